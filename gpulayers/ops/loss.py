"""Losses: cross entropy, the negative log-likelihood, the mean squared error; and from files of their own, others."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import FLOATS, Spec, arranged, compute_dtype, namespace, spec, up
from gpulayers.definition import ArgumentError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops._ctc_loss import ctc_loss as ctc_loss
from gpulayers.ops._ctc_loss import ctc_loss_backward as ctc_loss_backward
from gpulayers.ops._ctc_loss import ctc_loss_forward as ctc_loss_forward
from gpulayers.ops._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from gpulayers.ops._linear_cross_entropy import linear_cross_entropy_backward as linear_cross_entropy_backward
from gpulayers.ops._linear_cross_entropy import linear_cross_entropy_forward as linear_cross_entropy_forward
from gpulayers.ops._loss import require_labels, require_reduction
from gpulayers.ops._multilabel_margin import multilabel_margin as multilabel_margin
from gpulayers.ops._multilabel_margin import multilabel_margin_backward as multilabel_margin_backward
from gpulayers.ops._multilabel_margin import multilabel_margin_forward as multilabel_margin_forward
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape
from gpulayers.ops._pointwise_loss import pointwise_loss as pointwise_loss
from gpulayers.ops._pointwise_loss import pointwise_loss_backward as pointwise_loss_backward
from gpulayers.ops._pointwise_loss import pointwise_loss_forward as pointwise_loss_forward
from gpulayers.ops._row_loss import row_loss as row_loss
from gpulayers.ops._row_loss import row_loss_backward as row_loss_backward
from gpulayers.ops._row_loss import row_loss_forward as row_loss_forward


def _reduced(loss: Any, share: Any, reduction: str) -> tuple[Any, Any]:
    """(the reduced loss, what a mean divides by or None). share: each sample's part of that; None: 1."""
    xp = namespace(loss)
    if reduction == "none":
        return arranged(xp.asarray(loss), None), None
    if reduction == "sum":
        return loss.sum(), None
    total = xp.asarray(loss.size if share is None else share.sum(), dtype=loss.dtype)
    return _divide(loss.sum(), total), total


def _divide(a: Any, by: Any) -> Any:
    """a / by, where 0 / 0 = NaN is what a mean over nothing is, and no cause for a warning."""
    xp = namespace(by)
    return xp.where(by == 0, a * xp.nan, a / xp.where(by == 0, xp.ones_like(by), by))


# --- samples and their classes ---------------------------------------------------------------------------------------


def _samples(x: Spec) -> tuple:
    """The shape of the samples of x: () for (C,), (N, *d) for (N, C, *d)."""
    return () if x.ndim == 1 else (x.shape[0], *x.shape[2:])


def _require_labels(x: Spec, target: Spec, kinds: str = "class indices (an integer dtype)") -> None:
    if target.dtype.kind not in "iu":
        raise UnsupportedTypeError("target", kinds, target.dtype)
    known = x.ndim > 1 and target.ndim and None not in (x.shape[0], target.shape[0])
    if known and x.shape[0] != target.shape[0]:
        raise ArgumentError(
            "target", "target.shape[0] = x.shape[0] = N", f"{list(target.shape)} with x {list(x.shape)}"
        )
    if x.ndim == target.ndim == 1:
        raise ArgumentError("target", "target.shape = () for x (C,)", list(target.shape))
    require_shape("target", target, _samples(x), "the shape of class indices = (N, *d) for x (N, C, *d), () for (C,)")


def _require_class_weight(x: Spec, weight: Spec | None) -> None:
    if weight is not None:
        require_same_dtype(x, weight=weight)
        require_shape("weight", weight, (x.shape[min(1, x.ndim - 1)],), "weight.shape = (C,)")


def _kept(x: Spec) -> Spec:
    """A dense spec of x's shape: channels-last where x is so, else row-major."""
    last = tuple([0, *range(2, x.ndim), 1])
    return Spec(x.shape, x.dtype, last if x.ndim > 2 and x.contiguous and x.order == last else None)


def _one_hot(target: Any, shape: tuple, kind: Any, ignore_index: int) -> tuple[Any, Any]:
    """(class indices as probabilities, 1 for each sample that counts), against x's axes; NaN for a wrong label."""
    xp, axis = namespace(target), min(1, len(shape) - 1)
    labels = xp.expand_dims(target, axis) if len(shape) > 1 else target.reshape(1)
    counts = (labels != ignore_index).astype(kind)
    indices = _along_classes(xp.arange(shape[axis]), len(shape))
    wrong = (counts != 0) & ((labels < 0) | (labels >= shape[axis]))
    return xp.where(wrong, xp.asarray(xp.nan, kind), (labels == indices).astype(kind) * counts), counts


def _along_classes(a: Any, ndim: int) -> Any:
    """One number a class, (C,), against the axes of an x of so many."""
    return a.reshape(-1, *[1] * (ndim - 2))


def _check_labels(
    x: np.ndarray, target: np.ndarray, weight: Any = None, *, ignore_index: int = -100, **options: Any
) -> None:
    """Raises LabelError for a wrong label; targets that are probabilities have none."""
    if target.dtype not in FLOATS:
        require_labels(target, x.shape[min(1, x.ndim - 1)], ignore_index)


# --- cross entropy ---------------------------------------------------------------------------------------------------


def cross_entropy_rule(
    x: Spec,
    target: Spec,
    weight: Spec | None = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Rule:
    require_float("x", x)
    require_reduction(reduction)
    if x.ndim == 0:
        raise ShapeError("x", "x.shape = (C,) or (N, C, *d)", [])
    samples = _samples(x)
    probabilities = target.dtype in FLOATS
    if probabilities:
        require_shape("target", target, x.shape, "the shape of class probabilities = x.shape")
        require_same_dtype(x, target=target)
        if ignore_index >= 0:
            raise ShapeError("ignore_index", "ignore_index < 0 (not used) for class probabilities", ignore_index)
    else:
        _require_labels(x, target, "class indices (an integer dtype) or probabilities of x.dtype")
    _require_class_weight(x, weight)
    work = compute_dtype(x.dtype)
    saved = {"x": x, "target": target} | ({} if weight is None else {"weight": weight})
    saved |= {"lse": Spec(samples, work), "mass": Spec(samples, work)}
    if reduction == "mean" and not probabilities:
        saved["total"] = Spec((), work)
    y = Spec(samples if reduction == "none" else (), x.dtype)
    return Rule({"y": y}, saved if needs else {}, None, {"x": _kept(x), "target": _kept(target)})


def _cross_entropy_guard(*inputs: Any, label_smoothing: float = 0.0, **_: Any) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ShapeError("label_smoothing", "0 ≤ label_smoothing ≤ 1", label_smoothing)


def _wanted(x: Any, target: Any, weight: Any, ignore_index: int, label_smoothing: float) -> tuple[Any, Any, Any]:
    """(q, which of q's elements count, each sample's share of a mean), against x's axes.

    The loss is −Σ q log softmax(x) over the classes that count. q = weight · ((1 − ε) p + ε / C), where p is the
    target's distribution and ε the label smoothing.
    """
    xp, axis = namespace(x), min(1, x.ndim - 1)
    w = 1 if weight is None else _along_classes(weight, x.ndim)
    smooth = label_smoothing / max(x.shape[axis], 1)
    if target.dtype in FLOATS:
        return w * (target * (1 - label_smoothing) + smooth), xp.ones((), bool), None
    hot, counts = _one_hot(target, x.shape, x.dtype, ignore_index)
    counted, none = (counts if label_smoothing else hot) != 0, xp.zeros((), x.dtype)
    q = xp.where(counted, w * (hot * (1 - label_smoothing) + smooth * counts), none)  # other weights may be infinite
    return q, counted, xp.where(hot != 0, w * hot, none).sum(axis)


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
    y, total = _reduced(loss, share, reduction)
    if total is not None and share is not None:
        saved["total"] = total
    return (xp.asarray(y, dtype=x.dtype),), saved if needs else {}


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
        w = 1 if weight is None else _along_classes(weight, x.ndim)
        dp = -s * (1 - label_smoothing) * w * log_y
        dp = arranged(dp.astype(target.dtype, copy=False), _kept(spec(target)).order)
    return dx, dp, None


cross_entropy = Op(
    cross_entropy_rule,
    cross_entropy_forward,
    cross_entropy_backward,
    differentiable=("x", "target"),
    check=_check_labels,
    dynamic=("label_smoothing",),
    guard=_cross_entropy_guard,
)


# --- negative log-likelihood -----------------------------------------------------------------------------------------


def nll_loss_rule(
    x: Spec,
    target: Spec,
    weight: Spec | None = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Rule:
    require_float("x", x)
    require_reduction(reduction)
    if x.ndim == 0:
        raise ArgumentError("x", "x.shape = (C,) or (N, C, *d)", [])
    samples = _samples(x)
    _require_labels(x, target)
    _require_class_weight(x, weight)
    saved = {"target": target} | ({} if weight is None else {"weight": weight})
    saved |= {"total": Spec((), compute_dtype(x.dtype))} if reduction == "mean" else {}
    y = Spec(samples if reduction == "none" else (), x.dtype)
    return Rule({"y": y}, saved if needs else {}, None, {"x": _kept(x)})


def _picked(target: Any, weight: Any, shape: tuple, kind: Any, ignore_index: int) -> tuple[Any, Any]:
    """(where each sample's class is, that class's weight there and 0 elsewhere), against x's axes."""
    xp = namespace(target)
    hot, _ = _one_hot(target, shape, kind, ignore_index)
    here = hot != 0
    return here, hot if weight is None else xp.where(
        here, hot * _along_classes(up(weight), len(shape)), xp.zeros((), kind)
    )


def nll_loss_forward(
    x: Any,
    target: Any,
    weight: Any = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[tuple, dict]:
    """−weight[target] · x[target] for each sample.

    x: (C,) or (N, C, *d), float: log-probabilities. target: classes, integers (N, *d). weight: (C,), of x's dtype: a
    factor for each class. A target of ignore_index has loss 0. reduction: "mean" divides the sum by Σ weight[target]
    over the targets that are not ignored, "sum", or "none" for one loss a sample. Returns y in x's dtype: 0-dim, or
    (N, *d). Saves no array of x's size. Raises LabelError for a label out of range on the CPU; on a GPU it makes NaN.
    """
    xp, axis, v = namespace(x), min(1, x.ndim - 1), up(x)
    here, w = _picked(target, weight, x.shape, v.dtype, ignore_index)
    loss = -(w * xp.where(here, v, xp.zeros((), v.dtype))).sum(axis)
    y, total = _reduced(loss, w.sum(axis), reduction)
    saved = {"target": target} | ({} if weight is None else {"weight": weight})
    return (xp.asarray(y, dtype=x.dtype),), (saved | ({} if total is None else {"total": total}) if needs else {})


def nll_loss_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, ignore_index: int = -100, reduction: str = "mean"
) -> tuple:
    """dx = −weight[target] · dy at the target, divided by the mean's denominator; 0 elsewhere and if ignored."""
    (dy,), (x, *_), weight = dys, inputs, saved.get("weight")
    xp, s = namespace(dy), up(dy)
    if reduction == "mean":
        s = _divide(s, saved["total"])
    s = xp.expand_dims(s, min(1, x.ndim - 1)) if reduction == "none" else s
    here, w = _picked(saved["target"], weight, x.shape, s.dtype, ignore_index)
    dx = -w * xp.where(here, s, xp.zeros((), s.dtype))
    return arranged(dx.astype(x.dtype, copy=False), _kept(x).order), None, None


nll_loss = Op(nll_loss_rule, nll_loss_forward, nll_loss_backward, differentiable=("x",), check=_check_labels)


# --- mean squared error ----------------------------------------------------------------------------------------------


def mse_rule(x: Spec, target: Spec, *, needs: tuple = (), reduction: str = "mean") -> Rule:
    require_float("x", x)
    require_same_dtype(x, target=target)
    require_shape("target", target, x.shape, "target.shape = x.shape")
    require_reduction(reduction)
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
