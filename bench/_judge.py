"""Whether a result is right, and how far from the truth: against float64, for every case that is timed.

The truth of a small case is the op's definition in float64, computed on the CPU. A large one's is torch's own function
in float64 on the device (the definitions themselves are held against it by the tests); where the result depends on
random numbers, the definition's on the first rows. The bound is ``testing/tolerance.py``'s; the plain formula in it is
the same judge's, in the case's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gpulayers.bench._case import Case
from gpulayers.bench._providers import Function, Other, Theirs
from torch import Tensor

from gpulayers import arrays, dispatch
from gpulayers.arrays import float32
from gpulayers.testing.tolerance import allowed, ulp

MOST_ELEMENTS = 1 << 22
MOST_FLOPS = 1 << 33
"""A definition computes this much on the CPU within a second or two; ten times that is left to the device."""
OTHERS_TIMES = 100.0
"""Others are not held to our bound; this many times it is no rounding any more."""
_CHUNK = 1 << 24


class Error(NamedTuple):
    """How far a result is from the truth."""

    relative: float
    """The largest error over the largest true value."""
    ulp: float
    """The largest error in units of the last place of the largest true value."""
    times: float
    """The largest error over what the bound allows there; at most 1 is right."""
    where: str = ""
    """The worst element in words."""


class _Value(NamedTuple):
    name: str
    truth: Tensor
    """float64."""
    plain: list[Tensor]
    """The plain formula's, and a gradient's from dys that are a rounding away."""


class Truth(NamedTuple):
    """What a case's results must be, for given inputs and gradients of the outputs."""

    case: Case
    outputs: list[_Value]
    """Outputs, then what the op updates."""
    grads: list[_Value]
    rows: int | None
    """Of the first rows alone."""
    x: Tensor
    dys: list[Tensor]
    by: str


def truth(case: Case, dtype: np.dtype, inputs: Sequence[Any], dys: Sequence[Tensor]) -> Truth:
    """The truth about one call; inputs and dys are tensors of the device."""
    tf32 = dtype == float32 and allows_tf32(case)
    small = sum(x.numel() for x in arrays.lists(inputs)) <= MOST_ELEMENTS and case.flops <= MOST_FLOPS and not tf32
    rows = None
    if case.draws and not small:
        x = inputs[0]
        rows = max(1, min(len(x), MOST_ELEMENTS // max(1, x[0].numel())))
        inputs, dys = [x[:rows], *inputs[1:]], [dy[:rows] for dy in dys]
    judge = _by_definition if small or case.draws or case.torch is None else _by_torch
    outputs, grads = judge(case, dtype, inputs, dys)
    by = "definition" if judge is _by_definition else "torch"
    return Truth(case, outputs, grads, rows, arrays.lists(inputs)[0], list(dys), by)


def allows_tf32(case: Case) -> bool:
    """Whether torch's settings let this case use TF32 in float32, on a GPU."""
    if not case.tf32 or not torch.cuda.is_available():
        return False
    backend, operator = case.tf32.split(".")
    return getattr(getattr(torch.backends, backend), operator).fp32_precision == "tf32"


def results(case: Case, function: Function, inputs: Sequence[Any], dys: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What a provider gives for each direction that it serves; updates follow the outputs. Inputs are left as they are."""
    found = {}
    for direction in function.directions:
        given = _copied(case, inputs, everything=function.in_place)
        if direction == "forward":
            outputs = function.forward(given)
            found[direction] = [*outputs, *_updated(case, given)]
        elif case.wanted():
            outputs, backward = function.record(given)
            grads = backward(dys, False)
            found[direction] = grads if direction == "backward" else [*outputs, *_updated(case, given), *grads]
    return found


def judge(true: Truth, found: dict[str, list[Tensor]], ours: bool) -> dict[str, Error]:
    """The error of each direction: its worst result's."""
    errors = {}
    for direction, got in found.items():
        values = {"forward": true.outputs, "backward": true.grads, "both": [*true.outputs, *true.grads]}[direction]
        if len(got) != len(values):
            where = f"{len(got)} results where there are {len(values)}"
            errors[direction] = Error(math.inf, math.inf, math.inf, where)
            continue
        judged = [_error(g, v if ours else _of_its_draw(true, v, g), true.rows) for g, v in zip(got, values)]
        errors[direction] = max(judged, key=lambda e: (e.times, e.ulp))
    return errors


def _of_its_draw(true: Truth, value: _Value, got: Tensor) -> _Value:
    """Someone else's random numbers give other values: the nearest that some draw gives are the truth."""
    if not true.case.draws or true.case.nearest is None:
        return value
    of = true.x if any(value is v for v in true.outputs) else true.dys[0]
    nearest = true.case.nearest(got[: true.rows].double(), of.double(), true.x.double())
    return _Value(value.name, nearest, [nearest.to(got.dtype)])


# --- the judges ------------------------------------------------------------------------------------------------------


def _by_definition(case: Case, dtype: np.dtype, inputs: Sequence[Any], dys: Sequence[Tensor]) -> tuple:
    device = arrays.lists(inputs)[0].device
    with dispatch.only("definition"), np.errstate(all="ignore"):
        return _judged(
            case, dtype, inputs, dys, _run_definition, arrays.to_numpy, lambda y: arrays.numpy_to_torch(y).to(device)
        )


def _by_torch(case: Case, dtype: np.dtype, inputs: Sequence[Any], dys: Sequence[Tensor]) -> tuple:
    return _judged(case, dtype, inputs, dys, _run_torch, lambda x: x, lambda y: y)


def _judged(
    case: Case, dtype: np.dtype, inputs: Any, dys: Any, run: Callable, inward: Callable, outward: Callable
) -> tuple[list[_Value], list[_Value]]:
    """(outputs, gradients) of ``run``, which takes what ``inward`` makes of tensors and gives what ``outward`` takes."""

    def computed(xs: Sequence[Any], gradients: Sequence[Tensor]) -> tuple[list, list]:
        found = run(case, _each(inward, xs), _each(inward, gradients))
        return _each(outward, found[0]), _each(outward, found[1])

    outputs, grads = computed(_each(_wide, inputs), _each(_wide, dys))
    plain_outputs, plain_grads = computed(inputs, dys)
    # A dy that is a rounding of float32 away is the same dy in 16 bits.
    seeds = range(3) if dtype == float32 and grads else ()
    moved = [computed(inputs, [_moved(dy, seed) for dy in dys])[1] for seed in seeds]
    names = [*case.rule(dtype).outputs, *(n for n in case.op.inputs if n in case.op.updates)]
    names += names[-1:] * (len(outputs) - len(names))
    return (
        [_Value(n, t, [p]) for n, t, p in zip(names, outputs, plain_outputs)],
        [_Value(f"gradient of {n}", t, [p, *m]) for n, t, p, *m in zip(case.wanted(), grads, plain_grads, *moved)],
    )


def _run_definition(case: Case, inputs: Sequence[Any], dys: Sequence[Any]) -> tuple[list, list]:
    given = _copied(case, inputs)
    if not case.wanted():
        y = case.op(*given, **case.options)
        return [*(y if isinstance(y, tuple) else (y,)), *_updated(case, given)], []
    y, call = case.op.record(*given, needs=case.wanted(), **case.options)
    grads = [g for g in call.backward(*dys) if g is not None]
    return [*(y if isinstance(y, tuple) else (y,)), *_updated(case, given)], grads


def _run_torch(case: Case, inputs: Sequence[Any], dys: Sequence[Any]) -> tuple[list, list]:
    assert case.torch is not None
    function, given = Theirs(case, Other(case.torch)), _copied(case, inputs)
    if not case.wanted():
        outputs, grads = function.forward(given), []
    else:
        outputs, backward = function.record(given)
        grads = backward(dys, False)
    return [*outputs, *_updated(case, given)], grads


def _each(f: Callable, inputs: Sequence[Any]) -> list:
    return [None if x is None else _each(f, x) if isinstance(x, list | tuple) else f(x) for x in inputs]


def _wide(x: Tensor) -> Tensor:
    """In float64; integers stay."""
    return x.double() if x.is_floating_point() else x


def _moved(dy: Tensor, seed: int) -> Tensor:
    """``dy`` with each element one rounding up or down; mostly up, or a mean would not see it."""
    generator = torch.Generator(dy.device).manual_seed(seed)
    up = torch.randint(0, 4, dy.shape, generator=generator, device=dy.device).clamp_(max=1)
    return dy * (1 + (2 * up - 1) * torch.finfo(dy.dtype).eps)


def _copied(case: Case, inputs: Sequence[Any], everything: bool = False) -> list:
    """The inputs, those that the op updates as copies."""

    def copy(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) else x.copy()

    return [
        _each(copy, [x])[0] if everything or name in case.op.updates else x for name, x in zip(case.op.inputs, inputs)
    ]


def _updated(case: Case, inputs: Sequence[Any]) -> list:
    return arrays.lists([x for name, x in zip(case.op.inputs, inputs) if name in case.op.updates])


# --- the error -------------------------------------------------------------------------------------------------------


def _error(got: Tensor, value: _Value, rows: int | None) -> Error:
    """In pieces, so that what is compared needs little memory."""
    got = got[:rows] if rows is not None else got
    if got.shape != value.truth.shape or got.dtype != value.plain[0].dtype:
        came = (
            f"{value.name}: {got.dtype}{list(got.shape)} where {value.plain[0].dtype}{list(value.truth.shape)} is true"
        )
        return Error(math.inf, math.inf, math.inf, came)
    dtype = arrays.from_torch_dtype(got.dtype)
    flat, true = got.detach().reshape(-1), value.truth.reshape(-1)
    plain = [p.reshape(-1) for p in value.plain]
    pieces = range(0, max(1, flat.numel()), _CHUNK)
    largest = spread = 0.0
    for start in pieces:
        t = true[start : start + _CHUNK]
        finite = t.isfinite()
        largest = max(largest, _most(torch.where(finite, t.abs(), 0.0)))
        for p in plain:
            error = (p[start : start + _CHUNK].double() - t).abs()
            spread = max(spread, _most(torch.where(finite & error.isfinite(), error, 0.0)))
    worst, times, where = 0.0, 0.0, ""
    for start in pieces:
        t, g = true[start : start + _CHUNK], flat[start : start + _CHUNK].double()
        off = (g - t).abs()
        off = torch.where((g == t) | (g.isnan() & t.isnan()), 0.0, torch.nan_to_num(off, nan=math.inf))
        worst = max(worst, _most(off))
        found, at = _beyond(off, t, spread, largest, dtype)
        if found > times:
            i = start + at
            place = tuple(int(k) for k in np.unravel_index(i, got.shape)) if got.shape else ()
            times = found
            where = f"{value.name} at {place}: got {float(flat[i]):.9g}, true {float(true[i]):.9g}"
    unit = float(ulp(np.array(largest), dtype))
    return Error(worst / largest if largest else worst, worst / unit, times, where)


def _most(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _beyond(off: Tensor, true: Tensor, spread: float, largest: float, dtype: np.dtype) -> tuple[float, int]:
    """(largest error in units of what is allowed there, its index).

    Only where an error is above what is allowed at 0 must the bound be looked at element by element.
    """
    if not off.numel():
        return 0.0, 0
    least = float(allowed(spread, largest, np.zeros(()), dtype))
    suspects = (off > least).nonzero().reshape(-1)[: 1 << 20]
    if not len(suspects):
        at = int(off.argmax())
        return float(off[at]) / float(allowed(spread, largest, true[at].cpu().numpy(), dtype)), at
    limit = allowed(spread, largest, true[suspects].cpu().numpy(), dtype)
    times = np.nan_to_num(off[suspects].cpu().numpy() / limit, nan=np.inf)
    at = int(times.argmax())
    return float(times[at]), int(suspects[at])
