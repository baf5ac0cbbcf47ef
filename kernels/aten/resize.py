"""Resizing by torch."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec

from .._window import output_order
from ._tensors import FLOAT32, arranged, plainly, refusal

REFUSALS = {"dtype": FLOAT32, "empty": "an empty array is left to the NumPy kernel"}
_MODES = ("bilinear", "nearest", "bicubic")
_PADDING = ("zeros", "border", "reflection")
"""As torch's operators number them."""


def grid_sample_refuses(x: Spec, grid: Spec, *, needs: tuple, **options: Any) -> str | None:
    return refusal(x) or (REFUSALS["empty"] if 0 in (x.size, grid.size) else None)


def _finite(grid: torch.Tensor, mode: str, padding_mode: str) -> torch.Tensor:
    """What is no number far outside, or at 0: torch's gradient would write anywhere for it."""
    if padding_mode == "zeros":
        return torch.nan_to_num(grid, 1e4, 1e4, 1e4)
    return torch.nan_to_num(grid, -1.0, 2.0 if padding_mode == "border" and mode != "bicubic" else -1.0, -1.0)


def _known(grid: torch.Tensor) -> torch.Tensor:
    """Which places are numbers."""
    return plainly(lambda grid: grid.isfinite().all(-1), grid)


def grid_sample_forward(
    x: torch.Tensor, grid: torch.Tensor, *, needs: tuple = (), mode: str, padding_mode: str, align_corners: bool
) -> tuple[tuple, dict]:
    sampler = torch.ops.aten.grid_sampler_2d if x.ndim == 4 else torch.ops.aten.grid_sampler_3d
    looked = plainly(_finite, grid, mode, padding_mode)
    y = plainly(sampler, x, looked, _MODES.index(mode), _PADDING.index(padding_mode), align_corners)
    if mode == "bicubic":
        y = plainly(torch.where, _known(grid)[:, None], y, torch.nan)
    return (arranged(y, output_order(x)),), {"x": x, "grid": grid} if needs else {}


def grid_sample_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, mode: str, padding_mode: str, align_corners: bool
) -> tuple:
    x, grid = saved["x"], saved["grid"]
    gradient = torch.ops.aten.grid_sampler_2d_backward if x.ndim == 4 else torch.ops.aten.grid_sampler_3d_backward
    how = _MODES.index(mode), _PADDING.index(padding_mode), align_corners, ["x" in needs, "grid" in needs]
    known = _known(grid) if mode == "bicubic" else None
    dy = dys[0] if known is None else plainly(torch.where, known[:, None], dys[0], 0.0)
    found = plainly(gradient, dy, x, plainly(_finite, grid, mode, padding_mode), *how)
    if known is not None and "grid" in needs:
        found = found[0], plainly(torch.where, known[..., None], found[1], torch.nan)
    names = zip(("x", "grid"), found, inputs)
    return tuple(arranged(each, of.like().order) if name in needs else None for name, each, of in names)
