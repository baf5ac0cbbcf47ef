"""What each of two processes runs for test_torch_distributed.py: the example; a model of chains under DDP, as torch's own;
ops of DTensors; and a GPT divided in each way, resumed in another and by one process."""

import copy
import os
import pathlib
import runpy
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers.torch import functional
from gpulayers.torch._op import fallbacks

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SMALL = "--width 16 --layers 1 --heads 2 --context 8 --batch-size 4 --eps 1e-4 --quiet --save-every 2"
WHOLE, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
# function of tensors; shape of each, and how it is placed.
DTENSORS = {
    "linear, rows": (functional.linear, [((4, 3, 6), COLUMNS), ((5, 6), WHOLE), ((5,), WHOLE)]),
    "linear, columns": (functional.linear, [((4, 6), WHOLE), ((5, 6), ROWS), ((5,), ROWS)]),
    "linear, sums": (functional.linear, [((4, 6), COLUMNS), ((5, 6), COLUMNS), ((5,), WHOLE)]),
    "linear, uneven": (functional.linear, [((3, 6), ROWS), ((5, 6), WHOLE)]),
    "linears": (
        lambda x, *w: sum(gt.linear.linears(x, w[:2], w[2:])),
        [((4, 6), WHOLE), ((4, 6), ROWS), ((4, 6), ROWS), ((4,), WHOLE), ((4,), ROWS)],
    ),
    "layer_norm": (
        lambda x, w, b: functional.layer_norm(x, (6,), w, b),
        [((2, 4, 6), COLUMNS), ((6,), WHOLE), ((6,), WHOLE)],
    ),
    "rms_norm": (lambda x, w: functional.rms_norm(x, (6,), w), [((2, 5, 6), COLUMNS), ((6,), WHOLE)]),
    "softmax": (lambda x: functional.softmax(x, -1), [((4, 6), ROWS)]),
    "gelu": (functional.gelu, [((4, 6), COLUMNS)]),
    "embedding": (lambda w: functional.embedding(w.new_ones(2).long(), w), [((3, 6), COLUMNS)]),
}


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


def ops_of_dtensors():
    """What torch's functions give of whole tensors, and their gradients; what has no rule is torch's, with the reason."""
    mesh = init_device_mesh("cpu", (2,))
    for name, (function, inputs) in DTENSORS.items():
        whole = [torch.randn(shape, requires_grad=True) for shape, _ in inputs]
        parts = [distribute_tensor(t.detach(), mesh, [place]).requires_grad_() for t, (_, place) in zip(whole, inputs)]
        y, cut = function(*whole), function(*parts)
        dy = torch.randn_like(y)
        y.backward(dy)
        cut.backward(distribute_tensor(dy, mesh, [WHOLE]))
        for ours, theirs in zip((cut, *(t.grad for t in parts)), (y, *(t.grad for t in whole))):
            torch.testing.assert_close(ours.full_tensor(), theirs, msg=lambda text, name=name: f"{name}: {text}")
    x = distribute_tensor(torch.randn(4, 6), mesh, [COLUMNS])
    with gl.strict(False):
        torch.testing.assert_close(functional.softmax(x, -1).full_tensor(), x.full_tensor().softmax(-1))
    assert ("softmax", "no rule for DTensors cut so: [1]") in fallbacks


def layerwise_rates():
    """LARS and LAMB take the norms of whole DTensors, by torch's operations."""
    mesh, w, g = init_device_mesh("cpu", (2,)), torch.randn(6, 3), torch.randn(6, 3)
    for kind in (gt.optim.LARS, gt.optim.LAMB):
        cut, whole = nn.Parameter(distribute_tensor(w.clone(), mesh, [Shard(0)])), nn.Parameter(w.clone())
        cut.grad, whole.grad = distribute_tensor(g, mesh, [Shard(0)]), g
        with gl.strict(False):
            kind([cut], lr=0.5).step()
            kind([whole], lr=0.5).step()
        torch.testing.assert_close(cut.detach().full_tensor(), whole.detach(), rtol=1e-5, atol=1e-7)
        assert (kind.__name__, "a parameter's norm is that of no plain tensor") in fallbacks


def synchronised(rank):
    """Of parts that are not alike, one of them empty, too: what one process has of the whole batch."""
    for shapes, affine, last in (((3, 1), True, False), ((2, 4), False, True), ((5, 0), True, False)):
        whole = torch.randn(sum(shapes), 4, 3, 2, dtype=torch.float64)
        whole = whole.contiguous(memory_format=torch.channels_last) if last else whole
        dy = torch.randn_like(whole)
        ours = gt.SyncBatchNorm(4, affine=affine, momentum=None if last else 0.3).double()
        theirs = nn.BatchNorm2d(4, affine=affine, momentum=None if last else 0.3).double()
        part = slice(0, shapes[0]) if rank == 0 else slice(shapes[0], None)
        x, given = whole[part].clone().requires_grad_(), whole.clone().requires_grad_()
        if affine:
            nn.init.normal_(theirs.weight)
            nn.init.normal_(theirs.bias)
        ours.load_state_dict(theirs.state_dict())
        for _ in range(2):
            y, wanted = ours(x), theirs(given)
        y.backward(dy[part])
        wanted.backward(dy)
        torch.testing.assert_close((y, x.grad), (wanted[part], given.grad[part]))
        for mine, of in zip(ours.parameters(), theirs.parameters()):
            dist.all_reduce(mine.grad)
            torch.testing.assert_close(mine.grad, of.grad)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(whole)[part])


def gpt(rank, folder):
    """Each way's losses are those of one process, also from another's checkpoint: sums in other orders apart."""
    sys.path.insert(0, str(EXAMPLES))
    import train_gpt

    tokens, kept = train_gpt.language.read().train, ["--save", folder]

    model = train_gpt.GPT(width=16, layers=1, heads=2, context=8)
    gt.patch(model)
    train_gpt.cut(model, init_device_mesh("cpu", (2,)))
    with CommDebugMode() as counted:
        model.blocks[0](torch.ones(2, 8, 16, requires_grad=True)).sum().backward()
    sums = counted.get_comm_counts()[torch.ops.c10d_functional.all_reduce]
    assert sums == counted.get_total_counts() == 4, "two forward, two backward: that of q, k and v is one"

    def losses(text, *more):
        return train_gpt.train(train_gpt.arguments([*f"{SMALL} {text}".split(), *more]), tokens)

    by_ddp, by_fsdp = losses("--by ddp --steps 3"), losses("--by fsdp --checkpointing --steps 2", *kept)
    by_tensor = losses("--tensor 2 --steps 4 --resume", *kept)
    in_16 = losses("--by fsdp --precision bfloat16 --steps 2")
    dist.destroy_process_group()
    if rank == 0:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        alone = train_gpt.main(f"{SMALL} --steps 6".split())
        resumed = train_gpt.main([*f"{SMALL} --steps 6 --resume".split(), *kept])
        for name, found, at in (("DDP", by_ddp, 0), ("FSDP2", by_fsdp, 0), ("TP", by_tensor, 2), ("one", resumed, 4)):
            assert len(found) == {"DDP": 3}.get(name, 2), (name, found)
            torch.testing.assert_close(
                found, alone[at : at + len(found)], rtol=3e-6, atol=0, msg=f"{name}: {found} {alone}"
            )
        torch.testing.assert_close(in_16, alone[:2], rtol=2**-8, atol=0)
        print("GPT: the losses are one process's")


def main():
    runpy.run_path(str(EXAMPLES / "distributed.py"), run_name="__main__")
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
    print(f"chains: {report.fused}")
    ops_of_dtensors()
    layerwise_rates()
    synchronised(rank)
    gpt(rank, f"{sys.argv[1]}.checkpoints")


if __name__ == "__main__":
    main()
