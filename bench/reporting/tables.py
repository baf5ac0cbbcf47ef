"""Results as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpulayers.bench.measuring.records import Results, Row

from gpulayers._table import amount, table


def show(head: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print a table, by rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join(filter(None, [title, table(head, rows)])))
        return
    drawn = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(head):
        numbers = all(str(row[i])[:1].isdigit() for row in rows if row[i] != "")
        drawn.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in rows:
        drawn.add_row(*map(str, row))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file folds no lines
    console.print(drawn)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a page."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


HEAD = ("case", "dtype", "direction", "provider", "µs", "p20–p80", "of limit", "× best other", "ulp", "peak", "host µs")


def fastest(rows: Iterable[Row]) -> dict[tuple, dict[str, float]]:
    """(op, case, dtype, direction) → {provider: median µs} of what was measured."""
    found: dict[tuple, dict[str, float]] = {}
    for r in rows:
        if r["us"] is not None:
            found.setdefault(call(r), {})[r["provider"]] = r["us"]["p50"]
    return found


def call(row: Row) -> tuple[str, str, str, str]:
    """What providers are compared on."""
    return row["op"], row["case"], row["dtype"], row["direction"]


def show_results(results: Results) -> None:
    """A table for each op; then what has no time: wrong, refused, raised."""
    rows = results["rows"]
    times = fastest(rows)
    for op in dict.fromkeys(r["op"] for r in sorted(rows, key=lambda r: r["family"])):
        found = sorted((r for r in rows if r["op"] == op), key=call)
        show(HEAD, [cells for r in found if (cells := _cells(r, times[call(r)] if r["us"] else {}))], op)
        print()
    names = ("status", "op", "case", "dtype", "direction", "provider", "reason")
    if without := [[r[name] for name in names] for r in rows if r["us"] is None]:  # type: ignore[literal-required]
        show([*names[:-1], "why there is no time"], without)


def _cells(row: Row, times: dict[str, float]) -> list[str]:
    if (us := row["us"]) is None:
        return []
    others = [t for name, t in times.items() if name != row["provider"]]
    ulp, peak, host = row["ulp"], row["peak_bytes"], row["host_us"]
    return [
        row["case"],
        row["dtype"],
        row["direction"],
        row["provider"],
        f"{us['p50']:.1f}",
        f"{us['p20']:.1f}–{us['p80']:.1f}",
        f"{row['share']:.0%}",
        f"{us['p50'] / min(others):.2f}" if others else "",
        "" if ulp is None else f"{ulp:.2g}",
        "" if peak is None else amount(peak),
        "" if host is None else f"{host:.0f}",
    ]
