"""What launching costs on the host, without a GPU: drop-ins over a driver that does nothing, beside torch's own layers on
CPU tensors of a few numbers, both in the same run.

Absolute times are this machine's; what is held to a limit is a ratio to torch, or to torch's relu of 64 numbers.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from gpulayers.bench.measuring.host import forget
from gpulayers.bench.models.gpt import GPT
from gpulayers.bench.models.kind import Kind, NextToken, images, stepping, tokens
from gpulayers.bench.models.resnet import ResNet
from torch import Tensor

import gpulayers.torch as gt
from gpulayers import dispatch, launch
from gpulayers.testing.null_driver import null_driver, same_memory

LIMITS = {"one launch": 1.5, "linear": 1.3, "conv": 1.3, "norm": 2.0, "element-wise": 2.6, "AdamW": 0.45, "step": 1.2}
"""A tape of one launch, as a multiple of torch's relu of 64 numbers; chains of layers, forward and backward, and AdamW's
step of GPT-2's tensors (200 µs where torch's fused one takes 448), as multiples of torch's own; and so a training step of
GPT-2 and ResNet-50 patched."""
CHAIN = 20
ADAMW_TENSORS = 148
"""As many as GPT-2 has."""
TURNS = 60


class Subject(NamedTuple):
    """A drop-in and torch's layer for an op."""

    op: str
    make: Callable[[Any], Callable[..., Tensor]]
    """From ``gpulayers.torch`` or ``torch.nn``; for the first with the sizes below."""
    ours: tuple
    """Shape of x, as kernels of every kind serve it."""
    theirs: tuple
    """Of as few numbers as the layer takes."""
    limit: str = ""
    """Of a chain, which limit holds."""


def _activation(name: str, *args: Any) -> Callable[[Any], Any]:
    return lambda m: getattr(m, name)(*args)


ROWS, FEW, IMAGE, PIXELS = (128, 128), (2, 8), (2, 64, 8, 8), (1, 4, 4, 4)
_PLAIN = {
    "glu": ("GLU",), "prelu": ("PReLU",), "rrelu": ("RReLU",), "relu": ("ReLU",), "leaky_relu": ("LeakyReLU",),
    "relu6": ("ReLU6",), "hardtanh": ("Hardtanh",), "hardsigmoid": ("Hardsigmoid",), "hardswish": ("Hardswish",),
    "hardshrink": ("Hardshrink",), "softshrink": ("Softshrink",), "threshold": ("Threshold", 0.1, 0.0),
    "gelu": ("GELU",), "sigmoid": ("Sigmoid",), "logsigmoid": ("LogSigmoid",), "silu": ("SiLU",), "tanh": ("Tanh",),
    "tanhshrink": ("Tanhshrink",), "softsign": ("Softsign",), "softplus": ("Softplus",), "elu": ("ELU",),
    "celu": ("CELU",), "selu": ("SELU",), "mish": ("Mish",), "dropout": ("Dropout",), "softmax": ("Softmax", -1),
    "softmin": ("Softmin", -1), "log_softmax": ("LogSoftmax", -1),
}  # fmt: skip
_CHAINED = {"relu", "silu", "softmax"}
_CAST = {
    "linear",
    "conv",
    "conv_transpose",
    "conv_batch_norm",
    "layer_norm",
    "rms_norm",
    "add_layer_norm",
    "add_rms_norm",
    "prelu",
}
"""Layers whose weights have the dtype of x."""


def _width(m: Any, ours: int, theirs: int) -> int:
    return ours if m is gt else theirs


def _loss(name: str, target: Callable[[int], Tensor]) -> Callable[[Any], Any]:
    def make(m: Any) -> Any:
        loss, n = getattr(m, name)(), _width(m, *(s[0] for s in (ROWS, FEW)))
        goal = target(n)
        return lambda x: loss(x, goal.to(x.dtype).expand(x.shape) if goal.is_floating_point() else goal)

    return make


class _OfSum(nn.Module):
    """The norm of the sum of x and a residual, whose gradients are wanted, too."""

    def __init__(self, m: Any, norm: str):
        super().__init__()
        rows, width = (_width(m, *sizes) for sizes in zip(ROWS, FEW))
        self.residual, self.weight = nn.Parameter(torch.zeros(rows, width)), nn.Parameter(torch.ones(width))
        self.fused = getattr(m.functional, f"add_{norm}", None)
        self.norm = getattr(m.functional, norm)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None:
            return self.fused(x, self.residual, self.weight.shape, self.weight)[0]
        return self.norm(x + self.residual, self.weight.shape, self.weight)


def _of_sum(norm: str) -> Callable[[Any], Any]:
    return lambda m: _OfSum(m, norm)


class _OfSteps(nn.Module):
    """What a GRU gives at each step, from a state that is there."""

    def __init__(self, m: Any):
        super().__init__()
        width = _width(m, 64, 4)
        self.layer, self.start = m.GRU(width, width), nn.Buffer(torch.zeros(1, _width(m, 2, 1), width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.start)[0]


def _chain(m: Any) -> nn.Module:
    width = _width(m, *(s[1] for s in (IMAGE, PIXELS)))
    model = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    if m is gt:
        gt.patch(model, fuse=True, memory_format=torch.channels_last)
    return model


def _sampled(m: Any) -> Callable[[Tensor], Tensor]:
    n, dtype = _width(m, IMAGE[0], PIXELS[0]), torch.bfloat16 if m is gt else torch.float32
    grid = torch.zeros(n, 4, 4, 2, dtype=dtype)
    return lambda x: m.functional.grid_sample(x, grid, align_corners=False)


def _put_back(m: Any) -> Callable[[Tensor], Tensor]:
    layer, shape = m.MaxUnpool2d(2), IMAGE if m is gt else PIXELS
    places = torch.zeros(shape, dtype=torch.int64)
    return lambda x: layer(x, places)


def _attended(m: Any) -> Callable[[Tensor], Tensor]:
    attend = m.functional.scaled_dot_product_attention
    return lambda x: attend(x, x, x)


def _looked_up(name: str) -> Callable[[Any], Callable[[Tensor], Tensor]]:
    """Its x is the table."""

    def make(m: Any) -> Callable[[Tensor], Tensor]:
        indices = torch.arange(_width(m, 32, 2)).reshape(-1, 1)
        return lambda x: getattr(m.functional, name)(indices, x)

    return make


class _Turned(nn.Module):
    """A head of images' columns turned by their rows; torch's own functions for torch."""

    def __init__(self, m: Any):
        super().__init__()
        rows, width = IMAGE[2:] if m is gt else PIXELS[2:]
        self.cos, self.sin = torch.ones(rows, width // 2), torch.zeros(rows, width // 2)
        self.ours = m is gt

    def forward(self, x: Tensor) -> Tensor:
        if self.ours:
            return gt.functional.rotary(x, None, self.cos, self.sin)
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)


def _several(m: Any) -> Callable[[Tensor], Tensor]:
    """One of two products that share x."""
    width = _width(m, 128, 8)
    weights = torch.zeros(2, width, width, dtype=torch.bfloat16 if m is gt else torch.float32)
    if m is gt:
        return lambda x: gt.functional.linears(x, [*weights])[0]
    return lambda x: nn.functional.linear(x, weights[0])


def _of_logits(m: Any) -> Callable[[Tensor], Tensor]:
    rows, width = ROWS if m is gt else FEW
    weight = torch.zeros(8, width, dtype=torch.bfloat16 if m is gt else torch.float32)
    goal = torch.zeros(rows, dtype=torch.int64)
    unfused = lambda x: m.functional.cross_entropy(m.functional.linear(x, weight), goal)  # noqa: E731
    return (lambda x: m.functional.linear_cross_entropy(x, weight, goal)) if m is gt else unfused


def _listed(m: Any) -> Callable[[Tensor], Tensor]:
    loss, goal = m.MultiLabelMarginLoss(), torch.zeros(ROWS if m is gt else FEW, dtype=torch.int64)
    return lambda x: loss(x, goal)


def _aligned(m: Any) -> Callable[[Tensor], Tensor]:
    times, _ = ROWS if m is gt else FEW
    label, lengths, counts = (torch.full((1,), n) for n in (1, times, 1))
    return lambda x: m.functional.ctc_loss(x, label, lengths, counts)


def _of_halves(m: Any) -> Callable[[Tensor], Tensor]:
    if m is gt:
        return lambda x: gt.functional.swiglu(x)
    return lambda x: nn.functional.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]


def subjects() -> list[Subject]:
    """One for each op that is differentiable."""
    labels = lambda n: torch.zeros(n, dtype=torch.int64)  # noqa: E731
    found = [
        Subject(op, _activation(*how), ROWS, FEW, "element-wise" if op in _CHAINED else "")
        for op, how in _PLAIN.items()
    ]
    return [
        *found,
        Subject("attention", _attended, (2, 4, 64, 64), (1, 1, 2, 4)),
        Subject("linear", lambda m: m.Linear(*[_width(m, 128, 8)] * 2), ROWS, FEW, "linear"),
        Subject(
            "conv",
            lambda m: m.Conv2d(*[_width(m, 64, 4)] * 2, 3, padding=1, bias=False).to(memory_format=torch.channels_last),
            IMAGE, PIXELS, "conv",
        ),
        Subject("conv_transpose", lambda m: m.ConvTranspose2d(*[_width(m, 64, 4)] * 2, 2, 2, bias=False), IMAGE, PIXELS),
        Subject("matmul", lambda m: lambda x: (m.functional if m is gt else torch).matmul(x, x.detach().mT), ROWS, FEW),
        Subject("linears", _several, ROWS, FEW),
        Subject("gated", _of_halves, ROWS, FEW),
        Subject(
            "quick_gelu", lambda m: gt.activation.QuickGELU() if m is gt else lambda x: x * torch.sigmoid(1.702 * x), ROWS, FEW
        ),
        Subject("relu_squared", lambda m: gt.activation.ReLUSquared() if m is gt else lambda x: x.relu().square(), ROWS, FEW),
        Subject("recurrent", _OfSteps, (3, 2, 64), (2, 1, 4)),
        Subject("pairwise_distance", lambda m: lambda x: m.functional.pairwise_distance(x, x.detach()), ROWS, FEW),
        Subject("cosine_similarity", lambda m: lambda x: m.functional.cosine_similarity(x, x.detach(), -1), ROWS, FEW),
        Subject("normalize", lambda m: lambda x: m.functional.normalize(x, dim=-1), ROWS, FEW),
        Subject("pdist", lambda m: lambda x: m.functional.pdist(x), ROWS, FEW),
        Subject("rotary", _Turned, IMAGE, PIXELS),
        Subject("embedding", _looked_up("embedding"), (64, 128), (4, 8)),
        Subject("embedding_bag", _looked_up("embedding_bag"), (64, 128), (4, 8)),
        Subject("layer_norm", lambda m: m.LayerNorm(_width(m, 128, 8)), ROWS, FEW, "norm"),
        Subject("rms_norm", lambda m: m.RMSNorm(_width(m, 128, 8)), ROWS, FEW),
        Subject("add_layer_norm", _of_sum("layer_norm"), ROWS, FEW),
        Subject("add_rms_norm", _of_sum("rms_norm"), ROWS, FEW),
        Subject("batch_norm", lambda m: m.BatchNorm2d(_width(m, 64, 4)), IMAGE, PIXELS, "norm"),
        Subject("conv_batch_norm", _chain, IMAGE, PIXELS),
        Subject("cross_entropy", _loss("CrossEntropyLoss", labels), ROWS, FEW),
        Subject("linear_cross_entropy", _of_logits, ROWS, FEW),
        Subject("nll_loss", _loss("NLLLoss", labels), ROWS, FEW),
        Subject("pointwise_loss", _loss("BCEWithLogitsLoss", lambda n: torch.zeros(())), ROWS, FEW),
        Subject("ctc_loss", _aligned, ROWS, FEW),
        Subject("multilabel_margin", _listed, ROWS, FEW),
        Subject("row_loss", _loss("MultiLabelSoftMarginLoss", lambda n: torch.zeros(())), ROWS, FEW),
        Subject("mse", _loss("MSELoss", lambda n: torch.zeros(())), ROWS, FEW),
        Subject("pad", lambda m: m.ReflectionPad2d(1), IMAGE, PIXELS),
        Subject("max_pool", lambda m: m.MaxPool2d(2), IMAGE, PIXELS),
        Subject("avg_pool", lambda m: m.AvgPool2d(2), IMAGE, PIXELS),
        Subject("adaptive_avg_pool", lambda m: m.AdaptiveAvgPool2d(2), IMAGE, PIXELS),
        Subject("adaptive_max_pool", lambda m: m.AdaptiveMaxPool2d(2), IMAGE, PIXELS),
        Subject("fractional_max_pool", lambda m: m.FractionalMaxPool2d(2, output_ratio=0.5), IMAGE, PIXELS),
        Subject("max_unpool", _put_back, IMAGE, PIXELS),
        Subject("lp_pool", lambda m: m.LPPool2d(2, 2), IMAGE, PIXELS),
        Subject("group_norm", lambda m: m.GroupNorm(2, _width(m, 64, 4)), IMAGE, PIXELS),
        Subject("instance_norm", lambda m: m.InstanceNorm2d(_width(m, 64, 4)), IMAGE, PIXELS),
        Subject("local_response_norm", lambda m: m.LocalResponseNorm(3), IMAGE, PIXELS),
        Subject("interpolate", lambda m: m.Upsample(scale_factor=2, mode="bilinear"), IMAGE, PIXELS),
        Subject("grid_sample", _sampled, IMAGE, PIXELS),
        Subject("affine_grid", lambda m: lambda x: m.functional.affine_grid(x, (*x.shape[:2], 4, 4), False), (2, 2, 3), (1, 2, 3)),
        Subject("unfold", lambda m: m.Unfold(2), IMAGE, PIXELS),
        Subject("fold", lambda m: m.Fold((5, 5), 2), (2, 64, 16), (1, 4, 16)),
        Subject("pixel_shuffle", lambda m: m.PixelShuffle(2), IMAGE, PIXELS),
        Subject("pixel_unshuffle", lambda m: m.PixelUnshuffle(2), IMAGE, PIXELS),
        Subject("channel_shuffle", lambda m: m.ChannelShuffle(2), IMAGE, PIXELS),
    ]  # fmt: skip


# --- what is timed ---------------------------------------------------------------------------------------------------


def _x(shape: tuple, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, dtype=dtype)
    return (x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).requires_grad_()


def _parameters(layers: Iterable[Any]) -> list[Tensor]:
    return [p for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters()]


def _step(layers: Sequence[Any], x: Tensor) -> Callable[[], None]:
    """Forward and backward of layers in a row."""
    wanted = [x, *_parameters(layers)]

    def run() -> Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    dy = torch.ones_like(run())

    def step() -> None:
        run().backward(dy)
        for p in wanted:
            p.grad = None

    return step


def _without(layer: Any, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def least(calls: dict[str, Callable[[], Any]], n: int, turns: int = TURNS) -> dict[str, float]:
    """µs a call: the least of many short samples in turns, so that what else the machine does drops out."""
    best = dict.fromkeys(calls, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns + 1):
            for name, call in calls.items():
                begin = time.perf_counter()
                for _ in range(n):
                    call()
                if turn:
                    best[name] = min(best[name], (time.perf_counter() - begin) / n * 1e6)
            gc.collect(0)
    finally:
        gc.enable()
    return best


def _counted(call: Callable[[], Any]) -> tuple[int, int]:
    """(calls of Python's functions, of C's) that one call makes, its backward's included."""
    found = {"call": 0, "c_call": 0}

    def note(_: Any, event: str, __: Any) -> None:
        if event in found:
            found[event] += 1

    with torch.autograd.set_multithreading_enabled(False):
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
    return found["call"], found["c_call"] - 1  # setprofile's own


def _ready(*calls: Callable[[], Any]) -> None:
    for call in calls:
        for _ in range(4):
            call()


def _tapes() -> Iterator[tuple[str, Any]]:
    """(direction, tape) of the latest plan that has a backward."""
    plan = [p for p in dispatch._plans.values() if p.needs][-1]
    runs: list[tuple[str, Any]] = [("forward", plan.run_forward), ("backward", plan.run_backward)]
    yield from ((name, tape) for name, run in runs for kind in run._kinds() for tape in kind.tapes)


def measure(subject: Subject, driver: Any, turns: int = TURNS) -> dict[str, Any]:
    """A row: what a repeat of the op's calls costs. Raises RuntimeError where a call is not taped."""
    gc.collect()
    dispatch._plans.clear()
    forget()
    launch.forget()
    ours, theirs = subject.make(gt), subject.make(nn)
    ours = ours.bfloat16() if subject.op in _CAST else ours  # type: ignore[attr-defined]
    x, tx = _x(subject.ours, torch.bfloat16), _x(subject.theirs, torch.float32)
    step, torchs = _step([ours], x), _step([theirs], tx)
    with same_memory() as memory:
        _ready(step)
        memory.keep()
        before = driver.launches
        step()
        row: dict[str, Any] = {"launches": driver.launches - before, "allocations": len(memory.kept)}
    launch.forget()
    calls = {"step": step, "torch_step": torchs, "call": _without(ours, x), "torch_call": _without(theirs, tx)}
    _ready(*calls.values())
    if {name for name, _ in _tapes()} != {"forward", "backward"}:
        raise RuntimeError(f"{subject.op}: its calls are not taped")
    row["python_calls"], row["c_calls"] = _counted(step)
    row["torch_python_calls"], row["torch_c_calls"] = _counted(torchs)
    return row | {f"{name}_us": us for name, us in least(calls, 20, turns).items()}


def chain(subject: Subject, turns: int = TURNS) -> float:
    """A row of equal layers, forward and backward, as a multiple of torch's own."""

    def steps(m: Any, shape: tuple, dtype: torch.dtype) -> Callable[[], None]:
        one: Any = subject.make(m)
        one = one.to(dtype) if dtype is torch.bfloat16 and subject.op != "batch_norm" else one
        return _step([copy.deepcopy(one) for _ in range(CHAIN)], _x(shape, dtype))

    calls = {"ours": steps(gt, subject.ours, torch.bfloat16), "torch": steps(nn, subject.theirs, torch.float32)}
    _ready(*calls.values())
    found = least(calls, 2, turns)
    return found["ours"] / found["torch"]


MODELS = {
    "GPT-2": Kind(lambda: GPT(64, 64, 4, 12, 16), tokens(1, 8, 64), NextToken),
    "ResNet-50": Kind(lambda: ResNet((3, 4, 6, 3), 4, 10), images(1, 64, 10)),
}
"""Whole, but narrow."""


def training_steps(kind: Kind, turns: int = TURNS) -> dict[str, float]:
    """Forward, backward and AdamW of a patched model, and of one whose rows are fused too, as multiples of torch's own
    (with its fused AdamW)."""
    model, batch = kind.made()

    calls = {"torch": stepping(model, batch, torch.optim.AdamW(model.parameters(), fused=True))}
    for how, fuse in (("patched", False), ("fused", True)):
        patched = copy.deepcopy(model)
        gt.patch(patched, fuse=fuse)
        calls[how] = stepping(patched, batch, gt.optim.AdamW(patched.parameters()))
    _ready(*calls.values())
    found = least(calls, 1, turns)
    return {how: us / found["torch"] for how, us in found.items() if how != "torch"}


def _adamw(kind: Any, **options: Any) -> Callable[[], None]:
    params = [nn.Parameter(torch.randn(8, 8)) for _ in range(ADAMW_TENSORS)]
    optimizer = kind(params, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    return optimizer.step


def measured(turns: int = TURNS, only: Sequence[str] = ()) -> dict[str, Any]:
    """{"ops": rows, "limits": rows}; only: ops.

    Raises RuntimeError where a call is not taped, or the null driver cannot be had.
    """
    torch.set_num_threads(1)
    rows, limits = [], []
    ones, chosen = torch.ones(64), [s for s in subjects() if not only or s.op in only]
    with null_driver(compiled=False) as driver:
        for subject in chosen:
            rows.append({"op": subject.op, **measure(subject, driver, turns)})
            if subject.limit:
                limits.append(
                    _limit(f"{CHAIN} × {subject.op}, forward and backward", chain(subject, turns), subject.limit)
                )
        for name, kind in () if only else MODELS.items():
            steps = training_steps(kind, turns)
            limits += [_limit(f"a training step of {name}, narrow, {how}", r, "step") for how, r in steps.items()]
        x = torch.randn(8, 64, dtype=torch.bfloat16)
        _ready(_without(gt.ReLU(), x))
        plan = [p for p in dispatch._plans.values() if p.op.name == "relu" and not p.needs][-1]
        (tape,) = (t for kind in plan.run_forward._kinds() for t in kind.tapes)  # type: ignore[attr-defined]
        ours, theirs = _adamw(gt.optim.AdamW), _adamw(torch.optim.AdamW, fused=True)
        _ready(ours)
        found = least({"tape": lambda: tape(x), "relu": lambda: torch.relu(ones)}, 200, turns)
        adamw = least({"ours": ours}, 10, turns) | least({"torch": theirs}, 10, turns // 4)  # each in its own cache
    limits.append(_limit("one launch, of a relu of 64", found["tape"] / found["relu"], "one launch"))
    limits.append(_limit(f"AdamW of {ADAMW_TENSORS} tensors", adamw["ours"] / adamw["torch"], "AdamW"))
    yardsticks = {
        "relu_us": found["relu"],
        "tape_us": found["tape"],
        "adamw_us": adamw["ours"],
        "torch_adamw_us": adamw["torch"],
    }
    return {"yardsticks": yardsticks, "ops": rows, "limits": limits}


def _limit(what: str, ratio: float, limit: str) -> dict[str, Any]:
    return {"what": what, "ratio": ratio, "most": LIMITS[limit]}
