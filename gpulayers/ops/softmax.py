"""Softmax, softmin and log-softmax over one axis."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, namespace, up
from gpulayers.definition import Rule
from gpulayers.ops._op import Op, normal_axis, require_float


def softmax_rule(x: Spec, *, needs: tuple = (), axis: int = -1) -> Rule:
    require_float("x", x)
    y = Spec(x.shape, x.dtype)
    return Rule({"y": y}, {"y": y} if needs else {}, {"axis": normal_axis(axis, x.ndim)}, {"x": y})


def softmax_forward(x: Any, *, needs: tuple = (), axis: int = -1) -> tuple[tuple, dict]:
    """y = exp(x − max x) / Σ exp(x − max x) over ``axis``.

    x: any shape, float. Returns y, with x's shape and dtype, row-major. An empty axis gives an empty y.
    """
    return _forward(x, up(x), needs, axis)


def softmax_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1) -> tuple:
    """dx = y (dy − Σ dy y)."""
    return (_rounded(_gradient(dys[0], saved["y"], axis), saved["y"]),)


softmax = Op(softmax_rule, softmax_forward, softmax_backward)


def softmin_rule(x: Spec, *, needs: tuple = (), axis: int = -1) -> Rule:
    return softmax_rule(x, needs=needs, axis=axis)


def softmin_forward(x: Any, *, needs: tuple = (), axis: int = -1) -> tuple[tuple, dict]:
    """y = softmax(−x) = exp(min x − x) / Σ exp(min x − x) over ``axis``.

    x: any shape, float. Returns y, with x's shape and dtype, row-major. An empty axis gives an empty y.
    """
    return _forward(x, -up(x), needs, axis)


def softmin_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1) -> tuple:
    """dx = −y (dy − Σ dy y)."""
    return (_rounded(-_gradient(dys[0], saved["y"], axis), saved["y"]),)


softmin = Op(softmin_rule, softmin_forward, softmin_backward)


def _forward(x: Any, v: Any, needs: tuple, axis: int) -> tuple[tuple, dict]:
    """The softmax of v, rounded to x's dtype."""
    xp = namespace(x)
    if v.size == 0:
        y = xp.empty(x.shape, x.dtype)
    elif v.ndim == 0:
        y = xp.asarray(xp.exp(v - v), x.dtype)
    else:
        e = xp.exp(v - v.max(axis, keepdims=True))
        y = _rounded(e / e.sum(axis, keepdims=True), x)
    y = y.reshape(x.shape)
    return (y,), {"y": y} if needs else {}


def _gradient(dy: Any, y: Any, axis: int) -> Any:
    dy, v = up(dy), up(y)
    dot = (dy * v).sum(axis, keepdims=True) if v.ndim else dy * v
    return v * (dy - dot)


def _rounded(v: Any, like: Any) -> Any:
    return namespace(like).ascontiguousarray(v.astype(like.dtype)).reshape(like.shape)


def log_softmax_rule(x: Spec, *, needs: tuple = (), axis: int = -1) -> Rule:
    return softmax_rule(x, needs=needs, axis=axis)


def log_softmax_forward(x: Any, *, needs: tuple = (), axis: int = -1) -> tuple[tuple, dict]:
    """y = (x − max x) − log Σ exp(x − max x) over ``axis``.

    x: any shape, float. Returns y, with x's shape and dtype, row-major. An empty axis gives an empty y.
    """
    xp = namespace(x)
    v = up(x)
    if v.size == 0:
        y = xp.empty(x.shape, x.dtype)
    elif v.ndim == 0:
        y = xp.asarray(v - v, x.dtype)
    else:
        d = v - v.max(axis, keepdims=True)
        y = _rounded(d - xp.log(xp.exp(d).sum(axis, keepdims=True)), x)
    y = y.reshape(x.shape)
    return (y,), {"y": y} if needs else {}


def log_softmax_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1) -> tuple:
    """dx = dy − exp(y) Σ dy."""
    (dy,), y = dys, saved["y"]
    xp = namespace(y)
    dy = up(dy)
    total = dy.sum(axis, keepdims=True) if dy.ndim else dy
    return (_rounded(dy - xp.exp(up(y)) * total, y),)


log_softmax = Op(log_softmax_rule, log_softmax_forward, log_softmax_backward)
