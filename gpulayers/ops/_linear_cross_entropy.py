"""Cross entropy of a linear layer's outputs, which are never all there at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, compute_dtype, namespace, up
from gpulayers.definition import ArgumentError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops._loss import require_labels, require_reduction
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape


def linear_cross_entropy_rule(
    x: Spec,
    weight: Spec,
    target: Spec,
    bias: Spec | None = None,
    class_weight: Spec | None = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float = 0.0,
    wide: bool = False,
) -> Rule:
    require_float("x", x)
    if x.ndim == 0 or weight.ndim != 2:
        raise ShapeError("weight", "weight.shape = (C, D) for x (…, D)", f"{list(weight.shape)} with x {list(x.shape)}")
    classes, features = weight.shape
    work = compute_dtype(x.dtype)
    require_same_dtype(x, weight=weight, bias=bias)
    if class_weight is not None and class_weight.dtype != work:
        require_same_dtype(x, class_weight=class_weight)
    require_shape("x", x, (*x.shape[:-1], features), "x.shape = (…, D)")
    if target.dtype.kind not in "iu":
        raise UnsupportedTypeError("target", "class indices (an integer dtype)", target.dtype)
    require_shape("target", target, x.shape[:-1], "target.shape = x.shape[:-1]")
    for name, v in (("bias", bias), ("class_weight", class_weight)):
        if v is not None:
            require_shape(name, v, (classes,), f"{name}.shape = (C,)")
    require_reduction(reduction)
    if not 0 <= label_smoothing <= 1:
        raise ShapeError("label_smoothing", "0 ≤ label_smoothing ≤ 1", label_smoothing)
    if softcap < 0:
        raise ArgumentError("softcap", "softcap ≥ 0; 0: none", softcap)
    inputs = {"x": x, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    rows = {"x": Spec(x.shape, x.dtype), "weight": Spec(weight.shape, x.dtype), "bias": Spec((classes,), x.dtype)}
    saved = {n: s for n, s in inputs.items() if s is not None}
    if reduction != "none":
        saved |= {f"d{n}": s for n, s in rows.items() if n in needs}
    if reduction == "mean":
        saved["total"] = Spec((), work)
    y = Spec(target.shape if reduction == "none" else (), work if wide else x.dtype)
    return Rule({"y": y}, saved if needs else {}, None, {n: s for n, s in rows.items() if inputs[n] is not None})


def _check_labels(
    x: np.ndarray, weight: np.ndarray, target: np.ndarray, *others: Any, ignore_index: int = -100, **options: Any
) -> None:
    require_labels(target, weight.shape[0], ignore_index)


class _Losses:
    """What each of the samples (N,) loses, and how that changes with its logits."""

    def __init__(
        self, x: Any, weight: Any, target: Any, bias: Any, class_weight: Any, *,
        ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    ):  # fmt: skip
        xp = self.xp = namespace(x)
        self.rows, self.weight = up(x).reshape(-1, weight.shape[1]), up(weight)
        kind, classes, labels = self.rows.dtype, weight.shape[0], target.reshape(-1, 1)
        counts = labels != ignore_index
        wrong = counts & ((labels < 0) | (labels >= classes))
        one, none = xp.ones((), kind), xp.zeros((), kind)
        w = xp.ones((classes,), kind) if class_weight is None else up(class_weight)
        hit = counts & (labels == xp.arange(classes))
        self.share = xp.where(hit, w, none).sum(1) + xp.where(wrong[:, 0], xp.full((), xp.nan, kind), none)
        self.counts, self.z_loss = counts, z_loss
        q = xp.where(hit, w * (1 - label_smoothing), none) + xp.where(
            counts, w * (label_smoothing / max(classes, 1)), none
        )
        self.q = q + xp.where(wrong, xp.full((), xp.nan, kind), none)
        logits = self.rows @ self.weight.T
        logits = logits if bias is None else logits + up(bias)
        self.slope = one
        if softcap:
            bent = xp.tanh(logits / softcap)
            logits, self.slope = softcap * bent, 1 - bent * bent
        top = logits.max(1, keepdims=True) if classes else xp.zeros((labels.shape[0], 1), kind)
        lse = xp.log(xp.exp(logits - top).sum(1, keepdims=True)) + top
        each = xp.where(self.q != 0, self.q * (lse - logits), none).sum(1)
        self.loss = each + xp.where(counts[:, 0], z_loss * lse[:, 0] ** 2, none)
        self.logits, self.lse = logits, lse

    def gradients(self, scale: Any, needs: tuple) -> dict[str, Any]:
        """dx, dweight and dbias, by what each sample's loss counts: a number, or (N, 1)."""
        xp, none = self.xp, self.xp.zeros((), self.rows.dtype)
        mass = self.q.sum(1, keepdims=True) + 2 * self.z_loss * self.lse
        d = scale * (xp.exp(self.logits - self.lse) * mass - self.q) * self.slope
        d = xp.where(self.counts, d, none)
        found = {}
        if "x" in needs:
            found["dx"] = d @ self.weight
        if "weight" in needs:
            found["dweight"] = d.T @ self.rows
        if "bias" in needs:
            found["dbias"] = d.sum(0)
        return found


def _over(a: Any, total: Any) -> Any:
    """a / total; a mean over nothing is NaN."""
    xp = namespace(total)
    return xp.where(total == 0, xp.full((), xp.nan, total.dtype), a / xp.where(total == 0, xp.ones_like(total), total))


def linear_cross_entropy_forward(
    x: Any,
    weight: Any,
    target: Any,
    bias: Any = None,
    class_weight: Any = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float = 0.0,
    wide: bool = False,
) -> tuple[tuple, dict]:
    """Cross entropy of the logits x weightᵀ + bias; kernels make them for some tokens at a time, and their gradients with them.

    x: (…, D), weight: (C, D), bias and class_weight: (C,), float of one dtype, class_weight also float32 where that has 16
    bits. target: (…), classes. A loss is −Σ q log softmax(logits) + z_loss · (log Σ exp logits)², where
    q = class_weight ((1 − ε) p + ε / C), ε = label_smoothing, p is 1 at the target; logits are
    softcap · tanh(logits / softcap) where softcap > 0. A target of ignore_index has loss 0. reduction: "mean" divides the
    sum by Σ class_weight[target] over those that are not ignored, "sum", or "none".

    Returns y: 0-dim, or (…), in x's dtype; wide: in float32 where that has 16 bits. Saves the gradients of a sum of losses
    themselves, made in the same pass; backward multiplies them by dy and divides by what the mean does, so that those of
    many tokens do not vanish in float16. With reduction "none" backward computes the logits again. Raises LabelError for a
    label out of range on the CPU; on a GPU it makes NaN.
    """
    how: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
    }
    found = _Losses(x, weight, target, bias, class_weight, **how)
    xp, kind = found.xp, found.loss.dtype if wide else x.dtype
    given = {"x": x, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    saved = {n: a for n, a in given.items() if a is not None} if needs else {}
    if reduction == "none":
        return (found.loss.astype(kind).reshape(target.shape),), saved
    total = xp.asarray(found.share.sum() if reduction == "mean" else 1, dtype=found.loss.dtype)
    y = _over(found.loss.sum(), total)
    if needs:
        shapes = {"dx": x.shape, "dweight": weight.shape, "dbias": weight.shape[:1]}
        grads = found.gradients(_over(total, total), needs)
        saved |= {n: xp.ascontiguousarray(g.astype(x.dtype)).reshape(shapes[n]) for n, g in grads.items()}
        saved |= {"total": total} if reduction == "mean" else {}
    return (xp.asarray(y, dtype=kind),), saved


def linear_cross_entropy_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
    softcap: float,
    wide: bool = False,
) -> tuple:
    """dx = dlogits weight, dweight = dlogitsᵀ x, dbias = Σ dlogits, by dy; dlogits = (softmax (Σ q + 2 z_loss lse) − q)."""
    (dy,), kind, xp = dys, inputs[0].dtype, namespace(dys[0])
    if reduction == "none":
        given = [saved["x"], saved["weight"], saved["target"], saved.get("bias"), saved.get("class_weight")]
        how: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
        }
        grads = _Losses(*given, **how).gradients(up(dy).reshape(-1, 1), needs)
    else:
        total = saved.get("total", xp.ones((), up(dy).dtype))
        by = up(dy) / xp.where(total == 0, xp.ones_like(total), total)  # over nothing they are 0, or NaN already
        grads = {f"d{n}": up(saved[f"d{n}"]) * by for n in needs}
    named = [grads.get(f"d{n}") for n in ("x", "weight", "target", "bias", "class_weight")]
    return tuple(
        None if g is None else xp.ascontiguousarray(g.astype(kind, copy=False)).reshape(s.shape)
        for g, s in zip(named, inputs)
    )


linear_cross_entropy = Op(
    linear_cross_entropy_rule,
    linear_cross_entropy_forward,
    linear_cross_entropy_backward,
    differentiable=("x", "weight", "bias"),
    check=_check_labels,
    family="loss",
)
