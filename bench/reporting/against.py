"""Generated kernels beside hand-written ones and beside the array code that they come from, in a line an op."""

from __future__ import annotations

from collections.abc import Sequence

from gpulayers.bench.cases.case import BESIDE
from gpulayers.bench.measuring.records import Row
from gpulayers.bench.measuring.timing import geometric_mean
from gpulayers.bench.reporting.tables import fastest

AT_MOST, AT_LEAST = 1.15, 3.0
"""The goals: what a generated kernel may take of a hand-written one's time, and how many times longer array code takes."""
HEAD = ("op", "dtype", "direction", "generated / hand-written", "array code / generated")


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells for ``HEAD``: geometric means over the sizes, and whether they keep the goals; – where one was not measured."""
    times = fastest(r for r in rows if r["family"] in BESIDE)
    found: dict[tuple[str, str, str], tuple[list[float], list[float]]] = {}
    for (op, _, dtype, direction), us in times.items():
        slower, faster = found.setdefault((op, dtype, direction), ([], []))
        if "triton" in us and "hand-written" in us:
            slower.append(us["triton"] / us["hand-written"])
        if "triton" in us and "array code" in us:
            faster.append(us["array code"] / us["triton"])
    return [
        [*key, _said(slower, most=AT_MOST), _said(faster, least=AT_LEAST)] for key, (slower, faster) in found.items()
    ]


def _said(ratios: Sequence[float], most: float = float("inf"), least: float = 0.0) -> str:
    if not ratios:
        return "–"
    mean = geometric_mean(ratios)
    goal = f"at most {most}" if most < float("inf") else f"at least {least:.0f}"
    return f"{mean:.2f} ({goal}: {'kept' if least <= mean <= most else 'missed'})"
