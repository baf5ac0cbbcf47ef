"""What a layer itself gives: the numbers that an export of it is held against."""

from typing import Any, NamedTuple

import numpy as np

import gpulayers as gl


class Reference(NamedTuple):
    xs: list[np.ndarray]
    weights: dict[str, np.ndarray]
    ys: list[np.ndarray]
    dys: list[np.ndarray]
    dxs: list[Any]
    gradients: dict[str, Any]
    after: dict[str, np.ndarray]
    """The weights after a forward, which may update some."""


def reference(layer: gl.Layer, shapes: list[tuple], batch: int, training: bool = True, integers: int = 0) -> Reference:
    """Of random inputs and weights, which the layer has again afterwards. integers: inputs are such, below this."""
    rng = np.random.default_rng(batch)
    layer.ensure_built(*shapes)
    xs = [rng.standard_normal([batch, *s[1:]]).astype(np.float32) for s in shapes]
    if integers:
        xs = [rng.integers(0, integers, [batch, *s[1:]]) for s in shapes]
    named = layer.named_weights()
    held = {name: w.data for name, w in named.items()}
    for w in named.values():
        if w.data.dtype.kind == "f":
            w.data = (w.data + 0.3 * abs(rng.standard_normal(w.shape))).astype(w.dtype)
    weights = {name: w.data.copy() for name, w in named.items()}
    layer.zero_grad()
    layer.train(training)
    ys = layer.forward(*xs)
    ys = list(ys if isinstance(ys, tuple) else (ys,))
    after = {name: w.data.copy() for name, w in named.items()}
    dys = [rng.standard_normal(y.shape).astype(y.dtype) for y in ys]
    dxs = layer.backward(*dys)
    dxs = [None if integers else dx for dx in (dxs if isinstance(dxs, tuple) else (dxs,))]
    gradients = {name: np.asarray(w.grad) if w.trainable else None for name, w in named.items()}
    layer.train()
    for name, w in named.items():
        w.data = held[name]
    return Reference(xs, weights, ys, dys, dxs, gradients, after)
