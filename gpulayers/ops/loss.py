"""Losses: cross entropy and the mean squared error."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import FLOATS, Spec, arranged, compute_dtype, namespace, spec, up
from gpulayers.ops._op import (
    ArgumentError,
    LabelError,
    Op,
    Rule,
    ShapeError,
    UnsupportedTypeError,
    require_float,
    require_same_dtype,
    require_shape,
)

REDUCTIONS = ("mean", "sum", "none")


def _require_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ArgumentError("reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))


# --- cross entropy ---------------------------------------------------------------------------------------------------


def _kept(x: Spec) -> Spec:
    """A dense spec of x's shape: channels-last where x is so, else row-major."""
    last = tuple([0, *range(2, x.ndim), 1])
    return Spec(x.shape, x.dtype, last if x.ndim > 2 and x.contiguous and x.order == last else None)


def cross_entropy_rule(
    x: Spec,
    target: Spec,
    weight: Spec | None = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Rule:
    require_float("x", x)
    _require_reduction(reduction)
    if x.ndim == 0:
        raise ShapeError("x", "x.shape = (C,) or (N, C, *d)", [])
    if not 0 <= label_smoothing <= 1:
        raise ShapeError("label_smoothing", "0 ≤ label_smoothing ≤ 1", label_smoothing)
    samples = () if x.ndim == 1 else (x.shape[0], *x.shape[2:])
    probabilities = target.dtype in FLOATS
    if probabilities:
        require_shape("target", target, x.shape, "the shape of class probabilities = x.shape")
        require_same_dtype(x, target=target)
        if ignore_index >= 0:
            raise ShapeError("ignore_index", "ignore_index < 0 (not used) for class probabilities", ignore_index)
    else:
        if target.dtype.kind not in "iu":
            raise UnsupportedTypeError(
                "target", "class indices (an integer dtype) or probabilities of x.dtype", target.dtype
            )
        known = x.ndim > 1 and target.ndim and None not in (x.shape[0], target.shape[0])
        if known and x.shape[0] != target.shape[0]:
            raise ArgumentError(
                "target", "target.shape[0] = x.shape[0] = N", f"{list(target.shape)} with x {list(x.shape)}"
            )
        require_shape("target", target, samples, "the shape of class indices = (N, *d) for x (N, C, *d), () for (C,)")
    if weight is not None:
        require_same_dtype(x, weight=weight)
        require_shape("weight", weight, (x.shape[min(1, x.ndim - 1)],), "weight.shape = (C,)")
    work = compute_dtype(x.dtype)
    saved = {"x": x, "target": target} | ({} if weight is None else {"weight": weight})
    saved |= {"lse": Spec(samples, work), "mass": Spec(samples, work)}
    if reduction == "mean" and not probabilities:
        saved["total"] = Spec((), work)
    y = Spec(samples if reduction == "none" else (), x.dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": float(label_smoothing), "reduction": reduction}
    return Rule({"y": y}, saved if needs else {}, options, {"x": _kept(x), "target": _kept(target)})


def _one_hot(x: Any, target: Any, ignore_index: int) -> tuple[Any, Any]:
    """(class indices as probabilities, 1 for each sample that counts), against x's axes; NaN for a wrong label."""
    xp, axis = namespace(x), min(1, x.ndim - 1)
    classes = x.shape[axis]
    labels = xp.expand_dims(target, axis) if x.ndim > 1 else target.reshape(1)
    counts = (labels != ignore_index).astype(x.dtype)
    indices = xp.arange(classes).reshape(-1, *[1] * (x.ndim - 1 - axis))
    wrong = (counts != 0) & ((labels < 0) | (labels >= classes))
    return xp.where(wrong, xp.asarray(xp.nan, x.dtype), (labels == indices).astype(x.dtype) * counts), counts


def _wanted(x: Any, target: Any, weight: Any, ignore_index: int, label_smoothing: float) -> tuple[Any, Any, Any]:
    """(q, which of q's elements count, each sample's share of a mean), against x's axes.

    The loss is −Σ q log softmax(x) over the classes that count. q = weight · ((1 − ε) p + ε / C), where p is the
    target's distribution and ε the label smoothing.
    """
    axis = min(1, x.ndim - 1)
    w = 1 if weight is None else weight.reshape(-1, *[1] * (x.ndim - 1 - axis))
    smooth = label_smoothing / max(x.shape[axis], 1)
    if target.dtype in FLOATS:
        return w * (target * (1 - label_smoothing) + smooth), True, None
    hot, counts = _one_hot(x, target, ignore_index)
    q = w * (hot * (1 - label_smoothing) + smooth * counts)
    return q, (counts if label_smoothing else hot) != 0, (w * hot).sum(axis)


def cross_entropy_forward(
    x: Any,
    target: Any,
    weight: Any = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[tuple, dict]:
    """−Σ q log softmax(x) over the classes for each sample, with q = weight ((1 − ε) p + ε / C), ε = label_smoothing.

    x: (C,) or (N, C, *d), float: logits. weight: (C,), of x's dtype: a factor for each class. target: the classes
    themselves, integers (N, *d), and p is 1 at the target; or their probabilities p, of x's shape and dtype.
    A target of ignore_index has loss 0. reduction: "mean" divides the sum by Σ weight[target] over the targets that
    are not ignored (for probabilities by the number of samples), "sum", or "none" for one loss a sample. Returns y in
    x's dtype: 0-dim, or (N, *d). Raises LabelError for a label out of range on the CPU; on a GPU it makes NaN.
    """
    xp, axis = namespace(x), min(1, x.ndim - 1)
    v = up(x)
    p = target if target.dtype not in FLOATS else up(target)
    q, counts, share = _wanted(v, p, None if weight is None else up(weight), ignore_index, label_smoothing)
    top = v.max(axis, keepdims=True) if v.shape[axis] else xp.zeros((), v.dtype)
    shifted = v - top
    log_total = xp.log(xp.exp(shifted).sum(axis, keepdims=True))
    loss = xp.where(counts, q * (log_total - shifted), xp.zeros((), v.dtype)).sum(axis)
    saved = {"x": x, "target": target} | ({} if weight is None else {"weight": weight})
    saved |= {"lse": arranged(xp.asarray((log_total + top).reshape(loss.shape)), None)}
    saved |= {"mass": arranged(xp.asarray(q.sum(axis), dtype=v.dtype), None)}
    y = arranged(xp.asarray(loss), None) if reduction == "none" else loss.sum()
    if reduction == "mean":
        total = xp.asarray(xp.asarray(loss.size, v.dtype) if share is None else share.sum(), dtype=v.dtype)
        y = _divide(y, total)
        if share is not None:
            saved["total"] = total
    return (xp.asarray(y, dtype=x.dtype),), saved if needs else {}


def _divide(a: Any, by: Any) -> Any:
    """a / by, where 0 / 0 = NaN is what a mean over nothing is, and no cause for a warning."""
    xp = namespace(by)
    return xp.where(by == 0, a * xp.nan, a / xp.where(by == 0, xp.ones_like(by), by))


def cross_entropy_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple:
    """With s = dy, divided by the mean's denominator: dx = s (softmax(x) Σ q − q); where the target is p,

    dp = −s (1 − ε) weight · log softmax(x).
    """
    (dy,), x, target, weight = dys, saved["x"], saved["target"], saved.get("weight")
    xp, axis = namespace(x), min(1, x.ndim - 1)
    v, weight = up(x), None if weight is None else up(weight)
    p = target if target.dtype not in FLOATS else up(target)
    s = up(dy)
    if reduction == "mean":
        s = _divide(s, saved.get("total", xp.asarray(saved["lse"].size, v.dtype)))
    s = xp.expand_dims(s, axis) if reduction == "none" else s
    log_y = v - xp.expand_dims(saved["lse"], axis)
    dx = dp = None
    if "x" in needs:
        q, _, _ = _wanted(v, p, weight, ignore_index, label_smoothing)
        if target.dtype not in FLOATS:  # an ignored sample has gradient 0, were the mean one over nothing
            s = xp.where(xp.expand_dims(target, axis) == ignore_index, xp.zeros((), v.dtype), s)
        dx = s * (xp.exp(log_y) * xp.expand_dims(saved["mass"], axis) - q)
        dx = arranged(dx.astype(x.dtype, copy=False), _kept(spec(x)).order)
    if "target" in needs and target.dtype in FLOATS:
        w = 1 if weight is None else weight.reshape(-1, *[1] * (x.ndim - 1 - axis))
        dp = -s * (1 - label_smoothing) * w * log_y
        dp = arranged(dp.astype(target.dtype, copy=False), _kept(spec(target)).order)
    return dx, dp, None


def cross_entropy_check(
    x: np.ndarray, target: np.ndarray, weight: Any = None, *, ignore_index: int = -100, **options: Any
) -> None:
    """Raises LabelError for a label outside [0, C) that is not ``ignore_index``."""
    if target.dtype in FLOATS:
        return
    classes = x.shape[min(1, x.ndim - 1)]
    wrong = (target < 0) | (target >= classes)
    if wrong.any() and (wrong := wrong & (target != ignore_index)).any():
        rule = f"0 ≤ target < C = {classes}, or target = ignore_index = {ignore_index}"
        raise LabelError("target", rule, np.asarray(target)[wrong][0])


cross_entropy = Op(
    cross_entropy_rule,
    cross_entropy_forward,
    cross_entropy_backward,
    differentiable=("x", "target"),
    check=cross_entropy_check,
)


# --- mean squared error ----------------------------------------------------------------------------------------------


def mse_rule(x: Spec, target: Spec, *, needs: tuple = (), reduction: str = "mean") -> Rule:
    require_float("x", x)
    require_same_dtype(x, target=target)
    require_shape("target", target, x.shape, "target.shape = x.shape")
    _require_reduction(reduction)
    y = x.like() if reduction == "none" else Spec((), x.dtype)
    return Rule({"y": y}, {"x": x, "target": target} if needs else {}, None, {"x": x.like(), "target": x.like()})


def mse_forward(x: Any, target: Any, *, needs: tuple = (), reduction: str = "mean") -> tuple[tuple, dict]:
    """y = (x − target)²: its "mean", its "sum", or with reduction "none" each one.

    x, target: one shape and dtype, float. Returns y in x's dtype: 0-dim, or x's shape and memory order. The mean of
    nothing is NaN. Raises ShapeError for other shapes (torch broadcasts, with a warning that it is seldom meant).
    """
    xp = namespace(x)
    d = up(x) - up(target)
    y = d * d
    if reduction == "none":
        y = arranged(y.astype(x.dtype, copy=False), spec(x).like().order)
    else:
        y = y.sum() / y.size if reduction == "mean" and y.size else y.sum()
        y = xp.asarray(xp.nan if reduction == "mean" and not d.size else y, dtype=x.dtype)
    return (xp.asarray(y),), {"x": x, "target": target} if needs else {}


def mse_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, reduction: str = "mean") -> tuple:
    """dx = 2 (x − target) dy, divided by the number of elements for a mean; dtarget = −dx."""
    (dy,), x, target = dys, saved["x"], saved["target"]
    scale = 2 / max(x.size, 1) if reduction == "mean" else 2
    dx = (up(x) - up(target)) * (up(dy) * scale)
    order = inputs[0].like().order
    grads = (dx if "x" in needs else None, -dx if "target" in needs else None)
    return tuple(
        None if g is None else arranged(namespace(x).asarray(g).astype(x.dtype, copy=False), order) for g in grads
    )


mse = Op(mse_rule, mse_forward, mse_backward)
