"""Results of an audit as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpulayers._table import table
from gpulayers.sweep._results import Result, Sweep

HEAD = (
    *("registers", "spills", "shared B", "blocks/SM", "bound by", "loads", "stores", "tensor core", "bulk copies"),
    "accesses by bits",
)


def lines(found: Sweep) -> str:
    """One line for each kernel, configuration, dtypes and architecture."""
    rows = [
        [r.kernel, f"sm_{r.arch}", r.dtypes.replace("float", "f"), *_cells(r.figures), r.config]
        for r in sorted(found.results, key=lambda r: r.key)
    ]
    return table(["kernel", "arch", "arrays", *HEAD, "configuration"], rows)


def worst(found: Sweep) -> tuple[list[str], list[list[Any]]]:
    """(head, rows): for each kernel and architecture the worst of its configurations, figure by figure."""
    grouped: dict[tuple[str, int], list[Result]] = {}
    for result in found.results:
        if result.figures:
            grouped.setdefault((result.kernel, result.arch), []).append(result)
    rows = [
        [kernel, f"sm_{arch}", len(results), *_cells(_worst([r.figures for r in results]))]
        for (kernel, arch), results in sorted(grouped.items())
    ]
    return ["kernel", "arch", "binaries", *HEAD], rows


def _worst(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def of(name: str, which: Callable) -> Any:
        return which([f[name] for f in figures if f[name] is not None], default=None)

    tightest = min(figures, key=lambda f: f["blocks_per_sm"])
    return {
        **{name: of(name, max) for name in ("registers", "spills", "shared")},
        **{name: tightest[name] for name in ("blocks_per_sm", "bound")},
        **{name: of(name, min) for name in ("loads", "stores")},
        "tensor_core": "/".join(sorted({f["tensor_core"] or "none" for f in figures})).removeprefix("none") or "",
        "bulk": of("bulk", max),
        "widths": min(figures, key=lambda f: (f["loads"] or 128, f["stores"] or 128))["widths"],
    }


def _cells(figures: dict[str, Any]) -> list[Any]:
    return ["" if v in (None, "") else v for v in figures.values()] or [""] * len(HEAD)


def changes(before: Sweep, after: Sweep) -> tuple[str, int]:
    """(what differs between two audits: binaries added, gone, and figures changed; how many do)."""
    old, new = ({r.key: r for r in found.results} for found in (before, after))
    rows = []
    for key in sorted(old.keys() | new.keys()):
        kernel, config, dtypes, arch = key
        head = [kernel, f"sm_{arch}", dtypes.replace("float", "f")]
        if key not in old or key not in new:
            which = "added" if key in new else "gone"
            figures = (new if key in new else old)[key].figures
            rows.append([*head, which, f"{figures['registers']} registers" if figures else "", config])
        else:
            pairs = [(name, a, new[key].figures.get(name)) for name, a in old[key].figures.items()]
            changed = "; ".join(f"{name} {a} → {b}" for name, a, b in pairs if a != b)
            if changed:
                rows.append([*head, "changed", changed, config])
    return table(["kernel", "arch", "arrays", "", "figures", "configuration"], rows), len(rows)
