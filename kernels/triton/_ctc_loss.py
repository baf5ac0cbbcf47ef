"""Connectionist temporal classification: one program a sequence walks its times, with a lane for each label and each blank
between them; what a lane needs of its neighbours goes through memory, behind a barrier.

Backward walks from the end and leaves the probability of each label at each time, given the targets. A second kernel adds
them up class by class, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._classes import reduced

BUDGETS = {
    # A lane reads the class of its label, wherever that is.
    "_ctc_loss_forward_kernel": Budget(narrow="loads, stores"),
    "_ctc_loss_given_kernel": Budget(narrow="loads, stores"),
    "_ctc_loss_backward_kernel": Budget(registers=128, blocks=3, narrow="loads, stores"),
}
MOST = 8192
"""Lanes of a program, at most."""
REFUSALS = {"ctc": "targets have 4096 labels or more: a program has a lane for each, and for the blanks between them"}


@triton.jit
def _added(a, b, c):
    """log(exp(a) + exp(b) + exp(c)); −∞ where all are."""
    top = tl.maximum(tl.maximum(a, b), c)
    to = tl.where(top == float("-inf"), 0.0, top)
    return tl.log(tl.exp(a - to) + tl.exp(b - to) + tl.exp(c - to)) + to


@triton.jit
def _label(targets, s, inside, blank):
    """The label of each lane, a blank for even ones and outside."""
    return tl.load(targets + s // 2, inside & (s % 2 == 1), other=blank).to(tl.int64)


@triton.jit
def _of_labels(x, label, C, inside, x_c):
    """Log-probabilities of the lanes' labels; NaN for a label out of range."""
    known = (label >= 0) & (label < C)
    v = tl.load(x + label * x_c, inside & known, other=float("-inf")).to(tl.float32)
    return tl.where(inside & (known == 0), float("nan"), v)


@triton.jit
def _ctc_loss_forward_kernel(
    x, targets, input_lengths, target_lengths, alpha, nll, losses, T, C, S, R, x_t, x_n, x_c, blank,
    MEAN: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """alpha: R rows a sequence, T or 2."""
    n = tl.program_id(0).to(tl.int64)
    length = tl.load(input_lengths + n).to(tl.int32)
    count = tl.load(target_lengths + n).to(tl.int32)
    s = tl.arange(0, BLOCK)
    inside = s < 2 * count + 1
    targets += n * S
    label = _label(targets, s, inside, blank)
    skips = (s > 2) & (label != _label(targets, s - 2, inside & (s > 2), blank))
    x += n * x_n
    wide = 2 * S + 1
    alpha += n * R * wide
    for t in range(0, length):
        v = _of_labels(x + t * x_t, label, C, inside, x_c)
        before = alpha + ((t + R - 1) % R).to(tl.int64) * wide + s
        a = tl.load(before, inside & (t > 0), other=float("-inf"))
        b = tl.load(before - 1, inside & (s > 0) & (t > 0), other=float("-inf"))
        c = tl.load(before - 2, inside & skips & (t > 0), other=float("-inf"))
        new = v + tl.where(t > 0, _added(a, b, c), tl.where(s < 2, 0.0, float("-inf")))
        new = tl.where(inside, new, float("-inf"))
        tl.store(alpha + (t % R).to(tl.int64) * wide + s, new, s < wide)
        tl.debug_barrier()  # what one lane wrote, its neighbours read
    last = alpha + ((length + R - 1) % R).to(tl.int64) * wide + 2 * count
    a = tl.load(last, length > 0, other=float("-inf"))
    b = tl.load(last - 1, (length > 0) & (count > 0), other=float("-inf"))
    loss = -_added(a, b, float("-inf"))
    loss = tl.where((length == 0) & (count == 0), 0.0, loss)
    if nll is not None:
        tl.store(nll + n, loss)
        for t in range(length, T):
            tl.store(alpha + t.to(tl.int64) * wide + s, tl.full((BLOCK,), float("-inf"), tl.float32), s < wide)
    if ZERO:
        loss = tl.where(loss == float("inf"), 0.0, loss)
    if MEAN:
        loss /= tl.maximum(count, 1)
    tl.store(losses + n, loss.to(losses.dtype.element_ty))


@triton.jit
def _ctc_loss_given_kernel(
    x, targets, input_lengths, target_lengths, alpha, nll, rows, given, blanks, T, C, S, x_t, x_n, x_c, blank,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """given (N, T, S), blanks (N, T): the probabilities of labels and of the blank. rows: two a sequence."""
    n = tl.program_id(0).to(tl.int64)
    length = tl.load(input_lengths + n).to(tl.int32)
    count = tl.load(target_lengths + n).to(tl.int32)
    s = tl.arange(0, BLOCK)
    inside = s < 2 * count + 1
    targets += n * S
    label = _label(targets, s, inside, blank)
    after = _label(targets, s + 2, s + 2 < 2 * count + 1, blank)
    skips = (s + 2 < 2 * count + 1) & (label != after)
    x += n * x_n
    wide = 2 * S + 1
    rows += n * 2 * wide
    loss = tl.load(nll + n)
    for i in range(0, length):
        t = (length - 1 - i).to(tl.int64)
        v = _of_labels(x + t * x_t, label, C, inside, x_c)
        behind = rows + (t + 1) % 2 * wide + s
        a = tl.load(behind, inside & (i > 0), other=float("-inf"))
        b = tl.load(behind + 1, (s + 1 < 2 * count + 1) & (i > 0), other=float("-inf"))
        c = tl.load(behind + 2, skips & (i > 0), other=float("-inf"))
        start = tl.where(s >= 2 * count - 1, 0.0, float("-inf"))
        new = tl.where(inside, v + tl.where(i > 0, _added(a, b, c), start), float("-inf"))
        tl.store(rows + t % 2 * wide + s, new, s < wide)
        tl.debug_barrier()  # what one lane wrote, its neighbours read
        both = tl.load(alpha + (n * T + t) * wide + s, inside, other=float("-inf")) + new
        p = tl.where((both == float("-inf")) | (loss == float("inf")), 0.0, tl.exp(both + loss - v))
        odd = s % 2 == 1
        tl.store(given + (n * T + t) * S + s // 2, p, inside & odd)
        tl.store(blanks + n * T + t, tl.sum(tl.where(inside & (odd == 0), p, 0.0), 0))


@triton.jit
def _ctc_loss_backward_kernel(
    dy, x, targets, input_lengths, target_lengths, nll, given, blanks, dx, T, N, C, S, x_t, x_n, x_c, dy_step, scale, blank,
    MEAN: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    columns, tiles = tl.cdiv(C, BLOCK), tl.cdiv(T, ROWS)
    n = pid // columns // tiles
    t = pid // columns % tiles * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = pid % columns * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    length = tl.load(input_lengths + n)
    count = tl.load(target_lengths + n).to(tl.int32)
    live = t < length
    mask = live & (c < C)
    at = n * T + t
    total = tl.where(c == blank, tl.load(blanks + at, live, other=0.0), 0.0)
    for j in range(0, count):
        p = tl.load(given + at * S + j, live, other=0.0)
        total += tl.where(c == tl.load(targets + n * S + j), p, 0.0)
    g = tl.load(dy + n * dy_step).to(tl.float32) * scale
    if MEAN:
        g /= tl.maximum(count, 1)
    g = tl.where(tl.load(nll + n) == float("inf"), 0.0 if ZERO else float("nan"), g)
    v = tl.load(x + t * x_t + n * x_n + c * x_c, mask, other=0.0).to(tl.float32)
    slope = tl.where(live, (tl.exp(v) - total) * g, 0.0)
    tl.store(dx + (t * N + n) * C + c, slope.to(dx.dtype.element_ty), (t < T) & (c < C))


CTC_LOSS_BACKWARD = _configs.rows("ctc_loss_backward")


def ctc_loss_refuses(x: Any, targets: Any, *lengths: Any, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["ctc"] if 2 * targets.shape[1] + 1 > MOST else None


def _lanes(labels: int) -> dict:
    block = _tile.next_power_of_2(2 * labels + 1)
    return {"BLOCK": block, "num_warps": min(max(_tile.next_power_of_2(block // 128), 1), 16)}


def ctc_loss_forward(
    x: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    *,
    needs: tuple = (),
    blank: int = 0,
    zero_infinity: bool = False,
    reduction: str = "mean",
    empty: Any,
) -> tuple[tuple, dict]:
    (t, n, c), s = x.shape, targets.shape[1]
    rows = t if needs else 2
    alpha = empty((n, rows, 2 * s + 1), "float32")
    nll = empty((n,), "float32") if needs else None
    y = empty((n,) if reduction == "none" else (), x.dtype)
    losses = y if reduction == "none" else empty((n,), "float32")
    lengths = [_tile.dense(a, empty) for a in (targets, input_lengths, target_lengths)]
    _tile.launch(
        _ctc_loss_forward_kernel,
        (n,),
        *(x, *lengths, alpha, nll, losses, t, c, s, max(rows, 1), *x.stride(), blank),
        MEAN=reduction == "mean",
        ZERO=zero_infinity,
        **_lanes(s),
    )
    if reduction != "none":
        reduced(losses, None, y, None, n if reduction == "mean" else 1)
    given = {"x": x, "targets": targets, "input_lengths": input_lengths, "target_lengths": target_lengths}
    return (y,), given | {"alpha": alpha, "nll": nll} if needs else {}


def ctc_loss_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    blank: int = 0,
    zero_infinity: bool = False,
    reduction: str = "mean",
    empty: Any,
) -> tuple:
    x, targets, nll = saved["x"], saved["targets"], saved["nll"]
    (t, n, c), s = x.shape, targets.shape[1]
    lengths = [_tile.dense(a, empty) for a in (targets, saved["input_lengths"], saved["target_lengths"])]
    given, blanks = empty((n, t, s), "float32"), empty((n, t), "float32")
    rows = empty((n, 2, 2 * s + 1), "float32")
    _tile.launch(
        _ctc_loss_given_kernel,
        (n if t else 0,),
        *(x, *lengths, saved["alpha"], nll, rows, given, blanks, t, c, s, *x.stride(), blank),
        **_lanes(s),
    )
    dx = empty(x.shape, x.dtype)
    tile = _tile.flat_tile(CTC_LOSS_BACKWARD(_tile.device(x), c), c)
    _tile.launch(
        _ctc_loss_backward_kernel,
        (n * _tile.cdiv(t, tile["ROWS"]) * _tile.cdiv(c, tile["BLOCK"]),),
        *(_tile.dense(dys[0], empty), x, *lengths, nll, given, blanks, dx, t, n, c, s, *x.stride()),
        *(1 if reduction == "none" else 0, 1 / max(n, 1) if reduction == "mean" else 1.0, blank),
        MEAN=reduction == "mean",
        ZERO=zero_infinity,
        **tile,
    )
    return dx, None, None, None
