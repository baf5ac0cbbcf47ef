"""Local response norm in torch's operations."""

from __future__ import annotations

import torch

from ._tensors import plainly


def _summed(v: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Σ v over the channels c − before … c + after, of those that there are."""
    channels, total = v.shape[1], v.clone()
    for d in range(-before, after + 1):
        if d and abs(d) < channels:
            n = channels - abs(d)
            total.narrow(1, max(0, -d), n).add_(v.narrow(1, max(0, d), n))
    return total


def _forward(x: torch.Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _summed(x.square(), size // 2, (size - 1) // 2).mul_(alpha / size).add_(k)
    return scale.pow(-beta).mul_(x), scale


def _backward(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, size: int, slope: float, beta: float
) -> torch.Tensor:
    power = scale.pow(-beta)
    near = _summed((power / scale).mul_(dy).mul_(x), (size - 1) // 2, size // 2)
    return power.mul_(dy).sub_(near.mul_(x).mul_(slope))


def local_response_norm_forward(
    x: torch.Tensor, *, needs: tuple = (), size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> tuple[tuple, dict]:
    y, scale = plainly(_forward, x, size, alpha, beta, k)
    return (y,), {"x": x, "scale": scale} if needs else {}


def local_response_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> tuple:
    return (plainly(_backward, dys[0], saved["x"], saved["scale"], size, 2 * alpha * beta / size, beta),)
