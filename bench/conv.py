"""Convolutions of ResNet-50, ResNeXt, MobileNet, ConvNeXt and a small classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpulayers.ops.conv import conv, conv_transpose

from .cases.case import CHANNELS_LAST, ONE_ARCH, Case, Other

_RESNET50 = [  # channels in, size, channels out, kernel, stride: every distinct one
    (3, 224, 64, 7, 2),
    (64, 56, 64, 1, 1), (64, 56, 64, 3, 1), (64, 56, 256, 1, 1), (256, 56, 64, 1, 1),
    (256, 56, 128, 1, 1), (128, 56, 128, 3, 2), (128, 28, 512, 1, 1), (256, 56, 512, 1, 2), (512, 28, 128, 1, 1), (128, 28, 128, 3, 1),
    (512, 28, 256, 1, 1), (256, 28, 256, 3, 2), (256, 14, 1024, 1, 1), (512, 28, 1024, 1, 2), (1024, 14, 256, 1, 1), (256, 14, 256, 3, 1),
    (1024, 14, 512, 1, 1), (512, 14, 512, 3, 2), (512, 7, 2048, 1, 1), (1024, 14, 2048, 1, 2), (2048, 7, 512, 1, 1), (512, 7, 512, 3, 1),
]  # fmt: skip
_HEADLINES = [(64, 56, 64, 3, 1), (1024, 14, 256, 1, 1)]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Images and filters with their channels last in memory; other tensors as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@contextlib.contextmanager
def _tried_out() -> Iterator[None]:
    """cuDNN tries its algorithms on each shape and keeps the fastest."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


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
    return Case(
        conv, text, shapes, options, theirs, flops, cpu, gemm=groups == 1 or groups < c, tf32="cudnn.conv",
        others={"cudnn": Other(theirs, put=channels_last, context=_tried_out)},
        saving=4.0 if (k, stride) == (3, 1) else 1.0,  # Winograd's F(4×4, 3×3)
    )  # fmt: skip


def _small() -> list[Case]:
    """Small enough for a CPU."""
    return [
        _case("small classifier", 64, 1, 28, 32, 3, cpu=True),
        _case("ResNet-50 stem", 4, 3, 224, 64, 7, 2, cpu=True),
        _case("ResNet-50", 8, 64, 56, 64, 3, cpu=True),
        _case("ResNet-50", 8, 64, 56, 256, 1, cpu=True),
        _case("ResNet-50", 8, 128, 56, 128, 3, 2, cpu=True),
        _case("ResNet-50", 8, 256, 14, 256, 3, cpu=True),
        _case("ResNet-50", 8, 1024, 14, 256, 1, cpu=True),
        _case("ResNet-50", 8, 512, 7, 512, 3, cpu=True),
    ]


def _grouped(n: int, cpu: bool) -> list[Case]:
    return [
        _case("ResNeXt-50", n, 128, 56, 128, 3, 1, 32, cpu=cpu),
        _case("MobileNet", n, 128, 56, 128, 3, 1, 128, cpu=cpu),
        _case("MobileNet", n, 128, 56, 128, 3, 2, 128, cpu=cpu),
        _case("ConvNeXt", n, 96, 56, 96, 7, 1, 96, cpu=cpu),
    ]


def _transposed(name: str, n: int, c: int, size: int, o: int, k: int, stride: int, cpu: bool = False) -> Case:
    padding = (k - stride) // 2
    options = {"stride": stride, "padding": padding}

    def theirs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, weight, bias, stride, padding)

    shapes = ((n, c, size, size), (c, o, k, k), (o,))
    return Case(
        conv_transpose, f"{name} {k}×{k}/{stride} {c}→{o}, {n}×{size}²", shapes, options, theirs,
        2 * n * size * size * c * o * k * k, cpu, gemm=True, tf32="cudnn.conv",
        others={"cudnn": Other(theirs, put=channels_last, context=_tried_out)},
    )  # fmt: skip


def cases() -> list[Case]:
    found = [*_small(), *_grouped(8, cpu=True), *_grouped(128, cpu=False)]
    found += [_transposed("U-Net", 4, 128, 32, 64, 2, 2, cpu=True), _transposed("U-Net", 16, 256, 64, 128, 2, 2)]
    for shape in _RESNET50:
        case = _case("ResNet-50", 128, *shape)._replace(headline=shape in _HEADLINES)
        last = case._replace(name=f"{case.name}, channels last", put=channels_last)
        found += [last, case] if case.headline else [last]
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
