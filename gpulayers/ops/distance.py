"""Norms of rows and angles between them: distances of pairs, cosine similarity, rows of length 1."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, arranged, compute_dtype, namespace, up
from gpulayers.definition import ArgumentError, KindError, Rule, ShapeError
from gpulayers.ops._op import Op, normal_axis, require_float


def _norm_of(p: Any, n: Any = 1) -> float:
    """p, where the p-norm of ``n`` numbers is one that all backends know."""
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise KindError("p", "a number", repr(p))
    if not p >= 0:
        raise ArgumentError("p", "p ≥ 0", p)
    if p == math.inf and n == 0:
        raise ShapeError("x", "p = ∞ has no norm of no numbers; the axis is not empty", n)
    return float(p)


def _pair(x1: Spec, x2: Spec) -> None:
    require_float("x1", x1)
    if x2.shape != x1.shape or x2.dtype != x1.dtype:
        raise ShapeError("x2", "x2.shape, dtype = x1.shape, dtype", f"{x2} with x1 {x1}")


def _without(shape: tuple, axis: int) -> tuple:
    return shape[:axis] + shape[axis + 1 :]


def _signs(v: Any) -> Any:
    return (v > 0).astype(v.dtype) - (v < 0).astype(v.dtype)


def norms(v: Any, p: float, axis: int) -> Any:
    """The p-norms along ``axis``, which stays, of size 1; p = 0 counts what is not 0."""
    xp = namespace(v)
    if p == 0:
        return (v != 0).sum(axis, keepdims=True).astype(v.dtype)
    a = abs(v)
    if p == math.inf:
        return a.max(axis, keepdims=True)
    if p == 1:
        return a.sum(axis, keepdims=True)
    if p == 2:
        return xp.sqrt((a * a).sum(axis, keepdims=True))
    return (a**p).sum(axis, keepdims=True) ** (1 / p)


def slopes(v: Any, norm: Any, p: float, axis: int, shared: bool = True) -> Any:
    """∂norm/∂v, 0 where norm is; of p = ∞ the largest along ``axis`` share it, or each has all of it."""
    xp = namespace(v)
    if p == 0:
        return v * 0
    if p == 1:
        return _signs(v)
    if p == math.inf:
        largest = (abs(v) == abs(v).max(axis, keepdims=True)) | (v != v)
        share = largest.sum(axis, keepdims=True).astype(v.dtype) if shared else 1
        return _signs(v) * largest.astype(v.dtype) / share
    nothing = (norm == 0) | (v == 0)
    a, n = xp.where(nothing, v * 0 + 1, v), xp.where(norm == 0, norm + 1, norm)
    ratio = a / n if p == 2 else _signs(a) * (abs(a) / n) ** (p - 1)
    return xp.where(nothing, v * 0, ratio)


# --- pairwise distance -----------------------------------------------------------------------------------------------


def pairwise_distance_rule(x1: Spec, x2: Spec, *, needs: tuple = (), p: float = 2.0, eps: float = 1e-6) -> Rule:
    _pair(x1, x2)
    if x1.ndim < 1:
        raise ShapeError("x1", "one axis, or more", [])
    options = {"p": _norm_of(p, x1.shape[-1]), "eps": float(eps)}
    norm = Spec(x1.shape[:-1], compute_dtype(x1.dtype))
    saved = {"x1": x1, "x2": x2, "norm": norm} if needs else {}
    return Rule(
        {"y": Spec(x1.shape[:-1], x1.dtype)}, saved, options, {n: Spec(x1.shape, x1.dtype) for n in ("x1", "x2")}
    )


def pairwise_distance_forward(
    x1: Any, x2: Any, *, needs: tuple = (), p: float = 2.0, eps: float = 1e-6
) -> tuple[tuple, dict]:
    """y = ‖x1 − x2 + eps‖ₚ over the last axis.

    x1, x2: (…, N), of one float dtype. Returns y (…). p: a norm's, 0 to ∞; 0 counts differences. As
    ``torch.nn.functional.pairwise_distance``. Raises ShapeError.
    """
    norm = norms(up(x1) - up(x2) + eps, p, -1)[..., 0]
    return (norm.astype(x1.dtype),), {"x1": x1, "x2": x2, "norm": norm} if needs else {}


def pairwise_distance_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 2.0, eps: float = 1e-6
) -> tuple:
    """dx1 = dy ∂‖d‖/∂d = −dx2, d = x1 − x2 + eps; 0 where the distance is."""
    x1, x2, norm = saved["x1"], saved["x2"], saved["norm"][..., None]
    dx = (up(dys[0])[..., None] * slopes(up(x1) - up(x2) + eps, norm, p, -1)).astype(x1.dtype)
    dx = arranged(dx, None)
    return dx if "x1" in needs else None, -dx if "x2" in needs else None


pairwise_distance = Op(pairwise_distance_rule, pairwise_distance_forward, pairwise_distance_backward)


# --- cosine similarity -----------------------------------------------------------------------------------------------


def cosine_similarity_rule(x1: Spec, x2: Spec, *, needs: tuple = (), axis: int = 1, eps: float = 1e-8) -> Rule:
    _pair(x1, x2)
    axis = normal_axis(axis, x1.ndim)
    rows = _without(x1.shape, axis)
    of_rows = Spec(rows, compute_dtype(x1.dtype))
    saved = {"x1": x1, "x2": x2, **dict.fromkeys(("norm1", "norm2", "cosine"), of_rows)} if needs else {}
    options = {"axis": axis, "eps": float(eps)}
    return Rule({"y": Spec(rows, x1.dtype)}, saved, options, {n: Spec(x1.shape, x1.dtype) for n in ("x1", "x2")})


def cosine_similarity_forward(
    x1: Any, x2: Any, *, needs: tuple = (), axis: int = 1, eps: float = 1e-8
) -> tuple[tuple, dict]:
    """y = Σ x1 x2 / (max(‖x1‖₂, eps) max(‖x2‖₂, eps)) over ``axis``.

    x1, x2: of one shape and float dtype. Returns y, of that shape without ``axis``. As
    ``torch.nn.functional.cosine_similarity`` of what has been broadcast. Raises ShapeError, LabelError.
    """
    xp = namespace(x1)
    a, b = up(x1).reshape(x1.shape or (1,)), up(x2).reshape(x1.shape or (1,))
    one, two = norms(a, 2, axis), norms(b, 2, axis)
    found = (a / xp.maximum(one, eps) * (b / xp.maximum(two, eps))).sum(axis)
    shape = _without(x1.shape, axis)
    saved = {
        "x1": x1,
        "x2": x2,
        "norm1": one.reshape(shape),
        "norm2": two.reshape(shape),
        "cosine": found.reshape(shape),
    }
    return (found.astype(x1.dtype).reshape(shape),), saved if needs else {}


def cosine_similarity_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = 1, eps: float = 1e-8
) -> tuple:
    """dx1 = dy / n1 (x2 / n2 − y x1 / ‖x1‖), n = max(‖x‖, eps), without the last term where ‖x1‖ = 0; dx2 likewise.

    As torch's, it does not hear of the maximum.
    """
    xp = namespace(dys[0])
    x1, x2 = saved["x1"], saved["x2"]
    shape = x1.shape or (1,)
    rows = [xp.expand_dims(a, axis) if x1.ndim else a.reshape(1) for a in (up(dys[0]), saved["cosine"])]
    one, two = (xp.expand_dims(saved[n], axis) if x1.ndim else saved[n].reshape(1) for n in ("norm1", "norm2"))
    dy, y = rows
    a, b = up(x1).reshape(shape), up(x2).reshape(shape)
    n1, n2 = xp.maximum(one, eps), xp.maximum(two, eps)
    found = [
        dy / n * (other / m - y * slopes(v, norm, 2.0, axis))
        for v, other, norm, n, m in ((a, b, one, n1, n2), (b, a, two, n2, n1))
    ]
    return tuple(
        arranged(g.astype(x1.dtype).reshape(x1.shape), None) if name in needs else None
        for name, g in zip(("x1", "x2"), found)
    )


cosine_similarity = Op(cosine_similarity_rule, cosine_similarity_forward, cosine_similarity_backward)


# --- normalize -------------------------------------------------------------------------------------------------------


def normalize_rule(x: Spec, *, needs: tuple = (), p: float = 2.0, axis: int = 1, eps: float = 1e-12) -> Rule:
    require_float("x", x)
    axis = normal_axis(axis, x.ndim)
    options = {"p": _norm_of(p, x.shape[axis] if x.ndim else 1), "axis": axis, "eps": float(eps)}
    norm = Spec(_without(x.shape, axis), compute_dtype(x.dtype))
    y = Spec(x.shape, x.dtype)
    return Rule({"y": y}, {"x": x, "norm": norm} if needs else {}, options, {"x": y})


def normalize_forward(
    x: Any, *, needs: tuple = (), p: float = 2.0, axis: int = 1, eps: float = 1e-12
) -> tuple[tuple, dict]:
    """y = x / max(‖x‖ₚ, eps) over ``axis``.

    x: any shape, float. Returns y, row-major, with x's shape and dtype. As ``torch.nn.functional.normalize``.
    Raises ShapeError, LabelError.
    """
    xp = namespace(x)
    v = up(x).reshape(x.shape or (1,))
    norm = norms(v, p, axis)
    y = arranged((v / xp.maximum(norm, eps)).astype(x.dtype).reshape(x.shape), None)
    return (y,), {"x": x, "norm": arranged(norm.reshape(_without(x.shape, axis)), None)} if needs else {}


def normalize_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 2.0, axis: int = 1, eps: float = 1e-12
) -> tuple:
    """dx = dy / n − [‖x‖ ≥ eps] Σ dy x / n² · ∂‖x‖/∂x, n = max(‖x‖, eps)."""
    x = saved["x"]
    xp, shape = namespace(x), x.shape or (1,)
    v, dy = up(x).reshape(shape), up(dys[0]).reshape(shape)
    norm = xp.expand_dims(saved["norm"], axis) if x.ndim else saved["norm"].reshape(1)
    n = xp.maximum(norm, eps)
    dot = xp.where(norm >= eps, (dy * v).sum(axis, keepdims=True) / (n * n), xp.zeros_like(n))
    dx = dy / n - dot * slopes(v, norm, p, axis)
    return (arranged(dx.astype(x.dtype).reshape(x.shape), None),)


normalize = Op(normalize_rule, normalize_forward, normalize_backward)


# --- pdist -----------------------------------------------------------------------------------------------------------


def pdist_rule(x: Spec, *, needs: tuple = (), p: float = 2.0) -> Rule:
    require_float("x", x)
    if x.ndim != 2:
        raise ShapeError("x", "x.shape = (N, D)", list(x.shape))
    n = x.shape[0]
    pairs = None if n is None else n * (n - 1) // 2
    saved = {"x": x, "norm": Spec((pairs,), compute_dtype(x.dtype))} if needs else {}
    return Rule({"y": Spec((pairs,), x.dtype)}, saved, {"p": _norm_of(p)}, {"x": Spec(x.shape, x.dtype)})


def _square(pairs: Any, n: int) -> Any:
    """(n, n) of the numbers of all pairs i < j, the same for (j, i), 0 for (i, i)."""
    xp = namespace(pairs)
    i, j = xp.triu_indices(n, 1)
    found = xp.zeros((n, n), pairs.dtype)
    found[i, j] = pairs
    found[j, i] = pairs
    return found


def pdist_forward(x: Any, *, needs: tuple = (), p: float = 2.0) -> tuple[tuple, dict]:
    """y = ‖x[i] − x[j]‖ₚ of all pairs i < j, (0, 1), (0, 2), … (N − 2, N − 1).

    x: (N, D), float. Returns y (N (N − 1) / 2,). As ``torch.nn.functional.pdist``. Raises ShapeError.
    """
    xp = namespace(x)
    i, j = xp.triu_indices(x.shape[0], 1)
    d = up(x)[i] - up(x)[j]
    norm = norms(d, p, 1)[:, 0] if d.size else d.sum(1)
    return (norm.astype(x.dtype),), {"x": x, "norm": norm} if needs else {}


def pdist_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 2.0) -> tuple:
    """dx[i] = Σⱼ dy ∂‖d‖/∂d, which has the other sign for j; of p = ∞ each largest difference has all of it, as torch's."""
    x, v, n = saved["x"], up(saved["x"]), saved["x"].shape[0]
    dy, norm = (_square(a, n)[:, :, None] for a in (up(dys[0]), saved["norm"]))
    return (arranged((dy * slopes(v[:, None] - v, norm, p, 2, shared=False)).sum(1).astype(x.dtype), None),)


pdist = Op(pdist_rule, pdist_forward, pdist_backward)
