"""Dropout on activations of transformers and classifiers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpulayers.ops.dropout import dropout

from .cases.case import CHANNELS_LAST, ONE_ARCH, Case, Seeds

_P = 0.1


def _theirs(x: Any, seed: Any) -> Any:
    return F.dropout(x, _P)


def _nearest(got: Any, of: Any, x: Any) -> Any:
    """Each element may have been kept or not."""
    kept = of / (1 - _P)
    return torch.where(got.abs() < kept.abs() / 2, 0.0, kept)


def _case(name: str, *shape: int, cpu: bool = False, headline: bool = False, **kind: Any) -> Case:
    drawn = (shape, Seeds())
    return Case(dropout, name, drawn, {"p": _P, **kind}, _theirs, cpu=cpu, headline=headline, nearest=_nearest)


def cases() -> list[Case]:
    return [
        _case("small 64×256", 64, 256, cpu=True),
        _case("GPT-2 residual 2048×768", 2048, 768, cpu=True),
        _case("GPT-2 residual 16384×768", 16384, 768),
        _case("GPT-3 13B residual 8192×5120", 8192, 5120, headline=True),
        _case("Llama-sized 8192×14336", 8192, 14336),
    ]


def audits() -> list[Case]:
    kinds = [
        _case("alpha", 4096, 4096, alpha=True),
        _case("of features", 64, 256, 56, 56, features=2),
        _case("of features, channels last", 64, 256, 56, 56, features=2)._replace(order=CHANNELS_LAST),
    ]
    image = _case("channels last", 64, 256, 56, 56)
    return [_case("rows", 4096, 8192), image._replace(order=CHANNELS_LAST, archs=ONE_ARCH), *kinds]
