"""Batches: rows of NumPy arrays in a given order, on the model's device before they are needed."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays, transfer

Batch = tuple[list[Any], Any]


def columns(x: Any, y: Any = None) -> tuple[list[np.ndarray], np.ndarray | None]:
    """x as a list of NumPy arrays (one for each input of the model) and y, checked to be equally long."""
    xs = [transfer.to_numpy(a) for a in (x if isinstance(x, list | tuple) else [x])]
    y = None if y is None else transfer.to_numpy(y)
    lengths = {len(a) if a.ndim else None for a in [*xs, *([] if y is None else [y])]}
    if len(lengths) != 1 or None in lengths:
        shapes = [list(a.shape) for a in xs] + ([] if y is None else [list(y.shape)])
        raise ValueError(f"data: the rule is len(x) = len(y); got shapes {shapes}")
    return xs, y


def require_size(batch_size: Any) -> None:
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size: the rule is an integer ≥ 1; got {batch_size!r}")


def order(seed: int, epoch: int, rows: int, shuffle: bool, drawn: int | None = None) -> np.ndarray | None:
    """Which rows an epoch takes, in order: all of them, or ``drawn`` of them, each anew; None: as they stand."""
    generator = np.random.default_rng([seed, epoch])
    if drawn is not None:
        return generator.integers(rows, size=drawn)
    return generator.permutation(rows) if shuffle else None


def batches(
    xs: Sequence[np.ndarray],
    y: np.ndarray | None,
    size: int,
    device: str,
    order: np.ndarray | None = None,
    drop_last: bool = False,
) -> Iterator[Batch]:
    """(inputs, target) of ``size`` rows each, the last one smaller, or left out with ``drop_last``.

    On a GPU each batch is copied, on a stream of its own, while the one before it computes.
    """
    n = len(xs[0]) if order is None else len(order)
    require_size(size)

    def host(start: int) -> list[np.ndarray]:
        rows = slice(start, start + size) if order is None else order[start : start + size]
        return [a[rows] for a in (xs if y is None else [*xs, y])]

    starts = range(0, n - n % size if drop_last else max(n, 1), size)  # no rows: one empty batch
    for parts in map(host, starts) if device == "cpu" else _ahead(map(host, starts), device):
        yield (list(parts), None) if y is None else (list(parts[:-1]), parts[-1])


def _ahead(hosts: Iterator[list[np.ndarray]], device: str) -> Iterator[list[Any]]:
    """The same arrays on the GPU, each copy under way while the caller works on the one before."""
    copier = (_CuPyCopier if transfer.device_library().name == "cupy" else _TorchCopier)(device)
    coming = None
    try:
        for host in hosts:
            ready, coming = coming, copier.start(host)
            if ready is not None:
                yield copier.wait(ready)
        if coming is not None:
            ready, coming = coming, None
            yield copier.wait(ready)
    finally:
        if coming is not None:  # left early: its memory goes back to the pool, so the copy must come first
            copier.wait(coming)


_MOST_AHEAD = 4
"""Batches whose copies may be under way, so that the CPU does not wait for the GPU at every batch."""


class _CuPyCopier:
    def __init__(self, device: str):
        import cupy

        self.device = device
        with arrays.CUPY.on(_indexed(device)):
            self.stream = cupy.cuda.Stream(non_blocking=True)
        self.under_way: collections.deque = collections.deque()

    def start(self, host: list[np.ndarray]) -> tuple:
        import cupy
        import cupyx

        with arrays.CUPY.on(_indexed(self.device)):
            # Allocated on the caller's stream: the pool then never hands the memory out while the caller still uses it.
            fresh = [cupy.empty(a.shape, a.dtype) for a in host]
            self.stream.wait_event(cupy.cuda.get_current_stream().record())
            pinned = [cupyx.empty_pinned(a.shape, a.dtype) for a in host]
            for target, source, a in zip(fresh, pinned, host):
                source[...] = a
                target.set(source, stream=self.stream)
            copied = self.stream.record()
            # CuPy's pool would hand pinned memory out again at once: it lives here until its copy is done.
            self.under_way.append((copied, pinned))
            if len(self.under_way) > _MOST_AHEAD:
                self.under_way.popleft()[0].synchronize()
            return fresh, copied

    def wait(self, started: tuple) -> list[Any]:
        import cupy

        fresh, copied = started
        cupy.cuda.get_current_stream().wait_event(copied)
        return fresh


class _TorchCopier:
    def __init__(self, device: str):
        import torch

        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, host: list[np.ndarray]) -> tuple:
        import torch

        with torch.cuda.stream(self.stream):
            pinned = [transfer.numpy_to_torch(np.ascontiguousarray(a)).pin_memory() for a in host]
            return [p.to(self.device, non_blocking=True) for p in pinned], self.stream.record_event(), pinned

    def wait(self, started: tuple) -> list[Any]:
        import torch

        fresh, copied, _ = started
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for t in fresh:
            t.record_stream(current)
        return fresh


def _indexed(device: str) -> str:
    return device if ":" in device else f"{device}:0"
