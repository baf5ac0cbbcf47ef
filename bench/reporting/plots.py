"""Results as plots: the share of the limit by op, and time over size. Needs matplotlib."""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from gpulayers.bench.measuring.records import Results, Row
from gpulayers.bench.measuring.timing import geometric_mean
from gpulayers.bench.reporting.tables import call

COLOURS = {  # Okabe and Ito's, that colour-blind people tell apart
    "triton": "#0072B2",
    "cuda": "#009E73",
    "numpy": "#56B4E9",
    "definition": "#8A8F98",
    "torch": "#D55E00",
    "torch.compile": "#CC79A7",
    "cudnn": "#E69F00",
    "liger": "#6B4C9A",
}
_OTHER, _INK, _FAINT, PALE = "#B9BEC6", "#30353B", "#E3E6EA", "#6B7178"
_MANY = 8
LAUNCH_US = 10.0
"""What must take less by its limit is bound by its launch: its share of the limit says nothing of the kernel."""
_STYLE = {
    "font.size": 9, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.edgecolor": _OTHER, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlesize": 10, "figure.titlesize": 12, "savefig.facecolor": "white", "axes.axisbelow": True,
}  # fmt: skip


def colour(provider: str) -> str:
    return COLOURS.get(provider, "#777777")


def styled() -> contextlib.AbstractContextManager:
    """Within, figures look as ours do. Raises RuntimeError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError('plots need matplotlib (pip install "gpulayers[demo]")') from None
    return matplotlib.rc_context(_STYLE)


def write(results: Results, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw what the results allow into PNG files; their paths. Raises RuntimeError without matplotlib."""
    rows = [r for r in results["rows"] if r["us"] is not None]
    written: list[pathlib.Path] = []
    with styled():
        drawn: dict[str, Any] = {}
        for name, some in _by_family(rows).items():
            drawn[name] = _shares(some, f"Share of the limit, {some[0]['dtype']}", _title(results))
        for op, some in _sweeps(rows).items():
            drawn[f"sweep-{op}"] = _sweep(some, _title(results))
        for name, figure in drawn.items():
            if figure is not None:
                figure.savefig(path := folder / f"{name}.png", dpi=160)
                written.append(path)
    return written


def _by_family(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of the first dtype, by the name of their plot: a family of many ops has its own."""
    found: dict[str, list[Row]] = {}
    ops = {family: {r["op"] for r in rows if r["family"] == family} for family in {r["family"] for r in rows}}
    for r in rows:
        if r["dtype"] == rows[0]["dtype"]:
            name = f"share-{r['family']}" if len(ops[r["family"]]) >= _MANY else "share"
            found.setdefault(name, []).append(r)
    return found


def _sweeps(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Op → its sweep's rows, of the first dtype and the first sweep: a line has one time at a size."""
    found: dict[str, list[Row]] = {}
    for r in rows:
        if r["sweep"]:
            there = found.setdefault(r["op"], [r])
            if r is not there[0] and (r["dtype"], r["sweep"]) == (there[0]["dtype"], there[0]["sweep"]):
                there.append(r)
    return found


def _title(results: Results) -> str:
    process = results["processes"][-1]
    return f"{process['about'].get('device')}, {process['started'][:10]}"


def bandwidth_bound(row: Row) -> bool:
    """Whether its limit, not its launch, says how long it takes."""
    return row["limit_us"] >= LAUNCH_US


# --- the share of the limit ------------------------------------------------------------------------------------------


def best(rows: Iterable[Row]) -> dict[tuple, tuple[Row | None, Row | None]]:
    """(op, case, dtype, direction) → (the fastest of ours, the fastest of the others)."""
    found: dict[tuple, tuple[Row | None, Row | None]] = {}
    for r in rows:
        if r["us"] is None:
            continue
        mine, theirs = found.get(call(r), (None, None))
        now = mine if r["ours"] else theirs
        if now is None or r["us"]["p50"] < now["us"]["p50"]:  # type: ignore[index]
            mine, theirs = (r, theirs) if r["ours"] else (mine, r)
        found[call(r)] = mine, theirs
    return found


def _shares(rows: Sequence[Row], heading: str, title: str) -> Any:
    """Bars: each op's geometric mean over its cases, ours and the best other's."""
    from matplotlib.figure import Figure

    pairs = {k: v for k, v in best(filter(bandwidth_bound, rows)).items() if v[0] and v[1]}
    ops = list(dict.fromkeys(k[0] for k in pairs))
    if not ops:
        return None
    figure = Figure(figsize=(9, 1.5 + 0.36 * len(ops)), layout="constrained")
    figure.suptitle(heading, x=0.01, ha="left", weight="bold")
    both = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, direction in zip(both, ("forward", "backward")):
        for who, (label, shade) in enumerate((("gpulayers", COLOURS["triton"]), ("the fastest other", _OTHER))):
            for i, op in enumerate(ops):
                found = [v[who]["share"] for k, v in pairs.items() if k[0] == op and k[3] == direction]  # type: ignore[index]
                if not found:
                    continue
                share, at = geometric_mean(found) * 100, i + 0.19 * (2 * who - 1)
                axes.barh(at, share, height=0.34, color=shade, label=label if i == 0 else None)
                axes.text(share + 1, at, f"{share:.0f}", va="center", fontsize=7, color=_INK)
        axes.set(title=direction, xlabel="% of the limit", yticks=range(len(ops)), yticklabels=ops)
        axes.axvline(100, color=_INK, lw=0.8, ls=(0, (4, 3)))
        axes.grid(axis="x", color=_FAINT, lw=0.8)
        axes.tick_params(length=0)
    both[0].set(xlim=(0, max(112.0, both[0].get_xlim()[1] * 1.06)), ylim=(len(ops) - 0.4, -0.6))
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.supxlabel(title, x=0.99, ha="right", fontsize=7, color=PALE)
    return figure


# --- time over size --------------------------------------------------------------------------------------------------


def _sweep(rows: Sequence[Row], title: str) -> Any:
    """One line a provider, forward and backward; the limit dashed."""
    from matplotlib.figure import Figure

    directions = [d for d in ("forward", "backward") if any(r["direction"] == d for r in rows)]
    figure = Figure(figsize=(4.9 * len(directions), 4.0), layout="constrained")
    figure.suptitle(f"{rows[0]['op']}: time over size, {rows[0]['dtype']}", x=0.01, ha="left", weight="bold")
    for axes, direction in zip(figure.subplots(1, len(directions), sharey=True, squeeze=False)[0], directions):
        found = [r for r in rows if r["direction"] == direction]
        ends = []
        for provider in dict.fromkeys(r["provider"] for r in found):
            line = sorted((r for r in found if r["provider"] == provider), key=lambda r: r["size"])
            sizes = [r["size"] for r in line]
            times = [[r["us"][q] for r in line] for q in ("p50", "p20", "p80")]  # type: ignore[index]
            axes.fill_between(sizes, times[1], times[2], color=colour(provider), alpha=0.15, lw=0)
            axes.plot(sizes, times[0], "o-", color=colour(provider), lw=1.6, ms=3.5)
            ends.append((times[0][-1], provider, colour(provider)))
        limit = dict(sorted((r["size"], r["limit_us"]) for r in found))
        axes.plot([*limit], [*limit.values()], color=_INK, lw=1, ls=(0, (4, 3)))
        ends.append(([*limit.values()][-1], "limit", _INK))
        axes.set(xscale="log", yscale="log", title=direction, xlabel=found[0]["sweep"])
        axes.set_xticks([*limit], [_short(n) for n in limit], minor=False)
        axes.minorticks_off()
        axes.grid(color=_FAINT, lw=0.8)
        axes.tick_params(length=0)
        _label_ends(axes, max(limit), ends)
    figure.axes[0].set_ylabel("µs")
    figure.supxlabel(title, x=0.99, ha="right", fontsize=7, color=PALE)
    return figure


def _short(n: int) -> str:
    """65536 → "64K"."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def _label_ends(axes: Any, x: float, ends: list[tuple[float, str, str]]) -> None:
    """Names right of the lines' ends, pushed apart until none covers another."""
    low, high = map(math.log, axes.get_ylim())
    ends = sorted(ends)
    for (_, name, shade), at in zip(ends, apart([math.log(y) for y, *_ in ends], (high - low) * 0.06)):
        axes.annotate(
            name, (x, math.exp(at)), xytext=(8, 0), textcoords="offset points", va="center", color=shade, fontsize=8.5,
            annotation_clip=False, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.22)  # room for the names


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, moved as little as keeps ``gap`` between neighbours."""
    groups = [[p, 1] for p in places]  # (middle, how many), each group laid out around its middle
    i = 0
    while i + 1 < len(groups):
        (a, n), (b, m) = groups[i], groups[i + 1]
        if b - a >= gap * (n + m) / 2:
            i += 1
            continue
        groups[i : i + 2] = [[(a * n + b * m) / (n + m), n + m]]
        i = max(0, i - 1)
    return [middle + gap * (k - (n - 1) / 2) for middle, n in groups for k in range(int(n))]
