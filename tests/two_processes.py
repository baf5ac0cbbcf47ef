"""What each of two processes runs for test_torch_distributed.py: the example; then a model of chains under DDP, as torch's own."""

import copy
import os
import pathlib
import runpy
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import gpulayers.torch as gt

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples/distributed.py"


class Chains(nn.Module):
    """Convolution → batch norm (+ residual) → activation, and group norm → activation; a layer without a gradient."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.norm, self.relu, self.act, self.last = (
            nn.GroupNorm(2, 8),
            nn.ReLU(inplace=True),
            nn.SiLU(),
            nn.Conv2d(8, 2, 1),
        )
        self.bn1.weight.requires_grad_(False)

    def forward(self, x):  # (N, 3, H, W) → (N, 2, H, W)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.last(self.act(self.norm(x)))


def trained(model, rank):
    """Gradients and buffers after three steps on this process's images."""
    whole = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer, generator = torch.optim.SGD(model.parameters(), 0.1), torch.Generator().manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        whole(torch.randn(2, 3, 5, 4, generator=generator)).square().mean().backward()
        optimizer.step()
    grads = {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return grads | {n: b.clone() for n, b in model.named_buffers()}


def main():
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = Chains()
    model = copy.deepcopy(plain)
    report = gt.patch(model, fuse=True)
    ours, theirs = trained(model, rank), trained(plain, rank)
    for name, wanted in theirs.items():
        torch.testing.assert_close(
            ours[name], wanted, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    others = [{n: torch.empty_like(t) for n, t in ours.items()} for _ in range(2)]
    for name, t in ours.items():
        if name.endswith(".grad"):  # each process has the mean of both
            dist.all_gather([each[name] for each in others], t)
            assert torch.equal(others[0][name], others[1][name]), name
    dist.destroy_process_group()
    print(f"chains: {report.fused}")


if __name__ == "__main__":
    main()
