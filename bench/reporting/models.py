"""Whole models as a table and as a plot: each way beside plain torch."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gpulayers.bench.reporting import plots, tables

from gpulayers._table import amount

HEAD = (
    "model", "way", "ms", "least–most", "× plain", "GPU ms", "host ms", "launches", "layout copies", "peak", "loss",
    "error", "ready s",
)  # fmt: skip
FAILURES = ("model", "mode", "way", "precision", "status", "why there is no time")
NOTE = (
    "ms: a step of training, or a forward. GPU ms: in kernels. host ms: until the GPU has been given all. layout copies: "
    "passes that only bring an array into another memory layout, torch.compile's own not counted. loss: after the last "
    "step. error: of the network's outputs after the first steps, as a multiple of what is allowed."
)
COLOURS = {"plain": plots.COLOURS["torch"], "compiled": plots.COLOURS["torch.compile"]}
COLOURS |= {"patched": plots.COLOURS["triton"], "patched+compiled": plots.COLOURS["numpy"]}


def groups(whole: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by what they have in common, in words."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in whole["rows"]:
        found.setdefault(f"{row['mode']}, {row['precision']}", []).append(row)
    return {name: sorted(rows, key=lambda r: _first(rows, r["model"])) for name, rows in found.items()}


def _first(rows: Sequence[Mapping[str, Any]], model: str) -> int:
    return next(i for i, row in enumerate(rows) if row["model"] == model)


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for each row with a time."""
    timed = [row for row in rows if row["ms"] is not None]
    plain = {row["model"]: row["ms"] for row in timed if row["way"] == "plain"}
    return [_cells(row, plain.get(row["model"])) for row in timed]


def failures(whole: Mapping[str, Any]) -> list[list[str]]:
    """A line for each row without."""
    return [[row[name] for name in FAILURES[:-1]] + [row["reason"]] for row in whole["rows"] if row["ms"] is None]


def _cells(row: Mapping[str, Any], plain: float | None) -> list[str]:
    ms, peak = row["ms"], row["peak_bytes"]
    return [
        row["model"],
        row["way"],
        f"{ms:.1f}",
        f"{row['least_ms']:.1f}–{row['most_ms']:.1f}",
        "" if plain is None else f"{ms / plain:.2f}",
        _number(row["busy_ms"], ".1f"),
        _number(row["host_ms"], ".1f"),
        _number(row["launches"], ".0f"),
        _number(row["copies"], ".0f"),
        "" if peak is None else amount(peak),
        f"{row['losses'][-1]:.5f}",
        _number(row["error"], ".2f") or "not compared",
        f"{row['ready_s']:.1f}",
    ]


def _number(x: float | None, form: str) -> str:
    return "" if x is None else f"{x:{form}}"


def _titled(whole: Mapping[str, Any], group: str) -> str:
    size = "" if whole["size"] == "full" else f"{whole['size']} sizes, "
    return f"{group}: {size}{whole['about'].get('device')}"


def show(whole: Mapping[str, Any]) -> None:
    for group, rows in groups(whole).items():
        tables.show(HEAD, cells(rows), _titled(whole, group))
        print()
    if without := failures(whole):
        tables.show(FAILURES, without)
    print(NOTE)


def markdown(whole: Mapping[str, Any]) -> str:
    """The same tables, for a page."""
    parts = [
        f"{_titled(whole, group)}:\n\n{tables.markdown(HEAD, cells(rows))}" for group, rows in groups(whole).items()
    ]
    if without := failures(whole):
        parts.append(tables.markdown(FAILURES, without))
    return "\n\n".join([*parts, NOTE])


def draw(whole: Mapping[str, Any], path: pathlib.Path) -> pathlib.Path | None:
    """Time as a share of plain torch's, models by ways, into a PNG; None where nothing can be compared. Raises
    RuntimeError without matplotlib."""
    found = {group: shares for group, rows in groups(whole).items() if (shares := _shares(rows))}
    if not found:
        return None
    with plots.styled():
        from matplotlib.figure import Figure

        most = max(map(len, found.values()))
        figure = Figure(figsize=(1.5 + 4.5 * len(found), 1.6 + 0.9 * most), layout="constrained")
        figure.suptitle("Whole models: time as a share of plain torch's", x=0.01, ha="left", weight="bold")
        for axes, (group, shares) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
            _bars(axes, group, shares)
        handles = {label: bar for axes in figure.axes for bar, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2, frameon=False)
        figure.supxlabel(
            _titled(whole, whole["machine"]["date"][:10]), x=0.99, ha="right", fontsize=7, color=plots.PALE
        )
        figure.savefig(path, dpi=160)
    return path


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Model → way → (time over plain's, ms), of models with more than plain's time."""
    timed = [row for row in rows if row["ms"] is not None]
    plain = {row["model"]: row["ms"] for row in timed if row["way"] == "plain"}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for row in timed:
        if row["model"] in plain:
            found.setdefault(row["model"], {})[row["way"]] = row["ms"] / plain[row["model"]], row["ms"]
    return {model: ways for model, ways in found.items() if len(ways) > 1}


def _bars(axes: Any, group: str, shares: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    ways = [way for way in COLOURS if any(way in found for found in shares.values())]
    height = 0.8 / len(ways)
    for k, way in enumerate(ways):
        label = way
        for i, found in enumerate(shares.values()):
            if way in found:
                (share, ms), at = found[way], i + height * (k - (len(ways) - 1) / 2)
                axes.barh(at, 100 * share, height=0.9 * height, color=COLOURS[way], label=label)
                axes.text(100 * share, at, f" {ms:.3g} ms", va="center", fontsize=7)
                label = None
    axes.axvline(100, lw=0.8, ls=(0, (4, 3)), color="#30353B")
    axes.set(title=group, xlabel="% of plain torch's time", yticks=range(len(shares)), yticklabels=shares)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.tick_params(length=0)
