"""Attention of transformers: text, images, grouped queries, windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gpulayers.arrays import Spec, int64
from gpulayers.ops.attention import attention, attention_decode, kv_append, rotary_append

from .cases.case import ONE_ARCH, Case, Labels, sweep


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


def _decoding(
    name: str, n: int, heads: int, groups: int, tokens: int, width: int, *, pages: int = 0, rows: int = 1, cpu: bool = False
) -> Case:  # fmt: skip
    """A cache that is full, or in pages that lie anywhere."""

    def theirs(q: Any, k: Any, v: Any, lengths: Any = None, table: Any = None) -> Any:
        if pages:  # torch has no pages: those of a sequence are put side by side first
            k, v = (x[table].transpose(1, 2).reshape(len(table), groups, -1, width) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=groups != heads)

    cache: tuple = (n, groups, tokens, width)
    more: tuple = ()
    if pages:
        blocks = n * tokens // pages
        cache, more = (blocks, groups, pages, width), (None, Labels((n, tokens // pages), blocks))
    flops, title = _flops(n, heads, rows, tokens, width), f"{name}, {n}×{heads}×{tokens}×{width}"
    shapes = (n, heads, rows, width), cache, cache, *more
    return Case(
        attention_decode,
        title,
        shapes,
        {},
        theirs,
        flops,
        cpu,
        gemm=False,
        most=3.0,
        tf32="cuda.matmul",
    )


def _appending(name: str, n: int, heads: int, tokens: int, width: int, cpu: bool = False) -> Case:
    """As many tokens as the cache has places: all of it is written."""
    new = (n, heads, tokens, width)

    def theirs(k_cache: Any, v_cache: Any, k: Any, v: Any, positions: Any) -> None:
        k_cache.copy_(k)
        v_cache.copy_(v)

    return Case(
        kv_append, f"{name}, {n}×{heads}×{tokens}×{width}", (new,) * 4 + (Labels((n,), 1),), {}, theirs, cpu=cpu,
        hardly_read=("k_cache", "v_cache"),
    )  # fmt: skip


def _turning(name: str, n: int, heads: int, groups: int, tokens: int, width: int, cpu: bool = False) -> Case:
    """Prompts that fill the cache. torch has no such function: its operations turn q and k, and copy."""

    def theirs(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, cos: Any, sin: Any, positions: Any) -> Any:
        def turned(x: Any) -> Any:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        k_cache.copy_(turned(k))
        v_cache.copy_(v)
        return turned(q)

    new, table = (n, groups, tokens, width), (tokens, width // 2)
    shapes = (n, heads, tokens, width), new, new, new, new, table, table, Labels((n,), 1)
    return Case(
        rotary_append, f"{name}, {n}×{heads}×{tokens}×{width}", shapes, {}, theirs, cpu=cpu,
        hardly_read=("k_cache", "v_cache"),
    )  # fmt: skip


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
        _decoding("a small model, one token", 4, 8, 2, 2048, 64, cpu=True),
        _decoding("Llama-3 8B, one token", 32, 32, 8, 8192, 128),
        _decoding("Llama-3 8B, one token of one sequence", 1, 32, 8, 32768, 128),
        _decoding("Llama-3 8B, one token in pages", 32, 32, 8, 8192, 128, pages=16),
        _appending("prompts into a cache", 32, 8, 2048, 128),
        _turning("Llama-3 8B, prompts into a cache", 8, 32, 8, 2048, 128),
    ]  # fmt: skip


INT32 = np.dtype("int32")
BY_HALVES = (100, 90, 80)
"""Compiled for all of them, in 16 bits alone."""


def _more(name: str, *shapes: Any, **options: Any) -> Case:
    return Case(attention, name, shapes, options, tf32="cuda.matmul", archs=ONE_ARCH)


def audits() -> list[Case]:
    """Heads of 64 and 128 everywhere; then a kernel's other branches. Those without an architecture take long to compile:
    ``gpulayers audit`` has them alone."""
    heads, few, half = (2, 16, 1024, 64), (2, 4, 1024, 64), (2, 16, 1024, 80)
    seed, cu = Spec((2,), int64), Spec((9,), int64)
    return [
        _case("heads of 64", 2, 16, 1024, 64, causal=True),
        _case("heads of 128", 2, 16, 1024, 128, groups=4)._replace(archs=BY_HALVES),
        _more("all at once", heads, few, few, (16, 1024, 1024), (16,), seed, softcap=20.0, causal=True),
        _more("packed", (1, *heads[1:]), (1, *few[1:]), (1, *few[1:]), None, None, None, cu, cu, causal=True),
        _more("heads of 80", half, half, half),
        _case("heads of 256", 2, 16, 1024, 256, groups=4, causal=True)._replace(archs=()),
        _case("heads of 192", 2, 16, 1024, 192, causal=True)._replace(archs=()),
        *_of_caches(),
    ]


def _of_caches() -> list[Case]:
    """Heads of 64, 128 and 256, whole and in pages, shared out to several programs or not."""

    def one(name: str, width: int, *more: Any, n: int = 8, rows: int = 1, page: int = 0, **options: Any) -> Case:
        cache = (256, 2, page, width) if page else (n, 2, 4096, width)
        return Case(attention_decode, name, ((n, 16, rows, width), cache, cache, *more), options, tf32="cuda.matmul")

    def turning(name: str, tokens: int, width: int, *tables: Any, page: int = 0, **options: Any) -> Case:
        cache = (256, 2, page, width) if page else (8, 2, 4096, width)
        shapes = (
            (8, 16, tokens, width),
            *((8, 2, tokens, width),) * 2,
            cache,
            cache,
            *tables,
            new,
            *((table,) if page else ()),
        )
        return Case(rotary_append, name, shapes, options)

    lengths, table = Spec((8,), INT32), Spec((8, 64), INT32)
    new = Spec((8,), int64)
    return [
        one("a token, heads of 128", 128, lengths)._replace(archs=BY_HALVES),
        one("a token, heads of 64 in pages", 64, lengths, table, page=64)._replace(archs=()),
        one("several tokens, heads of 256, all at once", 256, lengths, table, (16,), rows=4, page=16, softcap=9.0, window=(999, 0))
        ._replace(archs=ONE_ARCH),
        one("many sequences", 128, n=1024)._replace(archs=()),
        Case(kv_append, "new tokens", ((8, 2, 4096, 128),) * 2 + ((8, 2, 1, 128),) * 2 + (new,)),
        Case(
            kv_append, "new tokens into pages", ((256, 2, 16, 64),) * 2 + ((8, 2, 4, 64),) * 2 + (new, table), archs=()
        ),
        turning("new tokens, turned", 1, 128, (4096, 64), (4096, 64)),
        turning("into pages, pairs of neighbours", 4, 64, (8, 4, 16), (8, 4, 16), page=16, interleaved=True)._replace(archs=ONE_ARCH),
    ]  # fmt: skip
