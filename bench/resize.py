"""Resizing in U-Nets, feature pyramids, segmentation heads, super-resolution and data pipelines."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from gpulayers.arrays import Spec, float32
from gpulayers.ops.resize import affine_grid, grid_sample, interpolate

from .cases.case import CHANNELS_LAST, ONE_ARCH, Case

_THEIRS = {"linear": "bilinear", "cubic": "bicubic"}


def _case(name: str, n: int, c: int, size: int, out: int, cpu: bool, **options: Any) -> Case:
    mode = _THEIRS.get(options["mode"], options["mode"])
    how = {k: v for k, v in options.items() if k == "antialias" or (k == "align_corners" and mode in _THEIRS.values())}

    def theirs(x: Any) -> Any:
        return F.interpolate(x, (out, out), mode=mode, **how)

    title = f"{name}, {n}×{c}×{size}² to {out}²"
    headline = name.startswith("U-Net") and not cpu
    return Case(
        interpolate, title, ((n, c, size, size),), {"size": (out, out), **options}, theirs, cpu=cpu, headline=headline
    )


def _cases(n: int, cpu: bool) -> list[Case]:
    return [
        _case("a feature pyramid's, nearest", n, 256, 32, 64, cpu, mode="nearest"),
        _case("U-Net's, bilinear", n, 128, 56, 112, cpu, mode="linear", align_corners=True),
        _case("a segmentation head's, bilinear", n, 21, 64, 250, cpu, mode="linear"),
        _case("super-resolution, bicubic", n, 3, 128, 256, cpu, mode="cubic"),
        _case("photos made smaller, antialiased", n, 3, 500, 224, cpu, mode="linear", antialias=True),
        _case("by areas", n, 64, 64, 24, cpu, mode="area"),
    ]


def _sampled(n: int, c: int, size: int) -> Case:
    def theirs(x: Any, grid: Any) -> Any:
        return F.grid_sample(x, grid, align_corners=False)

    shapes = (n, c, size, size), (n, size, size, 2)
    return Case(grid_sample, f"looked up anywhere, {n}×{c}×{size}²", shapes, {}, theirs, cpu=False)


def _mapped(n: int, *size: int, cpu: bool) -> Case:
    def theirs(theta: Any) -> Any:
        return F.affine_grid(theta, [theta.shape[0], 1, *size], align_corners=False)

    shape = (n, len(size), len(size) + 1)
    title = f"places of an affine map, {n}×{'×'.join(map(str, size))}"
    return Case(affine_grid, title, (shape,), {"size": size}, theirs, cpu=cpu, headline=not cpu and len(size) == 2)


def cases() -> list[Case]:
    mapped = [_mapped(16, 64, 64, cpu=True), _mapped(256, 224, 224, cpu=False), _mapped(8, 64, 64, 64, cpu=False)]
    return [*_cases(2, cpu=True), *_cases(32, cpu=False), _sampled(16, 32, 64), *mapped]


def audits() -> list[Case]:
    linear, sampled = _cases(32, cpu=False)[1], _sampled(16, 32, 64)
    last: dict[str, Any] = {"order": CHANNELS_LAST, "archs": ONE_ARCH}
    deep = Spec((2, 32, 9, 10, 12), float32)
    volumes = Spec((4, 8, 9, 10, 11), float32, (0, 2, 3, 4, 1)), Spec((4, 9, 10, 11, 3), float32)
    reflected = Case(grid_sample, "volumes", volumes, {"padding_mode": "reflection"}, archs=(100,))
    mapped = [_mapped(8, 64, 64, 64, cpu=False), _mapped(256, 224, 224, cpu=False)._replace(archs=ONE_ARCH)]
    twice = _case("Stable Diffusion's, bilinear", 32, 320, 32, 64, False, mode="linear")
    return [
        *mapped,
        twice,
        reflected,
        linear,
        sampled._replace(archs=ONE_ARCH),
        linear._replace(**last),
        _case("segmentation, bilinear", 32, 64, 64, 250, False, mode="linear"),
        _case("segmentation, bilinear", 32, 64, 64, 144, False, mode="linear")._replace(order=CHANNELS_LAST),
        _case("areas", 8, 48, 64, 24, False, mode="area")._replace(**last),
        Case(interpolate, "volumes", (deep,), {"size": (9, 15, 18), "mode": "linear"}, archs=ONE_ARCH),
    ]
