"""What a training step of a patched model in channels_last needs: launches, bytes and flops, layer by layer.

Counted from the calls of its layers (their sizes come from a step on the device "meta", where nothing is computed), from what
``patch`` let run as one op, and from torch's own operations between them. A layer's bytes are what its kernels read and write
once each. Second stages of sums that are split are not counted as launches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from gpulayers.bench.models.kind import Kind
from gpulayers.kernels.triton._addresses import WRITTEN
from gpulayers.kernels.triton._conv import FEW_CHANNELS
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gpulayers.torch as gt

ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.GELU, nn.Sigmoid)


class Call(NamedTuple):
    """A layer was called: what for, in a patched model."""

    layer: nn.Module
    x: tuple[int, ...]
    y: tuple[int, ...]
    is_first: bool
    """Nobody wants dx."""
    act: bool = False
    """An activation is part of the same op."""
    add: bool = False
    """So is a residual."""
    lowered: bool = False
    """It writes 16 bits under autocast, where torch's norms have float32."""
    joined: bool = False
    """Its dx is the sum of what comes back to its input."""


class Part(NamedTuple):
    """Launches of one kind that a call makes."""

    kind: str
    launches: int
    nbytes: float
    flops: float = 0.0
    call: Call | None = None
    sums: int = 0
    """How many of the launches are sums that may be split, and then take a second stage."""


# --- one layer after the other ---------------------------------------------------------------------------------------


def _conv(c: Call, e: int) -> Iterator[Part]:
    layer: Any = c.layer
    x, y, w = math.prod(c.x), math.prod(c.y), layer.weight.numel()
    flops = 2.0 * y * w / c.y[1]
    # The tiles read an image of few channels from a copy with more of them; so the weights, and back.
    few = 2 if e == 2 and c.x[1] < FEW_CHANNELS and c.y[1] % 8 == 0 and layer.groups == 1 else 0
    kind = "depthwise" if layer.groups == c.x[1] > 1 else "conv"
    moved = (x + y + w) * e
    yield Part(f"{kind}, forward", 1 + few, moved + few * x * e, flops, c, 1)
    if not c.is_first:
        yield Part(f"{kind}, dx", 1, moved + c.joined * x * e, flops, c, 1)
    yield Part(f"{kind}, dweight", 1 + few, moved + few * x * e, flops, c, 1)
    if layer.bias is not None:
        yield Part("dbias", 1, y * e, sums=1)


def _linear(c: Call, e: int) -> Iterator[Part]:
    layer: Any = c.layer
    x, y, w = math.prod(c.x), math.prod(c.y), layer.weight.numel()
    flops, moved = 2.0 * y * c.x[-1], (x + y + w) * e
    yield Part("linear, forward", 1, moved + c.act * y * e, flops, sums=1)  # the activation's input is kept
    if not c.is_first:
        yield Part("linear, dx", 1, moved, flops, sums=1)
    yield Part("linear, dweight", 1, moved, flops, sums=1)
    if layer.bias is not None:
        yield Part("dbias", 1, (3 if c.act else 1) * y * e, sums=1)


def _batch_norm(c: Call, e: int) -> Iterator[Part]:
    n = math.prod(c.x) * e
    own = e != 2  # else the convolution before has taken the moments
    yield Part("batch norm, forward", 1 + own, (2 + own + c.add) * n)
    yield Part("batch norm, backward", 2, (2 + c.act) * n + (3 + c.act + c.add) * n)  # sums; dx


def _width(c: Call, e: int) -> int:
    """Bytes of a number that a norm reads and writes under autocast."""
    return e if c.lowered else 4


def _layer_norm(c: Call, e: int) -> Iterator[Part]:
    n = math.prod(c.x) * _width(c, e)
    yield Part("layer norm, forward", 1, 2 * n)
    yield Part("layer norm, backward", 2, 3 * n)  # dx, with shares of dweight and dbias; their sums


def _group_norm(c: Call, e: int) -> Iterator[Part]:
    n = math.prod(c.x) * _width(c, e)
    yield Part("group norm, forward", 2, 3 * n)  # moments; y
    yield Part("group norm, backward", 3, 5 * n)  # sums; dx; dweight and dbias


def _activation(c: Call, e: int) -> Iterator[Part]:
    n = math.prod(c.x) * e
    yield Part("activation", 2, 5 * n)


def _resampling(c: Call, e: int) -> Iterator[Part]:
    n = (math.prod(c.x) + math.prod(c.y)) * e
    yield Part("pooling, resizing", 2, 2 * n)


def _loss(c: Call, e: int) -> Iterator[Part]:
    n = math.prod(c.x) * 4
    yield Part("loss", 3, 3 * n)  # rows, their mean; dx


RULES: dict[type[nn.Module], Callable[[Call, int], Iterator[Part]]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    **dict.fromkeys(ACTIVATIONS, _activation),
    **dict.fromkeys((nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Upsample), _resampling),
    **dict.fromkeys((nn.CrossEntropyLoss, nn.MSELoss), _loss),
    **dict.fromkeys((nn.Identity, nn.Flatten), lambda c, e: iter(())),
}


def _rule(layer: nn.Module) -> Any:
    return next((RULES[c] for c in type(layer).__mro__ if c in RULES), None)


UPDATES = {"SGD": (3, 5), "AdamW": (4, 7)}
"""(arrays of each parameter, how often a number of them is read or written)"""


def parts(kind: Kind, half: bool) -> list[Part]:
    """Of a step on a GPU, torch's own not among them. half: under autocast in bfloat16. Raises ValueError for a layer
    without a rule."""
    model, batch = kind.on_meta()
    if unknown := {type(m).__name__ for m in model.modules() if not any(m.children()) and _rule(m) is None}:
        raise ValueError(f"no rule says what a step needs of {', '.join(sorted(unknown))}")
    found = [part for call in calls(model, batch) for part in _rule(call.layer)(call, 2 if half else 4)]
    arrays, moved = UPDATES[kind.optimizer]
    sizes = [p.numel() for p in model.parameters()]
    tables = math.ceil(arrays * len(sizes) / WRITTEN)  # launches carry the arrays' addresses
    return [*found, Part("update", 1 + tables, 4 * moved * sum(sizes))]


def torchs(kind: Kind) -> list[Part]:
    """torch's own operations in a step under autocast in bfloat16, those that run in ours not among them."""
    model, batch = kind.on_meta()
    called, e = calls(model, batch), 2
    with _Own() as own:
        model(*batch).backward()
    ours = [3 * math.prod(c.y) for c in called if c.add]  # residuals, and what a linear layer's bias sums
    ours += [3 * math.prod(c.x) for c in called if c.joined]
    ours += [math.prod(c.y) + c.y[-1] for c in called if isinstance(c.layer, nn.Linear) and c.layer.bias is not None]
    moved, launches = sum(own.found) - sum(ours), len(own.found) - len(ours)
    found = [Part("torch: sums, products, copies", launches, moved * e)]
    for shape in own.attention:  # (N, H, T, D); backward in two launches
        n = math.prod(shape)
        found.append(Part("torch: attention", 3, 12 * n * e, 3.5 * 4.0 * n * shape[-2]))
    cast = [p.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters(False)]
    found.append(Part("torch: casts of weights and gradients", 2 * len(cast), 12 * sum(cast)))
    norms = [math.prod(c.x) for c in called if isinstance(c.layer, nn.LayerNorm | nn.GroupNorm) and not c.lowered]
    if norms:  # autocast has them in float32
        found.append(Part("torch: casts for norms", 4 * len(norms), 24 * sum(norms)))
    counters = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    return [*found, Part("torch: counters of batches", counters, 16.0 * counters)] if counters else found


# --- what is called --------------------------------------------------------------------------------------------------


def calls(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Call]:
    """Of the layers of a plain model, with what runs in one op once it is patched; what runs in another's is left out."""
    patched = copy.deepcopy(model)
    report = gt.patch(patched, fuse=True)
    rows = _rows(patched, report)
    found: list[Call] = []

    def watch(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def watched(layer: nn.Module, xs: tuple, y: Tensor) -> None:
            act, add, inside = rows.get(name, (False, False, False))
            if not inside:
                shapes, told = (tuple(xs[0].shape), tuple(y.shape)), (name in report.lowered, name in report.joined)
                found.append(Call(layer, *shapes, not xs[0].requires_grad, act, add, *told))

        return watched

    leaves = [(name, m) for name, m in model.named_modules() if next(m.children(), None) is None]
    hooks = [m.register_forward_hook(watch(name)) for name, m in leaves]
    with _Attended():
        model(*batch)
    for hook in hooks:
        hook.remove()
    return found


def _rows(model: nn.Module, report: gt.Report) -> dict[str, tuple[bool, bool, bool]]:
    """name → (an activation runs in its op, a residual does, it runs in another's op)"""
    found = {}
    for parent, rows in report.fused.items():
        inside = model.get_submodule(parent)
        for row in rows:
            words = [w for w in row.split(" → ") if w != "add"]
            layers = [w for w in words if not isinstance(getattr(inside, w, None), ACTIVATIONS)]
            kinds = len(layers) < len(words), "add" in row.split(" → "), False
            last = layers[-1]
            found[f"{parent}.{last}".removeprefix(".")] = kinds
            for act in {*words} - {*layers}:
                found[f"{parent}.{act}".removeprefix(".")] = (False, False, True)
    return found


class _Attend(torch.autograd.Function):
    """Stands for attention, whose operations depend on the device."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        return tuple([torch.empty_like(x) for x in ctx.saved_tensors])


class _Attended(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
            return _Attend.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Own(TorchDispatchMode):
    """Notes torch's own element-wise operations, sums and copies: the elements that each reads and writes."""

    NAMES = ("add", "add_", "mul", "cat", "sum", "copy_", "clone")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []
        self._attended = _Attended()
        self.attention = self._attended.shapes

    def __enter__(self) -> Any:
        self._attended.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attended.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.NAMES and y.dim():
            given = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
            self.found.append(sum(t.numel() for t in given) + y.numel())
        return y
