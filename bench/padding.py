"""Padding in style transfer, image translation, and networks over panoramas."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpulayers.ops.padding import pad

from .cases.case import CHANNELS_LAST, ONE_ARCH, Case


def _case(name: str, n: int, c: int, size: int, by: int, mode: str, cpu: bool, axes: int = 2) -> Case:
    def theirs(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (by,) * (2 * axes), mode)

    options = {"padding": by, "mode": mode}
    headline = mode == "reflect" and by == 1 and not cpu
    title = f"{name}, {n}×{c}×{size}{('', '²', '³')[axes - 1]}"
    return Case(pad, title, ((n, c, *(size,) * axes),), options, theirs, cpu=cpu, headline=headline)


def cases() -> list[Case]:
    return [
        case
        for n, cpu in ((2, True), (64, False))
        for case in (
            _case("CycleGAN's first, reflected by 3", n, 3, 256, 3, "reflect", cpu),
            _case("CycleGAN's blocks, reflected by 1", n, 256, 64, 1, "reflect", cpu),
            _case("edges repeated", n, 64, 128, 1, "replicate", cpu),
            _case("around a panorama", n, 64, 128, 1, "circular", cpu),
            _case("zeros", n, 64, 128, 1, "constant", cpu),
            _case("EnCodec's, reflected by 3", n, 32, 24000, 3, "reflect", cpu, axes=1),
            _case("edges of volumes", n, 16, 32, 1, "replicate", cpu, axes=3),
        )
    ]


def audits() -> list[Case]:
    found = [
        _case("channels last", 32, 64, 112, 1, mode, False)._replace(order=CHANNELS_LAST, archs=ONE_ARCH)
        for mode in ("constant", "replicate", "circular")
    ]
    last = _case("channels last", 32, 64, 112, 1, "reflect", False)._replace(order=CHANNELS_LAST)
    deep = _case("volumes", 8, 64, 32, 1, "replicate", False, axes=3)
    return [
        *found,
        deep._replace(order=(0, 2, 3, 4, 1), archs=ONE_ARCH),
        last,
        _case("channels first", 32, 64, 112, 3, "reflect", False),
        _case("channels first", 32, 64, 110, 1, "replicate", False),
        _case("channels first", 32, 64, 112, 1, "constant", False)._replace(archs=ONE_ARCH),
    ]
