"""Products of matrices in batches: y = α a b + c."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.kernels._linears import added_up, broadcast
from gpulayers.ops._op import Op, require_float, require_same_dtype


def _batch(a: Spec, b: Spec) -> tuple:
    if (found := broadcast(a.shape[:-2], b.shape[:-2])) is None:
        rule = "batches that broadcast, a.shape = (…, M, K), b.shape = (…, K, N)"
        raise ShapeError("b", rule, f"{list(b.shape)} with a {list(a.shape)}")
    return found


def matmul_rule(a: Spec, b: Spec, c: Spec | None = None, *, needs: tuple = (), alpha: float = 1.0) -> Rule:
    require_float("a", a)
    require_same_dtype(a, b=b, c=c)
    for name, x in (("a", a), ("b", b)):
        if x.ndim < 2:
            raise ShapeError(name, f"{name}.shape = (…, rows, columns)", list(x.shape))
    if a.shape[-1] != b.shape[-2]:
        raise ShapeError("b", "a.shape = (…, M, K), b.shape = (…, K, N)", f"{list(b.shape)} with a {list(a.shape)}")
    y = Spec((*_batch(a, b), a.shape[-2], b.shape[-1]), a.dtype)
    if c is not None and c.shape != y.shape:
        raise ShapeError("c", f"c.shape = y.shape = {list(y.shape)}", list(c.shape))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise KindError("alpha", "a number", repr(alpha))
    saved = {name: x for name, x, of in (("a", a, "b"), ("b", b, "a")) if of in needs}
    grads = {name: Spec(x.shape, x.dtype) for name, x in (("a", a), ("b", b), ("c", y))}
    return Rule({"y": y}, saved, {"alpha": float(alpha)}, grads)


def matmul_forward(a: Any, b: Any, c: Any = None, *, needs: tuple = (), alpha: float = 1.0) -> tuple[tuple, dict]:
    """y = α a b + c.

    a: (…, M, K), b: (…, K, N), whose batches broadcast; c: of y's shape, or None; all of one float dtype, any strides.
    Returns y (…, M, N), row-major. Raises ShapeError.
    """
    y = alpha * (up(a) @ up(b))
    if c is not None:
        y = y + up(c)
    saved = {name: x for name, x, of in (("a", a, "b"), ("b", b, "a")) if of in needs}
    return (namespace(a).ascontiguousarray(y.astype(a.dtype, copy=False)),), saved


def matmul_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, alpha: float = 1.0) -> tuple:
    """da = α dy bᵀ and db = α aᵀ dy, added up where a batch was broadcast; dc = dy."""
    xp, dy = namespace(dys[0]), up(dys[0])
    da = db = None
    if "a" in needs:
        da = added_up(alpha * (dy @ up(saved["b"]).swapaxes(-1, -2)), inputs[0].shape)
    if "b" in needs:
        db = added_up(alpha * (up(saved["a"]).swapaxes(-1, -2) @ dy), inputs[1].shape)
    grads = [g if g is None else xp.ascontiguousarray(g.astype(dys[0].dtype)) for g in (da, db)]
    return *grads, dys[0].copy() if "c" in needs else None


matmul = Op(matmul_rule, matmul_forward, matmul_backward, family="linear")
