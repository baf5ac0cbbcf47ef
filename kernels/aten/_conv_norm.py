"""Convolution by torch and batch norm by the NumPy kernel, on the same memory, as both are where they are apart."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec

from .._conv_norm import backward, norms, saved_by_both
from ..numpy._batch_norm import batch_norm_backward, batch_norm_forward
from ._tensors import lent, plainly
from .conv import conv_backward, conv_forward, conv_refuses


def conv_batch_norm_refuses(x: Spec, weight: Spec, *others: Any, needs: tuple, **options: Any) -> str | None:
    return conv_refuses(x, weight, needs=needs)


def _folded(x: Any, weight: Any, bias: Any, gamma: Any, beta: Any, mean: Any, var: Any, eps: float, how: dict) -> Any:
    """The norm by running statistics is the convolution's with another weight and another bias."""
    scale = (var + eps).rsqrt_()
    scale = scale if gamma is None else scale * gamma
    shift = scale * (-mean if bias is None else bias - mean)
    weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
    return conv_forward(x, weight, shift if beta is None else shift + beta, **how)[0][0]


def conv_batch_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any = None,
    gamma: Any = None,
    beta: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    how: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    running = running_mean, running_var
    if running_mean is not None and not (training or needs) and residual is None and activation in (None, "relu"):
        y = plainly(_folded, x, weight, bias, gamma, beta, *running, eps, how)
        return (y if activation is None else plainly(torch.relu_, y),), {}
    (c,), _ = conv_forward(x, weight, bias, **how)
    moved = [None if r is None else lent(r).copy() for r in running]
    then: dict[str, Any] = dict(training=training, momentum=momentum, eps=eps, activation=activation)
    given = *map(lent, (c, gamma, beta)), *moved, lent(residual)
    (y,), found = batch_norm_forward(*given, needs=norms(needs), **then)
    for target, now in zip(running, moved):
        if training and target is not None:
            plainly(target.copy_, torch.from_numpy(now))
    y = torch.from_numpy(y)
    as_given = {"x": c, "y": y, "weight": gamma, "bias": beta, "residual": residual}
    saved = {k: as_given[k] if k in as_given else torch.from_numpy(a) for k, a in found.items()}
    return (y,), saved_by_both(saved, needs, x, weight, bias) if needs else {}


def conv_batch_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple:
    how: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)

    def norm(kept: dict, specs: tuple, wanted: tuple) -> tuple:
        then: dict[str, Any] = dict(training=training, eps=eps, activation=activation)
        kept = {k: lent(a) for k, a in kept.items()}
        found = batch_norm_backward((lent(dys[0]),), kept, inputs=specs, needs=wanted, **then)
        return tuple(None if g is None else torch.from_numpy(g) for g in found)

    def conv(dc: torch.Tensor, specs: tuple, wanted: tuple) -> tuple:
        return conv_backward((dc, *dys[1:]), saved, inputs=specs, needs=wanted, **how)

    def of_bias(total: torch.Tensor, name: str, spec: Spec) -> torch.Tensor:
        if name == "beta":
            return total
        scale = 0 if training or inputs[5] is None else saved["rstd"]
        return plainly(torch.mul, total, scale if inputs[3] is None else scale * saved["gamma"])

    return backward(norm, conv, of_bias, saved, inputs, needs)
