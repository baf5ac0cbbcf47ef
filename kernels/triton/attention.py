"""Attention's launchers: forward 4 N Hq Lq Lk D flops, backward two and a half times that and, without atomics, one pass
more of the scores; blocks outside of a mask are not visited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .._attention import order_of_gradient, order_of_y, scale_of
from .._dropout import threshold_and_scale
from . import _attention_bias, _configs, _matmul, _tile
from ._attention import LEAST, along, choose, operands, registers
from ._attention_backward import _attention_delta_kernel, _attention_keys_kernel, _attention_queries_kernel
from ._attention_decode import attention_decode_forward as attention_decode_forward
from ._attention_forward import _attention_forward_kernel
from ._configs import Tile
from ._kv_append import kv_append_forward as kv_append_forward
from ._rotary_append import rotary_append_forward as rotary_append_forward


def _choices(name: str, *more: str) -> dict[str, _configs.Choice]:
    """rich: 16-bit scores to which more is done than a product, whose temporaries take registers. boxes: what
    descriptors load. capped: products in TF32 that would wait for each other, were the next keys on their way."""
    kinds = ("half", *more, "half_rich", "tf32", "single")
    return {kind: _configs.tiles(f"{name}.{kind}", choose, inner=()) for kind in kinds}


FORWARD = _choices("attention_forward", "half_boxes", "tf32_capped")
KEYS, QUERIES = (_choices(f"attention_{name}", "half_boxes") for name in ("keys", "queries"))
BIAS = _choices("attention_bias")
FLOATS = 4
"""Of a descriptor's 16 bytes."""
DELTA = _configs.rows("attention_delta")
HELD = 128
"""The widest heads whose two sums leave a warp group of sm_90 registers enough; sm_100 has memory of their own for them."""


def _in_boxes(x: Any) -> bool:
    """Whether a descriptor can describe ``x`` (N, H, L, D), and a result of its width."""
    *steps, last = x.stride()
    fits = x.element_size() == 2 and last == 1 and x.shape[3] % 8 == 0 and 0 not in x.shape
    return fits and all(s > 0 and s % 8 == 0 for s in steps) and _tile.begins_aligned(x)


def _box(x: Any, rows: int, width: int) -> Any:
    return _tile.described(x, (1, 1, rows, width))


class _Call(NamedTuple):
    """What all kernels of a call take."""

    arrays: tuple
    """q, k, v, with the last axis contiguous."""
    bias: Any
    seed: Any
    cu: tuple
    sizes: dict[str, int]
    numbers: dict[str, Any]
    how: dict[str, Any]

    @property
    def steps(self) -> dict[str, int]:
        found = {}
        for name, x in zip("qkv", self.arrays):
            found |= _steps(name, x)
        n, heads, rows = self.arrays[0].shape[:3]
        full = (n, heads, rows, self.arrays[1].shape[2])
        wide = (0, 0, 0, 0) if self.bias is None else self.bias.expand(full).stride()
        return found | dict(zip(("b_n", "b_h", "b_i", "b_j"), wide))

    @property
    def boxed(self) -> bool:
        """Whether descriptors load q, k and v: where tiles of warp groups pay, and the scores need nothing else."""
        if not 90 <= _tile.device(self.arrays[0]).arch < 120 or self.arrays[0].shape[2] <= LEAST:
            return False
        return self.bias is None and self.seed is None and not self.how["CAPPED"] and all(map(_in_boxes, self.arrays))

    def tile(self, choices: dict[str, _configs.Choice], rows: int, boxed: bool = False) -> tuple[Tile, dict[str, Any]]:
        """(the tile, what a launch takes of it)."""
        q, _, v = self.arrays
        kind, widths = operands(q, v)
        more = self.bias is not None or self.seed is not None or self.how["CAPPED"]
        rich = kind == "half" and (more or not (widths["EVEN_D"] and widths["EVEN_V"]))
        capped = kind == "tf32" and self.how["CAPPED"] and "tf32_capped" in choices
        kind = "half_boxes" if boxed else "half_rich" if rich else "tf32_capped" if capped else kind
        c = choices[kind](_tile.device(q), max(widths["BD"], widths["BV"]), rows)
        return c, dict(BM=c.BM, BN=c.BN, num_warps=c.warps, num_stages=c.stages) | widths | registers(q)

    def given(self, tile: dict[str, Any], boxed: bool) -> tuple:
        """q, k, v as a launch takes them."""
        sizes = (tile["BM"], tile["BD"]), (tile["BN"], tile["BD"]), (tile["BN"], tile["BV"])
        return tuple(_box(x, *size) for x, size in zip(self.arrays, sizes)) if boxed else self.arrays


def _steps(name: str, x: Any) -> dict[str, int]:
    return dict(zip((f"{name}_n", f"{name}_h", f"{name}_l"), (0, 0, 0) if x is None else x.stride()))


def _call(
    q: Any, k: Any, v: Any, bias: Any, seed: Any, cu_q: Any, cu_k: Any,
    window: tuple, corner: str, scale: float | None, softcap: float, p: float, empty: Callable,
) -> _Call:  # fmt: skip
    (_, heads, rows, width), (_, groups, keys, _) = q.shape, k.shape
    before, after = window
    sequences = 0 if cu_q is None else cu_q.shape[0] - 1
    sizes = dict(Hq=heads, Lq=rows, Lk=keys, D=width, DV=v.shape[3], group=heads // max(groups, 1))
    sizes |= dict(sequences=sequences, depth=sequences.bit_length())
    threshold, gain = (0, 1.0) if seed is None else threshold_and_scale(p)
    numbers = dict(
        scale=scale_of(q, scale),
        softcap=softcap,
        before=before,
        after=after,
        quarters=_tile.cdiv(keys, 4),
        threshold=threshold,
        gain=gain,
    )
    how = dict(BEFORE=before >= 0, AFTER=after >= 0, BOTTOM=corner == "bottom_right", CAPPED=softcap > 0)
    arrays = tuple(along(x, empty) for x in (q, k, v))
    rest = (None if x is None else _tile.dense(x, empty) for x in (seed, cu_q, cu_k))
    seed, *cu = rest
    return _Call(arrays, bias, seed, tuple(cu), sizes, numbers, how)


def attention_forward(
    q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None, seed: Any = None, cu_q: Any = None, cu_k: Any = None,
    *, needs: tuple = (), causal: bool = False, window: tuple = (-1, -1), corner: str = "top_left",
    scale: float | None = None, softcap: float = 0.0, p: float = 0.0, empty: Any,
) -> tuple[tuple, dict]:  # fmt: skip
    n, heads, rows, _ = q.shape
    y = empty((n, heads, rows, v.shape[3]), q.dtype, order_of_y(*_tile.layout(tuple(q.shape), tuple(q.stride()))))
    lse = empty((n, heads, rows), "float32")
    call = _call(q, k, v, bias, seed, cu_q, cu_k, window, corner, scale, softcap, p, empty)
    boxed = call.boxed
    c, tile = call.tile(FORWARD, rows, boxed)
    plain = bias is None and softcap == 0 and call.numbers["scale"] > 0
    _tile.launch(
        _attention_forward_kernel, (_tile.cdiv(rows, c.BM) * heads * n,),
        *call.given(tile, boxed), bias, None if sinks is None else _tile.dense(sinks, empty), call.seed, *call.cu,
        _box(y, c.BM, tile["BV"]) if boxed else y, lse,
        **call.sizes, **call.steps, **_steps("y", y), **call.numbers, **call.how, PLAIN=plain, BOXED=boxed, **tile,
    )  # fmt: skip
    inputs = dict(q=q, k=k, v=v, bias=bias, sinks=sinks, seed=seed, cu_q=cu_q, cu_k=cu_k)
    saved = {name: x for name, x in inputs.items() if x is not None} | {"y": y, "lse": lse}
    return (y, lse), saved if needs else {}


def _delta(call: _Call, saved: dict, dy: Any, dlse: Any, dsinks: Any, unit: int, empty: Callable) -> tuple[Any, Any]:
    """(lse in units of log 2, Σ dy y − dlse), both (N, Hq, Lq up to a multiple of unit) float32; and dsinks, where it is
    wanted."""
    y, lse, sinks = saved["y"], saved["lse"], saved.get("sinks")
    n, heads, rows, width = y.shape
    line = _tile.cdiv(rows, unit) * unit
    tops, delta = (empty((n, heads, line), "float32") for _ in range(2))
    block = max(LEAST, _tile.next_power_of_2(width))
    entry = DELTA(_tile.device(y), block)
    high = max(LEAST, entry.elements // block)
    tiles = _tile.cdiv(rows, high)
    parts = None if dsinks is None else empty((n * tiles, 1, heads), "float32")
    _tile.launch(
        _attention_delta_kernel, (tiles * heads * n,), y, dy, dlse, lse,
        None if dsinks is None else _tile.dense(sinks, empty), tops, delta, parts, heads, rows, line, width,
        *y.stride()[:3], *_steps("dy", dy).values(), *_steps("dl", dlse).values(), BM=high, BV=block, num_warps=entry.warps,
        **registers(y),
    )  # fmt: skip
    if parts is not None:
        _matmul.finish(parts, dsinks)
    return tops, delta


def attention_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, causal: bool = False, window: tuple = (-1, -1),
    corner: str = "top_left", scale: float | None = None, softcap: float = 0.0, p: float = 0.0, empty: Any,
) -> tuple:  # fmt: skip
    dy, dlse = dys
    dy = None if dy is None else along(dy, empty)
    q, k, v = (saved[name] for name in "qkv")
    bias, seed, cu_q, cu_k = (saved.get(name) for name in ("bias", "seed", "cu_q", "cu_k"))
    call = _call(q, k, v, bias, seed, cu_q, cu_k, window, corner, scale, softcap, p, empty)
    names = ("q", "k", "v", "bias", "sinks")
    orders = {name: order_of_gradient(x) for name, x in zip("qkv", inputs)}
    grads = {
        name: empty(spec.shape, q.dtype, orders.get(name)) if name in needs else None
        for name, spec in zip(names, inputs)
    }
    common = call.sizes | call.steps | _steps("dy", dy) | call.numbers | call.how
    boxed = call.boxed and (dy is None or _in_boxes(dy))
    found = _delta(call, saved, dy, dlse, grads["sinks"], FLOATS if boxed else 1, empty)

    def given(tile: dict[str, Any], boxed: bool) -> tuple:
        grad, lines = dy, found
        if boxed:
            grad = None if dy is None else _box(dy, tile["BM"], tile["BV"])
            lines = tuple(_tile.described(x.view(-1, x.shape[2]), (1, tile["BM"])) for x in found)
        return *call.given(tile, boxed), bias, call.seed, *call.cu, grad, *lines

    n, heads, rows, _ = q.shape
    groups, keys = k.shape[1:3]
    dk, dv, dq = (grads[name] for name in "kvq")
    if dk is not None or dv is not None:
        held = boxed and (max(q.shape[3], v.shape[3]) <= HELD or _tile.device(q).arch >= 100)
        c, tile = call.tile(KEYS, rows, held)
        _tile.launch(
            _attention_keys_kernel, (_tile.cdiv(keys, c.BN) * groups * n,), *given(tile, held), dk, dv,
            **common, **_steps("dk", dk), **_steps("dv", dv), line=found[0].shape[2], BOXED=held, **tile,
        )  # fmt: skip
    if dq is not None:
        c, tile = call.tile(QUERIES, rows, boxed)
        _tile.launch(
            _attention_queries_kernel, (_tile.cdiv(rows, c.BM) * heads * n,), *given(tile, boxed), dq,
            **common, **_steps("dq", dq), BOXED=boxed, **tile,
        )  # fmt: skip
    if grads["bias"] is not None:
        _, tile = call.tile(BIAS, rows)
        _attention_bias.gradient((n, heads, rows, keys), given(tile, False), common, tile, grads["bias"], empty)
    return (*(grads[name] for name in names), None, None, None)
