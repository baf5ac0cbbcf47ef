"""How a fused layer is called: by its kernels where a backend launches them, else by its own array code."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays, dispatch, random, transfer
from gpulayers.arrays import FLOATS, Spec
from gpulayers.export.recording import Unrecordable, check_replay, record
from gpulayers.fusing._fusion import Fusion
from gpulayers.fusing._refusal import FusionError
from gpulayers.layers import _calls
from gpulayers.layers._frames import thread
from gpulayers.layers._layer import Layer
from gpulayers.layers._weight import Weight

_fusions: weakref.WeakKeyDictionary[Layer, dict[tuple, Fusion]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_MOST = 64
"""Sizes and settings of one layer whose kernels are kept."""
SEED = Spec((2,), arrays.int64)
"""(seed, offset), as gl.random draws it."""
_PLAIN = frozenset((int, float, str, bool, type(None)))


def fuse(layer: Layer, *input_shapes: tuple) -> Layer:
    """The layer itself, whose forward and backward are from now on one Triton kernel each, written from its array code.

    They run where dispatch launches Triton (arrays on a GPU; within ``gpulayers.testing.interpreting``), by their op:
    ``fusion(layer, shape).op``. Elsewhere the array code runs as ever. ``fused = True`` in a class does the same.

    input_shapes: batch first, None for it; by default those it was built for. Where none is known, the first call that
    kernels could serve records the code. A setting that changes is seen: the code is recorded again.

    Raises FusionError, with the line and what to write instead, for code that no such kernel computes: matrix products,
    gathers, sums over rows that the output needs. TypeError for what is no Layer.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"fuse: layer: the rule is a Layer, as MyLayer(); got {layer!r}")
    shapes = input_shapes or layer._input_shapes
    if shapes:
        for training in (True, False):
            fusion(layer, *shapes, training=training)
    layer.fused = True
    return layer


def fusion(layer: Layer, *input_shapes: tuple, training: bool = True, dtypes: Sequence[Any] = ()) -> Fusion:
    """The layer's kernels for inputs of these shapes (batch first, None for it): their text, file and op.

    dtypes: of the inputs, where they are integers. Raises FusionError.
    """
    shapes = tuple((None, *shape[1:]) for shape in input_shapes)
    kinds = tuple(np.dtype(d) for d in dtypes) or (np.dtype(np.float32),) * len(shapes)
    key = training, shapes, kinds, _settings(layer)
    with _lock:
        known = _fusions.setdefault(layer, {})
        if key not in known:
            made = _made(layer, shapes, training, kinds)
            while len(known) >= _MOST:
                del known[next(iter(known))]
            known[key] = made
        return known[key]


def _made(layer: Layer, shapes: tuple, training: bool, kinds: tuple) -> Fusion:
    layer.ensure_built(*shapes)
    plain = copy.deepcopy(layer)
    for part in plain.layers():
        part.__dict__["fused"] = False
    try:
        recording = record(plain, shapes, training=training, dtypes=kinds)
        made = Fusion(recording, type(layer).__name__)
        check_replay(plain, recording, shapes, kinds)
    except Unrecordable as error:
        raise FusionError(layer.name, error) from error
    return made


def _settings(layer: Layer) -> tuple:
    """What its code may depend on besides arrays and shapes."""
    found: list[Any] = []
    for part in layer.layers() if layer._look()[1] else (layer,):
        found.append(part._training)
        found += [w.trainable for w in part._look()[0].values()]
        for name, value in part.__dict__.items():
            if name in part._internal or name == "fused":
                continue
            kind = type(value)
            if kind in _PLAIN:
                found += name, kind, value  # 1, 1.0 and True are equal
            elif kind is np.ndarray:
                found += name, str(value.dtype), value.shape, value.tobytes()
            elif kind is not Weight and not isinstance(value, Layer):
                found += name, repr(value)
    return tuple(found)


class Fused:
    """The scope in which a layer's op keeps what its backward needs."""


def _may_launch(xs: Sequence[Any]) -> bool:
    """Whether anybody could launch a kernel on these: not on a CPU, unless kernels are interpreted."""
    if type(xs[0]) is np.ndarray:
        return "triton" in dispatch._policy.get().simulate
    return arrays.library(xs[0]) is not arrays.NUMPY


class _Runner:
    """What ``layers`` calls in place of a fused layer's own forward and backward."""

    @staticmethod
    def forward(layer: Any, own: Callable, xs: tuple) -> Any:
        if not xs or not _may_launch(xs):
            return own(layer, *xs)
        kinds = [d if (d := arrays.library(x).dtype(x)) not in FLOATS else arrays.float32 for x in xs]
        made = fusion(layer, *(tuple(x.shape) for x in xs), training=layer.training, dtypes=kinds)
        op, weights = made.op, layer.named_weights().values()
        like = xs[0] if made.draws else None
        plan, _ = dispatch.plan_for(op, (*xs, *(w.data for w in weights), *[SEED] * len(made.draws)), (), {}, like)
        if plan.backend == "definition":
            return own(layer, *xs)
        seeds = [transfer.beside(random.draw(), like) for _ in made.draws]
        frame = thread.running[-1]
        frame.calls.setdefault(Fused, [])
        with _calls.scope(frame, Fused):
            return layer.run(op, *xs, *weights, *seeds)

    @staticmethod
    def backward(layer: Any, own: Callable, dys: tuple) -> Any:
        frame = thread.running[-1]
        if Fused not in frame.calls:
            return own(layer, *dys)
        with _calls.scope(frame, Fused):
            found = layer.run_backward(*dys)
        grads = iter(found if isinstance(found, tuple) else (found,))
        dxs = tuple(next(grads, None) if x is not None and x.dtype in FLOATS else None for x in frame.inputs)
        return dxs if len(dxs) > 1 else dxs[0]


_calls.fuser = _Runner
