"""Batch norm, and what may follow it in the same pass. Statistics are float32 (float64 for float64) for any dtype."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, arranged, compute_dtype, namespace, spec, up
from gpulayers.definition import ArgumentError, Rule
from gpulayers.ops._activation import require_activation
from gpulayers.ops._norm import across, require_channels, require_residual, require_running
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._window import output_order
from gpulayers.ops.activation import ACTIVATIONS


def batch_norm_rule(
    x: Spec,
    weight: Spec | None = None,
    bias: Spec | None = None,
    running_mean: Spec | None = None,
    running_var: Spec | None = None,
    residual: Spec | None = None,
    *,
    needs: tuple = (),
    training: bool = False,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Rule:
    require_float("x", x)
    require_activation(activation)
    channels = require_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    require_residual(x, residual)
    if eps < 0 or (eps == 0 and training):
        raise ArgumentError("eps", "eps > 0 in training, eps ≥ 0 otherwise", eps)
    require_running(running_mean, running_var)
    if running_mean is None or training:
        values = (x.shape[0], *x.shape[2:])
        if all(v is not None and v == 1 for v in values):
            raise ArgumentError("x", "more than one value per channel, N · ∏ spatial > 1, in training", list(x.shape))
    y = Spec(x.shape, x.dtype, output_order(x))
    row = Spec((channels,), compute_dtype(x.dtype))
    options = {"training": bool(training), "eps": float(eps), "activation": activation}
    saved = _saved(activation, y, row, row, x, weight, bias, residual) if needs else {}
    return Rule({"y": y}, saved, options, {"x": y, "residual": y})


def _saved(
    activation: str | None, y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, residual: Any
) -> dict[str, Any]:
    """What backward computes from: f'(z) from y where that does, else z again from all that made it."""
    saved = {"x": x, "mean": mean, "rstd": rstd, "weight": weight}
    if activation is not None:
        saved |= {"y": y} if ACTIVATIONS[activation].keeps == "y" else {"bias": bias, "residual": residual}
    return {name: a for name, a in saved.items() if a is not None}


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    """y = f((x − mean) rstd · weight + bias + residual) for each channel, with rstd = 1 / √(var + eps).

    x: (N, C, *spatial), float. weight, bias, running_mean, running_var: (C,), of x's dtype, or float32 for 16-bit x.
    residual: of x's shape and dtype. f: the activation, a name in ``ACTIVATIONS`` with torch's default numbers, or none.
    Training, or no running statistics: mean and var (the biased one) are the batch's, over N and spatial; in training
    the running statistics r become (1 − momentum) r + momentum · (the batch's, var unbiased), in place. Otherwise mean
    and var are the running ones. Returns y with x's shape, dtype and memory order (channels-last or row-major).
    Ioffe, Szegedy: Batch Normalization (2015). Raises ShapeError, and ArgumentError for one value per channel.
    """
    xp = namespace(x)
    axes, channels, count = across(x)
    v = up(x)
    if training or running_mean is None:
        n = max(count, 1)  # an empty batch has mean 0, and changes nothing that runs
        mean = v.sum(axes) / n
        d = v - mean.reshape(channels)
        var = (d * d).sum(axes) / n
        if running_mean is not None and count:
            for running, batch in ((running_mean, mean), (running_var, var * (count / max(count - 1, 1)))):
                running[...] = ((1 - momentum) * up(running) + momentum * batch).astype(running.dtype)
    else:
        mean, var = xp.array(running_mean, v.dtype), up(running_var)  # a copy: it is saved
        d = v - mean.reshape(channels)
    rstd = (1 / xp.sqrt(var + eps)).astype(v.dtype, copy=False)
    y = _combined(d * rstd.reshape(channels), weight, bias, residual)
    if activation is not None:
        f = ACTIVATIONS[activation]
        y = f.value(y, *f.numbers)
    y = arranged(y.astype(x.dtype, copy=False), output_order(spec(x)))
    return (y,), _saved(activation, y, mean, rstd, x, weight, bias, residual) if needs else {}


def _combined(xhat: Any, weight: Any, bias: Any, residual: Any) -> Any:
    """z = x̂ · weight + bias + residual, of those that there are."""
    _, channels, _ = across(xhat)
    if weight is not None:
        xhat = xhat * up(weight).reshape(channels)
    if bias is not None:
        xhat = xhat + up(bias).reshape(channels)
    return xhat if residual is None else xhat + up(residual)


def batch_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple:
    """With z = x̂ · weight + bias + residual, x̂ = (x − mean) rstd, dz = dy f'(z), and sums over N and spatial:

    dresidual = dz,  dweight = Σ dz x̂,  dbias = Σ dz,  dx = weight · rstd (dz − dbias / n − x̂ · dweight / n); by the
    running statistics dx = weight · rstd · dz.
    """
    (dy,), x, weight = dys, saved["x"], saved.get("weight")
    axes, channels, count = across(x)
    order = output_order(spec(x))
    rstd = saved["rstd"].reshape(channels)
    xhat = (up(x) - saved["mean"].reshape(channels)) * rstd
    dz = up(dy)
    if activation is not None:
        f = ACTIVATIONS[activation]
        by_y = f.keeps == "y"
        kept = up(saved["y"]) if by_y else _combined(xhat, weight, saved.get("bias"), saved.get("residual"))
        dz = f.gradient(dz, kept, *f.numbers)
    dweight, dbias, dx, dresidual = (dz * xhat).sum(axes), dz.sum(axes), None, None
    if "residual" in needs:
        dresidual = arranged(namespace(x).array(dz, x.dtype), order)
    if "x" in needs:
        dx = dz
        if training or inputs[3] is None:
            n = max(count, 1)
            dx = dz - (dbias / n).reshape(channels) - xhat * (dweight / n).reshape(channels)
        scale = rstd if weight is None else rstd * up(weight).reshape(channels)
        dx = arranged((dx * scale).astype(x.dtype, copy=False), order)
    return (
        dx,
        dweight.astype(inputs[1].dtype, copy=False) if "weight" in needs else None,
        dbias.astype(inputs[2].dtype, copy=False) if "bias" in needs else None,
        None,
        None,
        dresidual,
    )


batch_norm = Op(
    batch_norm_rule,
    batch_norm_forward,
    batch_norm_backward,
    differentiable=("x", "weight", "bias", "residual"),
    updates=("running_mean", "running_var"),
    dynamic=("momentum",),
    family="norm",
)
