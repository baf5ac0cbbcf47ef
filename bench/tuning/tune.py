"""``gpulayers tune``: searches the kernels' configurations on this GPU and writes the short table that launchers choose from.

For each choice: what its launches could take is compiled, and what spills is left out; the best of the rest are checked
against the definition and timed on the declared shapes, in turns with the present table; the best short table under the
launcher's own rule is timed once more as a whole, and written if it gains. A run stops at its time limit between two
candidates; the next one in the same folder goes on.
"""

from __future__ import annotations

import datetime
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpulayers.bench.cases.uses import Use, declare, precision, uses
from gpulayers.bench.measuring.device import Device, device
from gpulayers.bench.measuring.harness import Timer
from gpulayers.bench.measuring.lab import DIED
from gpulayers.bench.measuring.records import write_text
from gpulayers.bench.measuring.timing import geometric_mean, take_turns
from gpulayers.bench.reporting.tables import show
from gpulayers.bench.tuning import screen, search
from gpulayers.bench.tuning.known import Known, entry_text, use_text
from gpulayers.bench.tuning.search import Screened
from gpulayers.kernels.triton import _configs, _tables, _tile
from tqdm.auto import tqdm

from gpulayers import arrays
from gpulayers.testing.gpus import GPUS

ROUNDS = 5
"""Turns of a candidate and of the present table that are kept; one before them warms up."""
MOST = {_configs.Row: 12, _configs.Tile: len(search.SHAPES)}
"""Candidates of a choice that are timed on a shape, besides the present ones."""
MOST_USES = 12
"""Shapes that candidates are timed on; the table that comes of it is timed on all."""
DONE, STOPPED = 0, 0
"""Exit status: finished, or out of time; ``DIED`` where a fresh process should go on."""

Screening = Callable[[Sequence[screen.Job], int], Iterable[tuple[screen.Job, Screened]]]


class Lab(Protocol):
    """What measures a use by the choices that hold at the moment."""

    def about(self) -> dict[str, Any]:
        """gpu, driver, triton: what a result is worth nothing without."""

    def check(self, use: Use) -> str | None:
        """What is wrong with the use's results against the definition; None if nothing is."""

    def capture(self, use: Use) -> Callable[[], float]:
        """The use made ready; each call of the result runs it, the cache cold, and gives its seconds."""

    def alive(self) -> bool:
        """Whether this process can still measure: not after an illegal access on a GPU, say."""


class OutOfTime(Exception):
    """The limit is reached; what is known is on disk."""


class DeviceDied(RuntimeError):
    """This process cannot use the device any more; what is known is on disk."""


class Result(NamedTuple):
    """What was decided for a choice."""

    before: tuple
    after: tuple
    gain: float
    """Seconds of the table before over those of the table after, geometric mean over the uses; 1 where it stays."""
    uses: int


class Tuner:
    """One run over the choices that the families' declared shapes ask for.

    device: what launchers choose by. folder: where the run keeps what it knows. target: the table's file. until: of
    ``clock``. screening: compiles candidates (``screen.screened``).
    """

    def __init__(
        self,
        lab: Lab,
        device: _tile.Device,
        folder: Path,
        target: Path,
        *,
        until: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        screening: Screening = screen.screened,
        progress: bool = True,
    ):
        self.lab, self.device, self.target, self.until, self.clock = lab, device, target, until, clock
        self.screening, self.progress = screening, progress
        self.about = lab.about()
        self._say: Callable[[str], None] = lambda text: None
        declare()  # the folder may hold results of other families
        self.known = Known(folder, self.about)

    def run(self, only: Sequence[str] = ()) -> int:
        """Tune what the folder does not know yet; the exit status."""
        asked = uses(only, self.device)
        todo = [name for name in asked if not self.known.of(name)["result"]]
        with tqdm(todo, unit="choice", disable=not self.progress, file=sys.stderr) as bar:
            for name in bar:
                self._say = bar.set_postfix_str
                try:
                    self._tune(name, asked[name])
                except OutOfTime:
                    bar.write(
                        f"out of time: {len(todo) - bar.n} of {len(todo)} choices are left; the same command goes on"
                    )
                    return STOPPED
                except DeviceDied as error:
                    bar.write(f"{error}: the same command goes on in a fresh process")
                    return DIED
                self.write()
        return DONE

    def results(self) -> dict[str, Result]:
        """What was decided so far, by choice."""
        found = {}
        for name, known in self.known.data["choices"].items():
            if r := known["result"]:
                kind = _configs.find(name).kind
                before, after = (tuple(kind(*e) for e in r[k]) for k in ("before", "after"))
                found[name] = Result(before, after, r["gain"], r["uses"])
        return found

    def write(self) -> None:
        """The table as it stands, with what was decided so far."""
        base = _tables.read(self.target if self.target.exists() else _tables.find(self.device.arch))
        entries, measured = dict(base.entries), dict(base.measured)
        for name, result in self.results().items():
            if not result.uses:
                continue
            entries[name] = result.after
            day = self.known.of(name)["result"]["date"]
            measured[name] = self.about | {"date": day, "gain": round(result.gain, 3)}
        found = _tables.Table(self.target, self.device.arch, base.made, entries, measured)
        write_text(self.target, _tables.text(found))

    # --- one choice --------------------------------------------------------------------------------------------------

    def _tune(self, name: str, asked: dict[Use, tuple]) -> None:
        choice = _configs.find(name)
        present = choice.entries(self.device.arch)
        every = search.candidates(choice, present)
        sampled = search.sample(asked, _size, MOST_USES)
        screened = self._screened(choice, present, every, sampled)
        known = self.known.of(name)
        for use, keys in sampled.items():
            if use_text(use) not in known["unusable"]:
                self._measure(choice, present, use, keys, screened[use])
        asked, sampled = (
            {use: keys for use, keys in some.items() if use_text(use) not in known["unusable"]}
            for some in (asked, sampled)
        )
        ratios = self._ratios(choice, every, sampled, present)
        found = search.table(choice, present, sampled, ratios) if sampled else present
        gain = self._verified(choice, present, found, asked) if found != present else 1.0
        if gain <= 1 + search.WORTH:
            found, gain = present, 1.0
        known["result"] = {
            "before": present, "after": found, "gain": gain, "uses": len(asked) if sampled else 0,
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        self.known.save()

    def _screened(
        self, choice: _configs.Choice, present: tuple, every: Sequence[Any], asked: dict[Use, tuple]
    ) -> dict[Use, list[Any]]:
        """For each use the candidates to time, the best by their machine code.

        Rows are screened on each use, as what spills depends on their length. Tiles are on the largest one, and those
        that are left on the others, so that they are compiled by the time they are timed.
        """
        plans = {use: search.distinct(choice, every, keys) for use, keys in asked.items()}
        if choice.kind is _configs.Row:
            self._compile(choice, plans)
            return {use: self._shortlist(choice, use, plan, present) for use, plan in plans.items()}
        largest = max(asked, key=_size)
        self._compile(choice, {largest: plans[largest]})
        kept = self._shortlist(choice, largest, plans[largest], present)
        plans = {use: search.distinct(choice, kept, keys) for use, keys in asked.items()}
        self._compile(choice, plans)
        return {use: self._sound(choice, use, plan) for use, plan in plans.items()}

    def _compile(self, choice: _configs.Choice, plans: dict[Use, list[Any]]) -> None:
        """Screen what was not screened yet. Raises OutOfTime between two candidates."""
        jobs = []
        for use, plan in plans.items():
            there = self.known.screened(choice.name, use)
            jobs += [(use, choice.name, c) for c in plan if entry_text(c) not in there]

        def compiled() -> Iterator[tuple[Use, Any, Screened]]:
            for count, ((use, _, candidate), found) in enumerate(self.screening(jobs, self.device.arch), 1):
                self._say(f"{choice.name}: {count} of {len(jobs)} compiled")
                yield use, candidate, found
                self._time_left()

        if jobs:
            self._time_left()
            self.known.note_screened(choice.name, compiled())

    def _sound(self, choice: _configs.Choice, use: Use, plan: Sequence[Any]) -> list[Any]:
        there = self.known.screened(choice.name, use)
        return [c for c in plan if there[entry_text(c)].fault is None]

    def _shortlist(self, choice: _configs.Choice, use: Use, plan: Sequence[Any], present: tuple) -> list[Any]:
        there = self.known.screened(choice.name, use)
        found = {c: there[entry_text(c)] for c in plan}
        return [c for c in search.shortlist(choice, found, present, MOST[choice.kind]) if found[c].fault is None]

    def _measure(self, choice: _configs.Choice, present: tuple, use: Use, keys: tuple, plan: Sequence[Any]) -> None:
        """Check and time the candidates of one use that are not known yet. Raises OutOfTime between two of them."""
        name, known = choice.name, self.known.of(choice.name)
        same = search.taken_from(choice, present, keys)
        now: Callable[[], float] | None = None
        for candidate in plan:
            text = entry_text(candidate)
            if text in known["dropped"] or any(text in known[p].get(use_text(use), {}) for p in ("ratios", "failed")):
                continue
            if search.taken(choice, candidate, keys) == same:
                continue
            self._time_left()
            self._say(f"{name}: {text} on {use.text}")
            if not self.known.trying(name, use, text):
                self.known.drop(name, candidate, f"the process died of it, on {use.text}")
                continue
            try:
                if now is None and (now := self._present(name, use)) is None:
                    return
                with _configs.forced(name, candidate):
                    if wrong := self.lab.check(use):
                        self.known.drop(name, candidate, f"{use.text}: {wrong}")
                        continue
                    ratio = in_turns(self.lab.capture(use), now)
            except Exception as error:
                self._failed(name, use, candidate, error)
                continue
            self.known.note_entry(name, "ratios", use, candidate, ratio)

    def _present(self, name: str, use: Use) -> Callable[[], float] | None:
        """The use made ready with the present table; None, and kept why, if that is wrong or fails itself."""
        try:
            if not (wrong := self.lab.check(use)):
                return self.lab.capture(use)
        except Exception as error:
            if not self.lab.alive():
                raise
            wrong = f"{type(error).__name__}: {error}"[:300]
        self.known.note(name, "unusable", use, f"with the present table: {wrong}")
        return None

    def _failed(self, name: str, use: Use, candidate: Any, error: Exception) -> None:
        """Keep why a candidate has no time; raises DeviceDied if that was the end."""
        if not self.lab.alive():
            raise DeviceDied(f"the device does not answer any more, after {name} {candidate} on {use.text}") from error
        self.known.note_entry(name, "failed", use, candidate, f"{type(error).__name__}: {error}"[:300])

    def _ratios(
        self, choice: _configs.Choice, every: Sequence[Any], usable: dict[Use, tuple], present: tuple
    ) -> dict[Use, dict[Any, float]]:
        """Use → candidate → ratio, those that take the same there included, those that were dropped left out."""
        known = self.known.of(choice.name)
        timed = {text for there in known["ratios"].values() for text in there} - set(known["dropped"])
        sound = [c for c in every if entry_text(c) in timed or c in map(search.bare, present)]
        found: dict[Use, dict[Any, float]] = {}
        for use, keys in usable.items():
            there = known["ratios"].get(use_text(use), {})
            by_taken = {search.taken_from(choice, present, keys): 1.0}
            by_taken |= {search.taken(choice, c, keys): there[t] for c in every if (t := entry_text(c)) in there}
            taken = {c: search.taken(choice, c, keys) for c in sound}
            found[use] = {c: by_taken[t] for c, t in taken.items() if t is not None and t in by_taken}
        return found

    def _verified(self, choice: _configs.Choice, present: tuple, found: tuple, usable: dict[Use, tuple]) -> float:
        """The gain of a table as a whole, measured on every use; 0 if a result is wrong."""
        name, ratios = choice.name, []
        for use, keys in usable.items():
            known = self.known.of(name)["verified"].get(use_text(use), {})
            key = "; ".join(map(entry_text, found))
            if key not in known:
                if search.taken_from(choice, found, keys) == search.taken_from(choice, present, keys):
                    ratio = 1.0
                else:
                    self._time_left()
                    ratio = self._ratio_of_table(name, found, use)
                self.known.note(name, "verified", use, {key: ratio})
                known = self.known.of(name)["verified"][use_text(use)]
            ratios.append(known[key])
        if any(math.isinf(r) for r in ratios):
            return 0.0
        return 1 / geometric_mean(ratios)

    def _ratio_of_table(self, name: str, found: tuple, use: Use) -> float:
        if not self.known.trying(name, use, "the table found"):
            return math.inf
        try:
            now = self.lab.capture(use)
            with _configs.listed(name, found):
                return math.inf if self.lab.check(use) else in_turns(self.lab.capture(use), now)
        except Exception as error:
            if not self.lab.alive():
                raise DeviceDied(f"the device does not answer any more, after {name} {found} on {use.text}") from error
            return math.inf

    def _time_left(self) -> None:
        if self.clock() >= self.until:
            raise OutOfTime


def _size(use: Use) -> tuple[int, int]:
    return use.case.flops, sum(s.nbytes for s in arrays.lists(use.case.specs()))


def in_turns(candidate: Callable[[], float], present: Callable[[], float]) -> float:
    """Median seconds of a candidate over those of the present table, in turns, the order reversed each time."""
    samples = take_turns({"present": lambda: [present()], "candidate": lambda: [candidate()]}, ROUNDS)
    return statistics.median(samples["candidate"]) / statistics.median(samples["present"])


# --- the command -----------------------------------------------------------------------------------------------------


def in_use(arch: int) -> str:
    """Which table launches on this architecture choose from, and how it was made."""
    found = _tables.read(_tables.find(arch))
    text = f"sm_{arch} chooses from {found.path}: {len(found.entries)} choices, {found.made}"
    return text + (f"; {len(found.measured)} of them measured since" if found.measured else "")


def show_summary(results: dict[str, Result], known: Known) -> None:
    """What was decided, before and after, as a table; then what was dropped, and why."""
    rows = []
    for name, r in results.items():
        after = "stays" if r.after == r.before else _short(r.after)
        rows.append([name, r.uses, _short(r.before), after, f"{r.gain:.3f}"])
    show(["choice", "shapes", "before", "after", "gain"], rows)
    for name, there in known.data["choices"].items():
        for entry, why in there["dropped"].items():
            print(f"dropped  {name} {entry}: {why}")
        for use, why in there["unusable"].items():
            print(f"not used {name} {use}: {why}")


def _short(entries: Sequence[Any]) -> str:
    """Entries in few letters: "≤2048: 2048/4w" (length: elements, warps), "128×128×64 8w 3s" (tile, warps, stages)."""
    if isinstance(entries[0], _configs.Row):
        return ", ".join(f"{'' if e.upto is None else f'≤{e.upto}: '}{e.elements}/{e.warps}w" for e in entries)
    return ", ".join(f"{e.BM}×{e.BN}×{e.BK} {e.warps}w {e.stages}s" for e in entries)


def target(arch: int, out: Path | None) -> Path:
    """The file to write: the project's own table, or under ``out`` where that was given or the project's is not writable."""
    shipped = _tables.SHIPPED / f"sm_{arch}.json"
    if out is None and os.access(shipped if shipped.exists() else shipped.parent, os.W_OK):
        return shipped
    return (out or Path("tune-results")) / shipped.name


class Harness(Lab):
    """The lab's own harness: what is timed is right within the derived bound, and rotates through cold caches.

    on: its device. backend: whose kernels choose.
    """

    def __init__(self, on: Device, backend: str = "triton"):
        self.on, self.backend = on, backend
        self._timers: dict[str, Timer] = {}

    def about(self) -> dict[str, Any]:
        import triton

        found = self.on.about()
        return {"gpu": found["device"], "driver": str(found.get("driver", "unknown")), "triton": triton.__version__}

    def _timer(self, use: Use) -> Timer:
        """One at a time, for its memory, and one for each dtype: what it knows of a case holds for one setting of TF32."""
        if use.dtype not in self._timers:
            self._timers.clear()
            self._timers[use.dtype] = Timer(self.on)
        return self._timers[use.dtype]

    def check(self, use: Use) -> str | None:
        with precision(use.dtype):
            return self._timer(use).check(use.case, use.numbers, self.backend)

    def capture(self, use: Use) -> Callable[[], float]:
        with precision(use.dtype):
            captured = self._timer(use).capture(use.case, use.numbers, use.direction, self.backend)

        def replay() -> float:
            with self.on.entered():
                return statistics.median(captured.replay())

        return replay

    def alive(self) -> bool:
        return self.on.alive()


def command(only: Sequence[str], minutes: float, out: Path | None, arch: str | None) -> int:
    """``gpulayers tune``; the exit status. RuntimeError without a GPU, after saying which table is in use."""
    import torch

    names = [f"sm_{a}" for a in GPUS]
    if arch is not None and arch not in names:
        raise ValueError(f"--arch: the rule is one of {', '.join(names)}; got {arch!r}")
    if not torch.cuda.is_available():
        for name in [arch] if arch else names:
            print(in_use(int(name[3:])))
        raise RuntimeError("gpulayers tune times kernels on a GPU, and torch sees none here")
    gpu = _tile.real_device(torch.cuda.current_device())
    if arch not in (None, f"sm_{gpu.arch}"):
        raise ValueError(f"--arch: a table is measured where it is used, and this GPU is sm_{gpu.arch}; got {arch!r}")
    if gpu.arch not in GPUS:
        raise ValueError(f"tune: candidates are screened for {', '.join(names)}; this GPU is sm_{gpu.arch}")
    until = time.monotonic() + 60 * minutes
    print(in_use(gpu.arch))
    folder = out or Path("tune-results")
    tuner = Tuner(Harness(device("cuda")), gpu, folder, target(gpu.arch, out), until=until)
    status = tuner.run(only)
    show_summary(tuner.results(), tuner.known)
    print(f"written: {tuner.target}; what was measured: {tuner.known.path}")
    return status
