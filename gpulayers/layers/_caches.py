"""Caches of keys and values for decoding: what a sequence's tokens were, kept for the attention of those to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers import arrays, transfer
from gpulayers.definition import ArgumentError, ShapeError
from gpulayers.ops.attention import attention_decode, kv_append, rotary_append

INT32 = np.dtype("int32")


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentError(name, f"{name} ≥ 1", size)


class KVCache:
    """Keys and values of ``batch`` sequences of up to ``capacity`` tokens each, in one piece of memory.

    keys, values: arrays [batch, capacity, heads, width] (of values: value_width, by default the same). lengths: (batch,)
    int32, how many tokens each sequence has; ``used``, the same as a list, which asks no GPU. dtype: a float's name.
    device: "cpu", or "cuda[:i]".

    A call appends a step's keys and values and attends to all there are::

        cache = gl.KVCache(batch=2, capacity=1024, heads=8, width=64)
        y = cache(q, k, v)   # q (2, Hq, L, 64), k and v (2, 8, L, 64) → y (2, Hq, L, 64)

    All methods take ``sequences``, the numbers of those that a call is about, where it is not all of them: so prompts of
    different lengths are appended one by one. For inference: nothing here has a gradient.
    """

    table: Any = None
    """(batch, blocks) int32, each sequence's pages; None: its memory is a page of its own."""

    def __init__(
        self,
        batch: int,
        capacity: int,
        heads: int,
        width: int,
        *,
        value_width: int | None = None,
        dtype: Any = "float32",
        device: str = "cpu",
    ):
        self._begin(batch, capacity, (batch, capacity), heads, width, value_width, dtype, device)

    def _begin(
        self, batch: int, capacity: int, places: tuple, heads: int, width: int, value_width: Any, dtype: Any, device: Any
    ) -> None:  # fmt: skip
        _require_positive(batch=batch, capacity=capacity, heads=heads, width=width)
        self.batch, self.capacity, self.dtype, self.device = batch, capacity, dtype, device
        self.used = [0] * batch
        self.keys = self._zeros((*places, heads, width))
        self.values = self._zeros((*places, heads, width if value_width is None else value_width))
        self.lengths = self._put(np.zeros(batch, INT32))

    # --- what another library has otherwise --------------------------------------------------------------------------

    def _zeros(self, shape: tuple) -> Any:
        return self._put(np.zeros(shape, arrays.dtype(self.dtype)))

    def _put(self, host: np.ndarray) -> Any:
        return transfer.to_device(host, self.device)

    @staticmethod
    def _attended(q: Any, k: Any, v: Any, lengths: Any, table: Any, sinks: Any, **options: Any) -> Any:
        return attention_decode(q, k, v, lengths, table, sinks, **options)[0]

    @staticmethod
    def _appended(*given: Any) -> None:
        kv_append(*given)

    @staticmethod
    def _turned_and_appended(*given: Any, interleaved: bool) -> Any:
        return rotary_append(*given, interleaved=interleaved)

    # --- use ---------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        sequences: Sequence[int] | None = None,
        *,
        rotary: tuple[Any, Any] | None = None,
        interleaved: bool = False,
        **options: Any,
    ) -> Any:
        """``append``, then ``attend``. rotary: (cos, sin), (positions, pairs) each, by which q and k are turned before, each
        token by its place; interleaved: as ``rotary`` takes it."""
        if rotary is None:
            self.append(k, v, sequences)
        else:
            q = self.append(k, v, sequences, q=q, rotary=rotary, interleaved=interleaved)
        return self.attend(q, sequences, **options)

    def append(
        self,
        k: Any,
        v: Any,
        sequences: Sequence[int] | None = None,
        *,
        q: Any = None,
        rotary: tuple[Any, Any] | None = None,
        interleaved: bool = False,
    ) -> Any:
        """Write k, v: (sequences, heads, L, width) behind the tokens there are. With q and rotary, in the same launch, q and k
        are turned before; returns q, turned.

        Raises ValueError, and writes nothing, where a sequence would have more than ``capacity`` tokens.
        """
        if (q is None) is not (rotary is None):
            raise ArgumentError("rotary", "q and (cos, sin), or neither", "one of them")
        chosen, count = self._chosen(sequences), k.shape[2]
        if k.shape[0] != len(chosen):
            raise ShapeError("k", f"k.shape[0] = {len(chosen)}, the number of sequences", list(k.shape))
        most = max((self.used[i] for i in chosen), default=0) + count
        if most > self.capacity:
            raise ArgumentError("k", f"at most {self.capacity} tokens a sequence, the capacity", most)
        self._reserve(chosen, count)
        rows = self._rows(sequences)
        table, lengths = self._places(rows)
        caches, turned = (self.keys.swapaxes(1, 2), self.values.swapaxes(1, 2)), None
        if rotary is None:
            self._appended(*caches, k, v, lengths, table)
        else:
            turned = self._turned_and_appended(q, k, v, *caches, *rotary, lengths, table, interleaved=interleaved)
        if rows is None:
            self.lengths += count
        else:
            self.lengths[rows] += count
        for i in chosen:
            self.used[i] += count
        return turned

    def attend(self, q: Any, sequences: Sequence[int] | None = None, *, sinks: Any = None, **options: Any) -> Any:
        """y (sequences, Hq, Lq, value width): attention of the last Lq tokens' queries q to all tokens up to them.

        sinks, causal, window, scale, softcap: as ``gpulayers.ops.attention``'s attention_decode takes them.
        """
        table, lengths = self._places(self._rows(sequences))
        k, v = self.keys.swapaxes(1, 2), self.values.swapaxes(1, 2)
        return self._attended(q, k, v, lengths, table, sinks, **options)

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Forget all tokens."""
        for i in self._chosen(sequences):
            self.used[i] = 0
        self.lengths[...] = self._put(np.asarray(self.used, INT32))

    def _chosen(self, sequences: Sequence[int] | None) -> Sequence[int]:
        if sequences is None:
            return range(self.batch)
        if len({*sequences}) != len(sequences) or not all(0 <= i < self.batch for i in sequences):
            raise ArgumentError("sequences", f"different numbers from 0 to {self.batch - 1}", list(sequences))
        return sequences

    def _reserve(self, chosen: Sequence[int], count: int) -> None:
        """Make room for so many tokens more."""

    def _rows(self, sequences: Sequence[int] | None) -> Any:
        """The numbers of some sequences as an array beside the cache; None: of all."""
        return None if sequences is None else self._put(np.asarray(self._chosen(sequences), np.int64))

    def _places(self, rows: Any) -> tuple[Any, Any]:
        """(the table of pages or None, lengths) of the sequences of these numbers."""
        if rows is None:
            return self.table, self.lengths
        return (rows[:, None] if self.table is None else self.table[rows]), self.lengths[rows]


class PagedKVCache(KVCache):
    """A ``KVCache`` in pages of ``page_size`` tokens, which sequences take as they grow and give back at ``reset``.

    keys, values: arrays [pages, page_size, heads, width]. table: (batch, blocks) int32, each sequence's pages in order, -1
    for none yet; ``blocks`` bounds a sequence's length (by default it may take all pages). free: how many pages nobody has.
    """

    def __init__(
        self,
        batch: int,
        pages: int,
        heads: int,
        width: int,
        *,
        page_size: int = 16,
        blocks: int | None = None,
        value_width: int | None = None,
        dtype: Any = "float32",
        device: str = "cpu",
    ):
        _require_positive(pages=pages, page_size=page_size)
        self.page_size, blocks = page_size, pages if blocks is None else blocks
        self._begin(batch, blocks * page_size, (pages, page_size), heads, width, value_width, dtype, device)
        self._free = list(range(pages))[::-1]
        self._owned: list[list[int]] = [[] for _ in range(batch)]
        self._table = np.full((batch, blocks), -1, INT32)
        self.table = self._put(self._table.copy())

    @property
    def free(self) -> int:
        return len(self._free)

    def _reserve(self, chosen: Sequence[int], count: int) -> None:
        """Raises RuntimeError, and takes none, where pages are wanting."""
        wanted = {i: -(-(self.used[i] + count) // self.page_size) - len(self._owned[i]) for i in chosen}
        total = sum(max(n, 0) for n in wanted.values())
        if total > self.free:
            raise RuntimeError(f"PagedKVCache: {total} pages are needed and {self.free} are free: reset a sequence")
        for i, more in wanted.items():
            for _ in range(more):
                self._table[i, len(self._owned[i])] = page = self._free.pop()
                self._owned[i].append(page)
        if total:
            self.table[...] = self._put(self._table.copy())

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Forget all tokens, and give their pages back."""
        for i in self._chosen(sequences):
            self._free += self._owned[i][::-1]
            self._owned[i], self._table[i] = [], -1
        self.table[...] = self._put(self._table.copy())
        super().reset(sequences)
