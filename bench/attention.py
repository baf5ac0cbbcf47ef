"""Attention of transformers: text, images, grouped queries, windows."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from gpulayers.arrays import Spec, int64
from gpulayers.ops.attention import attention

from .cases.case import ONE_ARCH, Case, sweep


def _flops(n: int, heads: int, rows: int, keys: int, width: int, causal: bool = False) -> int:
    return 4 * n * heads * rows * keys * width // (2 if causal else 1)


def _case(
    name: str, n: int, heads: int, length: int, width: int, *, groups: int = 0, rows: int = 0, cpu: bool = False, **options: Any
) -> Case:  # fmt: skip
    groups, rows, causal = groups or heads, rows or length, options.get("causal", False)

    def theirs(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=groups != heads)

    shapes = (n, heads, rows, width), (n, groups, length, width), (n, groups, length, width)
    flops = _flops(n, heads, rows, length, width, causal)
    title = f"{name}, {n}×{heads}×{length}×{width}"
    return Case(attention, title, shapes, options, theirs, flops, cpu, most=2.0, tf32="cuda.matmul")


def cases() -> list[Case]:
    causal = {"causal": True}
    return [
        _case("ViT-B", 2, 12, 197, 64, cpu=True),
        _case("GPT-2", 1, 12, 512, 64, cpu=True, **causal),
        _case("GPT-2", 16, 12, 1024, 64, **causal),
        _case("ViT-L", 64, 16, 577, 64),
        _case("Llama-3 8B, grouped", 2, 32, 8192, 128, groups=8, **causal)._replace(headline=True),
        *sweep("tokens, 16 heads of 128", [(n, _case("", 65536 // n, 16, n, 128, **causal)) for n in (1024, 4096, 16384)]),
        *sweep("tokens, 32 heads of 64", [(n, _case("", 65536 // n, 32, n, 64)) for n in (1024, 4096, 16384)]),
    ]  # fmt: skip


BY_HALVES = (100, 90, 80)
"""Compiled for all of them, in 16 bits alone."""


def _more(name: str, *shapes: Any, **options: Any) -> Case:
    return Case(attention, name, shapes, options, tf32="cuda.matmul", archs=ONE_ARCH)


def audits() -> list[Case]:
    """Heads of 64 and 128 everywhere; then a kernel's other branches."""
    heads, few, half = (2, 16, 1024, 64), (2, 4, 1024, 64), (2, 16, 1024, 80)
    seed, cu = Spec((2,), int64), Spec((9,), int64)
    return [
        _case("heads of 64", 2, 16, 1024, 64, causal=True),
        _case("heads of 128", 2, 16, 1024, 128, groups=4)._replace(archs=BY_HALVES),
        _more("all at once", heads, few, few, (16, 1024, 1024), (16,), seed, softcap=20.0, causal=True),
        _more("packed", (1, *heads[1:]), (1, *few[1:]), (1, *few[1:]), None, None, None, cu, cu, causal=True),
        _more("heads of 80", half, half, half),
    ]
