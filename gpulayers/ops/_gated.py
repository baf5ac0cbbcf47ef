"""Gated units: an activation of one half times the other."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, namespace, up
from gpulayers.definition import ArgumentError, Rule, ShapeError
from gpulayers.ops._activation import ACTIVATIONS
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape


def gated_rule(x: Spec, gain: Spec | None = None, *, needs: tuple = (), activation: str = "silu") -> Rule:
    require_float("x", x)
    if activation not in ACTIVATIONS:
        raise ArgumentError("activation", f"activation ∈ {{{', '.join(ACTIVATIONS)}}}", repr(activation))
    shape = x.shape
    if gain is None:
        if x.ndim == 0 or (x.shape[-1] is not None and x.shape[-1] % 2):
            raise ShapeError("x", "x.shape = (…, 2 H) without gain", list(x.shape))
        shape = (*x.shape[:-1], None if x.shape[-1] is None else x.shape[-1] // 2)
    else:
        require_same_dtype(x, gain=gain)
        require_shape("gain", gain, x.shape, "gain.shape = x.shape")
    given = {"x": x} | ({} if gain is None else {"gain": gain})
    grads = {name: Spec(s.shape, s.dtype) for name, s in given.items()}
    return Rule({"y": Spec(shape, x.dtype)}, given if needs else {}, None, grads)


def _halves(x: Any, gain: Any) -> tuple[Any, Any]:
    """(what the activation is of, what it multiplies)"""
    if gain is not None:
        return up(x), up(gain)
    half = x.shape[-1] // 2
    return up(x[..., :half]), up(x[..., half:])


def gated_forward(x: Any, gain: Any = None, *, needs: tuple = (), activation: str = "silu") -> tuple[tuple, dict]:
    """y = f(x) gain; or y = f(a) b for x = [a, b] along the last axis, where gain is left out.

    x: any shape, or (…, 2 H), float. gain: x's shape and dtype. activation: f, a name in ``ACTIVATIONS`` with torch's default
    numbers: "silu" (SwiGLU), "gelu" and "gelu_tanh" (GeGLU), "relu" (ReGLU), "sigmoid" (Shazeer 2020, "GLU Variants Improve
    Transformer"). Returns y: x's shape, or (…, H), row-major. Saves its inputs; backward computes f again. torch's glu, which
    multiplies by the other half's sigmoid, is ``glu``.
    """
    a, b = _halves(x, gain)
    f = ACTIVATIONS[activation]
    y = (f.value(a, *f.numbers) * b).astype(x.dtype, copy=False)
    saved = ({"x": x} | ({} if gain is None else {"gain": gain})) if needs else {}
    return (namespace(x).ascontiguousarray(y).reshape(a.shape),), saved


def gated_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, activation: str) -> tuple:
    """da = dy b f'(a), db = dy f(a)."""
    (dy,), x, gain, xp = dys, saved["x"], saved.get("gain"), namespace(dys[0])
    (a, b), g, f = _halves(x, gain), up(dy), ACTIVATIONS[activation]
    value = f.value(a, *f.numbers)
    da, db = f.gradient(g * b, value if f.keeps == "y" else a, *f.numbers), g * value
    if gain is None:
        found = [xp.concatenate([da, db], -1), None]
    else:
        found = [da if "x" in needs else None, db if "gain" in needs else None]
    return tuple(
        None if v is None else xp.ascontiguousarray(v.astype(x.dtype, copy=False)).reshape(x.shape) for v in found
    )


gated = Op(gated_rule, gated_forward, gated_backward, family="activation")
