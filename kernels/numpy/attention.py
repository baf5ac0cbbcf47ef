"""Attention through BLAS: for each head, blocks of queries with all keys that they see, whose scores stay in the cache; for
several small heads at once, since threads wait for each other at each call into NumPy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpulayers.arrays import guests, layout

from .._attention import order_of_gradient, order_of_y, scale_of, spans
from .._invariance import on as invariant
from .._layout import empty_of
from . import _blocks, _masks
from ._attention_decode import attention_decode_forward as attention_decode_forward
from ._attention_decode import attention_decode_refuses as attention_decode_refuses
from ._kv_append import kv_append_forward as kv_append_forward
from ._rotary_append import rotary_append_forward as rotary_append_forward
from ._rotary_append import rotary_append_refuses as rotary_append_refuses

REFUSALS = {"float64": "float64 is left to the definition"}
SCORES = 1 << 17
"""Of a block: more leave the cache, and fewer make products that are too thin."""


def attention_refuses(q: Any, *others: Any, needs: tuple = (), **options: Any) -> str | None:
    return REFUSALS["float64"] if q.dtype == np.float64 else None


SMALL = 40.0
"""A block of scores within ±40 is not reduced by its rows' maxima: exponentials, and sums of them, are far from float32's ends."""


class _Call(NamedTuple):
    """A call's arrays in float32, and what is done to its scores."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: Any
    mask: Any
    """(N, Hq, Lq, ≥ Lk): dropout's m / (1 − p), or None."""
    blocks: list
    wide: Any
    """k with a column of ones, for a backward whose scores are products alone; else None."""
    scale: float
    softcap: float

    @property
    def group(self) -> int:
        return self.q.shape[1] // max(self.k.shape[1], 1)


def _call(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    seed: Any,
    cu_q: Any,
    cu_k: Any,
    options: dict[str, Any],
    first: bool,
    backward: bool = False,
) -> _Call:
    (n, heads, rows, _), keys = q.shape, k.shape[2]
    softcap, p = options["softcap"], options["p"]
    if bias is not None:
        bias = np.broadcast_to(bias, (n, heads, rows, keys))
    mask = None
    if seed is not None:
        wide = -(-keys // 4) * 4
        mask = _masks.mask(seed, p, n * heads * rows * wide, first).reshape(n, heads, rows, wide)
    seen = rows, keys, options["window"], options["corner"]
    blocks = _blocks_of(*spans(*seen, cu_q, cu_k), keys) if cu_q is not None else _plain_blocks(*seen)
    single = [x.astype(np.float32, copy=False) for x in (q, k, v)]
    plain = backward and bias is None and not softcap
    wide = np.concatenate([single[1], np.ones((*k.shape[:3], 1), np.float32)], 3) if plain else None
    return _Call(*single, bias, mask, blocks, wide, scale_of(q, options["scale"]), softcap)


class _Block(NamedTuple):
    """Queries, and the keys that any of them sees."""

    rows: slice
    keys: slice
    hidden: list
    """[(columns, where they are not seen)] of the keys that not all see."""


def _blocks_of(low: np.ndarray, high: np.ndarray, keys: int) -> list[_Block]:
    """Of queries that see the keys low … high − 1; those that see none are left out where they are a whole block."""
    rows, found = len(low), []
    size = max(16, SCORES // max(keys, 1) // 16 * 16)
    if rows and ((low != low[0]).any() or (high != high[0]).any()):
        size = min(size, 128)  # or much would be computed that nobody sees
    for start in range(0, rows, size):
        lows, highs = low[start : start + size], high[start : start + size]
        seen = highs > lows
        if not seen.any():
            continue
        first, last = int(lows[seen].min()), int(highs[seen].max())
        inner = min(max(int(lows.max()) - first, 0), last - first)
        outer = min(max(int(highs.min()) - first, inner), last - first)
        hidden = []
        for columns in (slice(0, inner), slice(outer, last - first)):
            if columns.start < columns.stop:
                j = np.arange(columns.start, columns.stop) + first
                hidden.append((columns, (j < lows[:, None]) | (j >= highs[:, None])))
        found.append(_Block(slice(start, start + len(lows)), slice(first, last), hidden))
    return found


@functools.lru_cache(32)
def _plain_blocks(rows: int, keys: int, window: tuple, corner: str) -> list[_Block]:
    return _blocks_of(*spans(rows, keys, window, corner, None, None), keys)


class _Heads(NamedTuple):
    """A head, or a slice of heads, of an image or a slice of images, and those of its keys."""

    n: Any
    q: Any
    k: Any


def _scores(call: _Call, at: _Heads, b: _Block, out: np.ndarray, less: Any = None) -> tuple[np.ndarray, Any]:
    """(scores of a block of heads minus ``less`` (…, rows, 1) in ``out``, hidden ones too; the cap's slope).

    Plain scores are reduced by the product itself, against a further column of ones: that saves a pass over them.
    """
    q, k = call.q[at.n, at.q, b.rows] * np.float32(call.scale), call.k if call.wide is None else call.wide
    if call.wide is not None:
        q = np.concatenate([q, -less], -1)
    s, slope = _product(q, k[at.n, at.k, b.keys].swapaxes(-1, -2), out), None
    if call.softcap:
        s *= np.float32(1 / call.softcap)
        np.tanh(s, out=s)
        slope = 1 - s * s
        s *= np.float32(call.softcap)
    if call.bias is not None:
        part = call.bias[at.n, at.q, b.rows, b.keys]
        if part.dtype == bool:
            np.copyto(s, -np.inf, where=~part)
        else:
            s += part.astype(np.float32, copy=False)
    if call.wide is None and less is not None:
        s -= less
    return s, slope


def _hide(s: np.ndarray, b: _Block) -> None:
    """−∞ where a query sees no key."""
    for columns, where in b.hidden:
        np.copyto(s[..., columns], -np.inf, where=where)


def _product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> np.ndarray:
    """a b, in the scratch memory ``out``."""
    shape = *a.shape[:-1], b.shape[-1]
    found = out[: math.prod(shape)].reshape(shape)
    guests.matmul(a, b, out=found)
    return found


def _scratch(call: _Call, count: int) -> list[np.ndarray]:
    keys = call.k.shape[2]
    size = min(max(SCORES, 16 * keys), math.prod(call.q.shape[:3]) * keys)
    return [np.empty(max(size, 1), np.float32) for _ in range(count)]


def _shared_out(items: list, work: Callable[[list], None], scores: int, alone: bool = False) -> None:
    """work(items) by a few threads, each with its share of them; by one if it is that few scores."""
    count = 1 if alone or scores < _blocks.ALONE else max(1, min(_blocks.threads(), len(items)))
    _blocks.apart([items[i::count] for i in range(count)], work)


def attention_forward(
    q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None, seed: Any = None, cu_q: Any = None, cu_k: Any = None,
    *, needs: tuple = (), causal: bool = False, window: tuple = (-1, -1), corner: str = "top_left",
    scale: float | None = None, softcap: float = 0.0, p: float = 0.0,
) -> tuple[tuple, dict]:  # fmt: skip
    options = dict(window=window, corner=corner, scale=scale, softcap=softcap, p=p)
    call = _call(q, k, v, bias, seed, cu_q, cu_k, options, bool(needs))
    n, heads, rows, _ = q.shape
    order, dense = layout(q.shape, tuple(s // q.itemsize for s in q.strides))
    y = empty_of((n, heads, rows, v.shape[3]), q.dtype, order_of_y(order, dense))
    lse = np.empty((n, heads, rows), np.float32)
    single = None if sinks is None else sinks.astype(np.float32, copy=False)
    if sum(b.rows.stop - b.rows.start for b in call.blocks) < rows:  # some see nothing
        y[...] = 0
        lse[...] = -np.inf if single is None else single[:, None]

    def work(items: list) -> None:
        (scores,) = _scratch(call, 1)
        with np.errstate(all="ignore"):
            for at in items:
                sink = None if single is None else single[at.q, None, None]
                for b in call.blocks:
                    lse[at.n, at.q, b.rows] = _attended(call, at, b, scores, sink, y[at.n, at.q, b.rows])

    _shared_out(_few_heads(call), work, n * heads * rows * k.shape[2])
    inputs = dict(q=q, k=k, v=v, bias=bias, sinks=sinks, seed=seed, cu_q=cu_q, cu_k=cu_k)
    saved = {name: x for name, x in inputs.items() if x is not None} | {"y": y, "lse": lse}
    return (y, lse), saved if needs else {}


def _few_heads(call: _Call) -> list[_Heads]:
    """All heads, as many at once as leave the cache's room to their scores: of keys of their own, or all of one key's."""
    (n, heads), group = call.q.shape[:2], call.group
    largest = max(((b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start) for b in call.blocks), default=1)
    share = -(-n * heads // _blocks.threads())
    size, run = max(1, min(SCORES // 2 // max(largest, 1), share)), heads if group == 1 else max(group, 1)
    size = 1 if invariant() else size
    if group == 1 and size > heads > 0:
        images, every = size // heads, slice(0, heads)
        return [_Heads(slice(i, min(i + images, n)), every, every) for i in range(0, n, images)]
    found = []
    for g in range(0, heads, run):
        for first in range(g, g + run, size):
            q = slice(first, min(first + size, g + run))
            found.append((q, q if group == 1 else slice(g // group, g // group + 1)))
    return [_Heads(at, *both) for at in range(n) for both in found]


def _attended(call: _Call, at: _Heads, b: _Block, scores: np.ndarray, sink: Any, y: np.ndarray) -> np.ndarray:
    """lse of a block of heads; y, too, into its place."""
    s, _ = _scores(call, at, b, scores)
    small = sink is None and s.size and s.max() <= SMALL and s.min() >= -SMALL  # not so for NaN
    _hide(s, b)
    top: Any = np.float32(0)
    if not small:
        top = s.max(-1, keepdims=True)
        if sink is not None:
            np.maximum(top, sink, out=top)
        top[top == -np.inf] = 0
        s -= top
    np.exp(s, out=s)
    total = guests.matmul(s, np.ones((s.shape[-1], 1), np.float32))
    if sink is not None:
        total += np.exp(sink - top)
    if call.mask is not None:
        s *= call.mask[at.n, at.q, b.rows, b.keys]
    found = guests.matmul(s, call.v[at.n, at.k, b.keys])
    lse = np.log(total) + top
    total[total == 0] = 1
    np.divide(found, total, out=y, casting="unsafe")
    return lse[..., 0]


def attention_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, causal: bool = False, window: tuple = (-1, -1),
    corner: str = "top_left", scale: float | None = None, softcap: float = 0.0, p: float = 0.0,
) -> tuple:  # fmt: skip
    options = dict(window=window, corner=corner, scale=scale, softcap=softcap, p=p)
    bias, sinks, seed, cu_q, cu_k = (saved.get(name) for name in ("bias", "sinks", "seed", "cu_q", "cu_k"))
    call = _call(*(saved[name] for name in "qkv"), bias, seed, cu_q, cu_k, options, False, backward=True)
    y, lse = saved["y"].astype(np.float32, copy=False), saved["lse"]
    dy = np.zeros_like(y) if dys[0] is None else dys[0].astype(np.float32, copy=False)
    with np.errstate(all="ignore"):
        delta = (dy * y).sum(-1)
        if dys[1] is not None:
            delta -= dys[1]
    grads = {
        name: np.zeros(spec.shape, np.float32) if name in needs else None
        for name, spec in zip(("q", "k", "v", "bias"), inputs)
    }
    n, groups = call.k.shape[:2]

    def work(items: list) -> None:
        memory = _scratch(call, 2)
        with np.errstate(all="ignore"):
            for at, g in items:
                for head in range(g * call.group, (g + 1) * call.group):
                    for b in call.blocks:
                        _gradients(call, at, head, b, dy, lse, delta, grads, memory)

    _shared_out(
        [(at, g) for at in range(n) for g in range(groups)],
        work,
        call.q.shape[1] * n * delta.shape[2] * call.k.shape[2],
        alone=grads["bias"] is not None,
    )
    found = [None if g is None else _rounded(g, spec) for g, spec in zip(grads.values(), inputs[:3])]
    found.append(None if grads["bias"] is None else grads["bias"].astype(saved["q"].dtype, copy=False))
    return *found, _sinks(sinks, lse, delta, q_dtype=saved["q"].dtype) if "sinks" in needs else None, None, None, None


def _gradients(
    call: _Call, n: int, head: int, b: _Block, dy: Any, lse: np.ndarray, delta: np.ndarray, grads: dict, memory: list
) -> None:
    """Adds what a block of a head brings to the gradients."""
    g = head // call.group
    top = lse[n, head, b.rows, None]
    s, slope = _scores(call, _Heads(n, head, g), b, memory[0], np.where(top == -np.inf, np.float32(np.inf), top))
    _hide(s, b)
    np.exp(s, out=s)
    dy, v = dy[n, head, b.rows], call.v[n, g, b.keys]
    ds = _product(dy, v.T, memory[1])
    if call.mask is not None:
        ds *= call.mask[n, head, b.rows, b.keys]
    ds -= delta[n, head, b.rows, None]
    ds *= s
    if grads["v"] is not None:
        if call.mask is not None:
            s *= call.mask[n, head, b.rows, b.keys]
        grads["v"][n, g, b.keys] += guests.matmul(s.T, dy)
    if grads["bias"] is not None:
        _add_summed(grads["bias"], ds, n, head, b)
    if slope is not None:
        ds *= slope
    scale = np.float32(call.scale)
    if grads["k"] is not None:
        grads["k"][n, g, b.keys] += guests.matmul(ds.T, call.q[n, head, b.rows] * scale)
    if grads["q"] is not None:
        grads["q"][n, head, b.rows] = guests.matmul(ds, call.k[n, g, b.keys] * scale)


def _add_summed(db: np.ndarray, ds: np.ndarray, n: int, head: int, b: _Block) -> None:
    """db += ds of a block, summed along the axes that the bias was repeated along."""
    wide = db.reshape((1,) * (4 - db.ndim) + db.shape)
    part = wide[n if wide.shape[0] > 1 else 0, head if wide.shape[1] > 1 else 0]
    rows, keys = (b.rows if part.shape[0] > 1 else slice(None)), (b.keys if part.shape[1] > 1 else slice(None))
    axes = tuple(a for a in range(2) if part.shape[a] == 1)
    part[rows, keys] += ds.sum(axes, keepdims=True) if axes else ds


def _sinks(sinks: np.ndarray, lse: np.ndarray, delta: np.ndarray, q_dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        share = np.exp(sinks.astype(np.float32)[None, :, None] - lse)
        return -(np.where(lse == -np.inf, np.float32(0), share) * delta).sum((0, 2)).astype(q_dtype)


def _rounded(g: np.ndarray, spec: Any) -> np.ndarray:
    order = order_of_gradient(spec)
    if order is None and g.dtype == spec.dtype:
        return g
    found = empty_of(spec.shape, spec.dtype, order)
    found[...] = g
    return found
