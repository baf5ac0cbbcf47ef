"""Layer norm in CUDA C++: what ``norm.cu`` is launched with. Arrays are CuPy's (NumPy's while emulated).

They serve where Triton or torch is not installed; where both are, Triton's kernels are faster and stand first.
"""

from __future__ import annotations

import math
from typing import Any

from .._budget import Budget
from . import _launch
from ._copy import dense

CACHED = 16384
"""The longest row that a block keeps in shared memory."""

THREADS = 512
"""Of a block, at most."""

BUDGETS = {
    "layer_norm_forward_*": Budget(registers=48, blocks=1, threads=THREADS, shared=4 * CACHED),
    "layer_norm_backward_*": Budget(registers=72, blocks=1, threads=THREADS),
    "add_up_*": Budget(registers=40, blocks=6, threads=256),
}


def _block(x: Any, n: int, *arrays: Any) -> tuple[int, str]:
    """(threads, "packs" or "items"): packs of as many elements as 16 bytes of x hold, where all arrays' are aligned."""
    pack = 16 // x.itemsize
    aligned = n % pack == 0 and all(
        _launch.pointer(a) % (pack * a.itemsize) == 0 for a in (x, *arrays) if a is not None
    )
    packs = -(-n // pack) if aligned else n
    return min(THREADS, max(32, 1 << (packs - 1).bit_length())), "packs" if aligned else "items"


def _blocks(x: Any, rows: int, threads: int) -> int:
    """Blocks that fill the GPU, and so the rows of partial sums: their number does not follow that of x's rows."""
    return min(rows, _launch.resident_blocks(x, threads))


def layer_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float = 1e-5,
    empty: Any,
) -> tuple[tuple, dict]:
    lead, n = x.shape[: x.ndim - len(normalized_shape)], math.prod(normalized_shape)
    y = empty(x.shape, x.dtype)
    mean, rstd = (empty(lead if needs else (0,), "float32") for _ in range(2))
    given = next((p for p in (weight, bias) if p is not None), None)
    dtype = x.dtype if given is None else given.dtype
    none = empty((0,), dtype)
    full, w, b = dense(x, None, empty), dense(weight, None, empty), dense(bias, None, empty)
    threads, moves = _block(full, n, y, w, b)
    cached = n <= CACHED
    _launch.launch(
        "norm",
        f"layer_norm_forward_{x.dtype}_{dtype}_{moves}",
        (math.prod(lead),),
        (threads,),
        (
            *(full, none if w is None else w, none if b is None else b, y, mean, rstd, n, float(eps)),
            *(w is not None, b is not None, bool(needs), cached),
        ),
        4 * n if cached else 0,
    )
    saved = {"x": x, "mean": mean, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y,), saved if needs else {}


def layer_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: tuple,
    eps: float = 1e-5,
    empty: Any,
) -> tuple:
    n = math.prod(normalized_shape)
    x, dy, weight = (dense(a, None, empty) for a in (saved["x"], dys[0], saved.get("weight")))
    rows = x.size // n if n else 0
    dx = empty(x.shape if "x" in needs else (0,), x.dtype)
    dtype = x.dtype if weight is None else weight.dtype
    threads, moves = _block(x, n, dy, weight, dx)
    blocks = _blocks(x, rows, threads)
    partials = [empty((blocks, n) if name in needs else (0,), "float32") for name in ("weight", "bias")]
    _launch.launch(
        "norm",
        f"layer_norm_backward_{x.dtype}_{dtype}_{moves}",
        (blocks,),
        (threads,),
        (
            *(dy, x, empty((0,), dtype) if weight is None else weight, saved["mean"], saved["rstd"], dx, *partials),
            *(rows, n, weight is not None, "x" in needs, "weight" in needs, "bias" in needs),
        ),
    )
    grads = []
    for name, of, partial in zip(("weight", "bias"), inputs[1:], partials):
        grads.append(empty(of.shape, of.dtype) if name in needs else None)
        if name in needs:
            grid = (-(-n // 32),)
            _launch.launch("norm", f"add_up_{of.dtype}", grid, (32, 8), (partial, grads[-1], blocks, n))
    return dx if "x" in needs else None, *grads
