"""A GPT over bytes on many GPUs: DDP or FSDP2, tensor parallelism, and both, with the layers of gpulayers.torch.

    torchrun --standalone --nproc_per_node 8 examples/train_gpt.py --by fsdp --tensor 2 --precision bfloat16 \\
        --checkpointing --width 2048 --layers 24 --heads 16 --context 1024 --batch-size 64 --save run

Without GPUs it runs on gloo. A checkpoint (torch.distributed.checkpoint) is resumed by any number of processes and in any
way of dividing the model: the rows of a step depend on its number alone. In one process: the same without torchrun.
"""

import argparse
import contextlib
import os
import pathlib

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import parallel as tp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import language

VOCABULARY = 256


class Attention(nn.Module):
    """Causal, over as many heads as its weights have here."""

    def __init__(self, width, heads):
        super().__init__()
        self.size = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):  # (N, L, width) → (N, L, width)
        q, k, v = (y.unflatten(-1, (-1, self.size)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        return self.out(gt.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.act, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, *, width, layers, heads, context, checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x):  # (N, L) → (N, L, 256)
        x = self.tokens(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(self.norm(x))


# --- how a model is divided ---------------------------------------------------------------------------------------------


def cut(model, mesh):
    """Tensor parallelism: heads, and columns of the MLP, to each process; one sum after attention and one after the MLP."""
    # q, k and v of one DTensor: their gradients are added before they are summed over the processes.
    once = {"input_layouts": Replicate(), "desired_input_layouts": Replicate(), "use_local_output": False}
    for block in model.blocks:
        plan = {f"attention.{name}": tp.ColwiseParallel() for name in "qkv"}
        plan |= {"attention": tp.PrepareModuleInput(**once), "attention.out": tp.RowwiseParallel()}
        tp.parallelize_module(block, mesh, plan | {"up": tp.ColwiseParallel(), "down": tp.RowwiseParallel()})
    whole = tp.ColwiseParallel(output_layouts=Replicate())
    tp.parallelize_module(model, mesh, {"tokens": whole, "head": whole})


def divided(model, mesh, args):
    """What is called for the logits: its gradients are means over the processes that share the data."""
    if args.tensor > 1:
        cut(model, mesh["tensor"])
    if args.by == "ddp":
        return DistributedDataParallel(model, process_group=mesh["data"].get_group()) if args.tensor == 1 else model
    kept = getattr(torch, args.precision) if args.precision else None
    policy = MixedPrecisionPolicy(param_dtype=kept, reduce_dtype=torch.float32 if kept else None)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh["data"], mp_policy=policy)
    return model


def clip(params, most):
    """As ``nn.utils.clip_grad_norm_``, of DTensors and plain tensors together; nothing waits for the GPU."""
    grads = [p.grad for p in params if p.grad is not None]
    meshes = {}
    for g in grads:
        meshes.setdefault(getattr(g, "device_mesh", None), []).append(g)
    squares = [nn.utils.get_total_norm(each).square() for each in meshes.values()]
    squares = [s.full_tensor() if isinstance(s, DTensor) else s for s in squares]
    factor = (most / (sum(squares).sqrt() + 1e-6)).clamp(max=1.0)
    for g in grads:
        (g.to_local() if isinstance(g, DTensor) else g).mul_(factor)


# --- training -----------------------------------------------------------------------------------------------------------


def rows_of(step, tokens, args, part, parts):
    """This process's windows of a step's batch, and what comes after each of their tokens."""
    starts = np.random.default_rng([args.seed, step]).integers(len(tokens) - args.context, size=args.batch_size)
    mine = np.split(starts, parts)[part]
    rows = torch.from_numpy(np.stack([tokens[s : s + args.context + 1] for s in mine]).astype(np.int64))
    return rows[:, :-1].to(args.device), rows[:, 1:].to(args.device)


def train(args, tokens):
    """[mean loss of each step, in nats a byte], from the checkpoint on where ``args.resume``. Needs a process group."""
    world = dist.get_world_size()
    shape, kind = (world // args.tensor, args.tensor), args.device.partition(":")[0]
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "tensor"))
    part, parts = mesh.get_local_rank("data"), shape[0]
    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in ("width", "layers", "heads", "context", "checkpointing")}
    model = GPT(**sizes).to(args.device)
    report = gt.patch(model, fuse=True)
    whole = divided(model, mesh, args)
    optimizer = gt.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.1, eps=args.eps)
    done = load(args.save, model, optimizer) if args.resume else 0
    if dist.get_rank() == 0 and not args.quiet:
        print(report)
    dtype = getattr(torch, args.precision or "float32")
    losses, bar = [], tqdm(range(done, args.steps), disable=args.quiet or dist.get_rank() > 0, unit="step")
    for step in bar:
        x, y = rows_of(step, tokens, args, part, parts)
        optimizer.zero_grad()
        with torch.autocast(kind, dtype, enabled=args.precision is not None and args.by == "ddp"):
            logits = whole(x)
        loss = gt.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()
        clip([*model.parameters()], 1.0)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=mesh["data"].get_group())
        losses.append(mean / parts)
        if step % 10 == 9:  # reading it waits for the GPU
            bar.set_postfix(loss=f"{losses[-1].item():.3f}")
        if args.save and (step + 1 == args.steps or (step + 1) % args.save_every == 0):
            save(args.save, model, optimizer, step + 1)
    return [loss.item() for loss in losses]


def save(folder, model, optimizer, step):
    """Each process writes its part. A checkpoint is whole when its .metadata is there."""
    weights, state = get_state_dict(model, optimizer)
    path = pathlib.Path(folder) / f"step-{step:08d}"
    dcp.save({"model": weights, "optimizer": state, "step": step}, checkpoint_id=path)


def load(folder, model, optimizer):
    """The steps that were done before the last whole checkpoint."""
    last = max(pathlib.Path(folder).glob("step-*/.metadata"), default=None)
    if last is None:
        return 0
    weights, state = get_state_dict(model, optimizer)
    kept = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(kept, checkpoint_id=last.parent)
    set_state_dict(model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])
    return kept["step"]


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=("ddp", "fsdp"), default="ddp", help="how processes share the data")
    parser.add_argument("--tensor", type=int, default=1, help="processes that share each layer")
    for name, default in (("width", 128), ("layers", 4), ("heads", 4), ("context", 128), ("batch-size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--eps", type=float, default=1e-8, help="AdamW's")
    parser.add_argument("--precision", choices=("bfloat16", "float16"), help="of the products; weights stay float32")
    parser.add_argument("--checkpointing", action="store_true", help="compute each block again in backward")
    parser.add_argument("--data", help="a file, or a folder; else the help topics of Python")
    parser.add_argument("--save", help="a folder for checkpoints")
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --save")
    parser.add_argument("--reserve", type=int, default=16, help="multiprocessors that stay free for NCCL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args(given)
    args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if world % args.tensor or args.heads % args.tensor or args.batch_size % (world // args.tensor):
        parser.error(
            "the rule is a --tensor that divides processes and --heads, and a --batch-size that the rest divides"
        )
    if args.by == "ddp" and args.tensor not in (1, world):
        parser.error("--by ddp with --tensor: the rule is all processes; --by fsdp takes both")
    if args.resume and not args.save:
        parser.error("--resume: the rule is a --save to go on from")
    return args


def main(given=None):
    """The losses of the steps that it made."""
    args = arguments(given)
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if args.device != "cpu":
        torch.cuda.set_device(args.device)
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if dist.get_world_size() > 1:
            stack.enter_context(gl.sms(reserve=args.reserve))
        losses = train(args, language.read(args.data).train)
        if dist.get_rank() == 0 and losses:
            print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} nats a byte in {len(losses)} steps")
        return losses


if __name__ == "__main__":
    main()
