"""Tables of language models and recommenders."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from gpulayers.ops.embedding import embedding, embedding_bag, one_hot

from .cases.case import ONE_ARCH, Case, Labels


def _embedding(name: str, rows: int, width: int, tokens: int, cpu: bool = False) -> Case:
    def theirs(weight: Any, indices: Any) -> Any:
        return F.embedding(indices, weight)

    title = f"{name}, {tokens} of {rows}×{width}"
    most = 1.2
    return Case(
        embedding,
        title,
        ((rows, width), Labels((tokens,), rows)),
        {},
        theirs,
        cpu=cpu,
        most=most,
        hardly_read=("weight",),
    )


def _bag(name: str, rows: int, width: int, bags: int, length: int, mode: str = "sum", cpu: bool = False) -> Case:
    def theirs(weight: Any, indices: Any) -> Any:
        return F.embedding_bag(indices, weight, mode=mode)

    title, shapes = f"{name}, {bags}×{length} of {rows}×{width}", ((rows, width), Labels((bags, length), rows))
    return Case(embedding_bag, title, shapes, {"mode": mode}, theirs, cpu=cpu, hardly_read=("weight",))


def _one_hot(name: str, tokens: int, classes: int, cpu: bool = False) -> Case:
    title, theirs = f"{name}, {tokens} of {classes}", lambda indices: F.one_hot(indices, classes)
    return Case(one_hot, title, (Labels((tokens,), classes),), {"num_classes": classes}, theirs, cpu=cpu)


def cases() -> list[Case]:
    return [
        _bag("text", 4096, 128, 256, 24, "mean", cpu=True),
        _bag("a recommender's", 1_000_000, 128, 16384, 32),
        _embedding("words", 4096, 256, 2048, cpu=True),
        _embedding("GPT-2", 50257, 768, 512, cpu=True),
        _embedding("GPT-2", 50257, 768, 16384),
        _embedding("Llama-3", 128256, 4096, 8192)._replace(headline=True),
        _embedding("positions", 1024, 768, 16384),
        _one_hot("classes", 4096, 1000, cpu=True),
        _one_hot("words", 16384, 50257),
    ]


def audits() -> list[Case]:
    found = [_embedding("GPT-2", 50257, 768, 16384), _embedding("positions", 1024, 768, 16384)._replace(archs=ONE_ARCH)]
    for mode in ("sum", "mean", "max"):
        found.append(_bag(mode, 100_000, 128, 16384, 32, mode)._replace(archs=ONE_ARCH))
    factors = ((100_000, 128), Labels((65536,), 100_000), Labels((4096,), 1), (65536,))
    found.append(_one_hot("words", 16384, 50304))
    return [*found, Case(embedding_bag, "offsets and factors", factors, {"mode": "sum"}, archs=ONE_ARCH)]
