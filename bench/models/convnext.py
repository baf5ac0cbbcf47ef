"""ConvNeXt-T (Liu et al., 2022)."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from gpulayers.bench.models.kind import Kind, images, installed
from torch import Tensor


class Block(nn.Module):
    """Depthwise 7×7; then, pixel by pixel, a norm and two linear layers, scaled; and what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) → the same
        y = self.depthwise(x).permute(0, 2, 3, 1)  # (N, H, W, C), which is how channels_last lies in memory
        y = self.down(self.act(self.up(self.norm(y))))
        return x + (self.scale * y).permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """Of each pixel's channels, as torchvision has it."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) → the same
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """``depths`` and ``widths`` of its stages: (3, 3, 9, 3) and (96, 192, 384, 768) in ConvNeXt-T."""

    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], classes: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), LayerNorm2d(widths[0], eps=1e-6)]
        for stage, (depth, width) in enumerate(zip(depths, widths)):
            if stage:
                layers += [LayerNorm2d(widths[stage - 1], eps=1e-6), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            layers += [Block(width) for _ in range(depth)]
        self.features, self.pool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1)
        self.norm, self.flatten = LayerNorm2d(widths[-1], eps=1e-6), nn.Flatten()
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) → (N, classes)
        x = self.features(x)  # (N, C, H / 32, W / 32)
        return self.fc(self.flatten(self.norm(self.pool(x))))


def _full() -> nn.Module:
    theirs = installed("torchvision.models", "convnext_tiny", stochastic_depth_prob=0.0)
    theirs = theirs or installed("timm.models.convnext", "convnext_tiny")
    return theirs or ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), 1000)


FULL = Kind(_full, images(128, 224, 1000))
TINY = Kind(lambda: ConvNeXt((1, 1, 2, 1), (16, 32, 48, 64), 10), images(4, 32, 10))
