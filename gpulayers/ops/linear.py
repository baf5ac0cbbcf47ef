"""Linear (fully connected, dense): y = f(x Wᵀ + b)."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, compute_dtype, namespace, up
from gpulayers.definition import Rule, ShapeError
from gpulayers.ops._activation import require_activation
from gpulayers.ops._linears import linears as linears
from gpulayers.ops._matmul import matmul as matmul
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape
from gpulayers.ops.activation import ACTIVATIONS


def linear_rule(
    x: Spec, weight: Spec, bias: Spec | None = None, *, needs: tuple = (), activation: str | None = None
) -> Rule:
    require_float("x", x)
    require_activation(activation)
    if weight.ndim != 2:
        raise ShapeError("weight", "weight.shape = [out, in]", list(weight.shape))
    out, features = weight.shape
    if x.ndim < 1:
        raise ShapeError("x", f"x.shape = [..., in] = [..., {features}]", list(x.shape))
    require_shape("x", x, (*x.shape[:-1], features), "x.shape = [..., in]")
    if bias is not None:
        require_shape("bias", bias, (out,), "bias.shape = [out]")
    require_same_dtype(x, weight=weight, bias=bias)
    y = Spec((*x.shape[:-1], out), x.dtype)
    saved = {}
    if "weight" in needs:
        saved["x"] = x
    if "x" in needs:
        saved["weight"] = weight
    if activation is not None and needs:
        if ACTIVATIONS[activation].keeps == "y":
            saved["y"] = y
        else:
            saved |= {"z": y, "weight": weight} | ({} if bias is None else {"bias": bias})
    grads = {name: Spec(given.shape, given.dtype) for name, given in (("x", x), ("weight", weight))}
    return Rule({"y": y}, saved, None, grads)


def linear_forward(
    x: Any, weight: Any, bias: Any = None, *, needs: tuple = (), activation: str | None = None
) -> tuple[tuple, dict]:
    """y = f(x Wᵀ + b), f the activation (or none).

    x: (..., in); weight W: (out, in); bias b: (out,) or None; all of one float dtype. activation: a name in
    ``ACTIVATIONS``, with torch's default numbers. Returns y: (..., out), row-major.

    Raises RuntimeError for shapes or dtypes that do not fit, ValueError for an unknown activation.
    """
    rows, (out, features) = math.prod(x.shape[:-1]), weight.shape
    z = up(x).reshape(rows, features) @ up(weight).T
    if bias is not None:
        z = z + up(bias)
    z = z.reshape(*x.shape[:-1], out)
    saved = {"x": x} if "weight" in needs else {}
    if "x" in needs:
        saved["weight"] = weight
    if activation is None:
        return (z.astype(x.dtype, copy=False),), saved
    f = ACTIVATIONS[activation]
    y = f.value(z, *f.numbers).astype(x.dtype, copy=False)
    if needs:
        if f.keeps == "y":
            saved["y"] = y
        else:
            saved |= {"z": z.astype(x.dtype, copy=False), "weight": weight} | ({} if bias is None else {"bias": bias})
    return (y,), saved


def linear_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, activation: str | None = None) -> tuple:
    """With dz = dy f'(z): dx = dz W, dW = dzᵀ x, db = Σ dz over rows.

    f' is computed from y where the activation allows it, else from z, which the forward then keeps; beside it the
    weights, from which the gradient of a gradient computes z again.
    """
    (dy,), (x, weight, _) = dys, inputs
    xp = namespace(dy)
    rows, (out, features) = math.prod(x.shape[:-1]), weight.shape
    dz = up(dy)
    if activation is not None:
        f = ACTIVATIONS[activation]
        dz = f.gradient(dz, up(saved["z" if f.keeps == "x" else "y"]), *f.numbers)
    dz = dz.reshape(rows, out)
    dx = dw = db = None
    if "x" in needs:
        dx = (dz @ up(saved["weight"])).reshape(x.shape).astype(x.dtype, copy=False)
    if "weight" in needs:
        dw = xp.ascontiguousarray(dz.T @ up(saved["x"]).reshape(rows, features)).astype(x.dtype, copy=False)
    if "bias" in needs:
        db = dz.sum(0, dtype=compute_dtype(x.dtype)).astype(x.dtype, copy=False)
    return dx, dw, db


linear = Op(linear_rule, linear_forward, linear_backward)
