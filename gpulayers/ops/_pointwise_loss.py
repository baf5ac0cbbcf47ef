"""Losses of one formula an element, and their mean or sum: one op for all of them. The formulas are in
``kernels/_pointwise_loss.py``."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, arranged, namespace, spec, up
from gpulayers.definition import ArgumentError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.kernels._pointwise_loss import LOSSES, Numbers, divisor
from gpulayers.ops._loss import REDUCTIONS
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape


def _require_reduction(loss: str, reduction: str) -> None:
    known = REDUCTIONS + (("batchmean",) if loss == "kl_div" else ())
    if reduction not in known:
        raise ArgumentError("reduction", f"one of {', '.join(known)}", repr(reduction))


def _require_target(x: Spec, target: Spec, integers: bool) -> None:
    require_shape("target", target, x.shape, "target.shape = x.shape")
    if target.dtype.kind not in "iu":
        require_same_dtype(x, target=target)
    elif not integers:
        raise UnsupportedTypeError("target", "target.dtype = x.dtype", target.dtype)


def _require_factor(name: str, x: Spec, factor: Spec | None) -> None:
    """A factor of each element: of a shape that x's gives room to."""
    if factor is None:
        return
    require_same_dtype(x, **{name: factor})
    pairs = zip(reversed(x.shape), reversed(factor.shape))
    if factor.ndim > x.ndim or any(None not in (n, f) and f != n and f != 1 for n, f in pairs):
        raise ShapeError(name, f"{name}.shape broadcasts to x.shape = {list(x.shape)}", list(factor.shape))


def pointwise_loss_rule(
    x: Spec,
    target: Spec,
    other: Spec | None = None,
    weight: Spec | None = None,
    pos_weight: Spec | None = None,
    *,
    needs: tuple = (),
    loss: str,
    number: float = 1.0,
    log: bool = False,
    full: bool = False,
    reduction: str = "mean",
) -> Rule:
    require_float("x", x)
    if loss not in LOSSES:
        raise ArgumentError("loss", f"one of {', '.join(LOSSES)}", repr(loss))
    how = LOSSES[loss]
    _require_reduction(loss, reduction)
    if how.least and not (number > how.least[0] or how.least == (number, True)):
        raise ShapeError("number", f"number {'≥' if how.least[1] else '>'} {how.least[0]:g} for {loss}", number)
    _require_target(x, target, how.integers)
    if (other is not None) != (how.third == "other") or (pos_weight is not None and how.third != "pos_weight"):
        names = "other" if other is not None or how.third == "other" else "pos_weight"
        raise ArgumentError(names, f"{names} where loss takes it, and only there", f"loss {loss!r}")
    if other is not None:
        require_same_dtype(x, other=other)
        require_shape("other", other, x.shape, "other.shape = x.shape")
    _require_factor("weight", x, weight)
    _require_factor("pos_weight", x, pos_weight)
    given = {"x": x, "target": target, "other": other, "weight": weight, "pos_weight": pos_weight}
    y = x.like() if reduction == "none" else Spec((), x.dtype)
    saved = {name: each for name, each in given.items() if each is not None} if needs else {}
    return Rule({"y": y}, saved, None, dict.fromkeys(("x", "target", "other"), x.like()))


def _check(x: np.ndarray, target: Any, other: Any = None, *_: Any, loss: str, **options: Any) -> None:
    for name, each in (("x", x), ("target", target)) if loss == "bce" else ():
        if (wrong := ~((each >= 0) & (each <= 1))).any():
            raise ShapeError(name, f"0 ≤ {name} ≤ 1 for bce", np.asarray(each)[wrong][0])
    if loss == "gaussian_nll" and (wrong := other < 0).any():
        raise ArgumentError("other", "other ≥ 0, the variance, for gaussian_nll", np.asarray(other)[wrong][0])


def _ready(x: Any, target: Any, third: Any) -> tuple[Any, Any, Any]:
    """In the dtype that is computed in."""
    v = up(x)
    return v, target.astype(v.dtype, copy=False), None if third is None else third.astype(v.dtype, copy=False)


def pointwise_loss_forward(
    x: Any,
    target: Any,
    other: Any = None,
    weight: Any = None,
    pos_weight: Any = None,
    *,
    needs: tuple = (),
    loss: str,
    number: float = 1.0,
    log: bool = False,
    full: bool = False,
    reduction: str = "mean",
) -> tuple[tuple, dict]:
    """weight · f(x, t), t the target: the elements' "mean", their "sum", or with reduction "none" each one.

    x, target, other: one shape and dtype, float; targets that are labels or counts may be integers. weight, pos_weight: of
    x's dtype, and of a shape that broadcasts to x's; they have no gradient. f by ``loss``:

    - bce: −t max(log x, −100) − (1 − t) max(log(1 − x), −100)
    - bce_with_logits: (1 − t) x + (1 + (pos_weight − 1) t) log(1 + exp(−x))
    - kl_div: t (log t − x), or with ``log``, where the target is a logarithm, exp(t) (t − x)
    - l1: |x − t|
    - smooth_l1: d² / (2 number) where d = |x − t| < number, else d − number / 2
    - huber: d² / 2 where d = |x − t| < number, else number (d − number / 2)
    - poisson_nll: x − t log(x + number), or with ``log`` exp(x) − t x; ``full`` adds Stirling's approximation of log t!
    - gaussian_nll: (log v + (x − t)² / v) / 2 with the variance v = max(other, number); ``full`` adds log(2π) / 2. The
      gradient by other is that by v
    - hinge_embedding: x where t = 1, max(number − x, 0) where t = −1
    - margin_ranking: max(number − t (x − other), 0)
    - soft_margin: log(1 + exp(−t x))

    Reduction "batchmean", of kl_div alone, divides the sum by x.shape[0]. The mean of nothing is NaN. Returns y in x's
    dtype: 0-dim, or x's shape and memory order. On the CPU it raises RuntimeError for x or targets of bce outside [0, 1], and
    ValueError for a negative variance; on a GPU these make NaN.
    """
    xp, how = namespace(x), LOSSES[loss]
    with np.errstate(all="ignore"):
        arrays = _ready(x, target, other if how.third == "other" else pos_weight)
        y = how.value(xp, *arrays, Numbers(number, log, full))
        y = y if weight is None else y * up(weight)
        if reduction == "none":
            y = arranged(xp.asarray(y).astype(x.dtype, copy=False), spec(x).like().order)
        else:
            by = divisor(x.shape, reduction)
            y = xp.asarray(y.sum() / by if by else xp.nan, dtype=x.dtype)
    given = {"x": x, "target": target, "other": other, "weight": weight, "pos_weight": pos_weight}
    return (xp.asarray(y),), {name: each for name, each in given.items() if each is not None} if needs else {}


def pointwise_loss_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    loss: str,
    number: float = 1.0,
    log: bool = False,
    full: bool = False,
    reduction: str = "mean",
) -> tuple:
    """dy · weight, divided by what the mean is, times the derivatives of f by x, target and other."""
    (dy,), x, how = dys, saved["x"], LOSSES[loss]
    xp = namespace(x)
    with np.errstate(all="ignore"):
        arrays = _ready(x, saved["target"], saved.get("other", saved.get("pos_weight")))
        slopes = how.slopes(xp, *arrays, Numbers(number, log, full))
        g = up(dy) / max(divisor(x.shape, reduction), 1)
        g = g if saved.get("weight") is None else g * up(saved["weight"])
        found = [slope * g if name in needs else None for name, slope in zip(("x", "target", "other"), slopes)]
        order = inputs[0].like().order
        grads = [None if f is None else arranged(xp.asarray(f).astype(x.dtype, copy=False), order) for f in found]
    return (*grads, None, None)


pointwise_loss = Op(
    pointwise_loss_rule,
    pointwise_loss_forward,
    pointwise_loss_backward,
    differentiable=("x", "target", "other"),
    check=_check,
    family="loss",
)
