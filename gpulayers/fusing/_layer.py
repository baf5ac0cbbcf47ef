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
from gpulayers.export.recording import Recording, Unrecordable, check_replay, record
from gpulayers.fusing import _measured
from gpulayers.fusing._fusion import Fusion
from gpulayers.fusing._refusal import FusionError
from gpulayers.fusing._split import Explained, Split
from gpulayers.layers import _calls
from gpulayers.layers._frames import Frame, recording, thread
from gpulayers.layers._layer import Layer
from gpulayers.layers._weight import Weight
from gpulayers.ops._op import Op

_fusions: weakref.WeakKeyDictionary[Layer, dict[tuple, Fusion | Split]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_MOST = 64
"""Sizes and settings of one layer whose kernels are kept."""
SEED = Spec((2,), arrays.int64)
"""(seed, offset), as gl.random draws it."""
_READ = frozenset(("activation", "dropout", "loss", "norm", "own", "softmax"))
"""Families whose definitions are element-wise, or sum up rows."""
_PLAIN = frozenset((int, float, str, bool, type(None)))


def fuse(layer: Layer, *input_shapes: tuple) -> Layer:
    """The layer itself, whose forward and backward are from now on one Triton kernel each, written from its array code.

    They run where dispatch launches Triton (arrays on a GPU; within ``gpulayers.testing.interpreting``), by their op:
    ``fusion(layer, shape).op``. Elsewhere the array code runs as ever. ``fused = True`` in a class does the same.

    Matrix products, convolutions and other ops of the library, gathers, and sums over rows that the output needs cut the
    code: what stands between them becomes kernels, the library's ops compute those, array code what is left.
    ``gl.explain(layer, x)`` lists the pieces.

    input_shapes: batch first, None for it; by default those it was built for. Where none is known, the first call that
    kernels could serve records the code. A setting that changes is seen: the code is recorded again.

    Raises FusionError, with the line and what to write instead, for code that cannot be recorded, or of which too little
    would become kernels. TypeError for what is no Layer.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"fuse: layer: the rule is a Layer, as MyLayer(); got {layer!r}")
    shapes = input_shapes or layer._input_shapes
    if shapes:
        for training in (True, False):
            fusion(layer, *shapes, training=training)
    layer.fused = True
    return layer


def explain(what: Op | Layer, *inputs: Any, needs: Sequence[str] = (), **options: Any) -> Any:
    """Who would compute a call. Launches nothing.

    Of an op: (backend, {backend: reason} for those passed over), with an attribute ``taped`` that says whether launches
    are replayed; ``inputs`` may be arrays or Specs (taken as arrays on the CPU). Of a fused layer: a list of its pieces,
    forward first, each (direction, name, the author's line, backend, reasons).

    Raises what the call would raise, TypeError for a layer that is not fused.
    """
    if not isinstance(what, Layer):
        return dispatch.explain(what, *inputs, needs=needs, **options)
    if not what.fused:
        raise TypeError(f"{what.name}: explain: the rule is an op, or a layer that gl.fuse took; got {what!r}")
    made, weights = _fusion_for(what, inputs), {name: w.data for name, w in what.named_weights().items()}
    if isinstance(made, Split):
        return made.explained(inputs, weights)
    seeds = [transfer.beside(np.zeros(2, np.int64), inputs[0])] * len(made.draws)
    backend, reasons = dispatch.explain(made.op, *inputs, *weights.values(), *seeds, needs=made.op.differentiable)
    return [Explained(way, f"{made.name}_{way}", "", backend, reasons) for way in ("forward", "backward")]


def fusion(layer: Layer, *input_shapes: tuple, training: bool = True, dtypes: Sequence[Any] = ()) -> Fusion | Split:
    """The layer's kernels for inputs of these shapes (batch first, None for it): their text, and the op, or the pieces.

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


def forget(layer: Layer) -> None:
    """Its kernels are made anew when they are asked for: something was measured since."""
    with _lock:
        _fusions.pop(layer, None)


def _made(layer: Layer, shapes: tuple, training: bool, kinds: tuple) -> Fusion | Split:
    layer.ensure_built(*shapes)
    plain = copy.deepcopy(layer)
    for part in plain.layers():
        part.__dict__["fused"] = False
    title = type(layer).__name__
    try:
        recording = record(plain, shapes, training=training, dtypes=kinds)
        made: Fusion | Split = _whole(recording, title)
    except Unrecordable as why:
        try:
            recording = record(plain, shapes, training=training, dtypes=kinds, keeps=_keeps)
            made = Split(recording, title, why)
        except Unrecordable as error:
            raise FusionError(layer.name, error) from error
    try:
        check_replay(plain, recording, shapes, kinds)
    except Unrecordable as error:
        raise FusionError(layer.name, error) from error
    return made


def _whole(recording: Recording, title: str) -> Fusion:
    """As counted bytes choose, or as was measured on this GPU."""
    counted = Fusion(recording, title)
    choice = _measured.read(counted.key)
    return counted if choice is None else Fusion(recording, title, choice)


def _keeps(op: Op) -> bool:
    """Ops with kernels that no fused one replaces; the definitions of others are read through."""
    return bool(op.kernels) or op.family not in _READ


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


def _fusion_for(layer: Layer, xs: Sequence[Any]) -> Fusion | Split:
    """For a call with these arrays."""
    kinds = [d if (d := arrays.library(x).dtype(x)) not in FLOATS else arrays.float32 for x in xs]
    return fusion(layer, *(tuple(x.shape) for x in xs), training=layer.training, dtypes=kinds)


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
        made = _fusion_for(layer, xs)
        if isinstance(made, Split):
            return _split_forward(layer, made, own, xs)
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
        if Split in frame.saved:
            return _split_backward(layer, frame, dys)
        if Fused not in frame.calls:
            return own(layer, *dys)
        with _calls.scope(frame, Fused):
            found = layer.run_backward(*dys)
        grads = iter(found if isinstance(found, tuple) else (found,))
        dxs = tuple(next(grads, None) if x is not None and x.dtype in FLOATS else None for x in frame.inputs)
        return dxs if len(dxs) > 1 else dxs[0]


def _split_forward(layer: Any, made: Split, own: Callable, xs: tuple) -> Any:
    if not made.serves():
        return own(layer, *xs)
    weights = layer.named_weights()
    ys, states, kept = made.run_forward(xs, {name: w.data for name, w in weights.items()})
    for name, value in states.items():
        weights[name].data = arrays.cast(value, weights[name].dtype)
    if recording.get():
        thread.running[-1].saved[Split] = made, kept
    return ys if len(ys) > 1 else ys[0]


def _split_backward(layer: Any, frame: Frame, dys: tuple) -> Any:
    made, kept = frame.saved[Split]
    dxs, gradients = made.run_backward(kept, dys, frame.wanted or [True] * len(frame.inputs))
    weights = layer.named_weights()
    for name, gradient in gradients.items():
        weights[name].add_grad(arrays.cast(gradient, weights[name].dtype))
    return tuple(dxs) if len(dxs) > 1 else dxs[0]


_calls.fuser = _Runner
