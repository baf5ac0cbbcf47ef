"""Measures an op of one's own, on the path that the library's ops are measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpulayers.bench.cases.case import Case
from gpulayers.bench.cases.providers import providers
from gpulayers.bench.measuring.device import device
from gpulayers.bench.measuring.harness import Measurement, measure
from gpulayers.bench.measuring.records import Row, machine
from gpulayers.bench.reporting.tables import show_results

from gpulayers import arrays
from gpulayers.ops._op import Op
from gpulayers.testing.arena import has_gpu


def bench_op(
    op: Op,
    *shapes: Any,
    torch: Callable | None = None,
    flops: int = 0,
    dtypes: Sequence[Any] = ("float32", "bfloat16"),
    on: str = "",
    rounds: int | None = None,
    show: bool = True,
    **options: Any,
) -> list[Row]:
    """Measure forward, backward and both of a call, each backend that the op has beside torch; prints a table.

    shapes: one for each input. torch: the same function of tensors, to compare with, eager and compiled. flops: of the
    forward pass, where arithmetic may bound it. on: "cuda" or "cpu", where the definition runs; by default a GPU if there
    is one. rounds: turns of each provider. Returns a row for each; what is wrong has no time.
    """
    place = device(on or ("cuda" if has_gpu() else "cpu"))
    case = Case(op, " and ".join(str(list(s)) for s in shapes if s is not None), shapes, options, torch, flops)
    limits, rows = place.limits(), []
    for dtype in map(arrays.dtype, dtypes):
        rows += measure(Measurement(op.family, case, dtype, place, limits), providers(case, place), rounds)
    if show:
        show_results({"schema": 1, "machine": machine(), "processes": [], "rows": rows, "deaths": {}})
    return rows
