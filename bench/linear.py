"""Linear layers of transformers, classifiers and small models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpulayers.ops.linear import linear, linears, matmul

from .cases.case import ONE_ARCH, Case, sweep


def _case(name: str, m: int, k: int, n: int, *, bias: bool = True, cpu: bool = False, activation: Any = None) -> Case:
    theirs = F.linear
    if activation is not None:

        def theirs(*inputs: Any) -> Any:
            return getattr(F, activation)(F.linear(*inputs))

    shapes = ((m, k), (n, k), (n,) if bias else None)
    options = {"activation": activation} if activation else {}
    flops = 2 * m * n * k
    return Case(linear, f"{name} {m}×{k}→{n}", shapes, options, theirs, flops, cpu, most=1.5, tf32="cuda.matmul")


def _apart(x: Any, *weights: Any) -> Any:
    return tuple(F.linear(x, w) for w in weights)


def _several(name: str, m: int, k: int, *outs: int, cpu: bool = False, biases: bool = False) -> Case:
    weights = tuple((n, k) for n in outs)
    if biases:
        weights += (*[None] * (3 - len(outs)), *((n,) for n in outs))
    flops, title = 2 * m * k * sum(outs), f"{name} {m}×{k}→{'+'.join(map(str, outs))}"
    theirs = None if biases else _apart
    return Case(linears, title, ((m, k), *weights), {}, theirs, flops, cpu, most=1.5, tf32="cuda.matmul")


def _batched(name: str, batch: int, heads: int, length: int, width: int, cpu: bool = False) -> Case:
    shapes = ((batch, heads, length, width), (batch, heads, width, length))
    title, flops = f"{name} of {batch}·{heads} heads {length}×{width}", 2 * batch * heads * length**2 * width
    return Case(matmul, title, shapes, {}, torch.matmul, flops, cpu, most=1.5, tf32="cuda.matmul")


def cases() -> list[Case]:
    return [
        _case("tutorial", 64, 784, 128, cpu=True, activation="relu")._replace(most=8.0),
        _case("ResNet-50 classifier", 64, 2048, 1000, cpu=True),
        _case("hidden", 256, 1024, 1024, cpu=True),
        _case("GPT-2 MLP", 512, 768, 3072, cpu=True, activation="gelu"),
        _case("GPT-2 MLP", 16384, 768, 3072, activation="gelu"),
        _case("GPT-2 queries, keys, values", 16384, 768, 2304),
        _case("square", 8192, 8192, 8192, bias=False),
        _case("Llama-3 8B attention out", 8192, 4096, 4096, bias=False),
        _case("Llama-3 8B up", 8192, 4096, 14336, bias=False)._replace(headline=True),
        _case("Llama-3 8B down", 8192, 14336, 4096, bias=False),
        _case("Llama-3 8B vocabulary", 4096, 4096, 128256, bias=False),
        _case("Llama-3 8B decoding", 16, 4096, 14336, bias=False),
        _several("small heads", 256, 256, 256, 64, 64, cpu=True),
        _several("GPT-2 queries, keys, values", 16384, 768, 768, 768, 768),
        _several("Llama-3 8B queries, keys, values", 8192, 4096, 4096, 1024, 1024),
        _several("Llama-3 8B gate, up", 8192, 4096, 14336, 14336),
        _batched("scores", 8, 12, 128, 64, cpu=True),
        _batched("scores", 8, 16, 2048, 128),
        *sweep("square matrices", [(n, _case("", n, n, n, bias=False)) for n in (512, 1024, 2048, 4096, 8192)]),
    ]


def audits() -> list[Case]:
    """The largest tiles with an epilogue, and without one in backward; a split K with few rows; dbias with dweight; several
    weights."""
    heads = (96, 1024, 64)
    return [
        Case(matmul, "heads", (heads, (96, 64, 1024))),
        Case(matmul, "odd", ((7, 250, 99), (7, 99, 63), (7, 250, 63)), {"alpha": 0.5}, archs=ONE_ARCH),
        _case("many rows", 8192, 4096, 14336, activation="gelu"),
        _case("few rows", 16, 4096, 14336, activation="softplus")._replace(archs=ONE_ARCH),
        _case("GPT-2 queries, keys, values", 16384, 768, 2304)._replace(archs=ONE_ARCH),
        _case("odd columns", 16384, 768, 50257, activation="gelu")._replace(archs=(100,), needs=()),
        _several("queries, keys, values", 16384, 768, 768, 768, 768, biases=True),
        _several("gate, up", 8192, 4096, 14336, 14336)._replace(archs=ONE_ARCH),
    ]
