"""Layers made of layers, and layers that only change a shape."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator
from typing import Any

from gpulayers import arrays
from gpulayers.layers._calls import each_shape, named
from gpulayers.layers._layer import Layer
from gpulayers.ops._op import normal_axis


class _Container(Layer):
    """Holds layers under the names "0", "1", …, as torch.nn.Sequential does; they may be exchanged, as those of a list."""

    _internal = Layer._internal | {"_parts"}
    _parts: list[Layer]

    def __init__(self, *layers: Layer):
        self._parts = []
        for layer in layers:
            self.append(layer)

    def _attributes(self) -> list[tuple[str, Any]]:
        return [*((str(i), part) for i, part in enumerate(self._parts)), *super()._attributes()]

    def _takes_layers(self) -> bool:
        """Whether ``__init__`` is one of those below, whose arguments are the layers."""
        return type(self).__init__.__module__ == __name__

    def _config_arguments(self) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = super()._config_arguments()
        return tuple(self._parts) if self._takes_layers() else args, kwargs

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | ({} if self._takes_layers() else {"_parts": self._parts})

    def _apply(self, changes: dict[str, Any]) -> None:
        super()._apply(changes)
        self._name_parts()

    def _builds(self) -> bool:
        return False  # only layers inside it have weights

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._parts)

    def __getitem__(self, index: Any) -> Any:
        return self._parts[index]

    def __setitem__(self, index: int, layer: Layer) -> None:
        self._parts[index] = self._checked(operator.index(index), layer)
        self._name_parts()

    def __delitem__(self, index: Any) -> None:
        del self._parts[index]
        self._name_parts()

    def insert(self, index: int, layer: Layer) -> None:
        """Put a layer before the one that stands at ``index``."""
        self._parts.insert(index, self._checked(index, layer))
        self._name_parts()

    def append(self, layer: Layer) -> None:
        """Put a layer behind the others."""
        self.insert(len(self), layer)

    def _checked(self, index: int, layer: Any) -> Layer:
        if not isinstance(layer, Layer):
            raise TypeError(f"{type(self).__name__}: argument {index}: the rule is a Layer; got {layer!r}")
        return layer

    def _name_parts(self) -> None:
        """A layer without a name of its own is called by its place and class, as "0.Linear"."""
        self._contents = None
        for i, layer in enumerate(self._parts):
            kind = type(layer).__name__
            again = any(layer is before for before in self._parts[:i])
            if re.fullmatch(rf"(\d+\.)?{kind}", layer.name) and not again:
                layer._rename(f"{i}.{kind}")


class Sequential(_Container):
    """y = fₙ(… f₂(f₁(x))). Layers that take several inputs may stand first."""

    skips_input_grad = True

    def build(self, *input_shapes: tuple) -> None:
        for layer, shapes, _ in self._walk(*input_shapes, build=True):
            layer.ensure_built(*shapes)

    def _walk(self, *shapes: tuple, build: bool = False) -> Iterator[tuple[Layer, tuple, tuple]]:
        for layer in self:
            if build:
                layer.ensure_built(*shapes)
            out = layer.output_shape(*shapes)
            yield layer, shapes, out
            shapes = each_shape(out)

    def output_shape(self, *input_shapes: tuple) -> tuple:
        return [input_shapes[0], *(out for _, _, out in self._walk(*input_shapes))][-1]

    def forward(self, *xs: Any) -> Any:
        for layer in self:
            y = layer(*xs)
            xs = y if isinstance(y, tuple) else (y,)
        return y if len(self) else xs[0]

    def backward(self, *dys: Any) -> Any:
        dx: Any = dys[0]
        for layer in reversed(self._parts):
            dx = layer.backward(*dys)
            dys = dx if isinstance(dx, tuple) else (dx,)
            if all(d is None for d in dys):
                return None  # nothing before it asked for a gradient
        return dx

    def rows(self, *input_shapes: tuple) -> Iterator[tuple[int, Layer, tuple, tuple]]:
        for layer, shapes, _ in self._walk(*input_shapes):
            yield from layer.rows(*shapes)


class Residual(Sequential):
    """y = shortcut(x) + f(x), f the layers in sequence; without a shortcut, y = x + f(x).

    The shapes of both must be equal.
    """

    skips_input_grad = True

    def __init__(self, *layers: Layer, shortcut: Layer | None = None):
        super().__init__(*layers)
        if not isinstance(shortcut, Layer | None):
            raise TypeError(f"Residual: shortcut: the rule is a Layer or None; got {shortcut!r}")
        self.shortcut = shortcut

    def build(self, *input_shapes: tuple) -> None:
        super().build(*input_shapes)
        if self.shortcut is not None:
            self.shortcut.ensure_built(*input_shapes)

    def output_shape(self, *input_shapes: tuple) -> tuple:
        out = super().output_shape(*input_shapes)
        past = self.shortcut.output_shape(*input_shapes) if self.shortcut is not None else input_shapes[0]
        if tuple(out) != tuple(past):
            raise RuntimeError(
                f"{self.name}: the rule is f(x).shape = shortcut(x).shape; got {list(out)} and {list(past)}"
            )
        return out

    def forward(self, *xs: Any) -> Any:
        (x,) = xs
        past = self.shortcut(x) if self.shortcut is not None else x
        return past + super().forward(x)

    def backward(self, *dys: Any) -> Any:
        (dy,) = dys
        dx = super().backward(dy)
        past = self.shortcut.backward(dy) if self.shortcut is not None else dy
        return past if dx is None else dx if past is None else dx + past

    def rows(self, *input_shapes: tuple) -> Iterator[tuple[int, Layer, tuple, tuple]]:
        yield 0, self, input_shapes[0], self.output_shape(*input_shapes)
        for depth, layer, shape, out in super().rows(*input_shapes):
            yield depth + 1, layer, shape, out
        if (s := self.shortcut) is not None:
            yield from ((depth + 1, layer, shape, out) for depth, layer, shape, out in s.rows(*input_shapes))


class Parallel(_Container):
    """The same x through each branch; the results are concatenated along ``axis``, or summed.

    merge: "concat" or "sum".
    """

    skips_input_grad = True

    def __init__(self, *branches: Layer, merge: str = "concat", axis: int = 1):
        super().__init__(*branches)
        if merge not in ("concat", "sum"):
            raise ValueError(f'Parallel: merge: the rule is "concat" or "sum"; got {merge!r}')
        self.merge, self.axis = merge, axis

    def build(self, input_shape: tuple) -> None:
        for branch in self:
            branch.ensure_built(input_shape)

    def output_shape(self, input_shape: tuple) -> tuple:
        shapes = [tuple(b.output_shape(input_shape)) for b in self]
        axis = _axis(self, "axis", self.axis, shapes[0]) if shapes and self.merge == "concat" else 0
        cut = (lambda s: s) if self.merge == "sum" else (lambda s: s[:axis] + s[axis + 1 :])
        if len({cut(s) for s in shapes}) != 1:
            what = "equal shapes" if self.merge == "sum" else f"shapes equal but for axis {self.axis}"
            raise RuntimeError(f"{self.name}: the rule is {what} from every branch; got {[list(s) for s in shapes]}")
        if self.merge == "sum":
            return shapes[0]
        sizes = [s[axis] for s in shapes]
        return (*shapes[0][:axis], None if None in sizes else sum(sizes), *shapes[0][axis + 1 :])

    def forward(self, x: Any) -> Any:
        ys = [branch(x) for branch in self]
        self.save([y.shape[self.axis] for y in ys] if self.merge == "concat" else None)
        return arrays.concatenate(ys, self.axis) if self.merge == "concat" else _total(ys)

    def backward(self, dy: Any) -> Any:
        (sizes,) = self.saved
        if sizes is None:
            dys = [dy] * len(self)
        else:
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            before = [slice(None)] * (self.axis % dy.ndim)
            dys = [dy[(*before, slice(end - n, end))] for n, end in zip(sizes, ends)]
        back = [branch.backward(d) for branch, d in zip(reversed(list(self)), reversed(dys))]
        return _total([dx for dx in back[::-1] if dx is not None])

    def rows(self, input_shape: tuple) -> Iterator[tuple[int, Layer, tuple, tuple]]:
        yield 0, self, input_shape, self.output_shape(input_shape)
        for branch in self:
            yield from ((depth + 1, layer, shape, out) for depth, layer, shape, out in branch.rows(input_shape))


def _axis(layer: Layer, argument: str, axis: int, shape: tuple) -> int:
    """``axis`` counted from the front; an error names the layer."""
    with named(layer):
        return normal_axis(axis, len(shape), argument)


def _total(values: list) -> Any:
    total = values[0] if values else None
    for v in values[1:]:
        total = total + v
    return total


class Reshape(Layer):
    """y = x with another shape, the batch kept: ``Reshape(3, -1)`` turns (N, 12) into (N, 3, 4). One size may be −1."""

    def __init__(self, *shape: int):
        if not all(isinstance(n, int) and n >= -1 for n in shape) or shape.count(-1) > 1:
            raise ValueError(f"Reshape: the rule is sizes ≥ 0, at most one of them −1; got {shape}")
        self.shape = shape

    def output_shape(self, input_shape: tuple) -> tuple:
        size, known = math.prod(input_shape[1:]), math.prod(n for n in self.shape if n != -1)
        if known == 0 or size % known or (-1 not in self.shape and size != known):
            rule = f"the product of {list(self.shape)} = that of x.shape[1:]"
            raise RuntimeError(f"{self.name}: the rule is {rule}; got {list(input_shape)}")
        return (input_shape[0], *(size // known if n == -1 else n for n in self.shape))

    def forward(self, x: Any) -> Any:
        self.save(x.shape)
        return x.reshape(self.output_shape(tuple(x.shape)))

    def backward(self, dy: Any) -> Any:
        (shape,) = self.saved
        return dy.reshape(shape)


class Flatten(Layer):
    """Joins axes ``start_dim`` to ``end_dim`` into one, row-major. As torch.nn.Flatten."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1):
        self.start_dim, self.end_dim = start_dim, end_dim

    def output_shape(self, input_shape: tuple) -> tuple:
        first = _axis(self, "start_dim", self.start_dim, input_shape)
        last = _axis(self, "end_dim", self.end_dim, input_shape)
        if first > last:
            raise RuntimeError(f"{self.name}: the rule is start_dim ≤ end_dim; got {self.start_dim} and {self.end_dim}")
        joined = input_shape[first : last + 1]
        return (*input_shape[:first], None if None in joined else math.prod(joined), *input_shape[last + 1 :])

    def forward(self, x: Any) -> Any:
        self.save(x.shape)
        return x.reshape(self.output_shape(tuple(x.shape)))

    def backward(self, dy: Any) -> Any:
        (shape,) = self.saved
        return dy.reshape(shape)
