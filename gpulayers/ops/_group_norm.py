"""Group norm and instance norm, and what may follow them in the same pass.

Statistics are float32 (float64 for float64) for any dtype."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, arranged, compute_dtype, namespace, spec, up
from gpulayers.definition import ArgumentError, KindError, Rule, ShapeError
from gpulayers.kernels._norm import batch_norm_saved, group_norm_saved
from gpulayers.ops._activation import require_activation
from gpulayers.ops._batch_norm import batch_norm_backward, batch_norm_forward
from gpulayers.ops._norm import require_channels, require_residual, require_running
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._window import output_order
from gpulayers.ops.activation import ACTIVATIONS

# --- group norm ------------------------------------------------------------------------------------------------------


def group_norm_rule(
    x: Spec,
    weight: Spec | None = None,
    bias: Spec | None = None,
    residual: Spec | None = None,
    *,
    needs: tuple = (),
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Rule:
    require_float("x", x)
    require_activation(activation)
    channels = require_channels(x, weight=weight, bias=bias)
    require_residual(x, residual)
    if not hasattr(num_groups, "__index__") or isinstance(num_groups, bool):
        raise KindError("num_groups", "an integer", repr(num_groups))
    if num_groups < 1 or (channels is not None and channels % num_groups):
        raise ShapeError("num_groups", "num_groups ≥ 1 divides C", f"{num_groups} with C = {channels}")
    values = (x.shape[0], None if channels is None else channels // num_groups, *x.shape[2:])
    if all(v is not None and v == 1 for v in values):
        raise ArgumentError("x", "more than one value, N · C / num_groups · ∏ spatial > 1", list(x.shape))
    y = Spec(x.shape, x.dtype, output_order(x))
    row = Spec((x.shape[0], num_groups), compute_dtype(x.dtype))
    options = {"num_groups": num_groups, "eps": float(eps), "activation": activation}
    saved = group_norm_saved(activation, x, row, row, weight, bias, residual) if needs else {}
    return Rule({"y": y}, saved, options, {"x": y, "residual": y})


def _grouped(x: Any, groups: int) -> Any:
    """x as (N, G, C / G, pixels)."""
    n, channels = x.shape[:2]
    return x.reshape(n, groups, channels // max(groups, 1), math.prod(x.shape[2:]))


def _of_channels(p: Any, groups: int) -> Any:
    """A channel vector against what ``_grouped`` gives."""
    return up(p).reshape(1, groups, p.size // max(groups, 1), 1)


def _normalised(
    x: Any, weight: Any, bias: Any, residual: Any, groups: int, eps: float, activation: str | None
) -> tuple[Any, Any, Any, Any]:
    """(y, and mean, variance and rstd of each group: (N, G))"""
    xp, v = namespace(x), _grouped(up(x), groups)
    n = max(v.shape[2] * v.shape[3], 1)  # a group of nothing has mean 0
    mean = v.sum((2, 3), keepdims=True) / n
    d = v - mean
    var = (d * d).sum((2, 3), keepdims=True) / n
    rstd = 1 / xp.sqrt(var + eps)
    y = _combined(d * rstd, weight, bias, residual, groups)
    if activation is not None:
        f = ACTIVATIONS[activation]
        y = f.value(y, *f.numbers)
    y = arranged(y.astype(x.dtype, copy=False).reshape(x.shape), output_order(spec(x)))
    mean, var, rstd = (arranged(a.reshape(x.shape[0], groups), None) for a in (mean, var, rstd))
    return y, mean, var, rstd


def _combined(xhat: Any, weight: Any, bias: Any, residual: Any, groups: int) -> Any:
    """z = x̂ · weight + bias + residual, of those that there are."""
    if weight is not None:
        xhat = xhat * _of_channels(weight, groups)
    if bias is not None:
        xhat = xhat + _of_channels(bias, groups)
    return xhat if residual is None else xhat + _grouped(up(residual), groups)


def group_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    """y = f((x − mean) rstd · weight + bias + residual), with rstd = 1 / √(var + eps), over each group of channels of each sample.

    x: (N, C, *), float, of any rank; its channels make num_groups groups of C / num_groups neighbours. weight, bias:
    (C,), of x's dtype, or float32 for 16-bit x. residual: of x's shape and dtype. mean and var (the biased one) are taken
    over a group's channels and all that * stands for. f: the activation, a name in ``ACTIVATIONS`` with torch's default
    numbers, or none. Returns y with x's shape, dtype and memory order (channels-last or row-major). Wu, He: Group
    Normalization (2018). Raises ShapeError; ArgumentError for one value in all, as torch.
    """
    y, mean, _, rstd = _normalised(x, weight, bias, residual, num_groups, eps, activation)
    return (y,), group_norm_saved(activation, x, mean, rstd, weight, bias, residual) if needs else {}


def group_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple:
    """With x̂ = (x − mean) rstd, z = x̂ · weight + bias + residual, dz = dy f'(z) and g = dz · weight, averaged over a group
    where a bar is:

    dx = rstd (g − ḡ − x̂ · mean(g x̂)),  dweight = Σ dz x̂,  dbias = Σ dz over samples and *,  dresidual = dz.
    """
    (dy,), x, weight = dys, saved["x"], saved.get("weight")
    v, dz = _grouped(up(x), num_groups), _grouped(up(dy), num_groups)
    mean, rstd = (saved[k].reshape(*v.shape[:2], 1, 1) for k in ("mean", "rstd"))
    xhat = (v - mean) * rstd
    if activation is not None:
        f = ACTIVATIONS[activation]
        kept = _combined(xhat, weight, saved.get("bias"), saved.get("residual"), num_groups)
        dz = f.gradient(dz, f.value(kept, *f.numbers) if f.keeps == "y" else kept, *f.numbers)
    dx = dweight = dbias = dresidual = None
    if "residual" in needs:
        dresidual = arranged(namespace(x).array(dz, x.dtype).reshape(x.shape), output_order(spec(x)))
    if "x" in needs:
        n = max(v.shape[2] * v.shape[3], 1)
        g = dz if weight is None else dz * _of_channels(weight, num_groups)
        means, slopes = (a.sum((2, 3), keepdims=True) / n for a in (g, g * xhat))
        dx = (rstd * (g - means - xhat * slopes)).astype(x.dtype, copy=False).reshape(x.shape)
        dx = arranged(dx, output_order(spec(x)))
    if "weight" in needs:
        dweight = (dz * xhat).sum((0, 3)).reshape(-1).astype(inputs[1].dtype, copy=False)
    if "bias" in needs:
        dbias = dz.sum((0, 3)).reshape(-1).astype(inputs[2].dtype, copy=False)
    return dx, dweight, dbias, dresidual


group_norm = Op(group_norm_rule, group_norm_forward, group_norm_backward, family="norm")


# --- instance norm ---------------------------------------------------------------------------------------------------


def instance_norm_rule(
    x: Spec,
    weight: Spec | None = None,
    bias: Spec | None = None,
    running_mean: Spec | None = None,
    running_var: Spec | None = None,
    residual: Spec | None = None,
    *,
    needs: tuple = (),
    use_input_stats: bool = True,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Rule:
    require_float("x", x)
    require_activation(activation)
    channels = require_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    require_running(running_mean, running_var)
    require_residual(x, residual)
    if running_mean is None and not use_input_stats:
        raise ShapeError("running_mean, running_var", "given where use_input_stats = False", None)
    if use_input_stats and all(v is not None and v == 1 for v in x.shape[2:]):
        raise ArgumentError("x", "more than one value per channel of a sample, ∏ spatial > 1", list(x.shape))
    y = Spec(x.shape, x.dtype, output_order(x))
    row = Spec((x.shape[0], channels) if use_input_stats else (channels,), compute_dtype(x.dtype))
    options = {"use_input_stats": bool(use_input_stats), "eps": float(eps), "activation": activation}
    if not needs:
        return Rule({"y": y}, {}, options)
    by = x, weight, bias, residual
    saved = group_norm_saved(activation, x, row, row, weight, bias, residual)
    saved = saved if use_input_stats else batch_norm_saved(activation, y, row, row, *by)
    return Rule({"y": y}, saved, options, {"x": y, "residual": y})


def instance_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    """y = f((x − mean) rstd · weight + bias + residual), with rstd = 1 / √(var + eps), for each channel of each sample.

    x: (N, C, *spatial), float. weight, bias, running_mean, running_var: (C,), of x's dtype, or float32 for 16-bit x.
    use_input_stats: mean and var (the biased one) are taken over spatial, and running statistics r, where there are such,
    become (1 − momentum) r + momentum · (the mean over samples of these, var unbiased), in place. Otherwise mean and var
    are the running ones, and this is batch norm in evaluation. residual, f: as group norm's. Returns y with x's shape, dtype and
    memory order (channels-last or row-major). Ulyanov, Vedaldi, Lempitsky: Instance Normalization (2016). Raises
    ShapeError, and ArgumentError for one value per channel.
    """
    if not use_input_stats:
        options: dict[str, Any] = dict(needs=needs, eps=eps, activation=activation)
        return batch_norm_forward(x, weight, bias, running_mean, running_var, residual, **options)
    samples, channels = x.shape[:2]
    y, mean, var, rstd = _normalised(x, weight, bias, residual, channels, eps, activation)
    if running_mean is not None and samples:
        count = math.prod(x.shape[2:])
        for running, found in ((running_mean, mean), (running_var, var * (count / max(count - 1, 1)))):
            running[...] = ((1 - momentum) * up(running) + momentum * (found.sum(0) / samples)).astype(running.dtype)
    return (y,), group_norm_saved(activation, x, mean, rstd, weight, bias, residual) if needs else {}


def instance_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple:
    """As group norm's with a group for each channel; by the running statistics, as batch norm's."""
    options: dict[str, Any] = dict(inputs=inputs, needs=needs, eps=eps, activation=activation)
    if not use_input_stats:
        return batch_norm_backward(dys, saved, **options)
    *grads, dresidual = group_norm_backward(dys, saved, num_groups=saved["x"].shape[1], **options)
    return *grads, None, None, dresidual


instance_norm = Op(
    instance_norm_rule,
    instance_norm_forward,
    instance_norm_backward,
    differentiable=("x", "weight", "bias", "residual"),
    updates=("running_mean", "running_var"),
    dynamic=("momentum",),
    family="norm",
)
