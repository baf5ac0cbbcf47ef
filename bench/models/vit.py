"""ViT-S/16 (Dosovitskiy et al., 2020; its small size is Touvron et al.'s, 2020)."""

from __future__ import annotations

import torch
import torch.nn as nn
from gpulayers.bench.models.attention import Block
from gpulayers.bench.models.kind import Kind, images, installed
from torch import Tensor


class ViT(nn.Module):
    """Images in patches of ``patch``² pixels, a token each, behind one that stands for the class."""

    def __init__(self, size: int, patch: int, width: int, heads: int, blocks: int, classes: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False, eps=1e-6) for _ in range(blocks)))
        self.norm, self.fc = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) → (N, classes)
        x = self.patches(x).flatten(2).transpose(1, 2)  # (N, (S/P)², W)
        x = torch.cat([self.first.expand(len(x), -1, -1).to(x.dtype), x], 1) + self.positions  # (N, T, W)
        return self.fc(self.norm(self.blocks(x)[:, 0]))


def _full() -> nn.Module:
    theirs = installed("timm.models.vision_transformer", "vit_small_patch16_224")
    return theirs or ViT(224, 16, 384, 6, 12, 1000)


FULL = Kind(_full, images(128, 224, 1000))
TINY = Kind(lambda: ViT(32, 8, 32, 2, 2, 10), images(4, 32, 10))
