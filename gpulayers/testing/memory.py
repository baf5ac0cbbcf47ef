"""A compute-sanitizer for interpreted kernels: every load, store and atomic is checked before it happens.

A kernel's pointer arguments are *tagged*: the upper 16 bits of an address hold the argument's number, which pointer
arithmetic carries along. So an access is held against the one tensor its pointer came from, even where another
argument lies right behind it in memory. Found are

- accesses outside the exact elements of the tensor, the gaps of a strided view and misaligned bytes included;
- hazards between programs of one launch: write-after-write, read-after-write, write-after-read (programs of a grid
  run in any order, so none of these has a defined result); atomics may meet atomics only;
- within a program, an element that one lane has stored and another loads or stores with no barrier in between: they may
  be of two threads;
- lanes of one store that write different values to one element;
- lanes masked off in a load without `other`: they come back as NaN (0xFF bytes), because a GPU promises nothing.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np

from gpulayers.arrays import span
from gpulayers.testing._hazards import SHARED_BY_MANY, Hazards
from gpulayers.testing._launches import dtype_name

TAG_SHIFT = 48  # user-space addresses have 47 bits
SHIFTS = {1 << n: np.uint64(n) for n in range(4)}
"""What divides by the bytes of an element."""
ADDRESS_BITS = np.uint64((1 << TAG_SHIFT) - 1)

_every = np.logical_and.reduce  # what `all` calls, by way of Python


class KernelMemoryError(RuntimeError):
    """A kernel touched memory it must not touch, or two of its programs raced."""


@dataclass
class Region:
    """One tensor argument: where its elements lie, and which bytes between the first and the last are its own."""

    dtype: str
    name: str
    shape: tuple[int, ...]
    steps: tuple[int, ...]  # strides in elements
    low: int  # real address of the lowest byte
    nbytes: int  # from the lowest byte to past the highest
    unit: int  # bytes of an element
    tag: int
    holes: np.ndarray | None  # True where a unit is NOT an element; None where the tensor is dense
    raw: np.ndarray
    hazards: Hazards | None = None
    views: dict[np.dtype, np.ndarray] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"argument {self.tag - 1}, '{self.name}' ({self.dtype}, shape {self.shape}, strides {self.steps})"

    @property
    def base(self) -> int:
        """The tagged address of the lowest byte."""
        return (self.tag << TAG_SHIFT) + self.low

    def view(self, dtype: np.dtype) -> np.ndarray:
        """The region's memory as a flat array of `dtype`, gaps included."""
        flat = self.views.get(dtype)
        if flat is None:
            whole = self.nbytes // dtype.itemsize * dtype.itemsize
            flat = self.views[dtype] = self.raw[:whole].view(dtype)
        return flat

    def fault(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Which lanes, accessing `size` bytes at byte `offsets` (uint64, so below the region is huge), are wrong."""
        bad = offsets > np.uint64(max(self.nbytes - size, 0)) if self.nbytes >= size else np.ones(offsets.shape, bool)
        bad |= offsets % np.uint64(size) != 0
        if self.holes is not None:
            units = np.where(bad, np.uint64(0), offsets // np.uint64(self.unit)).astype(np.int64)
            for step in range(max(1, size // self.unit)):
                bad |= self.holes.take(units + step, mode="clip")
        return bad

    def sound(self, offsets: np.ndarray, size: int) -> bool:
        """Whether all lanes are inside: the quick test that nearly every access passes."""
        if size != self.unit or self.holes is not None:
            return not self.fault(offsets, size).any()
        union = int(np.bitwise_or.reduce(offsets, axis=None))  # at least as large as the largest of them
        limit = self.nbytes - size
        return not union & (size - 1) and (union <= limit or int(offsets.max()) <= limit)


def layout(array: Any) -> tuple[int, tuple[int, ...], tuple[int, ...], int, str]:
    """Address, shape, strides in bytes, bytes of an element and dtype name of a NumPy array or a torch CPU tensor."""
    if isinstance(array, np.ndarray):
        address = array.__array_interface__["data"][0]
        return address, array.shape, array.strides, array.itemsize, dtype_name(array)
    size = array.element_size()
    return array.data_ptr(), tuple(array.shape), tuple(s * size for s in array.stride()), size, dtype_name(array)


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether the elements fill their stretch of memory without gaps (repeated elements, stride 0, are fine)."""
    expected = itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(strides, shape) if n > 1 and s):
        if stride != expected:
            return False
        expected *= n
    return True


class _FarApart:
    """Holes between elements so far apart that a mark for each unit of memory would not fit."""

    def __init__(self, shape: tuple[int, ...], steps: list[int]):
        self.axes = sorted(((s, n) for n, s in zip(shape, steps) if s and n > 1), reverse=True)
        spans = [1 + sum((n - 1) * s for s, n in self.axes[i + 1 :]) for i in range(len(self.axes))]
        self.covered = None
        if any(step < span for (step, _), span in zip(self.axes, spans)):  # axes reach into each other
            every = [slice(0, n * s, s) for s, n in self.axes]
            self.covered = np.unique(sum(np.ogrid[tuple(every)]))

    def take(self, units: np.ndarray, mode: str) -> np.ndarray:
        if self.covered is not None:
            return ~np.isin(units, self.covered)
        left = units
        for step, n in self.axes:
            left = left - np.minimum(left // step, n - 1) * step
        return left != 0


MOST_UNITS = 1 << 30


def _holes(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, unit: int, nbytes: int) -> Any:
    """True for each unit of the spanned memory that no element of the view covers (strides in bytes)."""
    steps = [abs(s) // unit for s in strides]
    if nbytes // unit > MOST_UNITS:
        return _FarApart((*shape, itemsize // unit), [*steps, 1])
    holes = np.ones(nbytes // unit, bool)
    np.lib.stride_tricks.as_strided(holes, (*shape, itemsize // unit), (*steps, 1))[...] = False
    return holes


class _Bytes:
    """A stretch of memory, for NumPy."""

    def __init__(self, low: int, nbytes: int):
        self.__array_interface__ = {"data": (low, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


class Memory:
    """The memory one launch may use: made with the launch's grid, then `add` each tensor, then run the programs.

    Addresses are uint64 arrays of tagged addresses; a mask is a bool array of their shape, or None for all lanes.
    """

    def __init__(self, kernel: str, grid: tuple[int, int, int] = (1, 1, 1), races: bool = True, poison: bool = True):
        self.kernel, self.grid, self.poison = kernel, grid, poison
        self.races = races
        self.regions: list[Region] = []
        self.began = [0]
        """When each program that has run began."""
        self.programs = [0]
        """And which it was, counted from 1."""
        self.now = 0
        self._grouped = False
        self.asked_where = False
        """Whether a program had to do with addresses as numbers: another launch has others."""

    def add(self, name: str, array: Any) -> int:
        """Register a tensor argument (NumPy array or torch CPU tensor); the tagged address of its first element."""
        address, shape, strides, itemsize, dtype = layout(array)
        low, nbytes = span(address, shape, strides, itemsize)
        unit, holes = itemsize, None
        if nbytes:
            unit = gcd(itemsize, *(s for s, n in zip(strides, shape) if n > 1))
            dense = _is_dense(shape, strides, itemsize)
            holes = None if dense else _holes(shape, strides, itemsize, unit, nbytes)
        raw = np.asarray(_Bytes(low, nbytes)) if nbytes else np.empty(0, np.uint8)
        steps = tuple(s // itemsize for s in strides)
        region = Region(dtype, name, shape, steps, low, nbytes, unit, len(self.regions) + 1, holes, raw)
        self.regions.append(region)
        self._grouped = False
        return (region.tag << TAG_SHIFT) + address

    @property
    def program(self) -> int:
        """The one at work, counted from 1."""
        return self.programs[-1]

    @program.setter
    def program(self, number: int) -> None:
        self.now += 1
        self.began.append(self.now)
        self.programs.append(number)

    def barrier(self) -> None:
        """The program at work has its lanes wait for each other."""
        self.now += 1

    @property
    def index(self) -> tuple[int, ...]:
        """(x, y, z) of the program at work."""
        return self._index(max(self.program, 1))

    def load(self, addresses: np.ndarray, mask: np.ndarray | None, dtype: np.dtype, fill: Any) -> np.ndarray:
        """The elements at `addresses`; lanes masked off get `fill`, or garbage (NaN, all bits set) if it is None."""
        if fill is None:
            fill = _garbage(dtype) if self.poison else np.zeros((), dtype)
        if mask is not None and _every(mask, axis=None):
            mask = None
        region, offsets = self._locate(addresses, mask, dtype.itemsize, "load")
        if region is None:  # several tensors, or none
            data = np.broadcast_to(np.asarray(fill, dtype), addresses.shape)
            for part in self._parts(addresses, mask, "load"):
                data = self.load(*part, dtype, data)
            return data
        if self.races:
            self._record("read", region, offsets, mask, dtype.itemsize)
        data = region.view(dtype).take((offsets >> SHIFTS[dtype.itemsize]).view(np.int64))
        return data if mask is None else np.where(mask, data, fill)

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray | None) -> None:
        """Write `values` (of the element's dtype, broadcastable to the lanes)."""
        if mask is not None and _every(mask, axis=None):
            mask = None
        size = values.dtype.itemsize
        region, offsets = self._locate(addresses, mask, size, "store")
        if region is None:
            for lanes, part in self._parts(addresses, mask, "store"):
                self.store(lanes, values, part)
            return
        if self.races:
            self._record("write", region, offsets, mask, size)
        index = (offsets >> SHIFTS[size]).view(np.int64)
        if values.shape != index.shape:
            values = np.broadcast_to(values, index.shape)
        if mask is not None:
            index, values = index[mask], values[mask]
        flat = region.view(values.dtype)
        flat[index] = values
        if index.size > 1:
            bits = np.dtype(f"u{size}")
            lost = flat.take(index).view(bits) != np.ascontiguousarray(values).view(bits)
            if lost.any():
                where = f"{region.label}: {int(lost.sum())} of {lost.size} lanes"
                raise self._error(f"lanes of one store write different values to one element of {where}")

    def atomic(self, addresses: np.ndarray, mask: np.ndarray | None, size: int) -> np.ndarray:
        """Check an atomic update of `size` bytes a lane; the real addresses, for whoever performs it."""
        region, offsets = self._locate(addresses, mask, size, "atomic")
        if region is None:
            for lanes, part in self._parts(addresses, mask, "atomic"):
                self.atomic(lanes, part, size)
        elif self.races:
            self._record("update", region, offsets, mask, size)
        return addresses & ADDRESS_BITS

    def _locate(
        self, addresses: np.ndarray, mask: np.ndarray | None, size: int, what: str
    ) -> tuple[Region | None, np.ndarray]:
        """The one region that all live lanes are in, and their byte offsets there (0 where masked); else None."""
        first = 0 if mask is None else int(mask.argmax())
        if mask is not None and not mask.item(first):
            return None, addresses  # no live lane
        tag = addresses.item(first) >> TAG_SHIFT
        region = self.regions[tag - 1] if 0 < tag <= len(self.regions) else self._around(addresses.item(first))
        if region is None:
            return None, addresses
        offsets = addresses - np.uint64(region.base if tag else region.low)
        if mask is not None:
            offsets = np.where(mask, offsets, np.uint64(0))
        if region.nbytes and region.sound(offsets, size):
            return region, offsets
        if not tag:
            return None, addresses
        live = addresses if mask is None else addresses[mask]
        if ((live >> np.uint64(TAG_SHIFT)) != np.uint64(tag)).any():
            return None, addresses
        raise self._outside(region, live - np.uint64(region.base), size, what)

    def _around(self, address: int) -> Region | None:
        """The tensor at an address that came as an integer, not from a pointer argument: it carries no tag."""
        self.asked_where = True
        return next((r for r in self.regions if r.low <= address < r.low + r.nbytes), None)

    def _parts(self, addresses: np.ndarray, mask: np.ndarray | None, what: str) -> Iterator[tuple[np.ndarray, Any]]:
        """Lanes that point into different tensors, one (addresses, mask) a tensor; plain addresses get their tag."""
        live = np.ones(addresses.shape, bool) if mask is None else mask
        if not live.any():
            return
        self.asked_where = True
        tags = np.where(live, addresses >> np.uint64(TAG_SHIFT), np.uint64(0))
        for region in self.regions:  # addresses that came as integers, not as pointer arguments, carry no tag
            low = np.uint64(region.low)
            inside = live & (tags == 0) & (addresses >= low) & (addresses < np.uint64(region.low + region.nbytes))
            tags = np.where(inside, np.uint64(region.tag), tags)
            addresses = np.where(inside, addresses + np.uint64(region.tag << TAG_SHIFT), addresses)
        strays = live & ((tags == 0) | (tags > len(self.regions)))
        if strays.any():
            raise self._error(f"{what} through an address that belongs to no argument: {_lanes(strays)}")
        for tag in np.unique(tags[live]):
            yield addresses, live & (tags == tag)

    def _record(self, kind: str, region: Region, offsets: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        """Enter an access into the hazard records and raise if it meets another program's, or another lane's."""
        if not self._grouped:
            self.group()
        hazards = region.hazards
        assert hazards is not None
        if kind == "read" and hazards.read_later(region.low, offsets, mask, size, self.now):
            return
        hazards.enter_reads()
        cells = hazards.of(region.low, offsets, mask, size)
        found = getattr(hazards, kind)(cells, self.began[-1], self.now)
        if found is None:
            return
        name, bad = found
        cell = int(cells[bad].flat[0])
        others = hazards.writer if name.startswith(("read-after", "write-after-write")) else hazards.reader
        other = abs(int(others[cell]))
        element = (hazards.low + cell * hazards.unit - region.low) // region.unit
        if other == self.now:
            raise self._error(f"{name}: element {element} of {region.label}")
        many = other == -SHARED_BY_MANY
        by = "several programs" if many else f"program {self._index(self.programs[bisect(self.began, other) - 1])}"
        raise self._error(
            f"{name} between programs of one launch: element {element} of {region.label} was reached by {by} before"
        )

    def group(self) -> None:
        """Let tensors that share memory share their hazard record."""
        self._grouped = True
        shared: Hazards | None = None
        for region in sorted((r for r in self.regions if r.nbytes), key=lambda r: r.low):
            high = region.low + region.nbytes
            if shared is None or region.low >= shared.high:
                shared = Hazards(region.low, high, region.unit)
            shared.high = max(shared.high, high)
            shared.unit = gcd(shared.unit, region.unit, region.low - shared.low)
            region.hazards = shared

    def _index(self, program: int) -> tuple[int, ...]:
        """(x, y, z) of a program counted from 1; z runs fastest."""
        return tuple(int(i) for i in np.unravel_index(program - 1, self.grid))

    def _outside(self, region: Region, offsets: np.ndarray, size: int, what: str) -> KernelMemoryError:
        """The error for an access outside its tensor, with the first wrong lane spelled out."""
        bad = region.fault(offsets, size)
        offset = int(offsets[bad].astype(np.int64).flat[0])
        element, rest = divmod(offset, region.unit)
        if not 0 <= offset <= region.nbytes - size:
            where = f"element {element} of {region.nbytes // region.unit}"
        elif rest or offset % size:
            where = f"byte {offset}, which is misaligned"
        else:
            where = f"element {element}, in a gap between the tensor's own elements"
        return self._error(f"{what} out of bounds of {region.label}: {_lanes(bad)}; the first at {where}")

    def _error(self, message: str) -> KernelMemoryError:
        return KernelMemoryError(f"{self.kernel}, program {self.index}: {message}")


class Nowhere:
    """Memory for code whose accesses are masked off: loads give zeros, what is stored is gone."""

    def __init__(self) -> None:
        self.spare = np.zeros(1, np.uint64)

    def load(self, addresses: np.ndarray, mask: np.ndarray | None, dtype: np.dtype, fill: Any) -> np.ndarray:
        return np.zeros(addresses.shape, dtype)

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray | None) -> None: ...

    def atomic(self, addresses: np.ndarray, mask: np.ndarray | None, size: int) -> np.ndarray:
        return np.full(addresses.shape, self.spare.ctypes.data, np.uint64)

    def barrier(self) -> None: ...


def _lanes(bad: np.ndarray) -> str:
    return f"{int(bad.sum())} of {bad.size} lanes"


@lru_cache
def _garbage(dtype: np.dtype) -> np.ndarray:
    """One value with all bits set: NaN for floats, -1 for integers, True for bool."""
    return np.ones((), dtype) if dtype.kind == "b" else np.frombuffer(b"\xff" * dtype.itemsize, dtype)[0]
