"""Activations on the shapes of convolutional networks and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpulayers.ops import activation as ops

from ._case import Case

_ALL: list[tuple[Any, dict, Callable, float]] = [
    (ops.relu, {}, F.relu, 8.0),
    (ops.leaky_relu, {}, F.leaky_relu, 8.0),
    (ops.gelu, {}, F.gelu, 12.0),
    (ops.gelu, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh"), 8.0),
    (ops.silu, {}, F.silu, 8.0),
    (ops.sigmoid, {}, torch.sigmoid, 8.0),
    (ops.tanh, {}, torch.tanh, 8.0),
    (ops.softplus, {}, F.softplus, 8.0),
    (ops.elu, {}, F.elu, 8.0),
    (ops.hardswish, {}, F.hardswish, 8.0),
    (ops.mish, {}, F.mish, 8.0),
]


def cases() -> list[Case]:
    found = []
    for op, options, theirs, most in _ALL:
        name = " ".join(["GPT-2 MLP 2048×3072", *map(str, options.values())])
        found.append(Case(op, name, ((2048, 3072),), options, theirs, most=most))
    for op, theirs in ((ops.relu, F.relu), (ops.silu, F.silu)):
        found.append(Case(op, "small 64×256", ((64, 256),), {}, theirs))
        found.append(Case(op, "ResNet-50 stage 1, 64×256×56²", ((64, 256, 56, 56),), {}, theirs, cpu=False))
        found.append(Case(op, "Llama-3 8B MLP 8192×14336", ((8192, 14336),), {}, theirs, cpu=False))
    return found
