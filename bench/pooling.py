"""Pooling in ResNet-50, VGG, DenseNet, Inception, AlexNet and squeeze-and-excitation networks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from gpulayers.ops.pooling import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    fractional_max_pool,
    lp_pool,
    max_pool,
    max_unpool,
)

from .cases.case import CHANNELS_LAST, ONE_ARCH, Case, Places, Seeds


def _cases(n: int, cpu: bool) -> list[Case]:
    def case(op, name: str, theirs, c: int, *sizes: int, **options) -> Case:
        def reference(x):
            return theirs(x, **options)

        headline = name in ("ResNet-50 3×3/2", "DenseNet 2×2") and not cpu
        sizes = sizes * 2 if len(sizes) == 1 else sizes
        title = f"{name}, {n}×{c}×{'×'.join(map(str, sizes))}"
        return Case(op, title, ((n, c, *sizes),), options, reference, cpu=cpu, headline=headline)

    def sequence(op, name: str, theirs, c: int, size: int, **options) -> Case:
        made = case(op, name, theirs, c, size, 1, **options)
        return made._replace(name=f"{name}, {n}×{c}×{size}", shapes=((n, c, size),))

    def adaptive(name: str, c: int, size: int, output_size: int) -> Case:
        return case(adaptive_avg_pool, name, F.adaptive_avg_pool2d, c, size, output_size=output_size)

    return [
        case(max_pool, "ResNet-50 3×3/2", F.max_pool2d, 64, 112, kernel_size=3, stride=2, padding=1),
        case(max_pool, "VGG 2×2", F.max_pool2d, 128, 56, kernel_size=2),
        case(avg_pool, "DenseNet 2×2", F.avg_pool2d, 128, 56, kernel_size=2),
        case(avg_pool, "Inception 3×3", F.avg_pool2d, 192, 28, kernel_size=3, stride=1, padding=1),
        sequence(max_pool, "audio 4/4", F.max_pool1d, 128, 4000, kernel_size=4),
        sequence(avg_pool, "audio 4/2", F.avg_pool1d, 128, 4000, kernel_size=4, stride=2),
        case(max_pool, "C3D 2×2×2", F.max_pool3d, 64, 4, 28, 28, kernel_size=2),
        case(avg_pool, "volumes 3×3×3/2", F.avg_pool3d, 32, 8, 28, 28, kernel_size=3, stride=2, padding=1),
        case(adaptive_max_pool, "to 6²", F.adaptive_max_pool2d, 256, 13, output_size=6),
        case(lp_pool, "of squares 2×2", F.lp_pool2d, 128, 56, norm_type=2.0, kernel_size=2),
        _put_back(n, 64, 56, cpu),
        _by_random_steps(n, 64, 56, cpu),
        adaptive("ResNet-50 head", 2048, 7, 1),
        adaptive("squeeze-and-excitation", 256, 56, 1),
        adaptive("VGG of 448² images, to 7²", 512, 14, 7),
        adaptive("AlexNet of 256² images, to 6²", 256, 7, 6),
    ]


def _put_back(n: int, c: int, size: int, cpu: bool) -> Case:
    def theirs(x: Any, indices: Any) -> Any:
        return F.max_unpool2d(x, indices, 2)

    title = f"SegNet's, to where 2×2 maxima were, {n}×{c}×{size}²"
    shapes = (n, c, size, size), Places((n, c, size, size), 2)
    return Case(max_unpool, title, shapes, {"output_size": (2 * size, 2 * size)}, theirs, cpu=cpu, headline=not cpu)


def _by_random_steps(n: int, c: int, size: int, cpu: bool) -> Case:
    """Without a seed: steps as of u = ½, so that both compute the same."""

    def theirs(x: Any) -> Any:
        return F.fractional_max_pool2d(x, 2, out, _random_samples=x.new_full((*x.shape[:2], 2), 0.5))

    out, title = int(size / 2**0.5), f"fractional, to 1/√2, {n}×{c}×{size}²"
    options = {"kernel_size": (2, 2), "output_size": (out, out)}
    return Case(fractional_max_pool, title, ((n, c, size, size),), options, theirs, cpu=cpu, headline=not cpu)


def cases() -> list[Case]:
    return [*_cases(8, cpu=True), *_cases(256, cpu=False)]


def audits() -> list[Case]:
    """Channels last (128 bits at a time) everywhere; channels first, and windows of other sizes, for one."""
    calls: list[tuple[Any, dict[str, Any]]] = [
        (max_pool, {"kernel_size": 3, "stride": 2, "padding": 1}),
        (avg_pool, {"kernel_size": 2}),
        (adaptive_avg_pool, {"output_size": 1}),
        (adaptive_avg_pool, {"output_size": 6}),
    ]
    overlapping: dict[str, Any] = {"kernel_size": 3, "stride": 1, "padding": 1}
    indexed = {"kernel_size": 3, "stride": 2, "return_indices": True}
    image, volume = ((32, 64, 112, 112),), ((8, 64, 16, 56, 56),)
    of_volumes = [(op, options) for op, options in calls if options.get("output_size") != 1]
    last = [Case(op, "channels last", image, options, order=CHANNELS_LAST) for op, options in calls]
    return [
        *last,
        last[0]._replace(name="channels first", order=None),
        Case(avg_pool, "channels first", image, overlapping | {"count_include_pad": False}),
        *(case._replace(name="channels first", order=None, archs=ONE_ARCH) for case in last[1:]),
        Case(max_pool, "channels first, rows of any length", ((32, 64, 113, 113),), calls[0][1], archs=ONE_ARCH),
        *(
            Case(op, f"volumes, channels {where}", volume, options, order=order, archs=ONE_ARCH)
            for where, order in (("last", (0, 2, 3, 4, 1)), ("first", None))
            for op, options in of_volumes
        ),
        Case(
            lp_pool,
            "volumes of three channels, last",
            ((2, 3, 7, 13, 13),),
            {"norm_type": 2, "kernel_size": 3, "stride": 2},
            order=(0, 2, 3, 4, 1),
            archs=ONE_ARCH,
        ),
        Case(adaptive_max_pool, "volumes, channels first", volume, {"output_size": 6}, archs=ONE_ARCH),
        *(
            Case(op, "channels last", image, options, order=CHANNELS_LAST, archs=ONE_ARCH)
            for op, options in (
                (adaptive_max_pool, {"output_size": 6}),
                (adaptive_max_pool, {"output_size": 1}),
                (lp_pool, {"norm_type": 2, "kernel_size": 3, "stride": 2}),
                (lp_pool, {"norm_type": 3, "kernel_size": 2}),
            )
        ),
        *(
            Case(adaptive_avg_pool, name, ((32, 2048, 7, 7),), {"output_size": 1}, order=order, archs=ONE_ARCH)
            for name, order in (("few pixels, channels last", CHANNELS_LAST), ("few pixels, channels first", None))
        ),
        *(
            Case(op, "channels last, windows that overlap", image, options, order=CHANNELS_LAST, archs=ONE_ARCH)
            for op, options in ((max_pool, overlapping), (avg_pool, overlapping | {"count_include_pad": False}))
        ),
        _put_back(32, 64, 56, cpu=False)._replace(order=CHANNELS_LAST, archs=ONE_ARCH),
        _put_back(32, 64, 56, cpu=False),
        Case(
            fractional_max_pool, "drawn", (*image, Seeds()), {"kernel_size": 2, "output_size": 79}, order=CHANNELS_LAST
        ),
        _by_random_steps(32, 64, 56, cpu=False)._replace(archs=ONE_ARCH),
        Case(max_pool, "indices", image, indexed, order=CHANNELS_LAST, archs=ONE_ARCH),
    ]
