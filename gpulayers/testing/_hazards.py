"""Who reached which memory when, in one launch of an interpreted kernel: what finds races between programs and lanes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

MOST_WAITING = 1 << 22
SHARED_BY_MANY = np.iinfo(np.int32).min  # an element that several programs reached atomically
UNORDERED = "{} between lanes of one program, with no tl.debug_barrier() between them"


@dataclass
class Hazards:
    """When each cell of a stretch of memory was written and first read, in one launch.

    Time is counted from 1; it goes on where a program begins, and at its barriers. `first` is when the program at work began,
    `now` its last barrier. A cell is the smallest unit that the tensors there share. `writer` holds 0, when it was stored, or
    minus when it was updated atomically. The first reader is enough: if it is the program at work, nobody else has read. One
    cell more than there is stands in for masked lanes.
    """

    low: int
    high: int
    unit: int
    writer: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    reader: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    written: bool = False
    was_read: bool = False
    reads: list[tuple[int, np.ndarray, np.ndarray | None, int, int]] = field(default_factory=list)
    """(lowest address, offsets from it, mask, bytes of a lane, now) of reads before the first write, which are entered when it comes."""
    waiting: int = 0
    """How many lanes those are."""
    stored: list[np.ndarray] = field(default_factory=list)
    """The cells of each store since the last barrier."""
    since: int = 0
    """When that was."""

    @property
    def cells(self) -> int:
        return (self.high - self.low) // self.unit

    def allocate(self) -> None:
        """Reserve the two records at the first access; untouched pages of zeros cost nothing."""
        if not len(self.writer):
            self.writer = np.zeros(self.cells + 1, np.int32)
            self.reader = np.zeros(self.cells + 1, np.int32)

    def of(self, low: int, offsets: np.ndarray, mask: np.ndarray | None, size: int) -> np.ndarray:
        """The cells of an access at byte offsets from an address."""
        cells = (offsets // np.uint64(self.unit)).view(np.int64) + (low - self.low) // self.unit
        if mask is not None:
            cells = np.where(mask, cells, self.cells)
        if size > self.unit:
            cells = np.minimum(cells[..., None] + np.arange(size // self.unit), self.cells)
        return cells

    def read_later(self, low: int, offsets: np.ndarray, mask: np.ndarray | None, size: int, now: int) -> bool:
        """Whether a read can wait for the first write: what nobody writes, all may read."""
        if self.written:
            return False
        self.reads.append((low, offsets, mask, size, now))
        self.waiting += offsets.size
        if self.waiting > MOST_WAITING:
            self.enter_reads()
        return True

    def enter_reads(self) -> None:
        """In the order they came."""
        reads, self.reads, self.waiting = self.reads, [], 0
        for low, offsets, mask, size, now in reads:
            self.read(self.of(low, offsets, mask, size), now, now)

    def read(self, cells: np.ndarray, first: int, now: int) -> tuple[str, np.ndarray] | None:
        """Record a read; the kind of hazard and the lanes in it, or None."""
        self.allocate()
        if self.written:
            writer = self.writer.take(cells)
            bad = (writer != 0) & (np.abs(writer) < first)
            if bad.any():
                return "read-after-write", bad
            if self.since == now and (bad := self._met(cells, writer == now)).any():
                return UNORDERED.format("read-after-write"), bad
        self.was_read = True
        fresh = self.reader.take(cells) == 0
        if fresh.any():
            self.reader[cells[fresh]] = now
            self.reader[-1] = 0
        return None

    def write(self, cells: np.ndarray, first: int, now: int) -> tuple[str, np.ndarray] | None:
        """Record a store; the kind of hazard and the lanes in it, or None."""
        self.allocate()
        if self.written:
            writer = self.writer.take(cells)
            bad = (writer != 0) & (writer < first)
            if bad.any():
                return "write-after-write", bad
            if self.since == now and (bad := self._met(cells, writer == now)).any():
                return UNORDERED.format("write-after-write"), bad
        if self.was_read:
            reader = self.reader.take(cells)
            bad = (reader != 0) & (reader < first)
            if bad.any():
                return "write-after-read", bad
        if self.since != now:
            self.stored, self.since = [], now
        self.stored.append(cells)
        self.written = True
        self.writer[cells] = now
        self.writer[-1] = 0
        return None

    def _met(self, cells: np.ndarray, again: np.ndarray) -> np.ndarray:
        """Of lanes whose cells were stored since the last barrier, those that another lane has stored."""
        if again.any():
            for before in self.stored:
                if before.shape == cells.shape:
                    again = again & (before != cells)
        return again

    def update(self, cells: np.ndarray, first: int, now: int) -> tuple[str, np.ndarray] | None:
        """Record an atomic update; the kind of hazard and the lanes in it, or None."""
        self.allocate()
        writer, reader = self.writer.take(cells), self.reader.take(cells)
        bad = (writer > 0) & (writer < first)
        if bad.any():
            return "write-after-write (an atomic after a plain store)", bad
        bad = (reader != 0) & (reader < first)
        if bad.any():
            return "write-after-read (an atomic after a plain load)", bad
        self.written = True
        alone = (writer == 0) | ((writer <= -first) & (writer != SHARED_BY_MANY))
        self.writer[cells] = np.where(writer > 0, writer, np.where(alone, -now, SHARED_BY_MANY))
        self.writer[-1] = 0
        return None
