"""What surrounds a layer's build, forward and backward: frames, checks, names in errors."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpulayers import arrays
from gpulayers.arrays import FLOATS, Spec
from gpulayers.ops._op import RuleError

if TYPE_CHECKING:
    from gpulayers.layers._layer import Layer

recording: contextvars.ContextVar[bool] = contextvars.ContextVar("recording", default=True)
_FRAMES_WORTH_A_WARNING = 1000


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Forwards made inside keep nothing for a backward."""
    token = recording.set(False)
    try:
        yield
    finally:
        recording.reset(token)


class Frame:
    """What one forward keeps for its backward; a class and its base class each keep their own."""

    __slots__ = ("calls", "inputs", "outputs", "saved", "scalar")

    def __init__(self) -> None:
        self.saved: dict[type, tuple] = {}
        self.calls: dict[type, list] = {}
        self.inputs: list[Spec | None] = []
        self.outputs: list[Spec] = []
        self.scalar: Any = None
        """The output, if it is one number (a loss): backward() then starts from dy = 1."""


def managed_build(cls: type, build: Callable) -> Callable:
    @functools.wraps(build)
    def managed(self: Layer, *input_shapes: tuple) -> None:
        first = self._input_shapes is None
        self._input_shapes = input_shapes
        try:
            build(self, *input_shapes)
        except BaseException:
            if first:
                self._input_shapes = None
            raise

    return managed


def managed_forward(cls: type, forward: Callable) -> Callable:
    @functools.wraps(forward)
    def managed(self: Layer, *xs: Any) -> Any:
        if self._scopes:  # super().forward(x)
            with _scope(self, cls):
                return forward(self, *xs)
        shapes = tuple(_shape(self, x) for x in xs)
        if self._input_shapes is None:
            self.build(*((None, *s[1:]) for s in shapes))
            self._input_shapes = shapes
        said = _said_shape(self, shapes)
        frame = Frame()
        self._frames.append(frame)
        try:
            with _scope(self, cls), named(self):
                y = forward(self, *xs)
            dtype = next((d for d in map(_dtype, xs) if d in FLOATS), None)
            ys = tuple(_as_output(self, out, dtype) for out in (y if isinstance(y, tuple) else (y,)))
            _check_shape(self, said, ys)
        except BaseException:
            self._frames.remove(frame)
            raise
        if not recording.get():
            self._frames.pop()
        else:
            frame.inputs = [arrays.spec(x) for x in xs]  # type: ignore[misc]
            frame.outputs = [arrays.spec(out) for out in ys]  # type: ignore[misc]
            frame.scalar = ys[0] if len(ys) == 1 and not ys[0].shape else None
            if len(self._frames) == _FRAMES_WORTH_A_WARNING:
                text = f"{self.name}: {len(self._frames)} forwards wait for their backward; use `with gl.no_grad():` for inference"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        return ys if isinstance(y, tuple) else ys[0]

    return managed


def managed_backward(cls: type, backward: Callable) -> Callable:
    @functools.wraps(backward)
    def managed(self: Layer, *dys: Any) -> Any:
        if self._scopes:  # super().backward(dy)
            with _scope(self, cls):
                return backward(self, *dys)
        if not self._frames:
            raise RuntimeError(f"{self.name}: backward without a forward before it (or the forward ran under no_grad)")
        frame = self._frames[-1]
        if not dys and frame.scalar is not None:
            dys = (arrays.zeros_like(frame.scalar) + 1,)
        _check_dys(self, frame, dys)
        with _scope(self, cls), named(self):
            dxs = backward(self, *dys)
        self._frames.pop()
        several = isinstance(dxs, tuple)
        checked = tuple(
            _as_gradient(self, dx, x) for dx, x in itertools.zip_longest(dxs if several else (dxs,), frame.inputs)
        )
        return checked if several else checked[0]

    return managed


@contextlib.contextmanager
def _scope(layer: Layer, cls: type) -> Iterator[None]:
    layer._scopes.append(cls)
    try:
        yield
    finally:
        layer._scopes.pop()


@contextlib.contextmanager
def named(layer: Layer) -> Iterator[None]:
    """Errors of a rule name the innermost layer."""
    try:
        yield
    except RuleError as error:
        if "(" not in error.where and error.where != layer.name:
            error.where = f"{layer.name} ({error.where})" if error.where else layer.name
        raise


def _shape(layer: Layer, x: Any) -> tuple:
    try:
        arrays.library(x)
    except TypeError as error:
        raise TypeError(f"{layer.name}: x: {error}") from None
    return tuple(x.shape)


def _dtype(x: Any) -> Any:
    return arrays.library(x).dtype(x)


def is_float(x: Any) -> bool:
    return x is not None and _dtype(x) in FLOATS


def _as_output(layer: Layer, y: Any, dtype: Any) -> Any:
    """16 bit in, 16 bit out, whatever array code computed in; a NumPy scalar becomes an array."""
    if y is None:
        raise TypeError(f"{layer.name}: forward returned None")
    y = np.asarray(y) if isinstance(y, np.generic | float) else y
    try:
        arrays.library(y)
    except TypeError as error:
        raise TypeError(f"{layer.name}: forward returned no array: {error}") from None
    return arrays.cast(y, dtype) if dtype is not None and _dtype(y) in FLOATS else y


def _said_shape(layer: Layer, shapes: tuple) -> tuple:
    """What ``output_shape`` says for inputs of these shapes, as a tuple of shapes."""
    said = layer._output_shapes.get(shapes)
    if said is None:
        shape = layer.output_shape(*shapes)
        if not isinstance(shape, tuple | list):
            raise TypeError(f"{layer.name}: output_shape: the rule is a tuple of sizes, batch first; got {shape!r}")
        said = layer._output_shapes[shapes] = each_shape(shape)
    return said


def each_shape(shape: Any) -> tuple:
    """What ``output_shape`` returns, one shape or several, as a tuple of shapes."""
    several = bool(shape) and isinstance(shape[0], tuple | list)
    return tuple(map(tuple, shape)) if several else (tuple(shape),)


def _check_shape(layer: Layer, said: tuple, ys: tuple) -> None:
    came = tuple(tuple(y.shape) for y in ys)
    if said != came:
        rule, got = (" and ".join(str(list(shape)) for shape in shapes) for shapes in (said, came))
        raise RuntimeError(f"{layer.name}: forward: the rule is y.shape = output_shape(x.shape) = {rule}; got {got}")


def _check_dys(layer: Layer, frame: Frame, dys: tuple) -> None:
    if len(dys) != len(frame.outputs):
        raise RuntimeError(f"{layer.name}: backward takes {len(frame.outputs)} gradients; got {len(dys)}")
    for dy, y in zip(dys, frame.outputs):
        if dy is not None and (tuple(dy.shape) != y.shape or _dtype(dy) != y.dtype):
            raise RuntimeError(f"{layer.name}: dy: the rule is dy.shape, dtype = {y}; got {_dtype(dy)}{list(dy.shape)}")


def _as_gradient(layer: Layer, dx: Any, x: Spec | None) -> Any:
    if dx is None or x is None:
        return None
    if tuple(dx.shape) != x.shape:
        raise RuntimeError(
            f"{layer.name}: backward: the rule is dx.shape = x.shape = {list(x.shape)}; got {list(dx.shape)}"
        )
    return arrays.cast(dx, x.dtype)
