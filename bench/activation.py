"""Activations on the shapes of convolutional networks and transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpulayers.ops import activation as ops

from .cases.case import CHANNELS_LAST, ONE_ARCH, Case, Other, Seeds, sweep

_ALL: list[tuple[Any, dict, Callable, float]] = [
    (ops.relu, {}, F.relu, 8.0),
    (ops.leaky_relu, {}, F.leaky_relu, 8.0),
    (ops.gelu, {}, F.gelu, 12.0),
    (ops.gelu, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh"), 8.0),
    (ops.silu, {}, F.silu, 8.0),
    (ops.quick_gelu, {}, lambda x: x * torch.sigmoid(1.702 * x), 8.0),
    (ops.sigmoid, {}, torch.sigmoid, 8.0),
    (ops.tanh, {}, torch.tanh, 8.0),
    (ops.softplus, {}, F.softplus, 8.0),
    (ops.elu, {}, F.elu, 8.0),
    (ops.hardswish, {}, F.hardswish, 8.0),
    (ops.mish, {}, F.mish, 8.0),
    (ops.relu6, {}, F.relu6, 8.0),
    (ops.relu_squared, {}, lambda x: F.relu(x).square(), 8.0),
    (ops.hardtanh, {}, F.hardtanh, 8.0),
    (ops.hardsigmoid, {}, F.hardsigmoid, 8.0),
    (ops.hardshrink, {}, F.hardshrink, 8.0),
    (ops.softshrink, {}, F.softshrink, 8.0),
    (ops.threshold, {"threshold": 0.1, "value": 20.0}, lambda x: F.threshold(x, 0.1, 20.0), 8.0),
    (ops.logsigmoid, {}, F.logsigmoid, 8.0),
    (ops.tanhshrink, {}, F.tanhshrink, 8.0),
    (ops.softsign, {}, F.softsign, 8.0),
    (ops.celu, {}, F.celu, 8.0),
    (ops.selu, {}, F.selu, 8.0),
]


def _rrelu(x: Any, seed: Any) -> Any:
    return F.rrelu(x, training=True)


def _nearest_rrelu(got: Any, of: Any, x: Any) -> Any:
    """Below 0 any slope in [1/8, 1/3] may have been drawn."""
    low, high = torch.minimum(of / 8, of / 3), torch.maximum(of / 8, of / 3)
    return torch.where(x < 0, got.clamp(low, high), of)


def _swiglu(a: Any, b: Any) -> Any:
    return F.silu(a) * b


def _liger(a: Any, b: Any) -> Any:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(a, b)


def cases() -> list[Case]:
    rows = ((8192, 14336), (8192, 14336))
    others = {"liger": Other(_liger, "liger_kernel")}
    gated = Case(ops.gated, "Llama-3 8B SwiGLU 8192×14336", rows, {}, _swiglu, cpu=False, headline=True, others=others)
    found = [gated, Case(ops.gated, "small SwiGLU", ((64, 256), (64, 256)), {}, _swiglu, cpu=False)]
    for op, options, theirs, most in _ALL:
        name = " ".join(["GPT-2 MLP 2048×3072", *map(str, options.values())])
        found.append(Case(op, name, ((2048, 3072),), options, theirs, most=most))
        if op is not ops.gelu:
            large = Case(op, "Llama-3 8B MLP 8192×14336", ((8192, 14336),), options, theirs, cpu=False)
            found.append(large._replace(headline=op is ops.silu))
    for op, theirs in ((ops.relu, F.relu), (ops.silu, F.silu)):
        found.append(Case(op, "small 64×256", ((64, 256),), {}, theirs))
        found.append(Case(op, "ResNet-50 stage 1, 64×256×56²", ((64, 256, 56, 56),), {}, theirs, cpu=False))
    for options, theirs in (({}, F.gelu), ({"approximate": "tanh"}, partial(F.gelu, approximate="tanh"))):
        name = " ".join(["GPT-3 13B MLP 8192×20480", *options.values()])
        found.append(Case(ops.gelu, name, ((8192, 20480),), options, theirs, cpu=False, headline=not options))
    found += sweep("elements", [(n, Case(ops.silu, "", ((n,),), {}, F.silu)) for n in (2**k for k in range(12, 29, 4))])
    rrelu = {"training": True}
    for name, shape, cpu in (("GPT-2 MLP", (2048, 3072), True), ("large", (8192, 14336), False)):
        size = "×".join(map(str, shape))
        drawn = (shape, Seeds())
        found.append(Case(ops.prelu, f"{name} {size}, one weight", (shape, (1,)), {}, F.prelu, cpu=cpu))
        found.append(Case(ops.rrelu, f"{name} {size}", drawn, rrelu, _rrelu, cpu=cpu, nearest=_nearest_rrelu))
        found.append(Case(ops.glu, f"{name} {size}", (shape,), {}, F.glu, cpu=cpu))
    image = (8, 64, 56, 56)
    found.append(Case(ops.prelu, "ResNet-sized 8×64×56²", (image, (64,)), {}, F.prelu))
    found.append(Case(ops.glu, "convolutional 8×64×56²", (image,), {"axis": 1}, lambda x: F.glu(x, 1)))
    return found


def audits() -> list[Case]:
    """The activation with most temporaries everywhere, the rest (the same code but for the value) for one."""
    rows, image = ((4096, 8192),), (64, 256, 56, 56)
    one: dict[str, Any] = {"archs": ONE_ARCH}
    found = [Case(op, "rows", rows, options, **({} if op is ops.softplus else one)) for op, options, *_ in _ALL]
    last: dict[str, Any] = {"order": CHANNELS_LAST, **one}
    return [
        *found,
        Case(ops.prelu, "channels first", (image, (256,))),
        Case(ops.prelu, "channels last", (image, (256,)), **last),
        Case(ops.prelu, "one weight", ((4096, 8192), (1,)), **one),
        Case(ops.rrelu, "rows", (*rows, Seeds()), {"training": True}),
        Case(ops.rrelu, "channels last", (image, Seeds()), {"training": True}, **last),
        Case(ops.glu, "long halves", ((8192, 28672),)),
        Case(ops.gated, "GeGLU of halves", ((8192, 28672),), {"activation": "gelu"}),
        Case(ops.gated, "ReGLU", ((8192, 14336), (8192, 14336)), {"activation": "relu"}, **one),
        Case(ops.glu, "halves of pixels", (image,), {"axis": 1}, **last),
    ]
