"""Convolution and batch norm, one after the other: of 16-bit arrays, too, whose norm is computed in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec

from .._conv_norm import backward, norms, saved_by_both
from ._batch_norm import batch_norm_backward, batch_norm_forward
from .conv import conv_backward, conv_forward


def _wide(x: Any) -> Any:
    return None if x is None else x.astype(np.float32, copy=False)


def _as(spec: Spec, x: Any) -> Any:
    """``x`` in a spec's dtype."""
    return None if x is None else x.astype(spec.dtype, copy=False)


def _scale(bias: Any, gamma: Any, beta: Any, mean: np.ndarray, var: np.ndarray, eps: float) -> tuple[Any, Any]:
    """(scale, shift) of (c + bias − mean) / √(var + eps) · gamma + beta = scale · c + shift."""
    scale = (1 / np.sqrt(var + eps)).astype(np.float32)
    scale = scale if gamma is None else scale * gamma
    shift = scale * (-mean if bias is None else bias - mean)
    return scale, shift if beta is None else shift + beta


def conv_batch_norm_forward(
    x: np.ndarray,
    weight: np.ndarray,
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
    how = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    if running_mean is not None and not (training or needs):
        scale, shift = _scale(*map(_wide, (bias, gamma, beta, running_mean, running_var)), eps)
        return conv_forward(x, weight, shift, scale, residual, activation=activation, **how)[0], {}
    (c,), _ = conv_forward(x, weight, bias, **how)
    running = [_wide(a) for a in (running_mean, running_var)]
    (y,), saved = batch_norm_forward(
        *map(_wide, (c, gamma, beta)),
        *running,
        _wide(residual),
        needs=norms(needs),
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
    )
    for target, wide in zip((running_mean, running_var), running):
        if wide is not target:
            target[...] = wide.astype(target.dtype)
    y = y.astype(x.dtype, copy=False)
    as_given = {"x": c, "y": y, "weight": gamma, "bias": beta, "residual": residual}
    saved = {k: as_given.get(k, a) for k, a in saved.items()}
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
    how = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    x, _, _, gamma, *_ = inputs

    def norm(kept: dict, specs: tuple, wanted: tuple) -> tuple:
        kept = {k: _wide(a) for k, a in kept.items()}
        then: dict[str, Any] = dict(training=training, eps=eps, activation=activation)
        dc, dgamma, total, *_, dresidual = batch_norm_backward(
            (_wide(dys[0]),), kept, inputs=specs, needs=wanted, **then
        )
        return _as(x, dc), _as(gamma, dgamma), total, None, None, _as(x, dresidual)

    def conv(dc: np.ndarray, specs: tuple, wanted: tuple) -> tuple:
        return conv_backward((dc, *map(_wide, dys[1:])), saved, inputs=specs, needs=wanted, **how)

    def of_bias(total: np.ndarray, name: str, spec: Spec) -> np.ndarray:
        if name == "bias":
            scale = 0 if training or inputs[5] is None else saved["rstd"]
            total = total * (scale if gamma is None else scale * _wide(saved["gamma"]))
        return _as(spec, total)

    return backward(norm, conv, of_bias, saved, inputs, needs)
