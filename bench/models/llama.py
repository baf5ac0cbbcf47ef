"""A stack like Llama 3.2 1B's (Grattafiori et al., 2024): RMSNorm, rotary positions, grouped queries, SwiGLU."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from gpulayers.bench.models.kind import Kind, NextToken, tokens
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each position's pairs (x[i], x[i + D/2]) turned by its angles: (N, H, T, D), (T, D/2), (T, D/2) → (N, H, T, D)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Attention(nn.Module):
    """``heads`` queries a position, and as many keys and values as ``groups``."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (N, T, W) → the same
        n, t, width = x.shape
        q = self.q(x).view(n, t, self.heads, self.size).transpose(1, 2)  # (N, H, T, D)
        k = self.k(x).view(n, t, self.groups, self.size).transpose(1, 2)  # (N, G, T, D)
        v = self.v(x).view(n, t, self.groups, self.size).transpose(1, 2)  # (N, G, T, D)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (N, H, T, D)
        return self.out(y.transpose(1, 2).reshape(n, t, width))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.act, self.down = nn.SiLU(), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, W) → the same
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, hidden: int):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(width, eps=1e-5), Attention(width, heads, groups)
        self.norm2, self.mlp = nn.RMSNorm(width, eps=1e-5), SwiGLU(width, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (N, T, W) → the same
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self, vocabulary: int, width: int, heads: int, groups: int, hidden: int, blocks: int, length: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, groups, hidden) for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        half = width // heads // 2
        angles = torch.outer(torch.arange(length), 500000.0 ** (-torch.arange(half) / half))  # (T, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (N, T) → (N, T, V)
        x, t = self.tokens(tokens), tokens.shape[1]  # (N, T, W)
        for block in self.blocks:
            x = block(x, self.cos[:t], self.sin[:t])
        return self.head(self.norm(x))


FULL = Kind(lambda: Llama(128256, 2048, 32, 8, 8192, 16, 2048), tokens(2, 2048, 128256), NextToken)
TINY = Kind(lambda: Llama(96, 32, 4, 2, 64, 2, 16), tokens(2, 16, 96), NextToken)
