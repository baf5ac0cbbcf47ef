"""Several fully connected layers of one input: queries, keys and values, or a gated unit's two halves."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, compute_dtype, namespace, up
from gpulayers.definition import Rule, ShapeError
from gpulayers.kernels._linears import BIASES, WEIGHTS, kept, named
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape

OUTPUTS = ("y", "y_2", "y_3")


def linears_rule(
    x: Spec,
    weight: Spec,
    weight_2: Spec,
    weight_3: Spec | None = None,
    bias: Spec | None = None,
    bias_2: Spec | None = None,
    bias_3: Spec | None = None,
    *,
    needs: tuple = (),
) -> Rule:
    require_float("x", x)
    if x.ndim < 1:
        raise ShapeError("x", "x.shape = [..., in]", list(x.shape))
    weights = dict(zip(WEIGHTS, (weight, weight_2, weight_3)))
    biases = dict(zip(BIASES, (bias, bias_2, bias_3)))
    outputs = {}
    for (name, w), (its, b), y in zip(weights.items(), biases.items(), OUTPUTS):
        if w is None:
            if b is not None:
                raise ShapeError(its, f"a {its} comes with a {name}", list(b.shape))
            continue
        if w.ndim != 2:
            raise ShapeError(name, f"{name}.shape = [out, in]", list(w.shape))
        require_shape(name, w, (w.shape[0], x.shape[-1]), f"{name}.shape = [out, in] with x.shape = [..., in]")
        if b is not None:
            require_shape(its, b, (w.shape[0],), f"{its}.shape = [out]")
        require_same_dtype(x, **{name: w, its: b})
        outputs[y] = Spec((*x.shape[:-1], w.shape[0]), x.dtype)
    given = named((weight, weight_2, weight_3))
    saved = kept(x, given, needs)
    grads = {name: Spec(s.shape, s.dtype) for name, s in {"x": x, **given}.items()}
    return Rule(outputs, saved, None, grads)


def linears_forward(
    x: Any,
    weight: Any,
    weight_2: Any,
    weight_3: Any = None,
    bias: Any = None,
    bias_2: Any = None,
    bias_3: Any = None,
    *,
    needs: tuple = (),
) -> tuple[tuple, dict]:
    """y_i = x W_iᵀ + b_i for two or three weights, which no array need hold together.

    x: (..., in); weight, weight_2, weight_3: (out_i, in), the third may be None; bias, bias_2, bias_3: (out_i,), each may be
    None; all of one float dtype. Returns y_i: (..., out_i), row-major, as many as there are weights. dx is one sum over all
    of them. For one weight, or with an activation, see ``linear``.

    Raises RuntimeError for shapes or dtypes that do not fit.
    """
    xp, rows = namespace(x), math.prod(x.shape[:-1])
    given = named((weight, weight_2, weight_3))
    ys = []
    for w, b in zip(given.values(), (bias, bias_2, bias_3)):
        y = up(x).reshape(rows, w.shape[1]) @ up(w).T
        y = y if b is None else y + up(b)
        ys.append(xp.ascontiguousarray(y.astype(x.dtype, copy=False)).reshape(*x.shape[:-1], w.shape[0]))
    return tuple(ys), kept(x, given, needs)


def linears_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    """dx = Σ dy_i W_i, dW_i = dy_iᵀ x, db_i = Σ dy_i over rows; 0 of an output that nobody used."""
    x, *weights, xp = inputs[0], *inputs[1:4], namespace(next(dy for dy in dys if dy is not None))
    rows, features, dx = math.prod(x.shape[:-1]), x.shape[-1], None
    grads: dict[str, Any] = {}
    for dy, w, name, bias in zip(dys, weights, WEIGHTS, BIASES):
        shape = rows, w.shape[0]
        flat = xp.zeros(shape, compute_dtype(x.dtype)) if dy is None else up(dy).reshape(shape)
        if "x" in needs and dy is not None:
            part = flat @ up(saved[name])
            dx = part if dx is None else dx + part
        if name in needs:
            dw = flat.T @ up(saved["x"]).reshape(rows, features)
            grads[name] = xp.ascontiguousarray(dw).astype(x.dtype, copy=False)
        if bias in needs:
            grads[bias] = flat.sum(0, dtype=compute_dtype(x.dtype)).astype(x.dtype, copy=False)
    if dx is not None:
        dx = dx.reshape(x.shape).astype(x.dtype, copy=False)
    return dx, *(grads.get(name) for name in WEIGHTS + BIASES)


linears = Op(linears_rule, linears_forward, linears_backward, family="linear")
