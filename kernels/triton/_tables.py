"""Tables of configurations on disk: ``kernels/configs/sm_XX.json``, one entry a line, read once and checked whole.

A table lists each choice's entries, of one of two kinds: rows (``Row``) or tiles of a matrix product (``Tile``), and says
how it was made: all of it ("made"), and each choice that was measured ("measured": GPU, driver, versions, date, gain).
``GPULAYERS_CONFIGS=DIR`` names a folder of tables of your own, which come before the shipped ones.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = Path(__file__).parents[1] / "configs"
MEASURED = {"gpu": str, "driver": str, "triton": str, "date": str, "gain": (int, float)}
"""What a measured choice says of itself; gain: seconds before, over seconds after (geometric mean over the shapes)."""


class Row(NamedTuple):
    """How a program takes rows (or any run of elements) up to a length."""

    upto: int | None
    """The longest row that this entry is for; None: any."""
    elements: int
    """Of the tile that a program has at a time: elements // block rows."""
    warps: int


class Tile(NamedTuple):
    """A tile of a matrix product (BM, BN), summed BK at a time."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory for the stages' tiles."""
        return self.stages * (self.BM + self.BN) * self.BK * itemsize


KINDS: dict[str, Any] = {"rows": Row, "tiles": Tile}
_POWERS = {  # field -> the least and the most, both and all between powers of two
    "elements": (32, 32768),
    "warps": (1, 32),
    "BM": (16, 256),
    "BN": (16, 256),
    "BK": (16, 256),
}


class Table(NamedTuple):
    """A table as it is on disk."""

    path: Path
    arch: int
    made: str
    entries: dict[str, tuple]
    """Choice -> its entries, all ``Row`` or all ``Tile``, in order."""
    measured: dict[str, dict[str, Any]]
    """Choice -> how it was measured, as in ``MEASURED``; the others are as ``made`` says."""


def find(arch: int) -> Path:
    """The table for an architecture: its own, else the nearest one that suits; of your own folder, else the shipped."""
    own = os.environ.get("GPULAYERS_CONFIGS")
    folders = ([Path(own)] if own else []) + [SHIPPED]
    if own and not folders[0].is_dir():
        raise ValueError(f"GPULAYERS_CONFIGS names a folder of tables; {own!r} is none")
    # Data-centre parts of 9.0 and 10.x have TMA and 228 KB of shared memory; the others are closer to sm_80.
    nearest = 90 if 90 <= arch < 120 else 80
    candidates = [folder / f"sm_{a}.json" for a in (arch, nearest) for folder in folders]
    return next((p for p in candidates if p.is_file()), candidates[-1])


def read(path: Path) -> Table:
    """The table in a file. ValueError names the file, the choice, the entry and the rule that it breaks."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: a table of configurations is a JSON file: {error}") from None
    if not isinstance(raw, dict) or set(raw) != {"arch", "made", "choices"} or not isinstance(raw["choices"], dict):
        raise ValueError(f"{path}: a table has the keys arch, made and choices (an object), not {_shown(raw)}")
    if not isinstance(raw["arch"], int) or not isinstance(raw["made"], str):
        raise ValueError(f"{path}: arch is a number and made a text, not {raw['arch']!r} and {raw['made']!r}")
    entries: dict[str, tuple] = {}
    measured: dict[str, dict[str, Any]] = {}
    for choice, given in raw["choices"].items():
        where = f"{path}: {choice}"
        kinds = [k for k in KINDS if isinstance(given, dict) and k in given]
        if len(kinds) != 1 or set(given) - {kinds[0], "measured"} or not isinstance(given[kinds[0]], list):
            raise ValueError(
                f"{where}: a choice has a list named rows or tiles, and maybe measured; not {_shown(given)}"
            )
        entries[choice] = tuple(_entry(where, i, e, KINDS[kinds[0]]) for i, e in enumerate(given[kinds[0]]))
        check(where, entries[choice])
        if "measured" in given:
            measured[choice] = _provenance(where, given["measured"])
    return Table(path, raw["arch"], raw["made"], entries, measured)


def _shown(raw: Any) -> str:
    return ", ".join(raw) if isinstance(raw, dict) else repr(raw)[:80]


def _entry(where: str, index: int, given: Any, kind: Any) -> Any:
    if not isinstance(given, dict) or set(given) != set(kind._fields):
        raise ValueError(f"{where}: entry {index}: it has the keys {', '.join(kind._fields)}, not {_shown(given)}")
    return kind(**given)


def _provenance(where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or set(given) != set(MEASURED):
        raise ValueError(f"{where}: measured has the keys {', '.join(MEASURED)}, not {_shown(given)}")
    for key, kind in MEASURED.items():
        if not isinstance(given[key], kind):
            raise ValueError(f"{where}: measured: {key} is {getattr(kind, '__name__', 'a number')}, not {given[key]!r}")
    return given


def check(where: str, entries: tuple) -> None:
    """Raise ValueError where entries are not a table's: ``where`` says whose they are."""
    if not entries:
        raise ValueError(f"{where}: there is at least one entry")
    for i, entry in enumerate(entries):
        for name, value in zip(entry._fields, entry):
            if fault := _fault(name, value):
                raise ValueError(f"{where}: entry {i}: {name} is {fault}, not {value!r}")
    if isinstance(entries[0], Row):
        lengths = [float("inf") if e.upto is None else e.upto for e in entries]
        if any(a >= b for a, b in itertools.pairwise(lengths)):
            raise ValueError(f"{where}: upto grows from entry to entry, null last; not {[e.upto for e in entries]}")


def _fault(name: str, value: Any) -> str | None:
    """The rule that a field's value breaks; None where it is well."""
    if name == "upto" and value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in _POWERS:
        least, most = _POWERS[name]
        well = whole and least <= value <= most and value & (value - 1) == 0
        return None if well else f"a power of two from {least} to {most}"
    least, most = (1, 2**31 - 1) if name == "upto" else (1, 8)
    return None if whole and least <= value <= most else f"a whole number from {least} to {most}"


def text(table: Table) -> str:
    """The table as it stands in its file: one entry a line."""
    head = f'{{\n "arch": {table.arch},\n "made": {json.dumps(table.made)},\n "choices": {{\n'
    choices = [_choice_text(name, entries, table.measured.get(name)) for name, entries in table.entries.items()]
    return head + ",\n".join(choices) + "\n }\n}\n"


def _choice_text(name: str, entries: tuple, measured: dict[str, Any] | None) -> str:
    kind = next(k for k, cls in KINDS.items() if isinstance(entries[0], cls))
    lines = ",\n".join(f"   {json.dumps(e._asdict())}" for e in entries)
    provenance = f'   "measured": {json.dumps(measured)},\n' if measured else ""
    return f'  {json.dumps(name)}: {{\n{provenance}   "{kind}": [\n{lines}\n   ]\n  }}'
