"""``check_layer``: is a layer right? If not, what is wrong with it, where, and by how much."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gpulayers import arrays, dispatch, random, transfer
from gpulayers.arrays import FLOATS, HALVES, float32, float64
from gpulayers.layers._frames import no_grad
from gpulayers.layers._layer import Layer, OpLayer
from gpulayers.layers._model import model_config, model_of
from gpulayers.ops._op import RuleError
from gpulayers.testing.arena import arena
from gpulayers.testing.check_op import CheckError

_STEP = 1e-5  # of the central differences: their error is about step² and rounding / step
_MOST_POINTS = 120  # elements of one array at which a slope is measured


class Result(NamedTuple):
    """One forward and backward of a fresh copy of the layer."""

    ys: tuple
    dxs: tuple
    weights: dict[str, np.ndarray]
    """The gradient of each trainable weight, by name; zeros where backward never touched it."""
    touched: set[str]


def check_layer(
    layer: Layer,
    *inputs: Any,
    dtypes: Sequence[Any] = ("float32", "float16", "bfloat16"),
    seed: int = 0,
) -> list[str]:
    """Check a layer on random inputs; returns the names of the checks it passed.

    inputs: one for each input of the layer: its shape, batch first (None: 4), or an array to use as it is.
    dtypes: what the layer must serve beside float64.

    The layer itself is not changed. Raises CheckError, whose text names the fault.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"check_layer: layer: the rule is a Layer, as MyLayer(); got {layer!r}")
    if not inputs or not all(isinstance(x, tuple | list | np.ndarray | np.generic) for x in inputs):
        raise TypeError(f"check_layer: inputs: the rule is a shape or an array for each input; got {inputs!r}")
    return _Check(layer, inputs, dtypes, seed).run()


class _Check:
    def __init__(self, layer: Layer, inputs: Sequence[Any], dtypes: Sequence[Any], seed: int):
        self.random = np.random.default_rng(seed)
        self.inputs, self.dtypes = inputs, list(map(arrays.dtype, dtypes))
        self.layer = copy.deepcopy(layer)
        self.state = random.get_state()
        self.xs = self.draw()
        self.passed: list[str] = []
        with self.explained("forward"), no_grad():
            self.layer.ensure_built(*((None, *x.shape[1:]) for x in self.xs))  # once: all copies have its weights
            self.fresh(float32)(*[x.astype(float32) if x.dtype == float64 else x for x in self.xs])

    def run(self) -> list[str]:
        checks: list[tuple[str, Callable]] = [
            ("output shape", self.output_shape),
            ("inputs unmodified", self.unmodified),
            ("deterministic", self.deterministic),
            ("gradients accumulate", self.accumulates),
            ("state between calls", self.two_calls),  # before the slopes, which take many calls of one layer
            ("gradients, training", lambda: self.gradients(True)),
            ("gradients, evaluation", lambda: self.gradients(False)),
            ("strides of dy", self.strides),
            ("batches of 0, 1 and 3", self.batches),
            *((str(d), lambda d=d: self.dtype(d)) for d in self.dtypes),  # type: ignore[misc]
            ("config and weights", self.round_trip),
            ("kernels", self.kernels),
        ]
        for name, check in checks:
            with self.explained(name):
                check()
            self.passed.append(name)
        return self.passed

    # --- running a copy ----------------------------------------------------------------------------------------------

    def draw(self, batch: int | None = None) -> list[np.ndarray]:
        """Random inputs, a few of them large; arrays that were given stay (cut or repeated to the batch)."""
        xs: list[Any] = []
        for given in self.inputs:
            if isinstance(given, np.ndarray | np.generic):
                x = given.astype(float64) if given.dtype in FLOATS else given
                xs.append(x if batch is None else np.resize(x, (batch, *x.shape[1:])))
                continue
            shape = tuple(4 if n is None else n for n in given)
            shape = shape if batch is None else (batch, *shape[1:])
            x = self.random.standard_normal(shape)
            if x.size > 3:
                x.flat[[0, -1]] = 9.0, -12.0  # exp(12) overflows float16
            # Exact in every dtype, so that all see the same numbers.
            xs.append(x.astype(ml_dtypes.bfloat16).astype(float64))
        return xs

    def fresh(self, dtype: np.dtype = float64, training: bool = True) -> Layer:
        """A copy of the layer, built, with weights of ``dtype`` (float32 for 16 bit)."""
        made = copy.deepcopy(self.layer)
        made.to(float64 if dtype == float64 else float32)
        return made.train(training)

    def call(self, layer: Layer, xs: Sequence[np.ndarray]) -> tuple:
        random.set_state(self.state)  # the same masks every time
        with np.errstate(all="ignore"):
            y = layer(*(x.copy() for x in xs))  # a layer that writes to its input changes no other check's
        return y if isinstance(y, tuple) else (y,)

    def both(
        self,
        xs: Sequence[np.ndarray],
        dys: Sequence[np.ndarray] | None = None,
        dtype: np.dtype = float64,
        training: bool = True,
    ) -> Result:
        """Forward and backward of a fresh copy. dys: by default random ones."""
        layer = self.fresh(dtype, training)
        xs = [x.astype(dtype) if x.dtype in FLOATS else x for x in xs]
        ys = self.call(layer, xs)
        dys = (
            [self.dy(y) for y in ys]
            if dys is None
            else [dy.astype(dtype) if dy.flags.c_contiguous and dy.dtype in FLOATS else dy for dy in dys]
        )
        with np.errstate(all="ignore"):
            dx = layer.backward(*dys)
        return Result(ys, dx if isinstance(dx, tuple) else (dx,), *_gradients(layer))

    def dy(self, y: Any) -> np.ndarray:
        draw = self.random.standard_normal(y.shape)
        return np.asarray(draw.astype(ml_dtypes.bfloat16).astype(float64)).astype(y.dtype)

    @contextlib.contextmanager
    def explained(self, check: str) -> Iterator[None]:
        """Whatever goes wrong names the layer and the check."""
        try:
            yield
        except CheckError as error:
            raise CheckError(f"{self.layer.name}: {check}: {error}") from None
        except Exception as error:
            if isinstance(error, TypeError) and str(error).endswith("is not an array"):
                raise
            raise CheckError(f"{self.layer.name}: {check}: {type(error).__name__}: {error}") from error
        finally:
            random.set_state(self.state)

    # --- the checks --------------------------------------------------------------------------------------------------

    def output_shape(self) -> None:
        self.call(self.fresh(), self.xs)  # Layer compares it with what output_shape says

    def unmodified(self) -> None:
        layer = self.fresh()
        xs = [x.copy() for x in self.xs]
        random.set_state(self.state)
        with np.errstate(all="ignore"):
            y = layer(*xs)
        ys = y if isinstance(y, tuple) else (y,)
        if any(not np.array_equal(a, b) for a, b in zip(xs, self.xs)):
            raise CheckError("forward modified its input in place; an input belongs to the caller")
        dys = [self.dy(y) for y in ys]
        before = [dy.copy() for dy in dys]
        layer.backward(*dys)
        if any(not np.array_equal(a, b) for a, b in zip(dys, before)):
            raise CheckError("backward modified dy in place; it belongs to the caller")
        if any(not np.array_equal(a, b) for a, b in zip(xs, self.xs)):
            raise CheckError("backward modified the input of forward in place")

    def deterministic(self) -> None:
        dys = [self.dy(y) for y in self.call(self.fresh(), self.xs)]
        first, second = self.both(self.xs, dys), self.both(self.xs, dys)
        for what, a, b in zip(("output", "input gradient"), (first.ys, first.dxs), (second.ys, second.dxs)):
            if any(not _same_bits(u, v) for u, v in zip(a, b)):
                raise CheckError(
                    f"the same input gave another {what} the second time; draw random numbers from gl.random"
                )
        for name, g in first.weights.items():
            if not _same_bits(g, second.weights[name]):
                raise CheckError(f"the same input gave another gradient of {name} the second time")

    def gradients(self, training: bool) -> None:
        """Against central differences in float64, with a random dy."""
        xs = [x.copy() for x in self.xs]
        dys = [self.dy(y) for y in self.call(self.fresh(training=training), xs)]
        got = self.both(xs, dys, training=training)
        probe = self.fresh(training=training)
        weights = {n: w for n, w in probe.named_weights().items() if w.trainable}
        state = {n: w.data.copy() for n, w in probe.named_weights().items()}

        def value() -> float:
            for n, w in probe.named_weights().items():
                if n not in weights:
                    w.data = state[n].copy()  # running statistics start from the same place
            with no_grad():
                ys = self.call(probe, xs)
            return sum(float((y * dy).sum()) for y, dy in zip(ys, dys))

        ones = self.both(xs, [np.ones_like(dy) for dy in dys], training=training)
        for i, (x, g) in enumerate(zip(xs, got.dxs)):
            if x.dtype in FLOATS:
                what = "dx" if len(xs) == 1 else f"dx[{i}]"
                if g is None:
                    raise CheckError(f"backward returned no {what}")
                self.compare(what, g, x, value, x, lambda: _works_for_ones(self, xs, ones.dxs[i], x))  # noqa: B023
        for name, w in weights.items():
            data = w.data
            if name not in got.touched and _slopes(data, value)[1].any():
                raise CheckError(
                    f"the gradient of {name} is missing: backward never added to it, yet the output depends on it"
                )
            self.compare(f"the gradient of {name}", got.weights[name], data, value, None, lambda: False)

    def compare(
        self, what: str, grad: Any, at: np.ndarray, value: Callable, x: np.ndarray | None, ones: Callable
    ) -> None:
        points, slopes = _slopes(at, value)
        mine = np.asarray(grad, float64).reshape(-1)[points]
        scale = max(1.0, float(np.abs(slopes).max(initial=0.0)))
        wrong = ~(np.abs(mine - slopes) <= 2e-5 * scale)
        if not wrong.any():
            return
        worst = int(np.argmax(np.where(wrong, np.nan_to_num(np.abs(mine - slopes), nan=np.inf), -1)))
        index = tuple(map(int, np.unravel_index(points[worst], at.shape)))
        text = (
            f"{what} is wrong at {int(wrong.sum())} of {len(points)} points, the worst at {index}: "
            f"got {mine[worst]:.6g}, finite differences give {slopes[worst]:.6g}"
        )
        raise CheckError(text + self.diagnosis(mine, slopes, wrong, x, points, ones))

    def diagnosis(
        self,
        mine: np.ndarray,
        slopes: np.ndarray,
        wrong: np.ndarray,
        x: np.ndarray | None,
        points: np.ndarray,
        ones: Callable,
    ) -> str:
        if ones():
            return "; it is right where dy is all ones: backward does not use dy"
        there = np.abs(slopes) > 1e-3 * np.abs(slopes).max(initial=0.0)
        ratios = mine[there] / slopes[there]
        if len(ratios) > 1 and np.ptp(ratios) < 1e-3 * abs(ratios.mean()) and wrong[there].all():
            return f"; everywhere it is off by a factor of {ratios.mean():.4g}"
        if x is not None:
            signs = x.reshape(-1)[points]
            for side, name in ((signs < 0, "x < 0"), (signs > 0, "x > 0")):
                if wrong.any() and not wrong[~side].any() and wrong[side].any():
                    return f"; it is wrong only where {name}"
        return ""

    def strides(self) -> None:
        ys = self.call(self.fresh(), self.xs)
        for kind in ("strided", "transposed", "expanded"):
            dys = [_laid_out(kind, self.dy(y)) for y in ys]
            plain = self.both(self.xs, [np.ascontiguousarray(dy).reshape(dy.shape) for dy in dys])
            self.equal(self.both(self.xs, dys), plain, f"with a {kind} dy", "backward ignores the strides of dy")

    def accumulates(self) -> None:
        """Two calls, two backwards: the gradients of the weights add up."""
        layer = self.fresh()
        dys = [self.dy(y) for y in self.call(self.fresh(), self.xs)]
        once = self.both(self.xs, dys)
        for _ in range(2):
            self.call(layer, self.xs)
            layer.backward(*dys)
        for name, g in _gradients(layer)[0].items():
            if not _close(g, 2 * once.weights[name]):
                if _close(g, once.weights[name]):
                    raise CheckError(f"the gradient of {name} was overwritten: backward must add to it (grad += …)")
                text = "backward does not add to it, or state leaks between calls"
                raise CheckError(f"after two equal backwards the gradient of {name} is not twice that of one: {text}")

    def two_calls(self) -> None:
        """Two forwards before the backwards, which come in reverse order."""
        others = self.draw()
        layer = self.fresh()
        dys = [self.dy(y) for y in self.call(self.fresh(), self.xs)]
        alone = self.both(self.xs, dys), self.both(others, dys)
        self.call(layer, self.xs)
        second = self.call(layer, others)
        dx2 = layer.backward(*dys)
        dx1 = layer.backward(*dys)
        text = "the second call changed what the first had kept: use self.save, not attributes"
        if not all(_close(a, b) for a, b in zip(second, alone[1].ys)):
            raise CheckError("a second call gives another output than a first one: state leaks between calls")
        for dx, want in ((dx2, alone[1].dxs), (dx1, alone[0].dxs)):
            for a, b in zip(dx if isinstance(dx, tuple) else (dx,), want):
                if not _close(a, b):
                    raise CheckError(f"two forwards before their backwards: state leaks between calls: {text}")
        for name, g in _gradients(layer)[0].items():
            if not _close(g, alone[0].weights[name] + alone[1].weights[name]):
                where = f"two forwards before their backwards, the gradient of {name}"
                raise CheckError(f"{where}: state leaks between calls: {text}")

    def batches(self) -> None:
        """Other batch sizes; a rule that refuses one says so."""
        for batch in (0, 1, 3):
            xs = self.draw(batch)
            try:
                got = self.both(xs)
            except RuleError:
                continue
            except Exception as error:
                raise CheckError(f"it is wrong for a batch of {batch}: {type(error).__name__}: {error}") from error
            named = {"output": got.ys, "dx": got.dxs} | {f"the gradient of {n}": (g,) for n, g in got.weights.items()}
            # The mean of no rows is NaN, and so may be what follows from it; anything else is finite.
            mean = any(not y.ndim for y in got.ys)
            for what, values in named.items():
                if any(v is not None and (v.ndim or not mean) and not np.isfinite(v).all() for v in values):
                    raise CheckError(f"it is wrong for a batch of {batch}: {what} is not finite")
            if batch:
                self.same_rows(batch, xs, got)

    def same_rows(self, batch: int, xs: list, got: Result) -> None:
        """The gradients for this batch are right, too (along one random direction of the inputs, one of the weights)."""
        probe = self.fresh()
        dys = [self.dy(y) for y in got.ys]
        again = self.both(xs, dys)
        inputs = [self.random.standard_normal(x.shape) if x.dtype in FLOATS else None for x in xs]
        weights = {n: self.random.standard_normal(g.shape) for n, g in again.weights.items()}

        def value(xs: Sequence[np.ndarray], t: float, way: dict[str, np.ndarray]) -> float:
            moved = copy.deepcopy(probe)
            for n, w in moved.named_weights().items():
                w.data = w.data + t * way[n] if n in way else w.data
            with no_grad():
                ys = self.call(moved, xs)
            return sum(float((y * dy).sum()) for y, dy in zip(ys, dys))

        def of_inputs(t: float) -> float:
            return value([x if w is None else x + t * w for x, w in zip(xs, inputs)], t, {})

        mine = sum(float((g * w).sum()) for g, w in zip(again.dxs, inputs) if w is not None and g is not None)
        self.along(batch, "dx gives", mine, of_inputs)
        mine = sum(float((g * weights[n]).sum()) for n, g in again.weights.items())
        self.along(batch, "the gradients of the weights give", mine, lambda t: value(xs, t, weights))

    def along(self, batch: int, what: str, mine: float, value: Callable[[float], float]) -> None:
        slope = (value(_STEP) - value(-_STEP)) / (2 * _STEP)
        if not abs(slope - mine) <= 1e-4 * max(1.0, abs(slope)):
            came = f"along a random direction {what} {mine:.6g}, finite differences {slope:.6g}"
            raise CheckError(f"it is wrong for a batch of {batch}: {came}")

    def dtype(self, dtype: np.dtype) -> None:
        """16-bit and float32 results near those in float64."""
        ys = self.call(self.fresh(), self.xs)
        dys = [self.dy(y) for y in ys]
        truth, got = self.both(self.xs, dys), self.both(self.xs, dys, dtype)
        for y, t in zip(got.ys, truth.ys):
            if y.dtype in FLOATS and y.dtype != dtype:
                raise CheckError(f"the output of {dtype} is {y.dtype}")
            self.near(y, t, dtype, "the output")
        for dx, t in zip(got.dxs, truth.dxs):
            self.near(dx, t, dtype, "dx")
        for name, g in got.weights.items():
            self.near(g, truth.weights[name], dtype, f"the gradient of {name}")

    def near(self, got: Any, truth: Any, dtype: np.dtype, what: str) -> None:
        if got is None or truth.dtype not in FLOATS:
            return
        wide, eps = np.asarray(got).astype(float64), float(ml_dtypes.finfo(dtype).eps)
        scales = [v for v in (truth, *self.xs) if v.dtype in FLOATS and v.size]
        largest, usual = (max((1.0, *(float(f(np.abs(v))) for v in scales))) for f in (np.max, _root_mean_square))
        ulps = (8 if dtype in HALVES else 32) * eps
        off = np.abs(wide - truth)
        if wide.size and not (off <= ulps * largest).all():
            at = tuple(map(int, np.unravel_index(int(np.argmax(np.nan_to_num(off, nan=np.inf))), off.shape)))
            raise CheckError(f"in {dtype} {what} is wrong, the worst at {at}: got {wide[at]:.6g}, true {truth[at]:.6g}")
        # A few large inputs hide no error that is everywhere.
        if wide.size and not (share := _root_mean_square(off)) <= ulps * usual:
            text = (
                f"the root mean square of the error is {share:.3g}, of the true values {_root_mean_square(truth):.3g}"
            )
            raise CheckError(f"in {dtype} {what} is wrong: {text}")

    def round_trip(self) -> None:
        """A layer made again from its config, with its weights loaded, is the same layer."""
        layer = self.fresh(float32)
        again = model_of(model_config(layer), layer.state_dict())
        xs = [x.astype(float32) if x.dtype in FLOATS else x for x in self.xs]
        if any(not _same_bits(a, b) for a, b in zip(self.call(layer.eval(), xs), self.call(again.eval(), xs))):
            raise CheckError(
                "made again from its config and weights it gives another output: keep every setting in __init__'s arguments"
            )

    def kernels(self) -> None:
        """The GPU kernels of the ops inside (interpreted or emulated where there is no GPU) agree with the definitions."""
        layer = self.fresh(float32)
        ops = {inner.op for inner in layer.layers() if isinstance(inner, OpLayer)}
        xs = [x.astype(float32) if x.dtype in FLOATS else x for x in self.xs]
        dys = [self.dy(y) for y in self.call(self.fresh(float32), xs)]
        with dispatch.only("definition"):
            truth = self.both(self.xs, dys, float32)
        for backend in ("triton", "cuda"):
            if not dispatch.installed(backend) or not any(dispatch.kernels(backend, op) for op in ops):
                continue
            with arena(backend) as room, dispatch.policy(backends=(backend, "definition"), strict=False):
                got = self.both(self.xs, dys, float32) if room.library == "numpy" else self.on_gpu(dys)
            for name, a, b in (("the output", got.ys, truth.ys), ("dx", got.dxs, truth.dxs)):
                for u, v in zip(a, b):
                    if v is not None:
                        self.near(u, v.astype(float64), float32, f"({backend}) {name}")
            for name, g in got.weights.items():
                self.near(g, truth.weights[name].astype(float64), float32, f"({backend}) the gradient of {name}")

    def on_gpu(self, dys: list) -> Result:
        layer = self.fresh(float32).to("cuda")
        there = [transfer.to_device(x.astype(float32) if x.dtype in FLOATS else x, "cuda") for x in self.xs]
        ys = self.call(layer, there)
        dx = layer.backward(*(transfer.to_device(dy, "cuda") for dy in dys))
        dxs = dx if isinstance(dx, tuple) else (dx,)
        host = [None if d is None else transfer.to_numpy(d) for d in dxs]
        return Result(tuple(map(transfer.to_numpy, ys)), tuple(host), *_gradients(layer))

    def equal(self, got: Result, want: Result, when: str, text: str) -> None:
        for what, a, b in (("output", got.ys, want.ys), ("dx", got.dxs, want.dxs)):
            if any(u is not None and not _close(u, v) for u, v in zip(a, b)):
                raise CheckError(f"{text}: {when} {what} is wrong")
        for name, g in got.weights.items():
            if not _close(g, want.weights[name]):
                raise CheckError(f"{text}: {when} the gradient of {name} is wrong")


def _gradients(layer: Layer) -> tuple[dict[str, np.ndarray], set[str]]:
    weights = {n: w for n, w in layer.named_weights().items() if w.trainable}
    touched = {n for n, w in weights.items() if w.has_grad}
    return {n: transfer.to_numpy(w.grad).copy() for n, w in weights.items()}, touched


def _slopes(at: np.ndarray, value: Callable[[], float]) -> tuple[np.ndarray, np.ndarray]:
    """(flat indices, central differences of ``value`` there) for up to _MOST_POINTS elements of ``at``."""
    size = at.size
    points = np.arange(size) if size <= _MOST_POINTS else np.unique(np.linspace(0, size - 1, _MOST_POINTS).astype(int))
    flat = at.reshape(-1)
    slopes = np.empty(len(points))
    for i, p in enumerate(points):
        old = flat[p]
        flat[p] = old + _STEP
        up = value()
        flat[p] = old - _STEP
        slopes[i] = (up - value()) / (2 * _STEP)
        flat[p] = old
    return points, slopes


def _works_for_ones(check: _Check, xs: list, grad: Any, x: np.ndarray) -> bool:
    """Whether dx is right for a dy of ones: then the fault is that backward leaves dy out."""
    probe = check.fresh()

    def value() -> float:
        with no_grad():
            return sum(float(y.sum()) for y in check.call(copy.deepcopy(probe), xs))

    points, slopes = _slopes(x, value)
    mine = np.asarray(grad, float64).reshape(-1)[points]
    return bool(np.abs(mine - slopes).max(initial=0.0) <= 2e-5 * max(1.0, np.abs(slopes).max(initial=0.0)))


def _laid_out(kind: str, dy: np.ndarray) -> np.ndarray:
    if kind == "expanded" or not dy.ndim:
        return np.broadcast_to(dy.reshape(-1)[:1].reshape((1,) * dy.ndim), dy.shape) if dy.size else dy
    if kind == "transposed":
        return np.asfortranarray(dy)
    wide = np.full((*dy.shape[:-1], 2 * dy.shape[-1]), np.nan if dy.dtype in FLOATS else 0, dy.dtype)
    wide[..., ::2] = dy
    return wide[..., ::2]


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt((x * x).mean()))


def _same_bits(a: Any, b: Any) -> bool:
    return (a is None) == (b is None) and (a is None or np.array_equal(a, b, equal_nan=a.dtype in FLOATS))


def _close(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    scale = max(1.0, float(np.abs(b).max(initial=0.0)))
    return a.shape == b.shape and bool((np.abs(a - b) <= 1e-9 * scale).all())
