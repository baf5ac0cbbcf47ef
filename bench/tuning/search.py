"""What the tuner tries, and the short table that measured candidates make. Nothing here needs a GPU.

A measured candidate has a ratio on each use: its seconds over those of the present table, taken in turns. A table's
estimate is the geometric mean of the ratios of the entries that the launcher's own rule takes from it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gpulayers.kernels.triton._configs import Choice, Row, Tile
from gpulayers.kernels.triton._tile import next_power_of_2

ELEMENTS = (1024, 2048, 4096, 8192, 16384)
WARPS = (1, 2, 4, 8, 16)
SHAPES = {  # (BM, BN) of tiles that others' matrix products proved -> warps
    (256, 128): (8,),
    (128, 256): (8,),
    (128, 128): (4, 8),
    (128, 64): (4, 8),
    (64, 256): (4, 8),
    (64, 128): (4,),
    (64, 64): (4,),
    (128, 32): (4,),
    (32, 128): (4,),
    (32, 64): (4,),
    (64, 32): (4,),
    (16, 128): (4,),
    (16, 64): (4,),
}
STAGES = (2, 3, 4, 5)
LEAST_A_THREAD, MOST_A_THREAD = 4, 128
MOST_ROWS, MOST_TILES = 6, 5
"""Entries of a table: a launch looks at each once, and people read them."""
WORTH = 0.01
"""What an entry more must gain on its shapes, and a table on all: less is noise."""

Ratios = Mapping[Any, Mapping[Any, float]]
"""Use -> candidate -> seconds over those of the present table."""


class Screened(NamedTuple):
    """What the machine code of a candidate says before it is timed."""

    fault: str | None
    """Why it is not timed: it spills, it needs too much shared memory, it does not compile."""
    resident: float
    """Warps that a multiprocessor holds at once, as a share of all it could."""
    wide: bool
    """Memory is accessed 128 bits at a time."""


def candidates(choice: Choice, present: Sequence[Any]) -> list[Any]:
    """The present entries, then what else is worth a try; of rows, each for any length."""
    if choice.kind is Row:
        space: Iterable[Any] = (Row(None, e, w) for e in ELEMENTS for w in WARPS)
    else:
        space = (
            Tile(*shape, inner, warps, stages)
            for shape, all_warps in SHAPES.items()
            for warps in all_warps
            for inner in choice.inner
            for stages in STAGES
        )
    return list(dict.fromkeys([*map(bare, present), *space]))


def sample(uses: Mapping[Any, tuple], size: Callable[[Any], Any], most: int) -> dict[Any, tuple]:
    """At most so many uses, none with the keys of another, evenly from the smallest to the largest."""
    first: dict[tuple, Any] = {}
    for use, keys in uses.items():
        first.setdefault(keys, use)
    ordered = sorted(first.values(), key=size)
    count = min(most, len(ordered))
    places = {round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(count)}
    return {use: uses[use] for i, use in enumerate(ordered) if i in places}


def taken(choice: Choice, candidate: Any, keys: Sequence[tuple]) -> tuple | None:
    """What launches take of a forced candidate for these keys: equal for candidates that differ in nothing there.

    None where the launcher's rule takes it for none.
    """
    found = taken_from(choice, (candidate,), keys)
    return None if None in found else found


def taken_from(choice: Choice, entries: Sequence[Any], keys: Sequence[tuple]) -> tuple:
    """What launches take from a table for these keys; None for a key that it has nothing for."""
    found = [choice.rule(entries, *key) for key in keys]
    return tuple(None if f is None else bare(f[1]) for f in found)


def bare(entry: Any) -> Any:
    """An entry without the length that it is for, as candidates are."""
    return entry._replace(upto=None) if isinstance(entry, Row) else entry


def distinct(choice: Choice, every: Sequence[Any], keys: Sequence[tuple]) -> list[Any]:
    """The candidates that launches with these keys can take, the first of those that are the same to them."""
    found: dict[tuple, Any] = {}
    for c in every:
        there = taken(choice, c, keys)
        if there is not None and all(map(_is_plausible, there)):
            found.setdefault(there, c)
    return list(found.values())


def _is_plausible(entry: Any) -> bool:
    """Whether a thread has elements enough to load them 8 bytes at a time, and not more than its registers hold."""
    entry = getattr(entry, "tile", entry)  # of a product, cut in a way
    if isinstance(entry, Tile):
        return MOST_A_THREAD * 32 * entry.warps >= entry.BM * entry.BN
    elements = entry.elements if isinstance(entry, Row) else entry[0] * entry[1]
    return LEAST_A_THREAD <= elements / (32 * entry[2]) <= MOST_A_THREAD


def shortlist(choice: Choice, screened: Mapping[Any, Screened], present: Sequence[Any], most: int) -> list[Any]:
    """The candidates worth timing, at most so many besides the present entries: the best by their machine code."""
    sound = [c for c, s in screened.items() if s.fault is None]
    kept = set(map(bare, present))
    if choice.kind is Row:
        # Half of a multiprocessor's warps hide the memory's latency; past that the nearest to the present are tried.
        def rank(c: Row) -> tuple:
            s = screened[c]
            return not s.wide, -min(s.resident, 0.5), min(_steps(c, e) for e in kept)

        best = sorted(sound, key=rank)[:most]
    else:
        # Of each shape the two that load furthest ahead with 8 warps a multiprocessor; operands are reused most by large ones.
        def depth(c: Tile) -> tuple:
            return -min(screened[c].resident, 1 / 8), -min(c.BK * c.stages, 256), c.stages

        ordered = sorted(sound, key=depth)
        shapes = {s: [c for c in ordered if s == (c.BM, c.BN)][:2] for s in SHAPES}
        turns = itertools.zip_longest(*sorted(shapes.values(), key=lambda found: -_reuse(found[0]) if found else 0.0))
        best = [c for turn in turns for c in turn if c is not None][:most]
    return [c for c in screened if c in kept or c in best]


def _steps(a: Row, b: Row) -> float:
    return abs(math.log2(a.elements / b.elements)) + abs(math.log2(a.warps / b.warps))


def _reuse(c: Tile) -> float:
    return c.BM * c.BN / (c.BM + c.BN)


def table(choice: Choice, present: tuple, uses: Mapping[Any, tuple], ratios: Ratios) -> tuple:
    """The best short table for these uses (and the keys each asks with); the present one if none promises more."""
    found = _rows(choice, present, uses, ratios) if choice.kind is Row else _tiles(choice, present, uses, ratios)
    return found if found and estimate(choice, found, uses, ratios) < 1 - WORTH else present


def estimate(choice: Choice, entries: Sequence[Any], uses: Mapping[Any, tuple], ratios: Ratios) -> float:
    """The geometric mean of the ratios of what the rule takes from these entries; infinite where that was not measured."""
    total = 0.0
    for use, keys in uses.items():
        total += math.log(_estimate_of(choice, entries, keys, ratios.get(use, {})))
    return math.exp(total / max(1, len(uses)))


def _estimate_of(choice: Choice, entries: Sequence[Any], keys: Sequence[tuple], measured: Mapping[Any, float]) -> float:
    """On one use: where its launches take several entries, the mean of theirs."""
    found = []
    for key in keys:
        chosen = choice.rule(entries, *key)
        found.append(math.inf if chosen is None else measured.get(bare(entries[chosen[0]]), math.inf))
    return sum(found) / len(found)


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(choice: Choice, present: tuple, uses: Mapping[Any, tuple], ratios: Ratios) -> tuple | None:
    """The lengths measured, cut into runs that each have one candidate: the best cut, an entry more if it is worth it."""
    by_length: dict[int, list[Mapping[Any, float]]] = {}
    for use, keys in uses.items():
        by_length.setdefault(max(key[1] for key in keys), []).append(ratios.get(use, {}))
    lengths = sorted(by_length)
    if not lengths:
        return None
    price = math.log1p(WORTH) * len(uses) / len(lengths)
    best: dict[tuple[int, int], tuple[float, tuple]] = {(0, 0): (0.0, ())}  # (lengths covered, entries) -> cost, cut
    for end in range(1, len(lengths) + 1):
        for count in range(1, min(end, MOST_ROWS) + 1):
            options = [
                (cost + run[0] + price, (*cut, (end, run[1])))
                for start in range(count - 1, end)
                if (start, count - 1) in best and (run := _best_of_run(by_length, lengths[start:end]))
                for cost, cut in (best[start, count - 1],)
            ]
            if options:
                best[end, count] = min(options, key=lambda option: option[0])
    whole = [best[len(lengths), k] for k in range(1, MOST_ROWS + 1) if (len(lengths), k) in best]
    return _entries(choice, present, lengths, min(whole, key=lambda w: w[0])[1]) if whole else None


def _best_of_run(by_length: Mapping[int, list], run: Sequence[int]) -> tuple[float, Row] | None:
    """(Σ log ratio, candidate) of the best candidate that was measured on all these lengths."""
    measured = [m for n in run for m in by_length[n]]
    common = [c for c in measured[0] if all(c in m for m in measured)]
    return min(((sum(math.log(m[c]) for m in measured), c) for c in common), key=lambda f: f[0], default=None)


def _entries(choice: Choice, present: tuple, lengths: Sequence[int], cut: Sequence[tuple[int, Row]]) -> tuple:
    """Each run's candidate up to the power of two that its last length fills.

    A length between two runs takes the longer one's; rows longer than all that was measured stay as they are.
    """
    entries: list[Row] = []
    for end, candidate in cut:
        last, after = lengths[end - 1], lengths[end] if end < len(lengths) else None
        filled = next_power_of_2(last)
        upto: int | None = last if after is not None and filled >= after else filled
        if after is None and not choice.held:
            upto = None
        elif after is None and present[-1].upto <= filled:  # a row's length that is held does not grow
            upto = present[-1].upto
        entries.append(candidate._replace(upto=upto))
    if choice.held:
        entries += [e for e in present if e.upto > entries[-1].upto]
    merged = [e for e, after in itertools.zip_longest(entries, entries[1:]) if after is None or e[1:] != after[1:]]
    return tuple(merged)


# --- tiles -----------------------------------------------------------------------------------------------------------


def _tiles(choice: Choice, present: tuple, uses: Mapping[Any, tuple], ratios: Ratios) -> tuple | None:
    """The best of all lists of at most ``MOST_TILES``, large tiles first, as the launchers' rules want them."""
    measured = {c for found in ratios.values() for c in found}
    ordered = sorted(measured, key=lambda c: (-c.BM * c.BN, -c.BN, -c.BK * c.stages, c.warps))
    lists = (found for k in range(1, MOST_TILES + 1) for found in itertools.combinations(ordered, k))
    best, least = None, math.inf
    for entries in lists:  # short ones first: a longer one must be better by more than noise
        found = estimate(choice, entries, uses, ratios)
        if found < least * (1 - WORTH) or (best is None and found < math.inf):
            best, least = entries, found
    return best
