"""Convolutions of ResNet-50, MobileNet, ConvNeXt and a small classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpulayers.ops.conv import conv2d

from ._case import CHANNELS_LAST, ONE_ARCH, Case


def _case(
    name: str,
    n: int,
    c: int,
    size: int,
    o: int,
    k: int,
    stride: int = 1,
    groups: int = 1,
    cpu: bool = False,
) -> Case:
    padding = k // 2
    options: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups}

    def theirs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)

    out = (size + 2 * padding - k) // stride + 1
    shapes = ((n, c, size, size), (o, c // groups, k, k), (o,))
    text = f"{name} {k}×{k}{f'/{stride}' if stride > 1 else ''} {c}→{o}, {n}×{size}²"
    flops = 2 * n * out * out * o * (c // groups) * k * k
    return Case(conv2d, text, shapes, options, theirs, flops, cpu, gemm=groups == 1 or groups < c)


def cases() -> list[Case]:
    found = [_case("small classifier", 64, 1, 28, 32, 3, cpu=True)]
    for n, cpu in ((8, True), (128, False)):
        found += [
            _case("ResNet-50 stem", n // 2, 3, 224, 64, 7, 2, cpu=cpu),
            _case("ResNet-50", n, 64, 56, 64, 3, cpu=cpu),
            _case("ResNet-50", n, 64, 56, 256, 1, cpu=cpu),
            _case("ResNet-50", n, 128, 56, 128, 3, 2, cpu=cpu),
            _case("ResNet-50", n, 256, 14, 256, 3, cpu=cpu),
            _case("ResNet-50", n, 1024, 14, 256, 1, cpu=cpu),
            _case("ResNet-50", n, 512, 7, 512, 3, cpu=cpu),
            _case("ResNeXt-50", n, 128, 56, 128, 3, 1, 32, cpu=cpu),
            _case("MobileNet", n, 128, 56, 128, 3, 1, 128, cpu=cpu),
            _case("MobileNet", n, 128, 56, 128, 3, 2, 128, cpu=cpu),
            _case("ConvNeXt", n, 96, 56, 96, 7, 1, 96, cpu=cpu),
        ]
    return found


def audits() -> list[Case]:
    """The largest configuration of each branch."""
    last, one = {"order": CHANNELS_LAST}, {"order": CHANNELS_LAST, "archs": ONE_ARCH}
    return [
        _case("deep", 32, 512, 28, 512, 3)._replace(**last),
        _case("in steps", 32, 256, 14, 512, 3, 2)._replace(**one),
        _case("flat", 32, 256, 56, 512, 1),
        _case("channels first", 32, 128, 56, 128, 3)._replace(archs=ONE_ARCH),
        _case("depthwise", 32, 128, 56, 128, 3, 1, 128)._replace(**last),
        _case("three channels", 32, 3, 224, 64, 7, 2)._replace(**one),
    ]
