"""Which test is next, so that a run that is cut off has seen a little of everything.

A test function's cases for one op, backend and dtype are a group. First comes one case of each group: of every file its first
function's first group's, of every file its second function's, …, then second groups. Then second cases, third ones, …; those
first whose group found kernels that nothing had reached before. What launches nothing on the device comes last: what cannot
by its text, and functions of which a case turned out not to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpulayers.bench.suite.outcomes import AT_THE_END, ENDED, Outcome


class Test(NamedTuple):
    id: str
    group: tuple[str, ...]
    """The test function, and what its parameters name of op, backend, dtype."""
    turn: tuple[int, int, int]
    """How many cases of its group come before it; how many groups of its function; how many functions of its file."""
    launches: bool = True
    """Whether it can launch anything."""

    @property
    def function(self) -> str:
        return self.group[0]


def in_turn(collected: Iterable[tuple[str, tuple[str, ...], bool]]) -> list[Test]:
    """(id, group, whether it can launch) in the order of collection → the tests with their turns."""
    cases: Counter = Counter()
    groups: dict[str, dict] = {}
    functions: dict[str, dict] = {}
    found = []
    for name, group, launches in collected:
        of_file = functions.setdefault(name.partition("::")[0], {})
        of_function = groups.setdefault(group[0], {})
        turn = cases[group], of_function.setdefault(group, len(of_function)), of_file.setdefault(group[0], len(of_file))
        found.append(Test(name, group, turn, launches))
        cases[group] += 1
    return found


class Queue:
    """The tests that are left, and what is known of the others. ``seen``: what any has reached."""

    def __init__(self, tests: Sequence[Test]):
        self._all = {t.id: t for t in tests}
        self._left = dict.fromkeys(self._all)
        self._late: set[str] = set()
        self.seen: set[str] = set()
        self._gained: dict[tuple[str, ...], bool] = {}
        self._launches: dict[str, bool] = {}

    def learn(self, news: Iterable[Outcome]) -> None:
        for o in news:
            if (test := self._all.get(o.id)) is None:
                continue
            if o.outcome in AT_THE_END:
                self._late.add(o.id)
                self._left.setdefault(o.id)
                continue
            self._left.pop(o.id, None)
            if o.outcome in ENDED:
                self._gained[test.group] = not self.seen.issuperset(o.reached)
                self._launches[test.function] = self._launches.get(test.function, False) or bool(o.reached)
                self.seen.update(o.reached)

    def next(self) -> Test | None:
        """The one whose turn it is; None if none is left."""
        return min((self._all[i] for i in self._left), key=self._rank, default=None)

    def _rank(self, test: Test) -> tuple:
        if not (test.launches and self._launches.get(test.function, True)):
            worth = 3
        elif test.turn[0] == 0:
            worth = 0
        else:
            worth = 1 if self._gained.get(test.group, True) else 2
        return test.id in self._late, worth, test.turn
