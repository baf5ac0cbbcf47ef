"""Rotary position embeddings of q and k as models have them."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.ops.rotary import rotary

from .cases.case import ONE_ARCH, Case, Other


def _halves(x: Any, cos: Any, sin: Any) -> Any:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _theirs(q: Any, cos: Any, sin: Any, k: Any = None) -> Any:
    found = tuple(_halves(x, cos, sin) for x in (q, k) if x is not None)
    return found if len(found) > 1 else found[0]


def _liger(q: Any, cos: Any, sin: Any, k: Any) -> Any:
    from liger_kernel.ops.rope import LigerRopeFunction

    both = (torch.cat([t, t], -1)[None] for t in (cos, sin))
    return LigerRopeFunction.apply(q, k, *both)


def _case(name: str, n: int, heads: int, keys: int, length: int, dim: int, cpu: bool = False, **options: Any) -> Case:
    table = (length, dim // 2)
    shapes = (n, heads, length, dim), table, table, (n, keys, length, dim)
    theirs = None if options else _theirs
    others = {"liger": Other(_liger, "liger_kernel")} if not options else {}
    title = f"{name}, {n}×{heads}+{keys}×{length}×{dim}"
    return Case(rotary, title, shapes, options, theirs, cpu=cpu, others=others)


def cases() -> list[Case]:
    return [
        _case("small", 1, 4, 2, 64, 32, cpu=True),
        _case("Llama-3 8B", 2, 32, 8, 4096, 128)._replace(headline=True),
        _case("one token", 64, 32, 8, 1, 128),
    ]


def audits() -> list[Case]:
    return [
        _case("Llama-3 8B", 2, 32, 8, 4096, 128),
        _case("pairs of neighbours", 2, 32, 8, 4096, 128, interleaved=True)._replace(archs=ONE_ARCH),
        Case(rotary, "part", ((2, 16, 2048, 96), (2048, 16), (2048, 16)), {}, archs=ONE_ARCH),
    ]
