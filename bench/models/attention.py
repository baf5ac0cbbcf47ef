"""Attention and the block around it, as GPT-2 and ViT have them."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Attention(nn.Module):
    """By torch's own fused function."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, W) → the same
        n, t, width = x.shape
        q, k, v = (
            z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1)
        )  # each (N, H, T, W/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (N, H, T, W/H)
        return self.out(y.transpose(1, 2).reshape(n, t, width))


class Block(nn.Module):
    """Norm, attention, dropout, then norm, two linear layers, dropout; each half beside what came in."""

    def __init__(self, width: int, heads: int, causal: bool, p: float = 0.0, eps: float = 1e-5):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attention, self.dropout = Attention(width, heads, causal), nn.Dropout(p)
        act = nn.GELU(approximate="tanh" if causal else "none")
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), act, nn.Linear(4 * width, width), nn.Dropout(p))

    def forward(self, x: Tensor) -> Tensor:  # (N, T, W) → the same
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))
