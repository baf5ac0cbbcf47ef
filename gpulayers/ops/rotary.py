"""Rotary position embeddings: pairs of a head's numbers turned by an angle that grows with the position."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, arranged, compute_dtype, float32, namespace, spec, up
from gpulayers.definition import KindError, LabelError, Rule, ShapeError
from gpulayers.ops._op import Op, require_float, require_same_dtype
from gpulayers.ops._rotary import frequencies as frequencies
from gpulayers.ops._rotary import tables as tables


def _fits(shape: tuple, wanted: tuple) -> bool:
    return len(shape) == len(wanted) and all(None in (a, b) or a in (1, b) for a, b in zip(shape, wanted))


def rotary_rule(
    q: Spec,
    cos: Spec,
    sin: Spec,
    k: Spec | None = None,
    positions: Spec | None = None,
    *,
    needs: tuple = (),
    interleaved: bool = False,
) -> Rule:
    require_float("q", q)
    if q.ndim != 4:
        raise ShapeError("q", "q.shape = (N, H, L, D)", list(q.shape))
    n, _, length, dim = q.shape
    require_same_dtype(q, k=k)
    if k is not None and (k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (n, length, dim)):
        raise ShapeError("k", f"k.shape = (N, Hk, L, D) = {[n, 'Hk', length, dim]}", list(k.shape))
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (q.dtype, float32):
            raise ShapeError(name, f"{name}.dtype = q.dtype or float32", f"{name} {table.dtype} with q {q.dtype}")
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ShapeError("sin", "sin.shape, dtype = cos.shape, dtype", f"{sin} with cos {cos}")
    if positions is None and cos.ndim == 2:
        fits = cos.shape[0] is None or length is None or cos.shape[0] >= length
    else:
        fits = cos.ndim == 2 or (positions is None and cos.ndim == 3 and _fits(cos.shape[:2], (n, length)))
    if not fits or not (dim is None or 2 * cos.shape[-1] <= dim):
        rule = f"cos.shape = (positions ≥ L, pairs), or (N or 1, L, pairs) without positions, with 2 pairs ≤ D = {dim}"
        raise ShapeError("cos", rule, f"{list(cos.shape)} with q {list(q.shape)}")
    if positions is not None:
        if positions.dtype.kind not in "iu":
            raise ShapeError("positions", "an integer dtype", positions.dtype)
        if not _fits(positions.shape, (n, length)):
            raise ShapeError("positions", f"positions.shape = (N or 1, L) = {[n, length]}", list(positions.shape))
    if not isinstance(interleaved, bool):
        raise KindError("interleaved", "True or False", repr(interleaved))
    outputs = {"y": q.like()} | ({} if k is None else {"z": k.like()})
    saved = {"cos": cos, "sin": sin} | ({} if positions is None else {"positions": positions})
    return Rule(outputs, saved if needs else {})


def _check_positions(q: Any, cos: Any, sin: Any, k: Any = None, positions: Any = None, **options: Any) -> None:
    """Raises LabelError for a position that the table does not have."""
    if positions is None or 0 in positions.shape:
        return
    low, high, most = int(positions.min()), int(positions.max()), cos.shape[0]
    if low < 0 or high >= most:
        raise LabelError("positions", f"0 ≤ position < cos.shape[0] = {most}", low if low < 0 else high)


def _of_tokens(table: Any, positions: Any, length: int, kind: Any) -> Any:
    """(N or 1, 1, L, pairs): each token's row of a table; NaN where it has none."""
    xp = namespace(table)
    if table.ndim == 3:
        return table.astype(kind)[:, None]
    if positions is None:
        return table[:length].astype(kind)[None, None]
    rows = xp.take(table, positions.clip(0, max(table.shape[0] - 1, 0)), 0).astype(kind)
    inside = ((positions >= 0) & (positions < table.shape[0]))[..., None]
    return xp.where(inside, rows, xp.full((), xp.nan, kind))[:, None]


def turned(x: Any, cos: Any, sin: Any, interleaved: bool, like: Spec) -> Any:
    xp, pairs = namespace(x), cos.shape[-1]
    v = up(x)
    if interleaved:
        one, other = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        one, other = slice(pairs), slice(pairs, 2 * pairs)
    a, b = v[..., one], v[..., other]
    y = xp.empty(v.shape, v.dtype)
    y[...] = v
    y[..., one] = a * cos - b * sin
    y[..., other] = b * cos + a * sin
    return arranged(y.astype(x.dtype, copy=False), like.like().order)


def rotary_forward(
    q: Any,
    cos: Any,
    sin: Any,
    k: Any = None,
    positions: Any = None,
    *,
    needs: tuple = (),
    interleaved: bool = False,
) -> tuple[tuple, dict]:
    """(a, b) → (a cos − b sin, b cos + a sin) for each pair (a, b) of every head of q, and of k where it comes.

    q: (N, H, L, D), k: (N, Hk, L, D), float, in any strides. A pair is (x[i], x[i + pairs]), or (x[2i], x[2i + 1]) where
    interleaved; what is past 2 pairs stays as it is. cos, sin: q's dtype or float32, (P, pairs) by the position, which is l or
    positions[n, l] (integers, (N or 1, L)); or (N or 1, L, pairs), each token's own. They have no gradients.

    Returns y, and z of k: q's and k's shapes and dtypes. Saves the tables alone. Raises LabelError for a position past the
    table on the CPU; on a GPU it makes NaN. Su et al. 2021, RoFormer; ``frequencies`` and ``tables`` make the tables.
    """
    (c, s) = (_of_tokens(t, positions, q.shape[2], compute_dtype(q.dtype)) for t in (cos, sin))
    found = tuple(turned(x, c, s, interleaved, spec(x)) for x in (q, k) if x is not None)
    saved = {"cos": cos, "sin": sin} | ({} if positions is None else {"positions": positions})
    return found, saved if needs else {}


def rotary_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, interleaved: bool) -> tuple:
    """The same turn the other way."""
    cos, sin, positions, like = saved["cos"], saved["sin"], saved.get("positions"), inputs[0]
    (c, s) = (_of_tokens(t, positions, like.shape[2], compute_dtype(like.dtype)) for t in (cos, sin))
    named = {"q": (dys[0], inputs[0]), "k": (dys[1] if len(dys) > 1 else None, inputs[3])}
    grads = {}
    for name, (dy, x) in named.items():
        if name in needs:
            dy = namespace(cos).zeros(x.shape, x.dtype) if dy is None else dy
            grads[name] = turned(dy, c, -s, interleaved, x)
    return grads.get("q"), None, None, grads.get("k"), None


rotary = Op(rotary_rule, rotary_forward, rotary_backward, differentiable=("q", "k"), check=_check_positions)
