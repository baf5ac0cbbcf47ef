"""What a tuning run knows, on disk as soon as it knows it: a run that was cut off goes on from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpulayers.bench.cases.uses import Use
from gpulayers.bench.measuring.records import write_text
from gpulayers.bench.tuning.search import Screened

DEATHS = 2
"""Processes that may die of a candidate before it is dropped: the first may have been stopped from outside."""


def use_text(use: Use) -> str:
    return "/".join(map(str, use))


def entry_text(entry: Any) -> str:
    return " ".join(map(str, entry))


class Known:
    """``folder/tune.json``: by choice, what was screened, measured, dropped and decided.

    about: the GPU and the versions that measure; a folder holds one set. ValueError if it holds another's.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.path = folder / "tune.json"
        self.data: dict[str, Any] = {"about": about, "trying": None, "deaths": {}, "choices": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
            if self.data["about"] != about:
                raise ValueError(
                    f"{self.path} holds what {self.data['about']} measured, and this is {about}: name another folder (--out)"
                )
        if self.data["trying"]:  # the process before ended at this
            deaths = self.data["deaths"]
            deaths[self.data["trying"]] = deaths.get(self.data["trying"], 0) + 1
            self.data["trying"] = None
        self.save()

    def save(self) -> None:
        """Never half a file."""
        write_text(self.path, json.dumps(self.data))

    def of(self, choice: str) -> dict[str, Any]:
        """What is known of a choice.

        screened: use → entry → ``Screened``. ratios: use → entry → seconds over the present table's. failed: the same →
        why there are none. dropped: entry → why it is not tried any more. unusable: use → what is wrong with the present
        results. verified: use → ratio of the table found. result: what was decided.
        """
        parts: dict[str, Any] = {
            k: {} for k in ("screened", "ratios", "failed", "dropped", "unusable", "verified", "result")
        }
        return self.data["choices"].setdefault(choice, parts)

    def screened(self, choice: str, use: Use) -> dict[str, Screened]:
        return {entry: Screened(*s) for entry, s in self.of(choice)["screened"].get(use_text(use), {}).items()}

    def note(self, choice: str, part: str, use: Use, value: Any) -> None:
        """Keep one fact of a use; what was being tried has ended."""
        self.of(choice)[part][use_text(use)] = value
        self.rest()

    def note_entry(self, choice: str, part: str, use: Use, entry: Any, value: Any) -> None:
        """Keep one fact of an entry on a use; what was being tried has ended."""
        self.of(choice)[part].setdefault(use_text(use), {})[entry_text(entry)] = value
        self.rest()

    def drop(self, choice: str, entry: Any, why: str) -> None:
        """An entry is not tried any more."""
        self.of(choice)["dropped"][entry_text(entry)] = why
        self.rest()

    def note_screened(self, choice: str, found: Iterable[tuple[Use, Any, Screened]]) -> None:
        """Keep what comes, on disk when that ends, however it ends: compiling again finds the compiler's cache."""
        there = self.of(choice)["screened"]
        try:
            for use, entry, screened in found:
                there.setdefault(use_text(use), {})[entry_text(entry)] = screened
        finally:
            self.save()

    def trying(self, choice: str, use: Use, what: str) -> bool:
        """Say what comes next, in case the process dies of it; False if it did so before, too often."""
        job = f"{choice}, {use_text(use)}, {what}"
        if self.data["deaths"].get(job, 0) >= DEATHS:
            return False
        self.data["trying"] = job
        self.save()
        return True

    def rest(self) -> None:
        """Nothing is being tried."""
        self.data["trying"] = None
        self.save()
