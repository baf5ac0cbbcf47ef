"""A drop-in against torch's own: the same call on both, and what differs.

Each value is judged against torch's in float64 from the same inputs: an error up to the bound of ``tolerance.py`` is
allowed, where torch's own result in the same dtype takes the place of the plain formula. Where torch gives the very
same number it is right by definition. A value beyond the bound gets a second look, since torch may just have been lucky
there: E is then the largest error that torch makes on 32 neighbouring inputs (within a tenth), and at least what the
truth moves by when inputs move by one rounding of the dtype that sums are in. For float64, whose truth is torch's own,
torch's error is measured in float32 and scaled by the ratio of the two roundings, 2⁻²⁹. A gradient's E is at least what
rounding once costs at the largest dy: its terms are of that size, though they may cancel.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpulayers import transfer
from gpulayers.testing.tolerance import excess, ulp


def same_strides(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy with the strides of ``x``, its gaps and its overlaps, in its own or another dtype."""
    dtype = dtype or x.dtype
    if not x.numel() or x.is_contiguous():
        return x.detach().to(dtype, copy=True)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    fresh = torch.empty(span, dtype=dtype, device=x.device).as_strided(x.shape, x.stride())
    # One index of each overlapping element: what is expanded is written once.
    one = tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())
    fresh[one] = x.detach()[one].to(dtype)
    return fresh


compared = 0
"""Calls that this process compared."""


class Outcome:
    """What a call gave: outputs, gradients of its inputs, gradients of its parameters, buffers, or an error."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.error: Exception | None = None


Wanted = bool | Sequence[bool]
"""Whether gradients are wanted: of all floating-point inputs, or input by input."""


Dys = Callable[[Sequence[Any]], Sequence[Any]] | Sequence[Any] | None
"""Gradients of the outputs, or what makes them of the outputs."""


def run(call: Callable, inputs: Sequence[Any], dys: Dys, grad: Wanted = True) -> Outcome:
    """``call(*inputs)``, then backward from ``dys``. ``call`` may be a module."""
    found = Outcome()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(found.values, call, inputs, dys, grad)
    except Exception as error:
        found.error = error
    return found


def _run(values: dict[str, Any], call: Callable, inputs: Sequence[Any], dys: Dys, grad: Wanted) -> None:
    flags = [grad] * len(inputs) if isinstance(grad, bool) else grad
    leaves = [x for x, want in zip(inputs, flags) if want and isinstance(x, Tensor) and x.is_floating_point()]
    for x in leaves:
        x.requires_grad_()
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for i, y in enumerate(outputs):
        values[f"output {i}"] = y.detach()
    dys = dys([y.detach() for y in outputs]) if callable(dys) else dys
    parameters = dict(call.named_parameters()) if isinstance(call, torch.nn.Module) else {}
    wanted = [y for y in outputs if y.requires_grad]
    if wanted and dys is not None:
        torch.autograd.backward(wanted, [dy for y, dy in zip(outputs, dys) if y.requires_grad])
    for i, x in enumerate(leaves):
        values[f"gradient of input {i}"] = x.grad
    for name, p in parameters.items():
        values[f"gradient of {name}"] = p.grad
    if isinstance(call, torch.nn.Module):
        for name, b in call.named_buffers():
            values[f"buffer {name}"] = b.detach()


def check_torch(
    ours: Callable, theirs: Callable, inputs: Sequence[Any], *, grad: Wanted = True, dy: Callable | None = None
) -> list[str]:
    """What differs between two functions or modules on these inputs; empty if nothing does.

    Modules must have equal weights and be in the dtype of the inputs. dy: makes a gradient like an output (random and
    strided by default).
    """
    global compared
    compared += 1
    make = dy or _strided_like
    mine, its, twice = (_inputs(inputs), _inputs(inputs), _inputs(inputs, torch.float64))
    truth_call = _in(torch.float64, theirs)
    dys: list[Tensor] = []

    def made(outputs: Sequence[Any]) -> list:
        dys.extend(map(make, outputs))
        return _inputs(dys)

    b = run(_as_it_was(theirs), its, made, grad)
    a = run(ours, mine, _inputs(dys) if dys else None, grad)
    if b.error is not None:
        return _same_error(a, b.error)
    if a.error is not None:
        return [f"raises {type(a.error).__name__}: {a.error}"]
    truth = run(_as_it_was(truth_call), twice, _inputs(dys, torch.float64), grad)
    look = functools.cache(lambda: _neighbours(theirs, truth_call, inputs, dys, grad, truth.values))
    complaints = []
    for i, before in enumerate(inputs):
        if not _equal(mine[i], before) and _equal(its[i], before):
            complaints.append(f"input {i} was changed")
        elif not _equal(its[i], before):  # updated in place
            complaints += _differs(f"input {i} afterwards", mine[i].detach(), its[i].detach(), twice[i].detach(), look)
    for name in b.values:
        complaints += _differs(name, a.values[name], b.values[name], truth.values.get(name), look)
    return complaints


def _in(dtype: torch.dtype, call: Callable) -> Callable:
    """With weights and statistics of this dtype, where it has any."""
    if not isinstance(call, torch.nn.Module) or not [*call.parameters(), *call.buffers()]:
        return call
    return copy.deepcopy(call).to(dtype)


def _as_it_was(call: Callable) -> Callable:
    """For one more run: a copy of a module that keeps statistics; without them it is itself, and forgets its gradients."""
    if not isinstance(call, torch.nn.Module) or next(call.buffers(), None) is not None:
        return copy.deepcopy(call)
    call.zero_grad()
    return call


_DRAWS = 32


def _neighbours(
    theirs: Callable, truth_call: Callable, inputs: Sequence[Any], dys: Sequence[Any], grad: Wanted, truth: dict
) -> list[dict[str, np.ndarray]]:
    """What torch is off by, value by value, on inputs and dys near these; and what ``truth`` moves by."""
    generator = torch.Generator().manual_seed(0)
    double = any(isinstance(x, Tensor) and x.dtype is torch.float64 for x in inputs)
    rough = _in(torch.float32, theirs) if double else theirs
    found, n = [], len(inputs)
    there = _inputs([*inputs, *dys], torch.float64)
    for _ in range(_DRAWS):
        near = [_near(x, generator) for x in (*inputs, *dys)]
        near = _inputs(near, torch.float32) if double else near
        wide = _inputs(near, torch.float64)
        plain = run(_as_it_was(rough), _inputs(near[:n]), _inputs(near[n:]), grad).values
        exact = run(_as_it_was(truth_call), wide[:n], wide[n:], grad).values
        found.append(_errors(plain, exact, 2.0**-29 if double else 1.0))
        close = [_near(x, generator, 2.0**-52 if double else 2.0**-23) for x in there]
        moved = run(_as_it_was(truth_call), close[:n], close[n:], grad).values
        found.append(_errors(moved, truth, 1.0))
    return [*found, _rounding(dys, found[0])]


def _errors(values: dict, truth: dict, scale: float) -> dict[str, np.ndarray]:
    with np.errstate(invalid="ignore"):  # Inf − Inf
        pairs = {k: (_numpy(v), _numpy(truth[k])) for k, v in values.items() if v is not None}
        return {k: (v.astype(np.float64) - t) * scale for k, (v, t) in pairs.items()}


def _rounding(dys: Sequence[Tensor], values: dict) -> dict[str, np.ndarray]:
    """For each gradient, what rounding once costs at the largest dy, in the dtype that sums are in."""
    finite = [dy[dy.isfinite()].abs().max().item() for dy in dys if dy.is_floating_point() and dy.isfinite().any()]
    largest = np.array(max(finite, default=0.0))
    wide = np.dtype(np.float64 if any(dy.dtype is torch.float64 for dy in dys) else np.float32)
    return {k: np.asarray(0.5 * ulp(largest, wide)) for k in values if k.startswith("gradient")}


def _near(x: Any, generator: torch.Generator, distance: float = 0.1) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    share = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (x.detach().double() * (1 + distance * share.to(x.device))).to(x.dtype)


def _inputs(inputs: Sequence[Any], dtype: torch.dtype | None = None) -> list:
    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return same_strides(x, dtype if x.is_floating_point() else None)

    return [*map(one, inputs)]


def _strided_like(y: Tensor) -> Tensor:
    wide = torch.randn((*y.shape, 2) if y.dim() else (2,), dtype=torch.float64).to(y.device, y.dtype)
    return wide[..., 0] if y.is_floating_point() else torch.zeros_like(y)


def _equal(x: Any, y: Any) -> bool:
    return not isinstance(x, Tensor) or torch.equal(torch.nan_to_num(x.detach()), torch.nan_to_num(y.detach()))


def _same_error(got: Outcome, error: Exception) -> list[str]:
    if got.error is None:
        return [f"torch raises {type(error).__name__} ({error}); it computes"]
    if not isinstance(got.error, type(error)):
        return [f"torch raises {type(error).__name__} ({error}); it raises {type(got.error).__name__} ({got.error})"]
    return []


def _differs(name: str, mine: Any, its: Any, truth: Any, look: Callable) -> list[str]:
    if its is None or mine is None:
        return [] if its is mine else [f"{name}: {'it has none' if mine is None else 'torch has none'}"]
    if mine.shape != its.shape or mine.dtype != its.dtype:
        return [f"{name}: {mine.dtype}{list(mine.shape)}, torch {its.dtype}{list(its.shape)}"]
    if not its.is_floating_point():
        return [] if torch.equal(mine, its) else [f"{name}: {mine}, torch {its}"]
    same = (mine == its) | (mine.isnan() & its.isnan())
    if bool(same.all()):
        return []
    got, plain, exact, agreed = map(_numpy, (mine, its, truth, same))
    # Where both give one number nothing is to be judged; elsewhere the truth is.
    judged = np.where(agreed, exact.astype(got.dtype), got)
    complaint = excess(judged, exact, plain)
    if complaint:
        complaint = excess(judged, exact, plain, [exact + e[name] for e in look() if name in e])
    return [f"{name}: {complaint}"] if complaint else []


def _numpy(x: Tensor) -> np.ndarray:
    return np.asarray(transfer.to_numpy(x.contiguous()))
