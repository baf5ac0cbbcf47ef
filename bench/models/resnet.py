"""ResNet-50 (He et al., 2015), its strides in the 3×3 convolutions."""

from __future__ import annotations

import torch.nn as nn
from gpulayers.bench.models.kind import Kind, images, installed
from torch import Tensor


class Bottleneck(nn.Module):
    """1×1 down to ``width`` channels, 3×3, 1×1 up to four times as many; and what came in."""

    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or inside != 4 * width:
            shortcut = nn.Conv2d(inside, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) → (N, 4 width, H / stride, W / stride)
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


class ResNet(nn.Module):
    """``depths``: blocks of each stage, (3, 4, 6, 3) in ResNet-50; the first is ``width`` channels inside, 64 there."""

    def __init__(self, depths: tuple[int, ...], width: int, classes: int):
        super().__init__()
        stem = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        blocks, inside = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(Bottleneck(inside, width << stage, 2 if stage and not i else 1))
                inside = 4 * width << stage
        self.blocks, self.pool, self.flatten = nn.Sequential(*blocks), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) → (N, classes)
        x = self.blocks(self.stem(x))  # (N, 32 width, H / 32, W / 32)
        return self.fc(self.flatten(self.pool(x)))


def _full() -> nn.Module:
    return installed("torchvision.models", "resnet50") or ResNet((3, 4, 6, 3), 64, 1000)


FULL = Kind(_full, images(128, 224, 1000), optimizer="SGD")
TINY = Kind(lambda: ResNet((1, 1, 1, 1), 16, 10), images(4, 32, 10), optimizer="SGD")
