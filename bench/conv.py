"""Convolutions of ResNet-50, ResNeXt, MobileNet, ConvNeXt, ViT, a U-Net, audio codecs and video networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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
_FOLLOWED = [(64, 56, 64, 1, 1), (64, 56, 64, 3, 1), (64, 56, 256, 1, 1), (256, 14, 256, 3, 1), (256, 14, 1024, 1, 1)]
"""Those that are measured with what follows them, too: in a block, and at its end."""
_THEIRS: list[Any] = [F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
Size = int | tuple[int, ...]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Images, volumes and their filters with their channels last in memory; other tensors as they are."""
    return x.contiguous(memory_format=_FORMATS[x.ndim]) if x.ndim in _FORMATS else x


@contextlib.contextmanager
def _tried_out() -> Iterator[None]:
    """cuDNN tries its algorithms on each shape and keeps the fastest."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


def _shown(sizes: Sequence[int]) -> str:
    """(56, 56) as 56²; a kernel's (3, 3) as 3×3 is shown by its caller."""
    *first, last = sizes
    square = len(sizes) > 1 and first[-1] == last
    return "×".join(map(str, [*first[:-1], f"{last}²"] if square else sizes))


def _case(
    name: str,
    n: int,
    c: int,
    size: Size,
    o: int,
    k: Size,
    stride: Size = 1,
    groups: int = 1,
    cpu: bool = False,
    axes: int = 2,
    transposed: bool = False,
) -> Case:
    """size, k, stride: a number for each of the axes, or one for all. Padding keeps size / stride (size · stride)."""
    sizes, kernel, steps = (v if isinstance(v, tuple) else (v,) * axes for v in (size, k, stride))
    padding = tuple([(a - b + 1) // 2 if transposed else a // 2 if b < a else 0 for a, b in zip(kernel, steps)])
    options: dict[str, Any] = {"stride": steps, "padding": padding, "groups": groups}
    function = _THEIRS[axes - 1 + 3 * transposed]

    def theirs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return function(x, weight, bias, **options)

    many = sizes if transposed else [(s + 2 * p - a) // b + 1 for s, p, a, b in zip(sizes, padding, kernel, steps)]
    flops = 2 * n * o * (c // groups)
    for each in (*many, *kernel):
        flops *= each
    shapes = ((n, c, *sizes), (c, o // groups, *kernel) if transposed else (o, c // groups, *kernel), (o,))
    step = f"/{'×'.join(map(str, sorted(set(steps))))}" if max(steps) > 1 else ""
    text = (
        f"{name} {'transposed ' if transposed else ''}{'×'.join(map(str, kernel))}{step} {c}→{o}, {n}×{_shown(sizes)}"
    )
    return Case(
        conv_transpose if transposed else conv, text, shapes, options, theirs, flops, cpu,
        gemm=groups == 1 or groups < c, tf32="cudnn.conv",
        others={"cudnn": Other(theirs, put=channels_last, context=_tried_out)},
        saving=4.0 if (kernel, steps) == ((3, 3), (1, 1)) else 1.0,  # Winograd's F(4×4, 3×3)
    )  # fmt: skip


def _followed(case: Case, activation: str, whole: bool = False) -> Case:
    """A convolution with an activation in its epilogue; whole: with a scale and a residual, too, as a folded norm leaves it."""
    o, axes = case.shapes[1][0], len(case.shapes[0]) - 2
    options, function = case.options, _THEIRS[axes - 1]
    more = ((o,), conv.rule(*case.specs(), **options).outputs["y"].shape) if whole else ()

    def theirs(x: Any, weight: Any, bias: Any, scale: Any = None, residual: Any = None) -> torch.Tensor:
        if not whole:
            return getattr(F, activation)(function(x, weight, bias, **options))
        factor, shift = (row.view(-1, *(1,) * axes) for row in (scale, bias))
        return getattr(F, activation)(function(x, weight, None, **options) * factor + shift + residual)

    return case._replace(
        name=f"{case.name}, {'scale, residual, ' if whole else ''}{activation}", shapes=(*case.shapes, *more), torch=theirs,
        options=options | {"activation": activation}, others={}, headline=False,
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
        _case("U-Net", 4, 128, 32, 64, 2, 2, cpu=True, transposed=True),
        _followed(_case("ResNet-50", 8, 64, 56, 64, 3, cpu=True), "relu"),
        _followed(_case("ResNet-50", 8, 64, 56, 256, 1, cpu=True), "relu", whole=True),
        _case("EnCodec", 4, 64, 3000, 128, 8, 4, cpu=True, axes=1),
        _case("EnCodec", 4, 128, 750, 64, 8, 4, cpu=True, axes=1, transposed=True),
        _case("R3D-18", 1, 64, (4, 28, 28), 64, 3, cpu=True, axes=3),
    ]


def _grouped(n: int, cpu: bool) -> list[Case]:
    return [
        _case("ResNeXt-50", n, 128, 56, 128, 3, 1, 32, cpu=cpu),
        _case("MobileNet", n, 128, 56, 128, 3, 1, 128, cpu=cpu),
        _case("MobileNet", n, 128, 56, 128, 3, 2, 128, cpu=cpu),
        _case("ConvNeXt", n, 96, 56, 96, 7, 1, 96, cpu=cpu),
    ]


def _networks() -> list[Case]:
    """Layers of whole networks, for a GPU; ResNet-50's are declared above."""
    convnext = [_case("ConvNeXt", 128, c, size, c, 7, 1, c) for c, size in ((192, 28), (384, 14), (768, 7))]
    convnext += [_case("ConvNeXt", 128, 3, 224, 96, 4, 4), _case("ConvNeXt", 128, 96, 56, 192, 2, 2)]
    vit = [_case("ViT", 128, 3, 224, 768, 16, 16)]
    unet = [
        _case("U-Net", 8, *shape, 3) for shape in ((64, 256, 64), (128, 128, 128), (1024, 32, 512), (512, 16, 1024))
    ]
    unet += [_case("U-Net", 8, c, size, c // 2, 2, 2, transposed=True) for c, size in ((128, 128), (1024, 16))]
    audio = [
        (1, 24000, 32, 7, 1),
        (32, 24000, 32, 3, 1),
        (32, 24000, 64, 4, 2),
        (64, 12000, 128, 8, 4),
        (256, 600, 512, 16, 8),
    ]
    codec = [_case("EnCodec", 32, *shape, axes=1) for shape in audio]
    back = [(512, 75, 256, 16, 8), (128, 3000, 64, 8, 4), (64, 12000, 32, 4, 2)]
    codec += [_case("EnCodec", 32, *shape, axes=1, transposed=True) for shape in back]
    codec.append(_case("Conformer", 32, 512, 1500, 512, 31, 1, 512, axes=1))
    video = [
        _case("R3D-18", 8, 3, (16, 112, 112), 64, (3, 7, 7), (1, 2, 2), axes=3),
        _case("R3D-18", 8, 64, (16, 56, 56), 64, 3, axes=3),
        _case("R3D-18", 8, 64, (16, 56, 56), 128, 3, 2, axes=3),
        _case("R3D-18", 8, 512, (2, 7, 7), 512, 3, axes=3),
        _case("R(2+1)D-18", 8, 64, (16, 56, 56), 144, (1, 3, 3), axes=3),
        _case("R(2+1)D-18", 8, 144, (16, 56, 56), 64, (3, 1, 1), axes=3),
        _case("X3D-M", 8, 108, (16, 28, 28), 108, 3, 1, 108, axes=3),
        _case("3-D U-Net", 2, 128, 32, 64, 2, 2, axes=3, transposed=True),
    ]
    return [*convnext, *vit, *unet, *codec, *video]


def _each_gradient(case: Case) -> list[Case]:
    """The forward pass, dx and dweight, each by itself."""
    forward = case._replace(ways=("forward",))
    gradients = [
        case._replace(name=f"{case.name}: d{name}", needs=(name,), ways=("backward",), headline=False)
        for name in ("x", "weight")
    ]
    return [forward, *gradients]


def cases() -> list[Case]:
    found = [*_small(), *_grouped(8, cpu=True)]
    for shape in _RESNET50:
        case = _case("ResNet-50", 128, *shape)._replace(headline=shape in _HEADLINES)
        last = case._replace(name=f"{case.name}, channels last", put=channels_last)
        found += [last, *_each_gradient(last)[1:]] + ([case] if case.headline else [])
        if shape in _FOLLOWED:
            found.append(_followed(last, "relu", whole=shape[2] == 4 * shape[0]))
    for case in [*_grouped(128, cpu=False), *_networks()]:
        found += _each_gradient(case)
        if len(case.shapes[0]) > 3:  # a sequence has no such memory format
            found += _each_gradient(case._replace(name=f"{case.name}, channels last", put=channels_last))
    return found


def audits() -> list[Case]:
    """The largest configuration of each branch."""
    last, one = {"order": CHANNELS_LAST}, {"order": CHANNELS_LAST, "archs": ONE_ARCH}
    deep = {"order": (0, 2, 3, 4, 1), "archs": ONE_ARCH}
    return [
        _case("deep", 32, 512, 28, 512, 3)._replace(**last),
        _case("in steps", 32, 256, 14, 512, 3, 2)._replace(**one),
        _case("in steps along one axis", 32, 256, 14, 512, 3, (1, 2))._replace(**one),
        _case("flat", 32, 256, 56, 512, 1),
        _case("channels first, one tap", 32, 1024, 14, 256, 1),
        _case("channels first, odd pixels", 32, 2048, 7, 512, 1)._replace(archs=ONE_ARCH),
        _case("patches", 32, 3, 224, 768, 16, 16)._replace(**one),
        _case("runs", 32, 3, 224, 96, 4, 4)._replace(order=CHANNELS_LAST, archs=(80,)),
        _case("channels first", 32, 128, 56, 128, 3)._replace(archs=ONE_ARCH),
        _case("depthwise", 32, 128, 56, 128, 3, 1, 128)._replace(**last),
        _followed(_case("epilogue", 32, 256, 28, 256, 3), "gelu", whole=True)._replace(**last),
        _followed(_case("epilogue, channels first", 32, 64, 28, 256, 3), "silu")._replace(archs=(80,)),
        _case("three channels", 32, 3, 224, 64, 7, 2)._replace(**one),
        _case("volumes in steps", 8, 256, (8, 28, 28), 256, 3, 2, axes=3)._replace(**deep),
        _case("depthwise volumes", 8, 128, (8, 28, 28), 128, 3, 1, 128, axes=3)._replace(**deep),
    ]
