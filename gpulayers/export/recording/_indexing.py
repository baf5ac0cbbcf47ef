"""x[…] and x[…] = …: slices, integers, index arrays, masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.export.recording._handle import Handle, emit, lift, of_node, plain, select, spread
from gpulayers.export.recording._place import refuse
from gpulayers.export.recording._shapes import along, padded
from gpulayers.export.recording.graph import Node
from gpulayers.layers._weight import Weight


def _real(index: Any) -> Any:
    """The index with values in place of handles."""
    return tuple(map(_real, index)) if isinstance(index, tuple) else plain(index)


def _items(index: Any, ndim: int) -> list[Any]:
    """One item an axis (slice, int, index array or handle), and Nones."""
    items: list[Any] = []
    for i in index if isinstance(index, tuple) else (index,):
        i = i.data if isinstance(i, Weight) else i
        if (isinstance(i, slice | int | Handle) and not isinstance(i, bool)) or i is None or i is Ellipsis:
            items.append(i)
            continue
        i = np.asarray(i)
        if i.dtype == bool:
            items += np.nonzero(i)
        else:
            items.append(int(i) if not i.ndim and i.dtype.kind in "iu" else i)
    given = sum(i is not None and i is not Ellipsis for i in items)
    at = next((k for k, i in enumerate(items) if i is Ellipsis), len(items))
    return [*items[:at], *[slice(None)] * (ndim - given), *items[at + 1 :]]


def _span(item: Any, n: int) -> tuple[int, int, int]:
    """(start, stop, step) of what an item takes of n; all of it where it is an index array."""
    if isinstance(item, int):
        return item % n, item % n + 1, 1
    start, stop, step = item.indices(n) if isinstance(item, slice) else (0, n, 1)
    return (start, max(stop, start), step) if step > 0 else (start, stop, step)


def _sliced(x: Any, spans: list[tuple[int, int, int]]) -> Any:
    """x[start:stop:step, …]; a negative step is a positive one, and turned round."""
    back = [axis for axis, span in enumerate(spans) if span[2] < 0]
    counts = [len(range(*span)) for span in spans]
    forth = tuple((s[0] + (k - 1) * s[2], s[0] + 1, -s[2]) if s[2] < 0 else s for s, k in zip(spans, counts))
    steps = [step for _, _, step in forth]
    apart = len(steps) > 4 and max(steps) > 1  # WebGL takes steps in four dimensions at most
    first = tuple((start, stop, 1) for start, stop, _ in forth) if apart else forth
    y = emit("slice", [x], x.value[tuple(slice(*s) for s in first)], spans=first)
    for axis, step in enumerate(steps if apart else ()):
        y = _every(y, axis, step) if step > 1 else y
    for axis in back:
        y = along(y, axis, lambda x, a: emit("reverse", [x], np.flip(x.value, a), axes=(a,)))
    return y


def _every(x: Any, axis: int, step: int) -> Any:
    """Every step-th along an axis, in three dimensions."""
    before, n, after = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
    flat = x.reshape(before, n, after)
    y = emit("slice", [flat], flat.value[:, ::step], spans=((0, before, 1), (0, n, step), (0, after, 1)))
    return y.reshape(*x.shape[:axis], y.shape[1], *x.shape[axis + 1 :])


def _picked(y: Any, picks: list[Any], axes: list[int], shape: tuple[int, ...]) -> Any:
    """What several index arrays that stand side by side take of y."""
    if axes != list(range(axes[0], axes[0] + len(axes))) or any(isinstance(p, Handle) for p in picks):
        refuse(
            "several index arrays that do not stand side by side, or that are computed",
            "x[np.arange(len(x)), i], np.take_along_axis, or np.where(np.arange(n) == i, x, 0).sum(axis)",
        )
    flat = np.ravel_multi_index(tuple(np.broadcast_arrays(*picks)), [shape[a] for a in axes], mode="wrap")
    return y.reshape(*y.shape[: axes[0]], -1, *y.shape[axes[-1] + 1 :]).take(flat, axes[0])


def _of_each_row(x: Any, items: list[Any]) -> Any:
    """Of x[np.arange(len(x)), i], where x has i's columns: a mask of x's rank. None for any other index."""
    first, i, *rest = [*items, None][: max(len(items), 2)]
    if not (isinstance(first, np.ndarray) and isinstance(i, Handle) and i.kind == "i") or x.ndim != len(items):
        return None
    if not (
        np.array_equal(first, np.arange(x.shape[0]))
        and i.value.shape == first.shape
        and rest == [slice(None)] * len(rest)
    ):
        return None
    columns: Any = i
    return (np.arange(x.shape[1]) == columns.reshape(-1, 1)).reshape(*x.shape[:2], *[1] * len(rest))


def chosen(mask: Any, x: Any, axis: int) -> Any:
    """The only number of each row along ``axis`` that the mask leaves."""
    return (mask & x).any(axis) if x.kind == "b" else select(mask, x, 0).sum(axis)


def _in_order(node: Node) -> Node:
    """The node that this one only takes in another shape."""
    while node.op in ("reshape", "broadcast", "slice") and math.prod(node.shape) == math.prod(node.inputs[0].shape):
        if node.op == "slice" and node.attributes["spans"] != tuple((0, n, 1) for n in node.shape):
            break
        node = node.inputs[0]
    return node


class Indexing(Handle):
    shape: Any
    ndim: Any

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Handle) and index.kind == "b":
            y = self.bare()
            y.mask = index
            return y
        items = _items(index, self.ndim)
        if (mask := _of_each_row(self, items)) is not None:
            return chosen(mask, self, 1)
        of_axes = [i for i in items if i is not None]
        lists = [axis for axis, i in enumerate(of_axes) if not isinstance(i, slice | int)]
        y = _sliced(self, [_span(item, n) for item, n in zip(of_axes, self.shape)])
        value = self.value[_real(index)]
        if lists:
            picks = [of_axes[axis] for axis in lists]
            if isinstance(picks[0], Handle) and len(picks) == 1:
                return y.take(picks[0], lists[0]).reshape(value.shape)
            y = _picked(y, picks, lists, self.shape)
        y = y if all(isinstance(i, slice) for i in items) else y.reshape(value.shape)
        if not np.array_equal(y.value, value, equal_nan=y.kind == "f"):
            refuse("this mixture of indices", "one kind of index after the other: x[:, rows][..., 0]")
        if lists or isinstance(value, np.generic):
            return Handle.concrete(y.node, np.asarray(value))
        return Handle.concrete(
            y.node, value, self, lambda base: base[index], lambda base, v: base._replaced(index, v), index
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        written = isinstance(value, Handle) and value.base is self and value.index is index
        if written and value.seen == self.root.version:
            return  # y[i] += … has written through its view already
        self.write(self._replaced(index, value))

    def _replaced(self, index: Any, value: Any) -> Any:
        """A new array: this one with ``value`` at ``index``."""
        if isinstance(index, Handle) and index.kind == "b":
            value = lift(value)
            if value.mask is None and value.ndim:
                rule = "only numbers, and what the same mask selected, have a shape that a recording knows"
                refuse(f"y[mask] = an array: {rule}", "np.where(mask, …, y)")
            return select(spread(index, self), value.bare(), self)
        target = self.value[_real(index)]
        v = lift(value, self.kind).broadcast_to(target.shape)
        memory = self.value.__array_interface__["data"], self.value.strides, self.value.shape
        if (target.__array_interface__["data"], target.strides, target.shape) == memory:
            return v
        items = [i for i in _items(index, self.ndim) if i is not None]
        if (mask := _of_each_row(self, items)) is not None:
            return select(mask, v.reshape(len(self.value), 1, *v.shape[1:]), self)
        if any(isinstance(i, Handle) for i in items):
            other = "y = np.where(np.arange(n) == i, v, y), which compares each place with the index"
            refuse(
                "a write at computed indices", f"y[np.arange(len(y)), i] = v, np.put_along_axis, np.add.at, or {other}"
            )
        at = [np.atleast_1d(np.arange(n)[i]) for n, i in zip(self.shape, items)]
        v = v.reshape([len(a) for a in at])
        if all(len(a) and (np.diff(a) == 1).all() for a in at):  # a block
            edges = tuple((int(a[0]), int(n - 1 - a[-1])) for a, n in zip(at, self.shape))
            if self.node.op == "full":
                return padded(v, edges, self.node.attributes["value"])
            if self.kind != "b" and (more := self._added(v, edges)) is not None:
                return self.bare() + padded(more, edges, 0)
        return self._scattered(v, at)

    def _added(self, v: Any, edges: tuple) -> Any:
        """What ``v`` adds to the block of this one that lies within ``edges``; None where it is no such sum."""
        total = _in_order(v.node)
        spans = tuple((first, n - last, 1) for (first, last), n in zip(edges, self.shape))
        for here, more in (total.inputs, total.inputs[::-1]) if total.op == "add" else ():
            block = _in_order(here)
            if block.op == "slice" and block.inputs[0] is self.node and block.attributes["spans"] == spans:
                return of_node(more).broadcast_to(total.shape).reshape(v.shape)
        return None

    def _scattered(self, v: Any, at: list[np.ndarray]) -> Any:
        """This one with ``v`` at the places ``at`` of each axis: v spread out by gathers, chosen by a mask."""
        inside: Any = None
        for axis, (a, n) in enumerate(zip(at, self.shape)):
            if len(a) == n and (a == np.arange(n)).all():
                continue
            if not len(a):
                return self
            source, here = np.zeros(n, int), np.zeros(n, bool)
            source[a], here[a] = np.arange(len(a)), True
            v = v.take(source, axis)
            mask = lift(here.reshape([-1 if k == axis else 1 for k in range(self.ndim)]))
            inside = mask if inside is None else inside & mask
        return select(inside, v, self)
