"""The contract: shape, dtype and number of every output and gradient; integers have no gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import float16, float32, float64
from gpulayers.layers._calls import each_shape
from gpulayers.layers._layer import Layer
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check._subject import Subject, is_float, said, which


def outputs(subject: Subject) -> None:
    """Forward runs, and gives what output_shape says, of the input's dtype."""
    for training in (True, False):
        layer = subject.fresh(training)
        before = set(layer.named_weights())
        ys = subject.forward(layer, subject.xs)
        if added := set(layer.named_weights()) - before:
            raise CheckError(
                f"forward adds the weights {sorted(added)}: add them in build, where a loaded model has them"
            )
        _dtypes(subject, ys)


def _dtypes(subject: Subject, ys: tuple) -> None:
    """float64 is computed in float64; the outputs of integers are of the weights' dtype."""
    floats = [x for x in subject.xs if is_float(x)]
    weights = [w for w in subject.layer.weights if w.dtype == float64]
    if not floats and weights and any(is_float(y) and y.dtype != float64 for y in ys):
        came = next(y.dtype for y in ys if is_float(y) and y.dtype != float64)
        raise CheckError(f"the output is {came} where the weights are float64: the rule is the weights' dtype")
    if not floats and weights:
        narrow = subject.forward(subject.fresh(dtype=float32), subject.xs)
        if any(is_float(y) and y.dtype != float32 for y in narrow):
            came = next(y.dtype for y in narrow if is_float(y) and y.dtype != float32)
            raise CheckError(f"the output is {came} where the weights are float32: the rule is the weights' dtype")


def _precise(subject: Subject, training: bool) -> None:
    """A float64 result that float32 could hold, of an input that it could not, was computed in float32."""
    if any(given is not None for given in subject.given) or not all(map(is_float, subject.xs)):
        return
    got = subject.both(subject.xs, training=training)
    # Sums of a dy of few bits fit float32 by themselves.
    dys = [dy if dy is None else dy * np.pi for dy in got.dys]
    back = subject.both(subject.xs, dys=dys, training=training)
    for where, results in (("forward", got.ys), ("backward", (*back.dxs, *back.weights.values()))):
        mode = "" if training else " in evaluation"
        if any(_narrow(r, float32, 24, 0.05) for r in results):
            raise CheckError(f"{where} computes float64 in float32{mode}: keep the dtype")
        if where == "forward" and any(_narrow(r, float16, 11, 0.25) for r in results):  # dy itself has few bits
            raise CheckError(f"{where} computes float64 in float16{mode}: keep the dtype")


def _narrow(result: Any, dtype: np.dtype, bits: int, share: float) -> bool:
    """Whether ``dtype`` holds it all, to the last of its mantissa's bits."""
    if not is_float(result) or result.size < 4:
        return False
    values = result[np.isfinite(result)]
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype).astype(float64)
    # Halves, signs and counts are exact in any dtype: a mantissa that ends just where the dtype's does is not.
    used = np.frexp(values)[0] * 2.0**bits
    return bool(np.array_equal(narrow, values)) and bool((used % 2 != 0).mean() > share)


def precision(subject: Subject) -> None:
    """float64 is computed in float64."""
    for training in (True, False):
        _precise(subject, training)


def shapes(subject: Subject) -> None:
    """output_shape knows the unknown batch."""
    fixed, other = ([(n, *s[1:]) if s else s for s in subject.shapes] for n in (6, 9))
    open_batch = [(None, *s[1:]) if s else s for s in subject.shapes]
    if not all(subject.shapes) or any(g is not None for g in subject.given):
        return
    try:
        a, b = (each_shape(subject.layer.output_shape(*s)) for s in (fixed, other))
    except Exception:
        return  # this layer refuses such batches
    try:
        said_open = each_shape(subject.layer.output_shape(*open_batch))
    except Exception as error:
        raise CheckError(
            f"output_shape fails for an unknown batch, {_list(open_batch)}: {type(error).__name__}: {error}"
        ) from error
    want = tuple(tuple(n if n == m else None for n, m in zip(s, t)) for s, t in zip(a, b))
    same = len(want) == len(said_open) and all(len(u) == len(v) for u, v in zip(want, said_open))
    # None for a size that is known says too little, a number for one that is not says too much.
    if not same or any(v not in (n, None) for u, w in zip(want, said_open) for n, v in zip(u, w)):
        raise CheckError(
            f"output_shape for an unknown batch, {_list(open_batch)}, says {_list(said_open)}: "
            f"the rule is {_list(want)}, None where the size depends on the batch"
        )


def _list(shapes: Any) -> str:
    return " and ".join(str(list(s)) for s in shapes)


def gradients(subject: Subject) -> None:
    """backward returns a gradient of each float input, and None for the others."""
    for training in (True, False):
        layer = subject.fresh(training)
        raw: list[Any] = []
        _spy(layer, raw)
        xs = subject.xs
        ys = subject.forward(layer, xs)
        dys = [subject.dy(y) for y in ys]
        try:
            subject.backward(layer, xs, dys)
        except CheckError:
            if raw:
                _raw(subject, raw[-1], subject.when(layer))
            raise
        _raw(subject, raw[-1], subject.when(layer))


def _spy(layer: Layer, seen: list) -> None:
    """What backward returns, before it is checked, goes to ``seen``."""
    cls: Any = type(layer)

    def backward(self: Any, *dys: Any) -> Any:
        dx = cls.backward(self, *dys)
        seen.append(dx)
        return dx

    layer.__class__ = type(cls.__name__, (cls,), {"backward": backward, "__module__": __name__})


def _raw(subject: Subject, dx: Any, when: str) -> None:
    xs = subject.xs
    rule = "dx" if len(xs) == 1 else f"a tuple of {len(xs)} gradients, one for each input"
    if isinstance(dx, list):
        raise CheckError(f"backward returns a list of {len(dx)}{when}: the rule is {rule}")
    dxs = dx if isinstance(dx, tuple) else (dx,)
    first_alone = not isinstance(dx, tuple) and not any(map(is_float, xs[1:]))
    if len(dxs) != len(xs) and dx is not None and not first_alone:
        raise CheckError(f"backward returns {len(dxs)} gradient{'s' * (len(dxs) != 1)}{when}: the rule is {rule}")
    for i, (x, g) in enumerate(zip(xs, dxs)):
        name = which(i, xs)
        if g is None:
            continue
        if not is_float(x):
            raise CheckError(
                f"backward returns a gradient of {name}, which is {x.dtype}{when}: integers have none, return None"
            )
        shape = getattr(g, "shape", None)
        if shape is None:
            raise CheckError(f"backward returns a {type(g).__name__} for {name}{when}: the rule is an array")
        if tuple(shape) != x.shape:
            how = _how(tuple(shape), x.shape)
            raise CheckError(
                f"d{name} {how}{when}: the rule is d{name}.shape = {name}.shape = {list(x.shape)}; got {list(shape)}, for {said(xs)}"
            )


def _how(got: tuple, want: tuple) -> str:
    if sorted(got) == sorted(want):
        return "is transposed"
    if int(np.prod(got, dtype=int)) == int(np.prod(want, dtype=int)):
        return "is flattened" if len(got) < len(want) else "has another shape"
    if got == want[1:]:
        return "has lost the batch"
    return "has the wrong shape"
