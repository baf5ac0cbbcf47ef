"""What a launch chooses from its architecture's table (``_tables.py``): launchers declare their choices here.

``FORWARD = rows("activation_forward")`` declares one; ``FORWARD(device, n)`` chooses, from then on by one look-up.
``forced`` gives a choice one configuration whatever the shape, and ``asked`` lists what launches asked for: so the audit
compiles, and the tuner times, every entry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from . import _tables
from ._tables import Row as Row
from ._tables import Table as Table
from ._tables import Tile as Tile
from ._tracing import thread

Rule = Callable[..., tuple[int, Any] | None]
"""rule(entries, device, *key) -> (which entry, the entry as a launch takes it); None: the table has none for this."""

CHOICES: dict[str, Choice] = {}
"""Every choice that the launchers imported so far declare, by name."""
_MOST_KNOWN = 4096
_tables_read: dict[int, Table] = {}
_replaced: dict[str, tuple] = {}
"""Entries that stand for the table's."""
_asked: list[Asked] | None = None
version: object = object()
"""Another one where the same choices may give other entries: what was recorded under one holds no longer."""


class Asked(NamedTuple):
    """A choice that a launch made."""

    choice: str
    key: tuple
    """The device, and what else the choice's rule went by."""
    index: int | None
    """Of the entry chosen; None: the table has none for rows as long as this."""


class Choice:
    """Something that a launcher takes from a table. Called with the device and the rule's key, it gives the entry.

    kind: of its entries. held: a kernel holds rows in registers, so that the last entry's length is the end of them.
    inner: of tiles, the lengths BK that the tuner tries.
    """

    def __init__(self, name: str, kind: type, rule: Rule, held: bool = False, inner: tuple[int, ...] = ()):
        if name in CHOICES:
            raise ValueError(f"two launchers declare the choice {name!r}")
        self.name, self.kind, self.rule, self.held, self.inner = name, kind, rule, held, inner
        self._known: dict[tuple, tuple[int | None, Any]] = {}
        CHOICES[name] = self

    def __call__(self, *key: Any) -> Any:
        """The entry for (device, *key); None from a ``held`` choice for a row that is too long."""
        try:
            found = self._known.get(key)
        except TypeError:
            return self._for_symbols(key)
        if found is None:
            found = self._choose(key)
        if _asked is not None:
            _asked.append(Asked(self.name, key, found[0]))
        return found[1]

    def _for_symbols(self, key: tuple) -> Any:
        """A choice while a compiler traces. A held row's tile must be as long as the row: the symbols that the rule compares
        are held to what it found. All else fits any size, and is chosen by the values at hand."""
        if not self.held:
            device, *sizes = key
            return self(device, *map(thread.compiler.hint, sizes))
        found = self.rule(self._entries(key[0]), *key)
        return None if found is None else found[1]

    def _entries(self, device: Any) -> tuple:
        return _replaced[self.name] if self.name in _replaced else self.entries(device.arch)

    def entries(self, arch: int) -> tuple:
        """What the table of an architecture lists for this choice. ValueError where it lists nothing that serves."""
        table = _table(arch)
        entries = table.entries.get(self.name)
        if entries is None:
            raise ValueError(f"{table.path}: {self.name}: a table has every choice, and this one is missing")
        self.check(f"{table.path}: {self.name}", entries)
        return entries

    def check(self, where: str, entries: tuple) -> None:
        """Raise ValueError where entries are not what this choice takes."""
        _tables.check(where, entries)
        if not all(isinstance(e, self.kind) for e in entries):
            raise ValueError(f"{where}: its entries are {self.kind.__name__}, not {type(entries[0]).__name__}")
        if self.kind is Row and (entries[-1].upto is None) == self.held:
            rule = "a length, past which rows are walked" if self.held else "null, for rows of any length"
            raise ValueError(f"{where}: entry {len(entries) - 1}: upto of the last entry is {rule}")

    def _choose(self, key: tuple) -> tuple[int | None, Any]:
        entries = self._entries(key[0])
        found: tuple[int | None, Any] | None = self.rule(entries, *key)
        if found is None:
            if not self.held:
                raise ValueError(
                    f"{self.name}: none of its configurations fits {key[0]}: {', '.join(map(str, entries))}"
                )
            found = None, None
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[key] = found
        return found


def for_length(entries: Sequence[Row], device: Any, n: int) -> tuple[int, Row] | None:
    """The rule of ``rows``: the first entry for rows as long as n."""
    return next(((i, e) for i, e in enumerate(entries) if e.upto is None or n <= e.upto), None)


def rows(name: str) -> Choice:
    """Declare a choice by the length of a row (or of any run of elements)."""
    return Choice(name, Row, for_length)


def tiles(name: str, rule: Rule, inner: tuple[int, ...]) -> Choice:
    """Declare a choice among tiles of a matrix product, by the launcher's own rule. inner: the tuner's BK."""
    return Choice(name, Tile, rule, inner=inner)


def _table(arch: int) -> Table:
    found = _tables_read.get(arch)
    if found is None:
        found = _tables_read[arch] = _tables.read(_tables.find(arch))
    return found


def reload() -> None:
    """Forget the tables and what was chosen from them: the next launch reads them anew."""
    global version
    version = object()
    _tables_read.clear()
    for choice in CHOICES.values():
        choice._known.clear()


@contextlib.contextmanager
def forced(name: str, config: Row | Tile | None) -> Iterator[None]:
    """Within, a choice takes this configuration whatever the shape. None, of a ``held`` choice: no row is held.

    ValueError for an unknown choice, or a configuration that no table may hold; a launch raises it where it cannot fit.
    """
    choice = find(name)
    if config is None and not choice.held:
        raise ValueError(f"forced: {name} takes a {choice.kind.__name__}, not None")
    if config is not None:
        if not isinstance(config, choice.kind):
            raise ValueError(f"forced: {name} takes a {choice.kind.__name__}, not {config!r}")
        _tables.check(f"forced: {name}", (config,))
        config = config._replace(upto=None) if isinstance(config, Row) else config
    with _replacing(choice, () if config is None else (config,)):
        yield


@contextlib.contextmanager
def listed(name: str, entries: Sequence[Any]) -> Iterator[None]:
    """Within, a choice takes from these entries by its rule, as from a table. ValueError as for a table."""
    choice = find(name)
    choice.check(f"listed: {name}", tuple(entries))
    with _replacing(choice, tuple(entries)):
        yield


def find(name: str) -> Choice:
    """The choice of this name. ValueError for an unknown one."""
    if name not in CHOICES:
        raise ValueError(f"no launcher declares the choice {name!r}; there are {', '.join(CHOICES)}")
    return CHOICES[name]


@contextlib.contextmanager
def _replacing(choice: Choice, entries: tuple) -> Iterator[None]:
    global version
    before, version_before = dict(_replaced), version
    _replaced[choice.name], version = entries, object()
    choice._known.clear()
    try:
        yield
    finally:
        _replaced.clear()
        _replaced.update(before)
        version = version_before
        choice._known.clear()


@contextlib.contextmanager
def asked() -> Iterator[list[Asked]]:
    """Within, what launches choose is added to the list that this yields. Blocks nest; the innermost one listens."""
    global _asked
    before, found = _asked, []
    _asked = found
    try:
        yield found
    finally:
        _asked = before
