"""Matrix products: matmul, dot, einsum, tensordot, outer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.export.recording._handle import cast, emit, kind_of, lift
from gpulayers.export.recording._place import refuse


def matmul(a: Any, b: Any) -> Any:
    """a @ b. The operation has equal ranks and equal leading sizes: not every target broadcasts them rightly."""
    a, b = lift(a), lift(b)
    value = np.matmul(a.value, b.value)
    if a.ndim == 1 or b.ndim == 1:
        y = matmul(a.reshape(1, -1) if a.ndim == 1 else a, b.reshape(-1, 1) if b.ndim == 1 else b)
        return y.reshape(value.shape)
    a, b = (cast(x, kind_of(value)) for x in (a, b))
    if b.ndim == 2 < a.ndim:
        return matmul(a.reshape(-1, a.shape[-1]), b).reshape(value.shape)
    if lead := value.shape[:-2]:
        a, b = (x.broadcast_to(lead + x.shape[-2:]) for x in (a, b))
    return emit("matmul", [a, b], value)


def dot(a: Any, b: Any, out: Any = None) -> Any:
    a, b = lift(a), lift(b)
    if not a.ndim or not b.ndim:
        return a * b
    if b.ndim > 2:
        return tensordot(a, b, ((a.ndim - 1,), (b.ndim - 2,)))
    return matmul(a, b)


def outer(a: Any, b: Any, out: Any = None) -> Any:
    return lift(a).reshape(-1, 1) * lift(b).reshape(-1)


def einsum(terms: Any, *xs: Any, **_: Any) -> Any:
    """Two operands at a time, as one matrix product: letters that both keep, that one has, that are summed."""
    if not isinstance(terms, str):
        refuse("einsum with lists of axes", 'einsum("ij,jk->ik", a, b)')
    values = [lift(x) for x in xs]
    names, out = _letters(terms.replace(" ", ""), values)
    while True:
        (a, x), values = _summed(names.pop(0), values[0], out + "".join(names)), values[1:]
        if not names:
            return x.transpose([a.index(c) for c in out]) if a else x
        second = names.pop(0)
        (b, y), values = _summed(second, values[0], a + out + "".join(names)), values[1:]
        joined, product = _paired(a, x, b, y, out + "".join(names))
        names.insert(0, joined)
        values.insert(0, product)


def _letters(terms: str, values: list[Any]) -> tuple[list[str], str]:
    """The letters of each operand and of the output, those that … stands for included."""
    left, _, out = terms.partition("->")
    names = left.split(",")
    extra = [x.ndim - len(n.replace("...", "")) for n, x in zip(names, values)]
    dots = "ABCDEFGH"[: max(extra)] if "." in left else ""
    names = [n.replace("...", dots[len(dots) - k :] if "." in n else "") for n, k in zip(names, extra)]
    everything = "".join(names)
    once = sorted(c for c in set(everything) if everything.count(c) == 1 and c not in dots)
    for n in names:
        if len(set(n)) < len(n):
            refuse("einsum with a letter twice in one operand", "np.where(np.eye(n, dtype=bool), x, 0).sum(-1)")
    return names, out.replace("...", dots) if "->" in terms else dots + "".join(once)


def _summed(letters: str, x: Any, later: str) -> tuple[str, Any]:
    """Without the letters that nothing asks for any more."""
    gone = tuple(k for k, c in enumerate(letters) if c not in later)
    return "".join(c for c in letters if c in later), x.sum(gone) if gone else x


def _paired(a: str, x: Any, b: str, y: Any, later: str) -> tuple[str, Any]:
    both, inner = [c for c in a if c in b and c in later], [c for c in a if c in b and c not in later]
    only_a, only_b = [c for c in a if c not in b], [c for c in b if c not in a]
    size = dict(zip(a, x.shape)) | dict(zip(b, y.shape))
    kept, rows, summed, columns = ([size[c] for c in group] for group in (both, only_a, inner, only_b))
    x = x.transpose([a.index(c) for c in both + only_a + inner]).reshape(*kept, math.prod(rows), math.prod(summed))
    y = y.transpose([b.index(c) for c in both + inner + only_b]).reshape(*kept, math.prod(summed), math.prod(columns))
    return "".join(both + only_a + only_b), matmul(x, y).reshape(kept + rows + columns)


def tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    a, b = lift(a), lift(b)
    if isinstance(axes, int):
        axes = range(a.ndim - axes, a.ndim), range(axes)
    first, second = (np.atleast_1d(list(s) if isinstance(s, range) else s).tolist() for s in axes)
    n, m = [chr(97 + k) for k in range(a.ndim)], [chr(65 + k) for k in range(b.ndim)]
    for p, q in zip(first, second):
        m[q] = n[p]
    out = [c for c in n if c not in m] + [c for c in m if c not in n]
    return einsum(f"{''.join(n)},{''.join(m)}->{''.join(out)}", a, b)
