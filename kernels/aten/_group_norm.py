"""Group norm of row-major tensors, and instance norm as group norm with a group for each channel, in torch's operations:
torch's own kernel folds the mean into a shift, which costs the digits of a large one."""

from __future__ import annotations

from typing import Any

import torch

from .._norm import group_norm_saved
from ._tensors import plainly


def normalise(x: torch.Tensor, weight: Any, bias: Any, groups: int, eps: float) -> tuple:
    """(y, mean, the biased variance and rstd of each group: (N, G))"""
    n, channels = x.shape[:2]
    v = x.reshape(n, groups, -1)
    first = v[..., :1].nan_to_num(0, 0, 0)
    d = v - first  # so that a large mean takes no digits from the sum
    mean = d.mean(2, keepdim=True)
    d -= mean
    mean += first
    var = d.square().mean(2, keepdim=True)
    rstd = (var + eps).sqrt_().reciprocal_()
    y = d.mul_(rstd).view(n, channels, -1)
    if weight is not None:
        y.mul_(weight[:, None])
    if bias is not None:
        y.add_(bias[:, None])
    return y.view(x.shape), *(a.view(n, groups) for a in (mean, var, rstd))


def gradients(dy: torch.Tensor, saved: dict, needs: tuple, groups: int) -> tuple:
    """(dx, dweight, dbias)"""
    x, weight = saved["x"], saved.get("weight")
    n, channels = x.shape[:2]
    rstd = saved["rstd"].unsqueeze(2)
    xhat = (x.reshape(n, groups, -1) - saved["mean"].unsqueeze(2)).mul_(rstd)
    dy = dy.reshape(n, channels, -1).contiguous()
    dx = dweight = dbias = None
    if "weight" in needs:
        dweight = (dy * xhat.view(dy.shape)).sum((0, 2))
    if "bias" in needs:
        dbias = dy.sum((0, 2))
    if "x" in needs:
        g = (dy if weight is None else dy * weight[:, None]).reshape(xhat.shape)
        dot = (g * xhat).mean(2, keepdim=True)
        dx = (g - g.mean(2, keepdim=True)).sub_(xhat.mul_(dot)).mul_(rstd).view(x.shape)
    return dx, dweight, dbias


def group_norm_forward(
    x: torch.Tensor,
    weight: Any = None,
    bias: Any = None,
    residual: None = None,
    *,
    needs: tuple = (),
    num_groups: int,
    eps: float = 1e-5,
    activation: None = None,
) -> tuple[tuple, dict]:
    y, mean, _, rstd = plainly(normalise, x, weight, bias, num_groups, eps)
    return (y,), group_norm_saved(activation, x, mean, rstd, weight, bias, residual) if needs else {}


def group_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    num_groups: int,
    eps: float = 1e-5,
    activation: None = None,
) -> tuple:
    return *plainly(gradients, dys[0], saved, needs, num_groups), None
