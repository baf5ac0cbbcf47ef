"""What ``check_layer`` found, as a list of the checks that passed and as a table."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from gpulayers._console import nearest
from gpulayers._table import table


class CheckError(AssertionError):
    """An op or a layer does not do what it must; the text says what, where and by how much."""

    report: Report | None = None
    """Of ``check_layer``: what passed before."""

    def _repr_html_(self) -> str | None:
        return None if self.report is None else self.report._repr_html_()


class Report(list[str]):
    """The names of the checks that a layer passed; it prints as a table of all, and is one in Jupyter. False if one failed.

    layer, inputs: what was checked, in words. checks: each check's name, and what it holds the layer to.
    fault: what the first check that failed said; those after it were not reached.
    """

    def __init__(self, layer: str, inputs: Sequence[str], checks: Mapping[str, str]):
        super().__init__()
        self.layer, self.inputs, self.checks = layer, list(inputs), dict(checks)
        self.fault: CheckError | None = None

    def __bool__(self) -> bool:
        return self.fault is None

    @property
    def title(self) -> str:
        end = f"passes {len(self)} checks" if self else f"is wrong; it passed {len(self)} of {len(self.checks)} checks"
        return f"{self.layer} {end}, on {' and '.join(self.inputs)}"

    def rows(self) -> list[tuple[str, str, str]]:
        """(check, "ok", "wrong" or "", what it holds the layer to, or what it found)."""
        rows: list = []
        for name, about in self.checks.items():
            failed = not self and len(rows) == len(self)
            state = "ok" if name in self else "wrong" if failed else ""
            rows.append((name, state, str(self.fault) if failed else about))
        return rows

    def __str__(self) -> str:
        return nearest(f"{self.title}\n\n{table(['check', '', 'what it holds'], self.rows())}")

    def _repr_html_(self) -> str:
        marks = {"ok": "✓", "wrong": "✗", "": ""}
        rows: list = []
        for name, state, about in self.rows():
            style = ' style="font-weight: bold"' if state == "wrong" else "" if state else ' style="opacity: 0.5"'
            cells = "".join(f'<td style="text-align: left">{html.escape(c)}</td>' for c in (marks[state], name, about))
            rows.append(f"<tr{style}>{cells}</tr>")
        return f"<table><caption>{html.escape(self.title)}</caption>{''.join(rows)}</table>"
