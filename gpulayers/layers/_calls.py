"""What surrounds a layer's build, forward and backward: frames, modes, checks, names in errors."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpulayers import arrays
from gpulayers.arrays import FLOATS, Spec
from gpulayers.definition import RuleError
from gpulayers.layers._frames import Frame, Waiting, forced_mode, recording, thread
from gpulayers.layers._members import Members
from gpulayers.layers._weight import Weight
from gpulayers.ops._op import Op

_FRAMES_WORTH_A_WARNING = 1000
_SHAPES_KEPT = 64  # output shapes that a layer remembers
_one_at_a_time = threading.RLock()
"""Layers are built one at a time, however many threads call them first."""
fuser: Any = None
"""Runs fused layers: ``forward(layer, its own forward, xs)`` and ``backward(layer, its own backward, dys)``."""


class Calls(Members):
    """A layer as what is called: forward, then backward, each in frames of the thread's own."""

    _internal = Members._internal | {"_waiting", "_training", "_input_shapes", "_output_shapes", "_built_by_init"}
    fused = False
    """Whether the layer runs as kernels written from its array code, where there is a GPU: see ``gl.fuse``."""
    skips_input_grad = False
    """Whether backward may leave out (None) the gradient of an input that nobody asks for; False again in a class that
    writes a backward of its own, unless it says so."""
    _waiting: Waiting
    _training: bool
    _input_shapes: tuple | None
    _output_shapes: dict[tuple, tuple]
    _built_by_init: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls, *args, **kwargs)
        # Set here, so that a layer of your own need not call super().__init__().
        fresh = {"_waiting": Waiting(), "_training": True, "_input_shapes": None, "_output_shapes": {}}
        self.__dict__.update(fresh | {"_built_by_init": False})
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "backward" in cls.__dict__ and "skips_input_grad" not in cls.__dict__:
            cls.skips_input_grad = False
        for method, manage in (
            ("build", _managed_build),
            ("forward", _managed_forward),
            ("backward", _managed_backward),
        ):
            if method in cls.__dict__:
                setattr(cls, method, manage(cls, cls.__dict__[method]))

    def build(self, *input_shapes: Any, **_: Any) -> None:
        """Add the weights that depend on the input shapes (batch first, None where the size is not known yet)."""

    def output_shape(self, *input_shapes: Any, **_: Any) -> tuple:
        """The shape of the output, batch included."""
        raise NotImplementedError(f"{type(self).__name__} must say its output_shape(input_shape)")

    def forward(self, *xs: Any, **_: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must write forward(x)")

    def backward(self, *dys: Any, **_: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must write backward(dy)")

    def __call__(self, *xs: Any) -> Any:
        return self.forward(*xs)

    # --- what forward and backward use -------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether this call trains: as ``train()`` and ``eval()`` said, except in ``predict`` and ``evaluate``."""
        forced = forced_mode.get()
        return self._training if forced is None else forced

    @training.setter
    def training(self, value: bool) -> None:
        self._training = bool(value)

    def _frame(self, what: str) -> Frame:
        running = thread.running
        if not running or running[-1].layer is not self:
            raise RuntimeError(f"{self.name}: {what}")
        return running[-1]

    def save(self, *values: Any) -> None:
        """Keep these for the backward of this call."""
        frame = self._frame("save(…) keeps arrays for backward, inside forward; gl.save(model, path) writes a model")
        if recording.get():
            frame.saved[frame.scopes[-1]] = values

    @property
    def saved(self) -> tuple:
        """What ``save`` kept in the forward that this backward belongs to."""
        frame = self._frame("saved is what forward kept, inside backward")
        return frame.saved.get(frame.scopes[-1], ())

    def saved_by(self, cls: type) -> tuple:
        """What a base class's forward kept in this call."""
        return self._frame("saved_by(…) is what forward kept, inside backward").saved.get(cls, ())

    def run(self, op: Op, *inputs: Any, **options: Any) -> Any:
        """The op's output; inputs may be arrays, Weights and None. ``run_backward`` is its backward."""
        frame = self._frame("run(…) is for forward; outside of it call the op")
        plain = [x.data if isinstance(x, Weight) else x for x in inputs]
        needs: list[str] = []
        if recording.get():
            wanted = [x.trainable if isinstance(x, Weight) else not frame.is_data(x) for x in inputs]
            pairs = zip(op.inputs, plain, wanted)
            needs = [n for n, x, want in pairs if want and n in op.differentiable and is_float(x)]
        if not needs:
            y = op(*plain, **options)
            if frame.data:
                frame.data.extend(y if isinstance(y, tuple) else (y,))
            return y
        y, call = op.record(*plain, needs=needs, **options)
        frame.calls.setdefault(frame.scopes[-1], []).append((call, inputs))
        return y

    def run_backward(self, *dys: Any) -> Any:
        """Adds the gradients of Weights to them; returns that of the one array input, or a tuple where there are more."""
        frame = self._frame("run_backward(…) is for backward")
        calls = frame.calls.get(frame.scopes[-1])
        if not calls:
            return None  # no gradient was needed
        call, inputs = calls.pop()
        outputs = call.plan.rule.outputs.values()
        # Array code between an op and the layer's end may have widened 16 bits.
        dys = tuple(dy if dy is None else arrays.cast(dy, out.dtype) for dy, out in zip(dys, outputs))
        grads = call.backward(*dys)
        for x, g in zip(inputs, grads):
            if isinstance(x, Weight) and g is not None:
                x.add_grad(g)
        given = zip(call.plan.op.inputs, inputs, grads)
        rest = [
            g for n, x, g in given if n in call.plan.op.differentiable and not isinstance(x, Weight) and is_float(x)
        ]
        return rest[0] if len(rest) == 1 else tuple(rest)

    # --- building ----------------------------------------------------------------------------------------------------

    def ensure_built(self, *input_shapes: tuple) -> None:
        """Build, if that has not been done."""
        if self._input_shapes is None:
            with _one_at_a_time:
                if self._input_shapes is None:
                    self.build(*input_shapes)
                    self._input_shapes = input_shapes

    def _builds(self) -> bool:
        """Whether this layer adds weights of its own when it sees its input shape."""
        return type(self).build is not Calls.build

    def waits(self) -> bool:
        """Whether it has not seen it yet."""
        return self._input_shapes is None and self._builds()

    def build_status(self) -> None:
        """Raises RuntimeError if a layer in here waits for its input shape."""
        for layer in self.layers():
            if layer.waits():
                raise RuntimeError(f"{layer.name} is not built: call the model once, or model.build(input_shape)")


@contextlib.contextmanager
def no_leftovers(*layers: Calls) -> Iterator[None]:
    """Calls made inside that get no backward (a step that failed half-way) leave nothing behind."""
    before = [len(layer._waiting.frames) for layer in layers]
    try:
        yield
    finally:
        for layer, count in zip(layers, before):
            del layer._waiting.frames[count:]


def _managed_build(cls: type, build: Callable) -> Callable:
    @functools.wraps(build)
    def managed(self: Calls, *input_shapes: tuple) -> None:
        if any(layer is self for layer in thread.building):  # super().build(…)
            build(self, *input_shapes)
            return
        with _one_at_a_time:
            before, weights = dict(self.__dict__), dict(self._weights)
            thread.building.append(self)
            try:
                build(self, *input_shapes)
            except BaseException:
                self.__dict__.clear()
                self.__dict__.update(before | {"_weights": weights})
                raise
            finally:
                thread.building.pop()
            self._input_shapes = input_shapes

    return managed


def _managed_forward(cls: type, forward: Callable) -> Callable:
    @functools.wraps(forward)
    def managed(self: Calls, *xs: Any) -> Any:
        running = thread.running
        if running and running[-1].layer is self:  # super().forward(x)
            with scope(running[-1], cls):
                return forward(self, *xs)
        shapes = tuple([_shape(self, x) for x in xs])
        if self._input_shapes is None:
            self.ensure_built(*((None, *s[1:]) for s in shapes))
        said = _said_shape(self, shapes)
        parent = running[-1] if running else None
        frame, record = Frame(self, cls), recording.get()
        if record:
            _ask(self, frame, parent, xs)
        running.append(frame)
        try:
            y = fuser.forward(self, forward, xs) if self.fused else forward(self, *xs)
            dtype = next((d for d in map(_dtype, xs) if d in FLOATS), None)
            ys = tuple([_as_output(self, out, dtype) for out in (y if isinstance(y, tuple) else (y,))])
            if said != tuple([tuple(out.shape) for out in ys]):
                _check_shape(self, shapes, ys)
        except RuleError as error:
            _name(self, error)
            raise
        finally:
            running.pop()
            frame.layer = None
        if record:
            _keep(self, frame, parent, xs, ys)
        return ys if isinstance(y, tuple) else ys[0]

    return managed


def _ask(layer: Calls, frame: Frame, parent: Frame | None, xs: tuple) -> None:
    """Which of the inputs' gradients will be asked for: those of data will not."""
    data = thread.data if parent is None else parent.data  # empty where the parent's backward wants them all
    if data:
        frame.wanted = [not any(x is d for d in data) for x in xs]
        if layer.skips_input_grad:
            frame.data = [x for x, wanted in zip(xs, frame.wanted) if not wanted]


def _keep(layer: Calls, frame: Frame, parent: Frame | None, xs: tuple, ys: tuple) -> None:
    """The call is over: its frame waits for the backward."""
    frame.data = []
    frame.inputs = [arrays.spec(x) for x in xs]
    frame.outputs = [arrays.spec(out) for out in ys]
    frame.scalar = ys[0] if len(ys) == 1 and not ys[0].shape else None
    if parent is not None:
        parent.of(layer).append(frame)
        if frame.wanted and not any(frame.wanted) and not layer.trainable_weights:
            parent.data.extend(ys)  # what follows from data alone is data
        return
    frames = layer._waiting.frames
    frames.append(frame)
    if len(frames) == _FRAMES_WORTH_A_WARNING:
        text = f"{layer.name}: {len(frames)} forwards wait for their backward; use `with gl.no_grad():` for inference"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _managed_backward(cls: type, backward: Callable) -> Callable:
    @functools.wraps(backward)
    def managed(self: Calls, *dys: Any) -> Any:
        running = thread.running
        if running and running[-1].layer is self:  # super().backward(dy)
            with scope(running[-1], cls):
                return backward(self, *dys)
        frames = running[-1].of(self) if running else self._waiting.frames
        frame = frames[-1] if frames else None
        if frame is None:
            text = "backward without a forward before it in this thread (or the forward ran under no_grad)"
            raise RuntimeError(f"{self.name}: {text}")
        if not dys and frame.scalar is not None:
            dys = (arrays.zeros_like(frame.scalar) + 1,)
        _check_dys(self, frame, dys)
        frames.pop()
        frame.layer, frame.scopes = self, [cls]
        running.append(frame)
        try:
            dxs = fuser.backward(self, backward, dys) if self.fused else backward(self, *dys)
        except RuleError as error:
            _name(self, error)
            raise
        finally:
            running.pop()
            frame.layer = None
        several = isinstance(dxs, tuple)
        given = itertools.zip_longest(dxs if several else (dxs,), frame.inputs, frame.wanted, fillvalue=None)
        checked = tuple([None if want is False else _as_gradient(self, dx, x) for dx, x, want in given])
        return checked if several else checked[0]

    return managed


@contextlib.contextmanager
def scope(frame: Frame, cls: type) -> Iterator[None]:
    """What is saved and run inside is this class's part of the call."""
    frame.scopes.append(cls)
    try:
        yield
    finally:
        frame.scopes.pop()


@contextlib.contextmanager
def named(layer: Calls) -> Iterator[None]:
    """Errors of a rule name the innermost layer."""
    try:
        yield
    except RuleError as error:
        _name(layer, error)
        raise


def _name(layer: Calls, error: RuleError) -> None:
    if "(" not in error.where and error.where != layer.name:
        error.where = f"{layer.name} ({error.where})" if error.where else layer.name


def _shape(layer: Calls, x: Any) -> tuple:
    try:
        arrays.library(x)
    except TypeError as error:
        raise TypeError(f"{layer.name}: x: {error}") from None
    return tuple(x.shape)


def _dtype(x: Any) -> Any:
    return arrays.library(x).dtype(x)


def is_float(x: Any) -> bool:
    return x is not None and _dtype(x) in FLOATS


def _as_output(layer: Calls, y: Any, dtype: Any) -> Any:
    """16 bit in, 16 bit out, whatever array code computed in; a NumPy scalar becomes an array."""
    if y is None:
        raise TypeError(f"{layer.name}: forward returned None")
    if isinstance(y, Weight):
        y = y.data
    y = np.asarray(y) if isinstance(y, np.generic | float) else y
    try:
        arrays.library(y)
    except TypeError as error:
        raise TypeError(f"{layer.name}: forward returned no array: {error}") from None
    return arrays.cast(y, dtype) if dtype is not None and _dtype(y) in FLOATS else y


def _said_shape(layer: Calls, shapes: tuple, fresh: bool = False) -> tuple:
    """What ``output_shape`` says for inputs of these shapes, as a tuple of shapes."""
    said = layer._output_shapes.get(shapes)
    if said is None or fresh:
        shape = layer.output_shape(*shapes)
        if not isinstance(shape, tuple | list):
            raise TypeError(f"{layer.name}: output_shape: the rule is a tuple of sizes, batch first; got {shape!r}")
        if len(layer._output_shapes) >= _SHAPES_KEPT:
            layer._output_shapes.clear()
        said = layer._output_shapes[shapes] = each_shape(shape)
    return said


def each_shape(shape: Any) -> tuple:
    """What ``output_shape`` returns, one shape or several, as a tuple of shapes."""
    several = bool(shape) and isinstance(shape[0], tuple | list)
    return tuple(map(tuple, shape)) if several else (tuple(shape),)


def _check_shape(layer: Calls, shapes: tuple, ys: tuple) -> None:
    """Settings may have changed since the shape that is remembered was said: it is asked for again."""
    said, came = _said_shape(layer, shapes, fresh=True), tuple(tuple(y.shape) for y in ys)
    if said != came:
        rule, got = (" and ".join(str(list(shape)) for shape in each) for each in (said, came))
        raise RuntimeError(f"{layer.name}: forward: the rule is y.shape = output_shape(x.shape) = {rule}; got {got}")


def _check_dys(layer: Calls, frame: Frame, dys: tuple) -> None:
    if len(dys) != len(frame.outputs):
        raise RuntimeError(f"{layer.name}: backward takes {len(frame.outputs)} gradients; got {len(dys)}")
    for dy, y in zip(dys, frame.outputs):
        if dy is not None and (tuple(dy.shape) != y.shape or _dtype(dy) != y.dtype):
            raise RuntimeError(f"{layer.name}: dy: the rule is dy.shape, dtype = {y}; got {_dtype(dy)}{list(dy.shape)}")


def _as_gradient(layer: Calls, dx: Any, x: Spec | None) -> Any:
    if dx is None or x is None:
        return None
    if tuple(dx.shape) != x.shape:
        raise RuntimeError(
            f"{layer.name}: backward: the rule is dx.shape = x.shape = {list(x.shape)}; got {list(dx.shape)}"
        )
    return arrays.cast(dx, x.dtype)
