"""GPT-2 (Radford et al., 2019), 124M."""

from __future__ import annotations

import torch.nn as nn
from gpulayers.bench.models.attention import Block
from gpulayers.bench.models.kind import Kind, NextToken, tokens
from torch import Tensor


class GPT(nn.Module):
    """The head's weight is the embedding's. p: of its dropouts."""

    def __init__(self, vocabulary: int, width: int, heads: int, blocks: int, length: int, p: float = 0.1):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = nn.Dropout(p)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True, p=p) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (N, T) → (N, T, V)
        x = self.dropout(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])  # (N, T, W)
        return self.head(self.norm(self.blocks(x)))


FULL = Kind(lambda: GPT(50257, 768, 12, 12, 1024, 0.0), tokens(16, 1024, 50257), NextToken)
TINY = Kind(lambda: GPT(96, 32, 2, 2, 16, 0.0), tokens(2, 16, 96), NextToken)
