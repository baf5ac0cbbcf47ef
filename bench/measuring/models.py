"""Whole models in plain torch.nn, to be trained as they are and patched: what a user's step costs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Attention(nn.Module):
    """Causal, by torch's own fused function."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, W)
        n, t, width = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (N, H, T, W/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, t, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, p: float):
        super().__init__()
        self.norm1, self.attention, self.dropout = nn.LayerNorm(width), Attention(width, heads), nn.Dropout(p)
        self.norm2 = nn.LayerNorm(width)
        hidden = nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(*hidden, nn.Dropout(p))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2's tree in small; the head's weight is the embedding's. tokens (N, T) → the loss of the next token."""

    def __init__(self, vocabulary: int, width: int, heads: int, blocks: int, length: int, p: float = 0.1):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.dropout = nn.Dropout(p)
        self.blocks = nn.Sequential(*(Block(width, heads, p) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.loss = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        logits = self.head(self.norm(self.blocks(x)))
        return self.loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or inside != 4 * width:
            shortcut = nn.Conv2d(inside, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


class ResNet(nn.Module):
    """ResNet-50's tree for ``depths`` (3, 4, 6, 3) and width 64. images (N, 3, H, W), labels (N,) → the loss."""

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
        self.fc, self.loss = nn.Linear(inside, classes), nn.CrossEntropyLoss()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.fc(self.flatten(self.pool(self.blocks(self.stem(images))))), labels)


def stepping(
    call: Callable[..., Tensor],
    batch: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    cast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Callable[[], Tensor]:
    """A step of training, which gives the loss: gradients to zero, forward inside ``cast()``, backward, update."""

    def step() -> Tensor:
        optimizer.zero_grad()
        with cast():
            loss = call(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


class Kind(NamedTuple):
    """A model, one batch for it, and its optimizer's name."""

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, ...]]
    optimizer: str


KINDS = {
    "GPT, 4 blocks of 128, 4 × 128 tokens": Kind(
        lambda: GPT(512, 128, 4, 4, 128), lambda: (torch.randint(512, (4, 128)),), "AdamW"
    ),
    "ResNet, 4 blocks of 32, 8 × 64²": Kind(
        lambda: ResNet((1, 1, 1, 1), 32, 10), lambda: (torch.randn(8, 3, 64, 64), torch.randint(10, (8,))), "SGD"
    ),
}
"""Small enough for a CPU."""
