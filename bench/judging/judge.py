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
from gpulayers.bench.cases.case import Case
from gpulayers.bench.cases.providers import Function, Other, Theirs
from torch import Tensor

from gpulayers import arrays, dispatch, transfer
from gpulayers.arrays import float32
from gpulayers.testing.tolerance import allowed, ulp

MOST_ELEMENTS = 1 << 20
MOST_FLOPS = 1 << 30
"""A definition computes this much on the CPU in no time; more is left to the device."""
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


class _Value:
    """The truth about one result (float64), and what the plain formula makes of it in the call's own dtype.

    plain: the formula's result, and a gradient's from dys that are a rounding away.
    """

    def __init__(self, name: str, truth: Tensor, plain: Sequence[Tensor]):
        self.name, self.truth, self.dtype = name, truth.reshape(-1), plain[0].dtype
        self.shape, self.largest, self.spread = truth.shape, 0.0, 0.0
        flat = [p.reshape(-1) for p in plain]
        for piece in _pieces(self.truth):
            t = self.truth[piece]
            finite = t.isfinite()
            self.largest = max(self.largest, _most(torch.where(finite, t.abs(), 0.0)))
            for p in flat:
                error = (p[piece].double() - t).abs()
                self.spread = max(self.spread, _most(torch.where(finite & error.isfinite(), error, 0.0)))

    def allowed(self, at: Tensor) -> np.ndarray:
        """The bound where the truth is ``at``."""
        return allowed(self.spread, self.largest, at.cpu().numpy(), arrays.from_torch_dtype(self.dtype))


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


class Results(NamedTuple):
    """What a provider gave for a call; updates follow the outputs."""

    forward: list[Tensor]
    recorded: list[Tensor]
    """The outputs of a forward that is followed by a backward."""
    grads: list[Tensor]


def results(case: Case, function: Function, inputs: Sequence[Any], dys: Sequence[Tensor]) -> Results:
    """Run a provider once without, once with gradients, as far as it serves that. Inputs are left as they are."""
    found = Results([], [], [])
    if "forward" in function.directions:
        given = _copied(case, inputs, everything=function.in_place)
        found.forward.extend([*function.forward(given), *_updated(case, given)])
    if case.wanted():
        given = _copied(case, inputs, everything=function.in_place)
        outputs, backward = function.record(given)
        found.grads.extend(backward(dys, False))
        found.recorded.extend([*outputs, *_updated(case, given)])
    return found


def judge(true: Truth, function: Function, found: Results, ours: bool) -> dict[str, Error]:
    """The error of each direction that the provider serves: its worst result's."""

    def worst(got: list[Tensor], values: list[_Value]) -> Error:
        if len(got) != len(values):
            return Error(math.inf, math.inf, math.inf, f"{len(got)} results where there are {len(values)}")
        judged = [_error(g, v if ours else _of_its_draw(true, v, g), true.rows) for g, v in zip(got, values)]
        return max(judged, key=lambda e: (e.times, e.ulp))

    directions = [d for d in function.directions if d in true.case.directions()]
    errors = {}
    if "forward" in directions:
        errors["forward"] = worst(found.forward, true.outputs)
    if true.case.wanted():
        same = errors and len(found.forward) == len(found.recorded) and all(map(_same, found.forward, found.recorded))
        recorded = errors["forward"] if same else worst(found.recorded, true.outputs)
        grads = worst(found.grads, true.grads)
        errors |= {"backward": grads, "both": max(recorded, grads, key=lambda e: (e.times, e.ulp))}
    return {d: errors[d] for d in directions}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


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
            case,
            dtype,
            inputs,
            dys,
            _run_definition,
            transfer.to_numpy,
            lambda y: transfer.numpy_to_torch(y).to(device),
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


def _pieces(x: Tensor) -> list[slice]:
    """So that what is compared needs little memory."""
    return [slice(start, start + _CHUNK) for start in range(0, max(1, x.numel()), _CHUNK)]


def _error(got: Tensor, value: _Value, rows: int | None) -> Error:
    got = got[:rows] if rows is not None else got
    if got.shape != value.shape or got.dtype != value.dtype:
        came = f"{value.name}: {got.dtype}{list(got.shape)} where {value.dtype}{list(value.shape)} is true"
        return Error(math.inf, math.inf, math.inf, came)
    flat, largest = got.detach().reshape(-1), value.largest
    worst, times, where = 0.0, 0.0, ""
    for piece in _pieces(flat):
        t, g = value.truth[piece], flat[piece].double()
        off = (g - t).abs()
        off = torch.where((g == t) | (g.isnan() & t.isnan()), 0.0, torch.nan_to_num(off, nan=math.inf))
        worst = max(worst, _most(off))
        found, at = _beyond(off, t, value)
        if found > times:
            i = piece.start + at
            place = tuple(int(k) for k in np.unravel_index(i, got.shape)) if got.shape else ()
            times = found
            where = f"{value.name} at {place}: got {float(flat[i]):.9g}, true {float(value.truth[i]):.9g}"
    unit = float(ulp(np.array(largest), arrays.from_torch_dtype(got.dtype)))
    return Error(worst / largest if largest else worst, worst and worst / unit, times, where)


def _most(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _beyond(off: Tensor, true: Tensor, value: _Value) -> tuple[float, int]:
    """(largest error in units of what is allowed there, its index).

    Only where an error is above what is allowed at 0 must the bound be looked at element by element.
    """
    if not off.numel():
        return 0.0, 0
    suspects = (off > float(value.allowed(true.new_zeros(())))).nonzero().reshape(-1)[: 1 << 20]
    if not len(suspects):
        at = int(off.argmax())
        return (float(off[at]) and float(off[at]) / float(value.allowed(true[at]))), at  # integers: nothing is allowed
    times = np.nan_to_num(off[suspects].cpu().numpy() / value.allowed(true[suspects]), nan=np.inf)
    at = int(times.argmax())
    return float(times[at]), int(suspects[at])
