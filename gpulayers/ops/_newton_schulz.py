"""Matrices made nearly orthogonal by Newton and Schulz's iteration, many of one shape at once."""

from __future__ import annotations

from typing import Any

from gpulayers import arrays
from gpulayers.arrays import NUMPY, TORCH, bfloat16, float32, library, namespace
from gpulayers.ops.linear import linear

COEFFICIENTS = 3.4445, -4.7750, 2.0315


def newton_schulz(x: Any, coefficients: tuple[float, ...], steps: int, eps: float) -> Any:
    """Each matrix of x (count, rows, columns) with singular values near 1 (Jordan et al., 2024): of x's shape, float32, or
    bfloat16 of torch.

    x ← x / max(‖x‖, eps), then ``steps`` times x ← a x + (b xxᵀ + c (xxᵀ)²) x. In float32 on NumPy; elsewhere products are
    in bfloat16: batched ones of torch's tensors, the linear kernels' of CuPy's arrays.
    """
    turned = x.shape[1] > x.shape[2]
    x = x.swapaxes(1, 2) if turned else x
    x = _of_tensors(x, coefficients, steps, eps) if library(x) is TORCH else _of_arrays(x, coefficients, steps, eps)
    return x.swapaxes(1, 2) if turned else x


def _of_tensors(x: Any, coefficients: tuple[float, ...], steps: int, eps: float) -> Any:
    import torch

    a, b, c = coefficients
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _of_arrays(x: Any, coefficients: tuple[float, ...], steps: int, eps: float) -> Any:
    (a, b, c), xp = coefficients, namespace(x)
    x = x.astype(float32)
    x = x / xp.maximum(xp.sqrt((x * x).sum((1, 2), keepdims=True)), eps)
    product = _plain if library(x) is NUMPY else products
    for _ in range(steps):
        gram = product(x, x)
        x = a * x + product(b * gram + c * product(gram, gram), x.swapaxes(1, 2))  # gram is symmetric
    return x


def _plain(x: Any, y: Any) -> Any:
    return x @ y.swapaxes(1, 2)


def products(x: Any, y: Any) -> Any:
    """x yᵀ of each pair of matrices by the linear kernels in bfloat16, as float32."""
    pairs = zip(arrays.cast(x, bfloat16), arrays.cast(y, bfloat16))
    return namespace(x).stack([arrays.cast(linear(a, b), float32) for a, b in pairs])
