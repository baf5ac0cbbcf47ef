"""A U-Net like Stable Diffusion's (Rombach et al., 2022), without the text: noisy latents and a time → the noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from gpulayers.bench.models.kind import Kind
from torch import Tensor


def sinusoids(times: Tensor, width: int) -> Tensor:
    """(N,) → (N, width): cosines and sines of frequencies from 1 down to 1 / 10,000."""
    half = width // 2
    angles = times[:, None] * torch.exp(-math.log(10000.0) / half * torch.arange(half, device=times.device))
    return torch.cat([angles.cos(), angles.sin()], 1)


class ResBlock(nn.Module):
    """(Norm, SiLU, 3×3) twice, the time added between; and what came in."""

    def __init__(self, inside: int, outside: int, time: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inside), nn.GroupNorm(groups, outside)
        self.conv1, self.conv2 = (nn.Conv2d(c, outside, 3, padding=1) for c in (inside, outside))
        self.act, self.time = nn.SiLU(), nn.Linear(time, outside)
        self.shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # (N, C, H, W), (N, time) → (N, outside, H, W)
        y = self.conv1(self.act(self.norm1(x))) + self.time(t)[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.act(self.norm2(y)))


class Attention(nn.Module):
    """Every pixel sees every other, by torch's own fused function; and what came in."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(groups, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # (N, C, H, W) → the same
        n, c, h, w = x.shape
        y = self.norm(x).flatten(2).transpose(1, 2)  # (N, H W, C), which is how channels_last lies in memory
        q, k, v = (
            z.view(n, h * w, self.heads, -1).transpose(1, 2) for z in self.qkv(y).chunk(3, -1)
        )  # (N, heads, H W, D)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, heads, H W, D)
        y = self.out(y.transpose(1, 2).reshape(n, h * w, c))
        return x + y.transpose(1, 2).view(n, c, h, w)


class Resample(nn.Module):
    """To half the size by a strided 3×3, or to twice by the nearest pixel and a 3×3."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1 if up else 2, 1)
        self.up = nn.Upsample(scale_factor=2, mode="nearest") if up else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, 2 H, 2 W), or half
        return self.conv(self.up(x))


class Level(nn.Sequential):
    """Parts that all take an image and the time."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        for part in self:
            x = part(x, t)
        return x


class UNet(nn.Module):
    """
    width: channels at full size, ``width * multiples[i]`` at the i-th level, half the size of that above.
    depth: residual blocks of a level on the way down; one more on the way up.
    attends: levels with attention, from the lowest up.
    """

    def __init__(self, channels: int, width: int, multiples: tuple[int, ...], depth: int, attends: int, heads: int, groups: int):  # fmt: skip
        super().__init__()
        self.width, time = width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        inside, kept = width, [width]

        def level(inside: int, width: int, i: int) -> list[nn.Module]:
            block = ResBlock(inside, width, time, groups)
            return [block, Attention(width, heads, groups)] if i >= len(multiples) - attends else [block]

        for i, m in enumerate(multiples):
            if i:
                self.down.append(Level(Resample(inside, up=False)))
                kept.append(inside)
            for _ in range(depth):
                self.down.append(Level(*level(inside, m * width, i)))
                inside = m * width
                kept.append(inside)
        lowest = len(multiples) - 1
        self.middle = Level(*level(inside, inside, lowest), ResBlock(inside, inside, time, groups))
        for i, m in reversed([*enumerate(multiples)]):
            for j in range(depth + 1):
                parts = level(inside + kept.pop(), m * width, i)
                inside = m * width
                self.up.append(Level(*parts, *([Resample(inside, up=True)] if i and j == depth else [])))
        self.norm, self.act = nn.GroupNorm(groups, inside), nn.SiLU()
        self.last = nn.Conv2d(inside, channels, 3, padding=1)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:  # (N, channels, H, W), (N,) → (N, channels, H, W)
        t = self.time(sinusoids(times, self.width))  # (N, time)
        x = self.first(x)
        kept = [x]
        for part in self.down:
            kept.append(x := part(x, t))
        x = self.middle(x, t)  # (N, C, H / 2^lowest, W / 2^lowest)
        for part in self.up:
            x = part(torch.cat([x, kept.pop()], 1), t)
        return self.last(self.act(self.norm(x)))


def latents(count: int, channels: int, size: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Noisy latents (N, channels, size, size), times (N,), and the noise that is in them."""

    def batch(g: torch.Generator) -> tuple[Tensor, ...]:
        clean, noise = (torch.randn(count, channels, size, size, generator=g, device=g.device) for _ in range(2))
        share = torch.rand(count, generator=g, device=g.device)
        of_noise = share[:, None, None, None]
        return (1 - of_noise**2).sqrt() * clean + of_noise * noise, 1000 * share, noise

    return batch


FULL = Kind(lambda: UNet(4, 320, (1, 2, 4, 4), 2, 2, 8, 32), latents(8, 4, 64), nn.MSELoss)
TINY = Kind(lambda: UNet(4, 16, (1, 2), 1, 1, 2, 8), latents(2, 4, 16), nn.MSELoss)
