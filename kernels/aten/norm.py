"""Norms by torch: batch norm of row-major images, which it sums in float64. Its batch norm of channels-last ones is less exact
than our bounds; so is its layer norm, which is therefore written in its operations."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpulayers.arrays import Spec

from .._norm import for_both, group_norm_saved, norms_own
from ._conv_norm import conv_batch_norm_backward as conv_batch_norm_backward
from ._conv_norm import conv_batch_norm_forward as conv_batch_norm_forward
from ._conv_norm import conv_batch_norm_refuses as conv_batch_norm_refuses
from ._group_norm import gradients, normalise
from ._group_norm import group_norm_backward as group_norm_backward
from ._group_norm import group_norm_forward as group_norm_forward
from ._local_response_norm import local_response_norm_backward as local_response_norm_backward
from ._local_response_norm import local_response_norm_forward as local_response_norm_forward
from ._tensors import FLOAT32, plainly, refusal

REFUSALS = {
    "dtype": FLOAT32,
    "empty": "an empty array is left to the NumPy kernel",
    "evaluation": "gradients by running statistics are left to the NumPy kernel",
    "row": "a residual and an activation in the same pass are left to the NumPy kernel",
    "order": "its kernel is for row-major images",
}
LOOKS = ("conv_batch_norm",)
"""Ops that look at values, so that compilers cannot trace them: NumPy's kernel computes the norm."""
_aten = torch.ops.aten


def batch_norm_refuses(
    x: Spec,
    weight: Spec | None = None,
    bias: Spec | None = None,
    running_mean: Spec | None = None,
    running_var: Spec | None = None,
    residual: Spec | None = None,
    *,
    needs: tuple = (),
    training: bool = False,
    activation: str | None = None,
    **options: Any,
) -> str | None:
    if (reason := refusal(x)) is not None or 0 in x.shape:
        return reason or REFUSALS["empty"]
    if residual is not None or activation is not None:
        return REFUSALS["row"]
    last = x.shape[1] == 1 or math.prod(x.shape[2:]) == 1  # or torch takes them for channels-last ones
    if last or not x.contiguous or x.order is not None:
        return REFUSALS["order"]
    by_running = running_mean is not None and not training
    return REFUSALS["evaluation"] if by_running and needs else None


def batch_norm_forward(
    x: torch.Tensor,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: None = None,
    *,
    needs: tuple = (),
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: None = None,
) -> tuple[tuple, dict]:
    batch = training or running_mean is None
    running = () if running_mean is None else (running_mean, running_var)
    legit = _aten._native_batch_norm_legit  # the one that says that it writes to the statistics
    function = legit.default if running else legit.no_stats
    y, mean, rstd = plainly(function, x, weight, bias, *running, batch, momentum, eps)
    saved = {"x": x, "mean": mean, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y,), saved if needs else {}


def batch_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: None = None,
) -> tuple:
    x, wanted = saved["x"], [name in needs for name in ("x", "weight", "bias")]
    given = saved.get("weight"), None, None, saved["mean"], saved["rstd"], True, eps, wanted
    grads = plainly(_aten.native_batch_norm_backward, dys[0].contiguous(), x, *given)
    return *(g if w else None for g, w in zip(grads, wanted)), None, None, None


def layer_norm_refuses(
    x: Spec, weight: Spec | None = None, bias: Spec | None = None, *, needs: tuple = (), **options: Any
) -> str | None:
    return refusal(x) or (REFUSALS["empty"] if 0 in x.shape else None)


def layer_norm_forward(
    x: torch.Tensor,
    weight: Any = None,
    bias: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float = 1e-5,
) -> tuple[tuple, dict]:
    y, mean, rstd = plainly(_normalized, x, weight, bias, normalized_shape, eps)
    saved = {"x": x, "mean": mean, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y,), saved if needs else {}


def _rows(x: torch.Tensor, normalized_shape: tuple) -> torch.Tensor:
    return x.reshape(-1, math.prod(normalized_shape))  # (M, N)


def _normalized(x: torch.Tensor, weight: Any, bias: Any, normalized_shape: tuple, eps: float) -> tuple:
    v = _rows(x, normalized_shape).contiguous()
    mean = v.mean(1, keepdim=True)
    d = v - mean
    rstd = d.square().mean(1, keepdim=True).add_(eps).sqrt_().reciprocal_()
    y = d.mul_(rstd)
    if weight is not None:
        y.mul_(weight.reshape(-1))
    if bias is not None:
        y.add_(bias.reshape(-1))
    lead = x.shape[: x.ndim - len(normalized_shape)]
    return y.view(x.shape), mean.view(lead), rstd.view(lead)


def layer_norm_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, normalized_shape: tuple, eps: float = 1e-5
) -> tuple:
    return plainly(_gradients, dys[0], saved, needs, normalized_shape)


def _gradients(dy: torch.Tensor, saved: dict, needs: tuple, normalized_shape: tuple) -> tuple:
    x, weight = saved["x"], saved.get("weight")
    dy, rstd = _rows(dy, normalized_shape).contiguous(), saved["rstd"].reshape(-1, 1)
    xhat = (_rows(x, normalized_shape) - saved["mean"].reshape(-1, 1)).mul_(rstd)
    dx = dweight = dbias = None
    if "weight" in needs:
        dweight = (dy * xhat).sum(0).view(normalized_shape)
    if "bias" in needs:
        dbias = dy.sum(0).view(normalized_shape)
    if "x" in needs:
        g = dy if weight is None else dy * weight.reshape(-1)
        dot = (g * xhat).mean(1, keepdim=True)
        dx = (g - g.mean(1, keepdim=True)).sub_(xhat.mul_(dot)).mul_(rstd).view(x.shape)
    return dx, dweight, dbias


def instance_norm_refuses(
    x: Spec,
    weight: Spec | None = None,
    bias: Spec | None = None,
    running_mean: Spec | None = None,
    running_var: Spec | None = None,
    residual: Spec | None = None,
    *,
    needs: tuple = (),
    use_input_stats: bool = True,
    activation: str | None = None,
    **options: Any,
) -> str | None:
    if use_input_stats:
        return group_norm_refuses(x, weight, bias, residual, activation=activation)
    return batch_norm_refuses(x, weight, bias, running_mean, running_var, residual, needs=needs, activation=activation)


def instance_norm_forward(
    x: torch.Tensor,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: None = None,
    *,
    needs: tuple = (),
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: None = None,
) -> tuple[tuple, dict]:
    if not use_input_stats:
        return batch_norm_forward(x, weight, bias, running_mean, running_var, needs=needs, eps=eps)
    y, mean, var, rstd = plainly(normalise, x, weight, bias, x.shape[1], eps)
    if running_mean is not None:
        count = math.prod(x.shape[2:])
        plainly(_move, running_mean, mean, 1, momentum)
        plainly(_move, running_var, var, count / max(count - 1, 1), momentum)
    return (y,), group_norm_saved(activation, x, mean, rstd, weight, bias, residual) if needs else {}


def _move(running: torch.Tensor, found: torch.Tensor, unbiased: float, momentum: float) -> None:
    """Towards the mean over samples."""
    running.mul_(1 - momentum).add_(found.mean(0).mul_(unbiased), alpha=momentum)  # no difference: Inf − Inf is NaN


def instance_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: None = None,
) -> tuple:
    if not use_input_stats:
        return batch_norm_backward(dys, saved, inputs=inputs, needs=needs, eps=eps)
    return *plainly(gradients, dys[0], saved, needs, saved["x"].shape[1]), None, None, None


def local_response_norm_refuses(x: Spec, *, needs: tuple = (), **options: Any) -> str | None:
    return group_norm_refuses(x)


def group_norm_refuses(
    x: Spec,
    weight: Spec | None = None,
    bias: Spec | None = None,
    residual: Spec | None = None,
    *,
    needs: tuple = (),
    activation: str | None = None,
    **options: Any,
) -> str | None:
    if (reason := layer_norm_refuses(x)) is not None:
        return reason
    if residual is not None or activation is not None:
        return REFUSALS["row"]
    return None if x.contiguous and x.order is None else REFUSALS["order"]


# --- layer norm of a sum ---------------------------------------------------------------------------------------------


def add_layer_norm_refuses(
    x: Spec, residual: Spec, *weights: Spec | None, needs: tuple = (), dtype: str | None = None, **options: Any
) -> str | None:
    if residual.dtype != x.dtype or dtype not in (None, str(x.dtype)):
        return REFUSALS["dtype"]
    return layer_norm_refuses(x)


def add_layer_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: Any = None,
    bias: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float = 1e-5,
    dtype: None = None,
) -> tuple[tuple, dict]:
    total = plainly(torch.add, x, residual).contiguous()
    y, mean, rstd = plainly(_normalized, total, weight, bias, normalized_shape, eps)
    saved = {"sum": total, "mean": mean, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y, total), saved if needs else {}


def add_layer_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: tuple,
    eps: float = 1e-5,
    dtype: None = None,
) -> tuple:
    dy, dsum = dys
    if dy is None:
        weights = (dsum.new_zeros(normalized_shape) if name in needs else None for name in ("weight", "bias"))
        return for_both((dsum.clone(memory_format=torch.contiguous_format), *weights), needs)
    saved, _, wanted = norms_own(saved, inputs, needs)
    grads = plainly(_gradients, dy, saved, wanted, normalized_shape)
    if grads[0] is not None and dsum is not None:
        plainly(grads[0].add_, dsum)
    return for_both(grads, needs)
