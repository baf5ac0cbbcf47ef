"""Pooling in ResNet-50, VGG, DenseNet and Inception."""

from __future__ import annotations

import torch.nn.functional as F

from gpulayers.ops.pooling import avg_pool2d, global_avg_pool2d, max_pool2d

from ._case import Case


def _cases(n: int, cpu: bool) -> list[Case]:
    def case(op, name: str, theirs, c: int, size: int, **options) -> Case:
        def reference(x):
            return theirs(x, **options)

        return Case(op, f"{name}, {n}×{c}×{size}²", ((n, c, size, size),), options, reference, cpu=cpu)

    def mean(x):
        return F.adaptive_avg_pool2d(x, 1)

    return [
        case(max_pool2d, "ResNet-50 3×3/2", F.max_pool2d, 64, 112, kernel_size=3, stride=2, padding=1),
        case(max_pool2d, "VGG 2×2", F.max_pool2d, 128, 56, kernel_size=2),
        case(avg_pool2d, "DenseNet 2×2", F.avg_pool2d, 128, 56, kernel_size=2),
        case(avg_pool2d, "Inception 3×3", F.avg_pool2d, 192, 28, kernel_size=3, stride=1, padding=1),
        case(global_avg_pool2d, "ResNet-50 head", mean, 2048, 7),
        case(global_avg_pool2d, "squeeze-and-excitation", mean, 256, 56),
    ]


def cases() -> list[Case]:
    return [*_cases(8, cpu=True), *_cases(256, cpu=False)]
