"""EfficientNet-B0 (Tan and Le, 2019), without its dropout and stochastic depth: each way of training draws other numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn as nn
from gpulayers.bench.models.kind import Kind, images, installed
from torch import Tensor


class Stage(NamedTuple):
    expand: int
    """Channels of a block's inside, as a multiple of those that come in."""
    kernel: int
    stride: int
    """Of its first block."""
    width: int
    """Channels that come out."""
    depth: int


B0 = (
    Stage(1, 3, 1, 16, 1), Stage(6, 3, 2, 24, 2), Stage(6, 5, 2, 40, 2), Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3), Stage(6, 5, 2, 192, 4), Stage(6, 3, 1, 320, 1),
)  # fmt: skip


def conv_norm(inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outside)]


class SqueezeExcite(nn.Module):
    """Each channel times a number in (0, 1) that all pixels' means decide."""

    def __init__(self, width: int, squeezed: int):
        super().__init__()
        self.pool, self.down, self.act = nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, squeezed, 1), nn.SiLU(inplace=True)
        self.up, self.gate = nn.Conv2d(squeezed, width, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) → the same
        return x * self.gate(self.up(self.act(self.down(self.pool(x)))))  # times (N, C, 1, 1)


class MBConv(nn.Module):
    """1×1 up, depthwise, squeeze and excite, 1×1 down; and what came in, where it has that shape."""

    def __init__(self, inside: int, stage: Stage, stride: int):
        super().__init__()
        width, layers = inside * stage.expand, []
        if stage.expand > 1:
            layers += [*conv_norm(inside, width), nn.SiLU(inplace=True)]
        layers += [*conv_norm(width, width, stage.kernel, stride, width), nn.SiLU(inplace=True)]
        layers += [SqueezeExcite(width, max(1, inside // 4)), *conv_norm(width, stage.width)]
        self.layers, self.residual = nn.Sequential(*layers), stride == 1 and inside == stage.width

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) → (N, stage.width, H / stride, W / stride)
        return x + self.layers(x) if self.residual else self.layers(x)


class EfficientNet(nn.Module):
    def __init__(self, stages: tuple[Stage, ...], stem: int, head: int, classes: int):
        super().__init__()
        layers, inside = [*conv_norm(3, stem, 3, 2), nn.SiLU(inplace=True)], stem
        for stage in stages:
            for i in range(stage.depth):
                layers.append(MBConv(inside, stage, stage.stride if not i else 1))
                inside = stage.width
        self.features = nn.Sequential(*layers, *conv_norm(inside, head), nn.SiLU(inplace=True))
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) → (N, classes)
        x = self.features(x)  # (N, head, H / 32, W / 32)
        return self.fc(self.flatten(self.pool(x)))


def _full() -> nn.Module:
    theirs = installed("torchvision.models", "efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0)
    theirs = theirs or installed("timm.models.efficientnet", "efficientnet_b0")
    return theirs or EfficientNet(B0, 32, 1280, 1000)


FULL = Kind(_full, images(128, 224, 1000), optimizer="SGD")
TINY = Kind(
    lambda: EfficientNet((Stage(1, 3, 1, 8, 1), Stage(4, 3, 2, 16, 1), Stage(4, 5, 2, 24, 2)), 16, 64, 10),
    images(4, 32, 10),
    optimizer="SGD",
)
