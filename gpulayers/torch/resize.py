"""Resizing: ``torch.nn.functional.interpolate``, ``upsample``, ``grid_sample`` and ``affine_grid``, and torch.nn's classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import resize as ops
from gpulayers.torch import _autocast
from gpulayers.torch._op import TorchOp

_NAMES: dict[tuple[str, int], str] = {
    **{(mode, axes): mode for mode in ("nearest", "nearest-exact", "area") for axes in (1, 2, 3)},
    ("linear", 1): "linear",
    ("bilinear", 2): "linear",
    ("trilinear", 3): "linear",
    ("bicubic", 2): "cubic",
    ("lanczos", 2): "lanczos",
}
"""The op's modes, by torch's and the number of axes."""
_ANTIALIASED = ("bilinear", "bicubic", "lanczos")
_aten = torch.ops.aten


def _interpolate_twin(
    x: Tensor, size: Any, mode: str, align_corners: bool, antialias: bool, scales: Sequence[float]
) -> Tensor:
    axes = x.dim() - 2
    steps = [s if s > 0 else None for s in scales]
    if mode == "area":
        return [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d][axes - 1](x, size)
    if mode in ("nearest", "nearest-exact"):
        name = "upsample_nearest" if mode == "nearest" else "_upsample_nearest_exact"
        return getattr(_aten, f"{name}{axes}d")(x, size, *steps)
    name = {"cubic": "bicubic", "lanczos": "lanczos"}.get(mode) or ("linear", "bilinear", "trilinear")[axes - 1]
    function = f"_upsample_{name}2d_aa" if antialias else f"upsample_{name}{axes}d"
    return getattr(_aten, function)(x, size, align_corners, *steps)


_interpolate = TorchOp(
    ops.interpolate,
    _interpolate_twin,
    "SymInt[] size, str mode, bool align_corners, bool antialias, float[] scales",
)


def _sizes(input: Tensor, size: Any, scale_factor: Any, recompute: bool) -> tuple[tuple, tuple] | None:
    """(size, scales) as torch reads them; None for what it refuses."""
    sizes = input.shape[2:]
    count = len(sizes)
    if (size is None) == (scale_factor is None) or (recompute and size is not None):
        return None
    given = scale_factor if size is None else size
    each = tuple(given) if isinstance(given, (list, tuple)) else (given,) * count
    kind = (int, torch.SymInt) if size is not None else (int, float)
    if len(each) != count or not all(isinstance(v, kind) and not isinstance(v, bool) for v in each):
        return None
    if size is not None:
        return each, (0.0,) * count
    out = tuple([int(n * s) for n, s in zip(sizes, each)])
    return out, (0.0,) * count if recompute else tuple(map(float, each))


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.interpolate``: input (N, C, L), (N, C, H, W) or (N, C, D, H, W)."""
    found, name = None, None
    if isinstance(input, Tensor) and input.is_floating_point():
        name = _NAMES.get((mode, input.dim() - 2))
    fits = align_corners is None or (mode not in ("nearest", "nearest-exact", "area"))
    if name is not None and fits and antialias in (False, True) and (not antialias or mode in _ANTIALIASED):
        found = _sizes(input, size, scale_factor, bool(recompute_scale_factor) or (mode == "area" and size is None))
    if found is None or (mode == "lanczos" and (align_corners or not antialias)):
        return F.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if mode != "area":
        (input,) = _autocast.cast(_autocast.ON_CUDA, (input,), 1)
    return _interpolate(input, found[0], name, bool(align_corners), bool(antialias), found[1])


def upsample(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None
) -> Tensor:
    """As ``torch.nn.functional.upsample``, ``interpolate`` under its old name."""
    return interpolate(input, size, scale_factor, mode, align_corners)


_grid_sample = TorchOp(ops.grid_sample, F.grid_sample, "str mode, str padding_mode, bool align_corners")


def grid_sample(
    input: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Tensor:
    """As ``torch.nn.functional.grid_sample``: input (N, C, H, W) or (N, C, D, H, W), grid (N, *sizes, 2 or 3)."""
    if align_corners is None:
        return F.grid_sample(input, grid, mode, padding_mode, align_corners)  # it warns
    input, grid = _autocast.cast(_autocast.ON_CPU, (input, grid), 2)
    return _grid_sample(input, grid, mode, padding_mode, align_corners)


def _affine_twin(theta: Tensor, size: Any, align_corners: bool) -> Tensor:
    return torch.affine_grid_generator(theta, [theta.shape[0], 1, *size], align_corners)


_affine_grid = TorchOp(ops.affine_grid, _affine_twin, "SymInt[] size, bool align_corners", outputs=("grid",))


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """As ``torch.nn.functional.affine_grid``: theta (N, 2, 3) or (N, 3, 4), size (N, C, H, W) or (N, C, D, H, W)."""
    known = isinstance(theta, Tensor) and theta.dim() == 3 and isinstance(align_corners, bool)
    if not known or not isinstance(size, tuple | list) or len(size) != theta.shape[1] + 2 or size[0] != theta.shape[0]:
        return F.affine_grid(theta, size, align_corners)  # type: ignore[arg-type]  # it warns, raises, or records itself
    if not theta.is_floating_point() or min(size) <= 0:
        return F.affine_grid(theta, size, align_corners)  # type: ignore[arg-type]
    return _affine_grid(theta, tuple(size[2:]), align_corners)


class Upsample(nn.Upsample):
    """``torch.nn.Upsample`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return interpolate(
            input, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor
        )


class UpsamplingNearest2d(nn.UpsamplingNearest2d, Upsample):
    """``torch.nn.UpsamplingNearest2d`` over gpulayers' kernels."""

    forward = Upsample.forward


class UpsamplingBilinear2d(nn.UpsamplingBilinear2d, Upsample):
    """``torch.nn.UpsamplingBilinear2d`` over gpulayers' kernels."""

    forward = Upsample.forward
