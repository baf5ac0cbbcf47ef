"""A patched model trained by two processes, with DDP and with FSDP2, is the model that one process trains.

    python -m torch.distributed.run --standalone --nproc_per_node 2 examples/distributed.py

It runs on the CPU (gloo). Each process takes its part of every batch, so the sums of the gradients are made in another
order, and the weights may differ by rounding: the bound is derived from what float32 costs in one process.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers.testing.tolerance import excess
from gpulayers.transfer import torch_to_numpy

STEPS, BATCH, LENGTH, WORDS, WIDTH = 10, 8, 6, 13, 16
RESERVED = 16
"""Multiprocessors of each GPU that stay free for NCCL, which sends gradients while backward still computes."""


class Block(nn.Module):
    """Attention to what came before, and an MLP: plain torch.nn."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.norm2(x))


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS))


def train(model, optimizer, rank=0, world=1):
    """Ten steps, on this process's part of each batch."""
    generator, loss_of = torch.Generator().manual_seed(1), gt.CrossEntropyLoss()
    for _ in range(STEPS):
        tokens = torch.randint(WORDS, (BATCH, LENGTH + 1), generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss_of(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def adamw(kind, model):
    # A larger eps: the keys' bias has no gradient but rounding, and AdamW's step would be the sign of it.
    return kind(model.parameters(), lr=3e-3, eps=1e-4)


def alone(dtype):
    """The weights after training in one process, by torch itself."""
    model = new_model().to(dtype)
    train(model, adamw(torch.optim.AdamW, model))
    return {name: p.detach() for name, p in model.named_parameters()}


def by_ddp(rank, world):
    model = new_model()
    report = gt.patch(model)
    train(DistributedDataParallel(model), adamw(gt.optim.AdamW, model), rank, world)
    return report, {name: p.detach() for name, p in model.named_parameters()}


def by_fsdp(rank, world):
    model, mesh = new_model(), init_device_mesh("cpu", (world,))
    report = gt.patch(model)
    for block in (model[1], model[2], model):
        fully_shard(block, mesh=mesh)
    train(model, adamw(gt.optim.AdamW, model), rank, world)
    return report, {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def main():
    if not dist.is_torchelastic_launched():
        sys.exit(__doc__)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    truth, plain = alone(torch.float64), alone(torch.float32)
    wrong = []
    for name, train_by in (("DDP", by_ddp), ("FSDP2", by_fsdp)):
        with gl.sms(reserve=RESERVED):  # nothing to a CPU
            report, weights = train_by(rank, world)
        largest = max((weights[n] - plain[n]).abs().max().item() for n in plain)
        for n in plain:
            problem = excess(*map(torch_to_numpy, (weights[n], truth[n], plain[n])))
            wrong += [f"{name}: {n}: {problem}"] if problem else []
        if rank == 0:
            print(f"{name}: {world} processes, {report!r}; largest difference of weights to one process {largest:.3g}")
    dist.destroy_process_group()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
