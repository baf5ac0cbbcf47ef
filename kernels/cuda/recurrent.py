"""Recurrent layers in CUDA C++: what ``recurrent.cu`` is launched with. Arrays are CuPy's (NumPy's while emulated).

One cooperative launch walks through all steps with the weights in shared memory: where they fit in that of all
multiprocessors. Where not, Triton's kernel a step serves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._budget import Budget
from .._recurrent import GATES
from . import _launch
from ._copy import dense

BY_DATA = True
"""How blocks wait for each other's part of the state: on its elements themselves, or at a barrier of all blocks."""
MODES = {name: number for number, name in enumerate(GATES)}
THREADS, SIDE, MOST_BATCH = 256, 64, 64
STATIC = 8 * 16 * 33 * 4
"""Bytes of shared memory beside the weights."""
REFUSALS = {
    "projection": "a projected state takes a kernel a step",
    "batch": "more than 64 sequences are a product a step",
    "shared": "the recurrent weights do not fit in the multiprocessors' shared memory",
}
BUDGETS = {
    # Units are a few of a row. One block has a multiprocessor for itself; in 16 bits sm_100's compiler takes 207.
    "recurrent_forward_*": Budget(registers=208, blocks=1, threads=THREADS, narrow="loads, stores"),
    "recurrent_backward_*": Budget(registers=168, blocks=1, threads=THREADS, narrow="loads, stores"),
    "recurrent_begin": Budget(registers=32, blocks=8, threads=THREADS, narrow="stores"),
    "recurrent_weights_*": Budget(registers=128, blocks=2, threads=THREADS, narrow="loads, stores"),
    "recurrent_biases_*": Budget(registers=48, blocks=5, threads=THREADS, narrow="loads, stores"),
}


def slice_bytes(rows: int, n: int, size: int) -> int:
    """Of the rows of weights that a block keeps, as ``fill`` lays them out."""
    whole = -(-n // 32) * 32
    return -(-rows // 8) * 8 * size * (whole + 4 if size == 4 else whole + 32 * (whole % 64 == 0))


def _shared(mode: str, hidden: int, units: int, size: int) -> tuple[int, int]:
    """Bytes of dynamic shared memory of a block, forward and backward."""
    return slice_bytes(GATES[mode] * units, hidden, size), slice_bytes(units, GATES[mode] * hidden, size)


def _units(hidden: int, multiprocessors: int) -> int:
    """Hidden units of a block."""
    return -(-hidden // max(1, min(multiprocessors, hidden)))


def recurrent_refuses(
    x: Any, weight: Any, h0: Any, c0: Any = None, bias: Any = None, projection: Any = None, lengths: Any = None,
    *, needs: tuple = (), mode: str, reverse: bool = False,
) -> str | None:  # fmt: skip
    if projection is not None:
        return REFUSALS["projection"]
    if x.shape[1] > MOST_BATCH:
        return REFUSALS["batch"]
    multiprocessors, room = _launch.figures()
    hidden = max(1, weight.shape[1])
    need = max(_shared(mode, hidden, _units(hidden, multiprocessors), x.dtype.itemsize))
    return REFUSALS["shared"] if need + STATIC > room else None


def _begin(waited: Any, empty: Any) -> Any:
    """The counter of barriers; or, of what is waited for by its elements, each made one that none can be."""
    arrived = empty((1,), "uint32")
    count = waited.nbytes if BY_DATA else 0
    grid = (max(1, min(1024, -(-count // (16 * THREADS)))),)
    args = waited.view("uint8") if waited.size else waited, arrived, np.int64(count), np.int32(BY_DATA)
    _launch.launch("recurrent", "recurrent_begin", grid, (THREADS,), args, only=str(waited.dtype))
    return arrived


def _loop(name: str, arrays: tuple, sizes: tuple, mode: str, flags: int, backward: bool) -> None:
    steps, batch, hidden = sizes
    units = _units(hidden, _launch.figures()[0])
    shared = _shared(mode, hidden, units, arrays[0].itemsize)[backward]
    numbers = [np.int32(n) for n in (steps, batch, hidden, units, MODES[mode], flags)]
    grid = (-(-hidden // units),)
    _launch.launch("recurrent", name, grid, (THREADS,), (*arrays, *numbers), shared, str(arrays[0].dtype), True)


def _flags(reverse: bool, **given: Any) -> int:
    """As ``Flag`` in recurrent.cu has them."""
    names = ("bias", "lengths", "saves", "dy", "dh", "dc")
    return BY_DATA + 2 * reverse + sum(4 << i for i, n in enumerate(names) if given.get(n) is not None)


def recurrent_forward(
    x: Any, weight: Any, h0: Any, c0: Any = None, bias: Any = None, projection: Any = None, lengths: Any = None,
    *, needs: tuple = (), mode: str, reverse: bool = False, empty: Any,
) -> tuple[tuple, dict]:  # fmt: skip
    (steps, batch, _), hidden, dtype = x.shape, weight.shape[1], x.dtype
    lstm, many = mode == "lstm", steps if needs else 1
    y, h_n = empty((steps, batch, hidden), dtype), empty((batch, hidden), dtype)
    c_n = empty((batch, hidden) if lstm else (0,), dtype)
    cells = empty((many, batch, hidden) if lstm else (0,), "float32")
    gates = empty((steps, batch, 4 * hidden) if needs and GATES[mode] > 1 else (0,), dtype)
    if y.size:
        none, no_lengths = empty((0,), dtype), empty((0,), "int64")
        xs = [none if a is None else dense(a, None, empty) for a in (x, weight, bias, h0, c0)]
        arrays = (
            *xs,
            no_lengths if lengths is None else dense(lengths, None, empty),
            y,
            gates,
            cells,
            h_n,
            c_n,
            _begin(y, empty),
        )
        flags = _flags(reverse, bias=bias, lengths=lengths, saves=needs or None)
        _loop(f"recurrent_forward_{dtype}", arrays, (steps, batch, hidden), mode, flags, False)
    outputs = (y, h_n, c_n) if lstm else (y, h_n)
    if not needs:
        return outputs, {}
    saved = {"weight": weight, "h0": h0, "y": y} | ({"c0": c0, "cells": cells} if lstm else {})
    saved |= {"gates": gates} if GATES[mode] > 1 else {}
    return outputs, saved | ({} if lengths is None else {"lengths": lengths})


def recurrent_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, mode: str, reverse: bool = False, empty: Any
) -> tuple:
    weight, y, lengths = saved["weight"], saved["y"], saved.get("lengths")
    (steps, batch, rows), hidden, dtype = inputs[0].shape, weight.shape[1], y.dtype
    dy, dh_n, dc_n = (*dys, None)[:3]
    dx, dh0, dc0 = empty((steps, batch, rows), dtype), empty((batch, hidden), dtype), empty((batch, hidden), dtype)
    dz = empty(dx.shape, dtype) if mode == "gru" else dx
    h0 = dense(saved["h0"], None, empty)
    if y.size:
        none, nothing, no_lengths = empty((0,), dtype), empty((0,), "float32"), empty((0,), "int64")
        ready = [none if a is None else dense(a, None, empty) for a in (dy, dh_n, dc_n, weight, y, saved.get("gates"))]
        c0 = none if "c0" not in saved else dense(saved["c0"], None, empty)
        carry, dc = (empty((batch, hidden), "float32") for _ in range(2))
        arrays = (
            *ready, saved.get("cells", nothing), h0, c0, no_lengths if lengths is None else dense(lengths, None, empty),
            dx, dz, dh0, dc0, carry, dc, _begin(dz, empty),
        )  # fmt: skip
        flags = _flags(reverse, lengths=lengths, dy=dy, dh=dh_n, dc=dc_n)
        _loop(f"recurrent_backward_{dtype}", arrays, (steps, batch, hidden), mode, flags, True)
    dw, db = (empty(inputs[i].shape, dtype) if n in needs else None for n, i in (("weight", 1), ("bias", 4)))
    count = np.int64(steps * batch)
    if dw is not None:
        grid, numbers = (-(-hidden // SIDE), -(-rows // SIDE)), (np.int32(batch), np.int32(rows), np.int32(hidden))
        args = dz, dense(y, None, empty), h0, dw, count, *numbers, bool(reverse)
        _launch.launch("recurrent", f"recurrent_weights_{dtype}", grid, (THREADS,), args, only=str(dtype))
    if db is not None:
        _launch.launch(
            "recurrent", f"recurrent_biases_{dtype}", (-(-rows // 32),), (32, 8), (dz, db, count, np.int32(rows))
        )
    of_states = [a if n in needs else None for n, a in (("h0", dh0), ("c0", dc0))]
    return dx if "x" in needs else None, dw, *of_states, db, None, None
