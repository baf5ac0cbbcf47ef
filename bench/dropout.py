"""Dropout on activations of transformers and classifiers."""

from __future__ import annotations

import torch.nn.functional as F

from gpulayers.ops.dropout import dropout

from ._case import CHANNELS_LAST, ONE_ARCH, Case, Seeds


def _case(name: str, *shape: int, cpu: bool = False) -> Case:
    options = {"p": 0.1}
    return Case(dropout, name, (shape, Seeds()), options, lambda x, seed: F.dropout(x, 0.1), cpu=cpu)


def cases() -> list[Case]:
    return [
        _case("small 64×256", 64, 256, cpu=True),
        _case("GPT-2 residual 2048×768", 2048, 768, cpu=True),
        _case("GPT-2 residual 16384×768", 16384, 768),
        _case("Llama-sized 8192×14336", 8192, 14336),
    ]


def audits() -> list[Case]:
    image = _case("channels last", 64, 256, 56, 56)
    return [_case("rows", 4096, 8192), image._replace(order=CHANNELS_LAST, archs=ONE_ARCH)]
