"""Layer norm and RMS norm, of x or of a sum; the norms of channels are in files beside this. Statistics are float32
(float64 for float64) for any dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes

from gpulayers.arrays import HALVES, Spec, arranged, compute_dtype, float32, namespace, up
from gpulayers.arrays import dtype as dtype_of
from gpulayers.definition import ArgumentError, Rule, ShapeError
from gpulayers.kernels._norm import sum_dtype
from gpulayers.ops._batch_moments import batch_moments as batch_moments
from gpulayers.ops._batch_norm import batch_norm as batch_norm
from gpulayers.ops._conv_norm import conv_batch_norm as conv_batch_norm
from gpulayers.ops._group_norm import group_norm as group_norm
from gpulayers.ops._group_norm import instance_norm as instance_norm
from gpulayers.ops._local_response_norm import local_response_norm as local_response_norm
from gpulayers.ops._norm import require_parameter
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape


def _normalized(x: Spec, normalized_shape: Any) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple that x's shape ends with."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise ShapeError("normalized_shape", "at least one size", shape)
    tail = x.shape[-len(shape) :] if x.ndim >= len(shape) else None
    if tail is None or any(a is not None and a != b for a, b in zip(tail, shape)):
        raise ShapeError("x", f"x.shape = (…, *normalized_shape) = (…, {', '.join(map(str, shape))})", list(x.shape))
    return shape


def _rows(x: Any, normalized_shape: Sequence[int]) -> tuple[Any, tuple[int, ...]]:
    """(x as a matrix with one row to normalise in each, x's leading sizes)."""
    lead = x.shape[: x.ndim - len(normalized_shape)]
    return x.reshape(math.prod(lead), math.prod(normalized_shape)), lead


# --- layer norm ------------------------------------------------------------------------------------------------------


def layer_norm_rule(
    x: Spec,
    weight: Spec | None = None,
    bias: Spec | None = None,
    *,
    needs: tuple = (),
    normalized_shape: Any,
    eps: float = 1e-5,
) -> Rule:
    require_float("x", x)
    shape = _normalized(x, normalized_shape)
    require_parameter(x, weight=weight, bias=bias)
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            require_shape(name, p, shape, f"{name}.shape = normalized_shape")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise ShapeError("bias", "bias.dtype = weight.dtype", f"bias {bias.dtype} with weight {weight.dtype}")
    y = Spec(x.shape, x.dtype)
    row = Spec(x.shape[: x.ndim - len(shape)], compute_dtype(x.dtype))
    saved = {"x": x, "mean": row, "rstd": row} | ({} if weight is None else {"weight": weight})
    return Rule({"y": y}, saved if needs else {}, {"normalized_shape": shape, "eps": float(eps)}, {"x": y})


def layer_norm_forward(
    x: Any, weight: Any = None, bias: Any = None, *, needs: tuple = (), normalized_shape: Any, eps: float = 1e-5
) -> tuple[tuple, dict]:
    """y = (x − mean) rstd · weight + bias, with rstd = 1 / √(var + eps), over x's last axes.

    x: (*lead, *normalized_shape), float. weight, bias: normalized_shape, of x's dtype, or float32 for 16-bit x.
    mean and var (the biased one) are taken over normalized_shape for each of lead. Returns y, row-major, with x's
    shape and dtype. Ba, Kiros, Hinton: Layer Normalization (2016). Raises ShapeError.
    """
    xp = namespace(x)
    v, lead = _rows(up(x), normalized_shape)
    n = max(v.shape[1], 1)  # a row of nothing has mean 0
    mean = v.sum(1, keepdims=True) / n
    d = v - mean
    rstd = 1 / xp.sqrt((d * d).sum(1, keepdims=True) / n + eps)
    y = d * rstd
    if weight is not None:
        y = y * up(weight).reshape(-1)
    if bias is not None:
        y = y + up(bias).reshape(-1)
    y = arranged(y.astype(x.dtype, copy=False).reshape(x.shape), None)
    saved = {"x": x, "mean": mean.reshape(lead), "rstd": rstd.reshape(lead)} | (
        {} if weight is None else {"weight": weight}
    )
    return (y,), saved if needs else {}


def layer_norm_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, normalized_shape: Any, eps: float = 1e-5
) -> tuple:
    """With x̂ = (x − mean) rstd and g = dy · weight, both averaged over normalized_shape where a bar is:

    dx = rstd (g − ḡ − x̂ · mean(g x̂)),  dweight = Σ dy x̂,  dbias = Σ dy.
    """
    (dy,), x, weight = dys, saved["x"], saved.get("weight")
    v, _ = _rows(up(x), normalized_shape)
    dy, _ = _rows(up(dy), normalized_shape)
    rstd = saved["rstd"].reshape(-1, 1)
    xhat = (v - saved["mean"].reshape(-1, 1)) * rstd
    dx = dweight = dbias = None
    if "x" in needs:
        n = max(v.shape[1], 1)
        g = dy if weight is None else dy * up(weight).reshape(-1)
        dx = rstd * (g - g.sum(1, keepdims=True) / n - xhat * ((g * xhat).sum(1, keepdims=True) / n))
        dx = arranged(dx.astype(x.dtype, copy=False).reshape(x.shape), None)
    if "weight" in needs:
        dweight = (dy * xhat).sum(0).astype(inputs[1].dtype, copy=False).reshape(inputs[1].shape)
    if "bias" in needs:
        dbias = dy.sum(0).astype(inputs[2].dtype, copy=False).reshape(inputs[2].shape)
    return dx, dweight, dbias


layer_norm = Op(layer_norm_rule, layer_norm_forward, layer_norm_backward)


# --- RMS norm --------------------------------------------------------------------------------------------------------


def rms_norm_rule(
    x: Spec, weight: Spec | None = None, *, needs: tuple = (), normalized_shape: Any, eps: float | None = None
) -> Rule:
    require_float("x", x)
    shape = _normalized(x, normalized_shape)
    require_parameter(x, weight=weight)
    if weight is not None:
        require_shape("weight", weight, shape, "weight.shape = normalized_shape")
    y = Spec(x.shape, x.dtype)
    work = compute_dtype(x.dtype)
    saved = {"x": x, "rstd": Spec(x.shape[: x.ndim - len(shape)], work)} | (
        {} if weight is None else {"weight": weight}
    )
    eps = float(ml_dtypes.finfo(work).eps if eps is None else eps)
    return Rule({"y": y}, saved if needs else {}, {"normalized_shape": shape, "eps": eps}, {"x": y})


def rms_norm_forward(
    x: Any, weight: Any = None, *, needs: tuple = (), normalized_shape: Any, eps: float | None = None
) -> tuple[tuple, dict]:
    """y = x rstd · weight, with rstd = 1 / √(mean x² + eps), over x's last axes.

    x: (*lead, *normalized_shape), float. weight: normalized_shape, of x's dtype, or float32 for 16-bit x.
    eps: None is the machine epsilon of float32 (of float64 for float64), torch's choice. Returns y, row-major, with
    x's shape and dtype. Zhang, Sennrich: Root Mean Square Layer Normalization (2019). Raises ShapeError.
    """
    xp = namespace(x)
    v, lead = _rows(up(x), normalized_shape)
    rstd = 1 / xp.sqrt((v * v).sum(1, keepdims=True) / max(v.shape[1], 1) + eps)
    y = v * rstd
    if weight is not None:
        y = y * up(weight).reshape(-1)
    y = arranged(y.astype(x.dtype, copy=False).reshape(x.shape), None)
    saved = {"x": x, "rstd": rstd.reshape(lead)} | ({} if weight is None else {"weight": weight})
    return (y,), saved if needs else {}


def rms_norm_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, normalized_shape: Any, eps: float | None = None
) -> tuple:
    """With x̂ = x rstd and g = dy · weight: dx = rstd (g − x̂ · mean(g x̂)),  dweight = Σ dy x̂."""
    (dy,), x, weight = dys, saved["x"], saved.get("weight")
    v, _ = _rows(up(x), normalized_shape)
    dy, _ = _rows(up(dy), normalized_shape)
    rstd = saved["rstd"].reshape(-1, 1)
    xhat = v * rstd
    dx = dweight = None
    if "x" in needs:
        g = dy if weight is None else dy * up(weight).reshape(-1)
        dx = rstd * (g - xhat * ((g * xhat).sum(1, keepdims=True) / max(v.shape[1], 1)))
        dx = arranged(dx.astype(x.dtype, copy=False).reshape(x.shape), None)
    if "weight" in needs:
        dweight = (dy * xhat).sum(0).astype(inputs[1].dtype, copy=False).reshape(inputs[1].shape)
    return dx, dweight


rms_norm = Op(rms_norm_rule, rms_norm_forward, rms_norm_backward)


# --- layer norm and RMS norm of a sum --------------------------------------------------------------------------------


def _summed(x: Spec, residual: Spec) -> Spec:
    """What a norm of a sum is of."""
    require_float("x", x)
    if residual.dtype != x.dtype and not {x.dtype, residual.dtype} <= {float32, *HALVES}:
        require_same_dtype(x, residual=residual)
    if {x.dtype, residual.dtype} == {*HALVES}:
        rule = "residual.dtype = x.dtype, or one of them float32 and the other of 16 bits"
        raise ShapeError("residual", rule, f"residual {residual.dtype} with x {x.dtype}")
    require_shape("residual", residual, x.shape, "residual.shape = x.shape")
    return Spec(x.shape, dtype_of(sum_dtype(x, residual)))


def _rule_of_sum(x: Spec, residual: Spec, norm: Rule, dtype: str | None) -> Rule:
    """From the rule of a norm of the sum, that of a norm of x + residual."""
    total = norm.outputs["y"]
    names = [str(total.dtype), *map(str, HALVES)] if total.dtype == float32 else [str(total.dtype)]
    if dtype not in (None, *names):
        rule = f"None, {', '.join(map(repr, names))}"
        raise ArgumentError("dtype", rule, f"{dtype!r} with a {total.dtype} sum")
    outputs = {"y": total if dtype is None else Spec(x.shape, dtype_of(dtype)), "sum": total}
    saved = {"sum" if name == "x" else name: total if name == "x" else s for name, s in norm.saved.items()}
    grads = {"x": Spec(x.shape, x.dtype), "residual": Spec(x.shape, residual.dtype)}
    return Rule(outputs, saved, (norm.options or {}) | {"dtype": dtype}, grads)


def _forward_of_sum(
    norm: Callable, x: Any, residual: Any, *weights: Any, dtype: str | None, **options: Any
) -> tuple[tuple, dict]:
    total = arranged((up(x) + up(residual)).astype(sum_dtype(x, residual), copy=False), None)
    (y,), saved = norm(total, *weights, **options)
    if dtype is not None and y.dtype == float32:
        y = y.astype(dtype_of(dtype))
    return (y, total), {"sum" if name == "x" else name: a for name, a in saved.items()}


def _backward_of_sum(
    norm: Callable, dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, **options: Any
) -> tuple[Any, ...]:
    """dh = dsum + the norm's dx, rounded once for x and once for residual, or for both where they have one dtype."""
    (dy, dsum), total = dys, saved["sum"]
    weights = inputs[2:]
    if dy is None:
        xp, names = namespace(total), ("weight", "bias")
        dh = arranged(up(dsum), None)
        others = [xp.zeros(s.shape, s.dtype) if name in needs else None for name, s in zip(names, weights)]
    else:
        wanted = tuple({"residual": "x"}.get(name, name) for name in needs)
        wide = saved | {"x": up(total)}  # so that the norm's dx comes unrounded
        dh, *others = norm((dy,), wide, inputs=(inputs[0], *weights), needs=wanted, **options)
        if dh is not None and dsum is not None:
            dh = arranged(dh + up(dsum), None)
    if dh is None:
        return None, None, *others
    first, second = (s.dtype for s in inputs[:2])
    dx = dh.astype(first, copy=dy is None)
    dresidual = dx if first == second else dh.astype(second, copy=dy is None)
    return dx if "x" in needs else None, dresidual if "residual" in needs else None, *others


def add_layer_norm_rule(
    x: Spec,
    residual: Spec,
    weight: Spec | None = None,
    bias: Spec | None = None,
    *,
    needs: tuple = (),
    normalized_shape: Any,
    eps: float = 1e-5,
    dtype: str | None = None,
) -> Rule:
    norm = layer_norm_rule(_summed(x, residual), weight, bias, needs=needs, normalized_shape=normalized_shape, eps=eps)
    return _rule_of_sum(x, residual, norm, dtype)


def add_layer_norm_forward(
    x: Any,
    residual: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: Any,
    eps: float = 1e-5,
    dtype: str | None = None,
) -> tuple[tuple, dict]:
    """sum = x + residual, y = layer_norm(sum): what stands between two layers of a transformer.

    x, residual: (*lead, *normalized_shape), float, of one shape; of one dtype, or one of them float32 and the other of 16
    bits: then the sum is float32, as torch's. weight, bias: as layer_norm's of the sum. dtype: of y; None is the sum's, "bfloat16" or
    "float16" round y of a float32 sum once. Returns y and sum, both row-major with x's shape; sum is rounded to its
    dtype first, and y is layer_norm's of that. The gradients of x and residual are one array where they have one dtype.
    Raises ShapeError, ArgumentError.
    """
    options: dict[str, Any] = {"needs": needs, "normalized_shape": normalized_shape, "eps": eps}
    return _forward_of_sum(layer_norm_forward, x, residual, weight, bias, dtype=dtype, **options)


def add_layer_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: Any,
    eps: float = 1e-5,
    dtype: str | None = None,
) -> tuple:
    """dx = dresidual = dsum + layer_norm's dx; the weights' gradients are layer_norm's."""
    options: dict[str, Any] = {"normalized_shape": normalized_shape, "eps": eps}
    return _backward_of_sum(layer_norm_backward, dys, saved, inputs=inputs, needs=needs, **options)


add_layer_norm = Op(add_layer_norm_rule, add_layer_norm_forward, add_layer_norm_backward, adds="sum")


def add_rms_norm_rule(
    x: Spec,
    residual: Spec,
    weight: Spec | None = None,
    *,
    needs: tuple = (),
    normalized_shape: Any,
    eps: float | None = None,
    dtype: str | None = None,
) -> Rule:
    norm = rms_norm_rule(_summed(x, residual), weight, needs=needs, normalized_shape=normalized_shape, eps=eps)
    return _rule_of_sum(x, residual, norm, dtype)


def add_rms_norm_forward(
    x: Any,
    residual: Any,
    weight: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: Any,
    eps: float | None = None,
    dtype: str | None = None,
) -> tuple[tuple, dict]:
    """sum = x + residual, y = rms_norm(sum): what stands between two layers of a transformer.

    x, residual: (*lead, *normalized_shape), float, of one shape; of one dtype, or one of them float32 and the other of 16
    bits: then the sum is float32, as torch's. weight, eps: as rms_norm's of the sum. dtype: of y; None is the sum's, "bfloat16" or
    "float16" round y of a float32 sum once. Returns y and sum, both row-major with x's shape; sum is rounded to its
    dtype first, and y is rms_norm's of that. The gradients of x and residual are one array where they have one dtype.
    Raises ShapeError, ArgumentError.
    """
    options: dict[str, Any] = {"needs": needs, "normalized_shape": normalized_shape, "eps": eps}
    return _forward_of_sum(rms_norm_forward, x, residual, weight, dtype=dtype, **options)


def add_rms_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: Any,
    eps: float | None = None,
    dtype: str | None = None,
) -> tuple:
    """dx = dresidual = dsum + rms_norm's dx; the weight's gradient is rms_norm's."""
    options: dict[str, Any] = {"normalized_shape": normalized_shape, "eps": eps}
    return _backward_of_sum(rms_norm_backward, dys, saved, inputs=inputs, needs=needs, **options)


add_rms_norm = Op(add_rms_norm_rule, add_rms_norm_forward, add_rms_norm_backward, adds="sum")
