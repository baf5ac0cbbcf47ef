"""Tables of language models and recommenders."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from gpulayers.ops.embedding import embedding

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


def cases() -> list[Case]:
    return [
        _embedding("words", 4096, 256, 2048, cpu=True),
        _embedding("GPT-2", 50257, 768, 512, cpu=True),
        _embedding("GPT-2", 50257, 768, 16384),
        _embedding("Llama-3", 128256, 4096, 8192)._replace(headline=True),
        _embedding("positions", 1024, 768, 16384),
    ]


def audits() -> list[Case]:
    words, positions = cases()[2], cases()[4]
    return [words, positions._replace(archs=ONE_ARCH)]
