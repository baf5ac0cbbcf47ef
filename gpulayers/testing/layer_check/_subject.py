"""The layer under test: copies of it with moved weights, inputs drawn for it, and what its calls give."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gpulayers import arrays, random, transfer
from gpulayers.arrays import FLOATS, bfloat16, float32, float64
from gpulayers.layers._frames import no_grad
from gpulayers.layers._layer import Layer
from gpulayers.testing.check_op import CheckError

BATCH = 4  # where the shape leaves it open


class Failed(CheckError):
    """The layer's own code raised ``cause`` in ``where`` ("forward", "backward", …)."""

    def __init__(self, text: str, cause: Exception, where: str):
        super().__init__(text)
        self.cause, self.where = cause, where


class Result(NamedTuple):
    """One forward and backward."""

    ys: tuple
    dys: tuple
    dxs: tuple
    weights: dict[str, np.ndarray]
    """The gradient of each trainable weight, by name; zeros where backward never touched it."""
    touched: set[str]


class Subject:
    """The layer under test.

    layer: built, in float64, its weights moved away from their start: ones and zeros hide what multiplies by them.
    xs: inputs of the shapes that were given (the arrays that were given), without NaN and Inf.
    """

    def __init__(self, layer: Layer, inputs: Sequence[Any], seed: int):
        self.name, self.random, self.state = layer.name, np.random.default_rng(seed), random.get_state()
        self.original = copy.deepcopy(layer)
        self.given = [x if isinstance(x, np.ndarray | np.generic) else None for x in inputs]
        self.shapes = [
            tuple(x.shape) if isinstance(x, np.ndarray | np.generic) else tuple(BATCH if n is None else n for n in x)
            for x in inputs
        ]
        self._probes: dict[bool, tuple] = {}
        self.builds = any(inner.waits() for inner in self.original.layers())
        self.xs = self.draw()
        self.at_start = self.built(self.shapes)
        self.layer = self.moved(self.at_start, self.shapes)

    # --- copies ------------------------------------------------------------------------------------------------------

    def built(self, shapes: Sequence[tuple]) -> Layer:
        """A copy of the layer as it came, built for inputs of these shapes, in float64."""
        made = copy.deepcopy(self.original)
        made.ensure_built(*((None, *shape[1:]) for shape in shapes))
        made.to(float64)
        return made

    def fresh(self, training: bool = True, dtype: np.dtype = float64, of: Layer | None = None) -> Layer:
        """A copy with weights of ``dtype`` (float32 for 16 bit)."""
        made = duplicate(self.layer if of is None else of)
        if dtype != float64:
            made.to(float32)
        return made.train(training)

    def moved(self, layer: Layer, shapes: Sequence[tuple]) -> Layer:
        """A copy with other weights. Signs and all; only the sizes where the layer needs positive weights; not at all where that is no use."""
        for signs, buffers in ((True, True), (False, True), (False, False)):
            moved = copy.deepcopy(layer)
            for w in moved.named_weights().values():
                if w.dtype in FLOATS and (w.trainable or buffers):
                    w.data = self._away(w, signs)
            with contextlib.suppress(CheckError):
                got = [self.both(self.draw(shapes), layer=self.fresh(t, of=moved)) for t in (True, False)]
                if all(np.isfinite(v).all() for r in got for v in (*r.ys, *r.dxs) if is_float(v)):
                    return moved
        return copy.deepcopy(layer)

    def _away(self, w: Any, signs: bool) -> np.ndarray:
        """Another value of a weight, exact in every dtype."""
        data = np.asarray(w.data)
        draw = self.random.uniform(0.3, 0.8, data.shape) * self.random.choice([-1, 1], data.shape)
        zero = not data.any()
        if w.trainable:
            spread = np.sqrt(np.mean(data * data)) if data.size and not zero else 0.5
            new = data + draw * spread
            if signs and (data > 0).all():
                new = new * self.random.permutation(np.resize([-1, 1, 1], data.size)).reshape(data.shape)
        elif zero:
            new = np.abs(draw)  # a running mean, or a sum of squares
        elif np.isin(data, (0, 1)).all() and not (data == 1).all():
            new = data  # a mask
        else:
            new = data * (1 + draw)
        if w.constraint is not None:
            new = np.asarray(w.constraint(new))
        return exact(new)

    # --- inputs ------------------------------------------------------------------------------------------------------

    def with_batch(self, batch: int) -> list[tuple]:
        return [(batch, *shape[1:]) if shape else shape for shape in self.shapes]

    def draw(self, shapes: Sequence[tuple] | None = None) -> list[np.ndarray]:
        """Random inputs, with all bits of float64; arrays that were given stay (cut or repeated to the shape)."""
        xs = []
        for given, shape in zip(self.given, self.shapes if shapes is None else shapes):
            if given is None:
                xs.append(np.asarray(1.5 * self.random.standard_normal(shape)))
                continue
            x = np.asarray(given)
            if x.dtype in FLOATS:
                x = x.astype(float64)
                fill = self.random.uniform(0.5, 1.0, x.shape)
                x = np.where(np.isfinite(x), x, fill)
            xs.append(np.resize(x, shape) if x.shape != shape else x)
        return xs

    def dy(self, y: Any) -> np.ndarray | None:
        """A random gradient of an output, no element of it small; None for integers."""
        if y.dtype not in FLOATS:
            return None
        draw = self.random.uniform(0.5, 1.5, y.shape) * self.random.choice([-1, 1], y.shape)
        return np.asarray(exact(draw)).astype(y.dtype)

    # --- calls -------------------------------------------------------------------------------------------------------

    def forward(self, layer: Layer, xs: Sequence[np.ndarray], record: bool = True) -> tuple:
        """The outputs, with the same random numbers every time. An input that it changed is a fault."""
        xs = [lent(x) for x in xs]
        before = [x.tobytes() for x in xs]
        random.set_state(self.state)
        try:
            with np.errstate(all="ignore"), contextlib.nullcontext() if record else no_grad():
                y = layer(*xs)
        except Exception as error:
            raise self._failed("forward", error, layer, xs) from error
        for i, (x, bits) in enumerate(zip(xs, before)):
            if x.tobytes() != bits:
                raise CheckError(
                    f"forward modified its input {which(i, xs)} in place{self.when(layer)}, for {said(xs)}; "
                    "an input belongs to the caller"
                )
        return y if isinstance(y, tuple) else (y,)

    def outputs(self, xs: Sequence[np.ndarray], training: bool = True) -> list[np.ndarray]:
        """The floating-point outputs alone, from a layer that is used again and again."""
        if training not in self._probes:
            layer = self.fresh(training)
            self._probes[training] = layer, [(w, np.array(w.data)) for w in layer.weights if not w.trainable]
        layer, buffers = self._probes[training]
        ys = self.forward(layer, xs, record=False)
        for w, data in buffers:
            w.data = data.copy()
        return [y for y in ys if is_float(y)]

    def backward(self, layer: Layer, xs: Sequence[np.ndarray], dys: Sequence, of: tuple = ()) -> tuple:
        """The gradients of the inputs. A dy that it changed is a fault, or one of the outputs ``of`` its forward."""
        before = [None if dy is None else dy.tobytes() for dy in dys]
        outputs = [y.tobytes() for y in of]
        try:
            with np.errstate(all="ignore"):
                dx = layer.backward(*dys)
        except Exception as error:
            raise self._failed("backward", error, layer, xs) from error
        for dy, bits in zip(dys, before):
            if dy is not None and dy.tobytes() != bits:
                raise CheckError(
                    f"backward modified dy in place{self.when(layer)}, for {said(xs)}; dy belongs to the caller"
                )
        if any(y.tobytes() != bits for y, bits in zip(of, outputs)):
            raise CheckError(f"backward modified the output of forward in place{self.when(layer)}")
        return dx if isinstance(dx, tuple) else (dx,) + (None,) * (len(xs) - 1)

    def both(
        self,
        xs: Sequence[np.ndarray],
        dys: Sequence | None = None,
        training: bool = True,
        dtype: np.dtype = float64,
        layer: Layer | None = None,
    ) -> Result:
        """Forward and backward of a fresh copy (or of ``layer``). dys: by default random ones; floats are cast."""
        layer = self.fresh(training, dtype) if layer is None else layer
        xs = [x.astype(dtype) if x.dtype in FLOATS and x.dtype != dtype else x for x in xs]
        lending = [lent(x) for x in xs]
        ys = self.forward(layer, lending)
        dys = [self.dy(y) for y in ys] if dys is None else [cast(dy, y) for dy, y in zip(dys, ys)]
        dxs = self.backward(layer, xs, dys, ys)
        return Result(ys, tuple(dys), dxs, *gradients(layer))

    def _failed(self, where: str, error: Exception, layer: Layer, xs: Sequence[np.ndarray]) -> CheckError:
        if isinstance(error, CheckError):
            return error
        text = f"{where} fails{self.when(layer)} for {said(xs)}: {type(error).__name__}: {error}"
        return Failed(text, error, where)

    def when(self, layer: Layer) -> str:
        return "" if layer.training else " in evaluation"


def duplicate(layer: Layer) -> Layer:
    """A deep copy, but for signatures, which nothing changes and which take the most time."""
    signatures = [inner._arguments.signature for inner in layer.layers()]
    return copy.deepcopy(layer, {id(s): s for s in signatures})


def gradients(layer: Layer) -> tuple[dict[str, np.ndarray], set[str]]:
    """(each trainable weight's gradient, the names of those that backward reached); a fault if one does not fit."""
    weights = {n: w for n, w in layer.named_weights().items() if w.trainable}
    found = {}
    for n, w in weights.items():
        g = transfer.to_numpy(w.grad) if w.has_grad else np.zeros(w.shape, w.dtype)
        rule = f"{w.dtype}{list(w.shape)}"
        if g.shape != w.shape or g.dtype != w.dtype:
            raise CheckError(
                f"the gradient of {n} is {g.dtype}{list(g.shape)}: the rule is the weight's own shape and dtype, {rule}"
            )
        found[n] = np.array(g)
    return found, {n for n, w in weights.items() if w.has_grad}


def exact(x: Any) -> np.ndarray:
    """``x`` rounded so that every dtype has it."""
    return np.asarray(x).astype(bfloat16).astype(float64)


def lent(x: np.ndarray) -> np.ndarray:
    """A copy of a row-major array; others are views that a check made for one call."""
    return x.copy() if x.flags.c_contiguous else x


def cast(dy: Any, y: Any) -> Any:
    return dy if dy is None or dy.dtype == y.dtype else arrays.cast(dy, y.dtype)


def is_float(x: Any) -> bool:
    return x is not None and x.dtype in FLOATS


def which(i: int, xs: Sequence) -> str:
    return "x" if len(xs) == 1 else f"x[{i}]"


def said(xs: Sequence[np.ndarray]) -> str:
    """The inputs of a call in words: "x = float64[4, 5]"."""
    return ", ".join(f"{which(i, xs)} = {x.dtype}{list(x.shape)}" for i, x in enumerate(xs))


def close(a: Any, b: Any, share: float = 1e-9) -> bool:
    """Equal but for the order of summation; NaN and Inf alike."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    if not is_float(a):
        return bool(np.array_equal(a, b))
    with np.errstate(all="ignore"):
        finite = np.isfinite(b)
        scale = max(1.0, float(np.abs(b[finite]).max(initial=0.0)))
        same = np.isfinite(a) == finite
        return bool(same.all() and (np.abs(a[finite] - b[finite]) <= share * scale).all())


def same_bits(a: Any, b: Any) -> bool:
    return (a is None) == (b is None) and (a is None or np.array_equal(a, b, equal_nan=is_float(a)))


def epsilon(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).eps)
