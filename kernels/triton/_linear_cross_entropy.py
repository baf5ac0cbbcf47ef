"""Cross entropy of a linear layer's outputs: logits of some tokens at a time, whose gradient takes their place.

For each chunk of tokens: the product that makes their logits; one pass over these, a token a program, that finds log Σ exp
and the loss and writes the gradient over them; and the products that make dx and add to dweight. There are few chunks, since
each rounds dweight once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _matmul, _tile
from ._classes import label_of, reduced
from ._tile import rows_tile
from .activation import _tanh

BUDGETS = {
    "_label_shares_kernel": Budget(registers=48, blocks=10, narrow="loads, stores"),
    # A few numbers a token; logits of a length that 16 does not divide.
    "_linear_cross_entropy_kernel": Budget(registers=128, blocks=2, narrow="loads, stores"),
    "_column_sums_kernel": Budget(registers=96, blocks=5, narrow="loads, stores"),
    "_mean_kernel": Budget(registers=48, blocks=10, narrow="loads, stores"),
    "_scaled_kernel": Budget(registers=48, blocks=10, narrow="loads"),
}
MOST_CHUNKS = 6
"""So that their logits, of 8K tokens, are less than a tenth of all logits and their gradients."""
LEAST_TOKENS = 128
MOST_WHOLE = 4096


@triton.jit
def _label_shares_kernel(target, weight, shares, M, C, ignore_index, BLOCK: tl.constexpr):
    """Each token's part of what a mean divides by."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, _, _, share = label_of(target + m, weight, m < M, C, ignore_index)
    tl.store(shares + m, share, m < M)


@triton.jit
def _logits(z, c, mask, cap, CAP: tl.constexpr):
    v = tl.load(z + c, mask, other=float("-inf")).to(tl.float32)
    if CAP:
        v = tl.where(mask, cap * _tanh(v / cap), float("-inf"))
    return v


@triton.jit
def _spread(weight, c, mask, smooth):
    """What each class has of every target: ε / C by its weight."""
    q = smooth + tl.zeros(c.shape, tl.float32)
    if weight is not None:
        w = tl.load(weight + c, mask, other=0.0).to(tl.float32)
        q = tl.where(q == 0, 0.0, q * w)
    return tl.where(mask, q, 0.0)


@triton.jit
def _linear_cross_entropy_kernel(
    z, target, weight, dy, total, losses, C, dy_step, ignore_index, keep, smooth, z_loss, cap, unit,
    GRAD: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's loss; and its logits become their gradient: dy · unit · (softmax · mass − q), NaN where total is 0."""
    m = tl.program_id(0).to(tl.int64)
    z += m * C
    at = m + tl.zeros((1,), tl.int64)
    label, counts, valid, share = label_of(target + at, weight, at >= 0, C, ignore_index)
    top, shift = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    sums, seen, dot = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = c < C
        v = _logits(z, c, mask, cap, CAP)
        new = tl.maximum(top, tl.max(v, 0))
        to = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(top - to) + tl.sum(tl.exp(v - to), 0)
        q = _spread(weight, c, mask, smooth)
        dot += (shift - to) * seen + tl.sum(tl.where(mask, q * (v - to), 0.0), 0)
        seen += tl.sum(q, 0)
        top, shift = new, to
    over = tl.log(sums)
    hit = tl.load(z + label, valid, other=0.0).to(tl.float32)
    if CAP:
        hit = cap * _tanh(hit / cap)
    lse = over + shift
    loss = keep * share * (over - (hit - shift)) + over * seen - dot + z_loss * lse * lse
    if losses is not None:
        tl.store(losses + at, tl.where(counts, loss, 0.0).to(losses.dtype.element_ty))
    if GRAD:
        scale = tl.zeros((1,), tl.float32) + unit
        if dy is not None:
            scale *= tl.load(dy + at * dy_step).to(tl.float32)
        if total is not None:
            scale = tl.where(tl.load(total) == 0, float("nan"), scale)
        mass = keep * share + seen + 2 * z_loss * lse
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            mask = c < C
            v = _logits(z, c, mask, cap, CAP)
            q = _spread(weight, c, mask, smooth) + tl.where(c == label, keep * share, 0.0)
            g = scale * (tl.exp(v - lse) * mass - q)
            if CAP:
                g *= 1 - (v / cap) * (v / cap)
            tl.store(z + c, tl.where(counts, g, 0.0).to(z.dtype.element_ty), mask)


@triton.jit
def _column_sums_kernel(x, sums, out, M, N, FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sums = Σ rows of x, after what is there; rounded to out, where that is wanted."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, M, ROWS):
        m = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        acc += tl.load(x + m * N + n, (m < M) & (n < N), other=0.0).to(tl.float32)
    total = tl.sum(acc, 0, keep_dims=True)
    if not FIRST:
        total += tl.load(sums + n, n < N, other=0.0)
    tl.store(sums + n, total, n < N)
    if out is not None:
        tl.store(out + n, total.to(out.dtype.element_ty), n < N)


@triton.jit
def _mean_kernel(losses, total, y, M, BLOCK: tl.constexpr):
    """y = Σ losses / total, by one program."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, M, BLOCK):
        i = start + tl.arange(0, BLOCK)
        acc += tl.load(losses + i, i < M, other=0.0)
    tl.store(y, (tl.sum(acc, 0) / tl.load(total)).to(y.dtype.element_ty))


@triton.jit
def _scaled_kernel(x, dy, total, y, M, N, unit, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = x · dy / (total · unit), one number."""
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    by = tl.load(dy).to(tl.float32) / unit
    if total is not None:
        count = tl.load(total)
        by /= tl.where(count == 0, 1.0, count)  # over nothing they are 0, or NaN already
    v = tl.load(x + row * N + n, mask, other=0.0).to(tl.float32) * by
    tl.store(y + row * N + n, v.to(y.dtype.element_ty), mask)


LOGITS = _configs.rows("linear_cross_entropy")
SCALED = _configs.rows("linear_cross_entropy.scaled")


def tokens_at_once(n: int) -> int:
    """Tokens whose logits are there at the same time."""
    return max(LEAST_TOKENS, -(-n // (MOST_CHUNKS * 64)) * 64)


def unit_of(n: int) -> float:
    """What a token counts in the gradients that are kept of so many: in float16 neither vanish the shares of rare classes,
    nor are sums over many tokens infinite."""
    return min(1.0, MOST_WHOLE / _tile.next_power_of_2(n))


class _Call:
    """A pass over all tokens."""

    def __init__(self, x: Any, weight: Any, target: Any, bias: Any, class_weight: Any, how: dict[str, Any], empty: Any):
        self.features = weight.shape[1]
        self.x = _tile.dense(x, empty).view(target.numel(), self.features)
        self.weight, self.empty, self.how = weight, empty, how
        self.target = _tile.dense(target, empty).view((target.numel(),))
        self.bias, self.class_weight = (None if v is None else _tile.dense(v, empty) for v in (bias, class_weight))

    def run(self, losses: Any, dy: Any, total: Any, unit: float, dx: Any, dweight: Any, dbias: Any) -> None:
        """Writes the losses and the gradients that are not None; dy, unit: what each loss counts there."""
        n, classes, empty, how = self.x.shape[0], self.weight.shape[0], self.empty, self.how
        chunk = tokens_at_once(n)
        grad = not (dx is None and dweight is None and dbias is None)
        logits = empty((min(chunk, n), classes), self.x.dtype)
        sums = None if dbias is None else empty((classes,), "float32")
        entry, smoothing = LOGITS(_tile.device(self.x), classes), how["label_smoothing"]
        block = entry.elements // 2 if how["softcap"] else entry.elements  # the cap takes registers
        numbers = (
            how["ignore_index"],
            1 - smoothing,
            smoothing / max(classes, 1),
            how["z_loss"],
            how["softcap"] or 1.0,
            unit,
        )
        for start in range(0, max(n, 1), chunk):  # of no tokens sums are 0, too
            end = min(start + chunk, n)
            x, z = self.x[start:end], logits[: end - start]
            _matmul.matmul(x, self.weight, z, empty, bias=self.bias)
            each = dy is not None and dy.numel() > 1
            _tile.launch(
                _linear_cross_entropy_kernel, (end - start,), z, self.target[start:end], self.class_weight,
                dy[start:end] if each else dy, total, None if losses is None else losses[start:end], classes, int(each),
                *numbers, GRAD=grad, CAP=how["softcap"] > 0, BLOCK=min(block, _tile.next_power_of_2(classes)),
                num_warps=entry.warps,
            )  # fmt: skip
            if dx is not None:
                _matmul.matmul(z, self.weight.T, dx[start:end], empty)
            if dweight is not None:
                _matmul.matmul(z.T, x.T, dweight, empty, add=start > 0, weights=True)
            if dbias is not None:
                _tile.launch(
                    _column_sums_kernel, (_tile.cdiv(classes, 128),), z, sums, dbias if end == n else None, end - start,
                    classes, FIRST=start == 0, ROWS=16, BLOCK=128, num_warps=4,
                )  # fmt: skip

    def total(self) -> Any:
        """What a mean divides by."""
        n, empty = self.target.numel(), self.empty
        shares, total, one = empty((n,), "float32"), empty((), "float32"), empty((), "float32")
        _tile.launch(
            _label_shares_kernel, (_tile.cdiv(n, 512),), self.target, self.class_weight, shares, n, self.weight.shape[0],
            self.how["ignore_index"], BLOCK=512, num_warps=4,
        )  # fmt: skip
        reduced(shares, shares, one, total, 1)
        return total


def linear_cross_entropy_forward(
    x: Any,
    weight: Any,
    target: Any,
    bias: Any = None,
    class_weight: Any = None,
    *,
    needs: tuple = (),
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
    softcap: float,
    wide: bool = False,
    empty: Any,
) -> tuple[tuple, dict]:
    how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    call = _Call(x, weight, target, bias, class_weight, how, empty)
    n, kind = target.numel(), "float32" if wide else x.dtype
    given = {"x": x, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    saved = {k: v for k, v in given.items() if v is not None} if needs else {}
    if reduction == "none":
        y = empty(target.shape, kind)
        call.run(y.view((n,)), None, None, 1.0, None, None, None)
        return (y,), saved
    y, losses = empty((), kind), empty((n,), "float32")
    total = call.total() if reduction == "mean" else None
    shapes = {"x": x.shape, "weight": weight.shape, "bias": weight.shape[:1]}
    grads = {name: empty(tuple(shape), x.dtype) for name, shape in shapes.items() if name in needs}
    dx = grads["x"].view(n, weight.shape[1]) if "x" in grads else None
    call.run(losses, None, total, unit_of(n), dx, grads.get("weight"), grads.get("bias"))
    if total is None:
        reduced(losses, None, y, None, 1)
    else:
        _tile.launch(_mean_kernel, (1,), losses, total, y, n, BLOCK=1024, num_warps=4)
    saved |= {f"d{name}": g for name, g in grads.items()}
    return (y,), saved | ({"total": total} if needs and total is not None else {})


def _scaled(x: Any, dy: Any, total: Any, unit: float, empty: Any) -> Any:
    y = empty(x.shape, x.dtype)
    walk = _tile.pointwise(SCALED, None, x, y, empty=empty)
    _tile.launch(
        _scaled_kernel, walk.grid, walk.arrays[0], dy, total, walk.arrays[1], walk.M, walk.N, unit, **walk.tile
    )
    return y


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
    empty: Any,
) -> tuple:
    (dy,), names = dys, ("x", "weight", "target", "bias", "class_weight")
    if reduction != "none":
        by = dy, saved.get("total"), unit_of(saved["target"].numel())
        return tuple([_scaled(saved[f"d{n}"], *by, empty) if n in needs else None for n in names])
    how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    call = _Call(saved["x"], saved["weight"], saved["target"], saved.get("bias"), saved.get("class_weight"), how, empty)
    grads = [None if s is None or n not in needs else empty(s.shape, s.dtype) for n, s in zip(names, inputs)]
    dx = None if grads[0] is None else grads[0].view(saved["target"].numel(), inputs[1].shape[1])
    call.run(None, _tile.dense(dy, empty).view((dy.numel(),)), None, 1.0, dx, grads[1], grads[3])
    return tuple(grads)
