"""Norms of transformers and convolutional networks."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

from gpulayers.arrays import Spec, float32
from gpulayers.ops.norm import (
    add_layer_norm,
    add_rms_norm,
    batch_moments,
    batch_norm,
    conv_batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    rms_norm,
)

from .cases.case import CHANNELS_LAST, ONE_ARCH, Case, Other, sweep

_LENGTHS = 256, 1024, 4096, 16384, 65536


def _layer_norm(name: str, m: int, n: int, cpu: bool = False) -> Case:
    def theirs(x: Any, weight: Any, bias: Any) -> Any:
        return F.layer_norm(x, (n,), weight, bias)

    def liger(x: Any, weight: Any, bias: Any) -> Any:
        from liger_kernel.transformers.functional import liger_layer_norm

        return liger_layer_norm(x, weight, bias, 1e-5)

    shapes, options, others = ((m, n), (n,), (n,)), {"normalized_shape": (n,)}, {"liger": Other(liger, "liger_kernel")}
    return Case(layer_norm, f"{name} {m}×{n}", shapes, options, theirs, cpu=cpu, others=others)


def _rms_norm(name: str, m: int, n: int, cpu: bool = False) -> Case:
    def theirs(x: Any, weight: Any) -> Any:
        return F.rms_norm(x, (n,), weight, eps)

    def liger(x: Any, weight: Any) -> Any:
        from liger_kernel.transformers.functional import liger_rms_norm

        return liger_rms_norm(x, weight, eps, casting_mode="gemma", in_place=False)  # all in float32, dy left as it is

    eps, others = 1e-6, {"liger": Other(liger, "liger_kernel")}
    options = {"normalized_shape": (n,), "eps": eps}
    return Case(rms_norm, f"{name} {m}×{n}", ((m, n), (n,)), options, theirs, cpu=cpu, others=others)


def _add_layer_norm(name: str, m: int, n: int, cpu: bool = False) -> Case:
    def theirs(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        total = x + residual
        return F.layer_norm(total, (n,), weight, bias), total

    shapes, options = ((m, n), (m, n), (n,), (n,)), {"normalized_shape": (n,)}
    return Case(add_layer_norm, f"{name} {m}×{n}", shapes, options, theirs, cpu=cpu)


def _add_rms_norm(name: str, m: int, n: int, cpu: bool = False) -> Case:
    def theirs(x: Any, residual: Any, weight: Any) -> Any:
        total = x + residual
        return F.rms_norm(total, (n,), weight, 1e-6), total

    def liger(x: Any, residual: Any, weight: Any) -> Any:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm

        return liger_fused_add_rms_norm(x, residual, weight, 1e-6, casting_mode="gemma", in_place=False)

    others = {"liger": Other(liger, "liger_kernel")}
    options = {"normalized_shape": (n,), "eps": 1e-6}
    return Case(add_rms_norm, f"{name} {m}×{n}", ((m, n), (m, n), (n,)), options, theirs, cpu=cpu, others=others)


def _stream(name: str, m: int, n: int) -> Case:
    """What autocast makes of a sum between two blocks: a residual of 32 bits, x and y of 16."""

    def theirs(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        total = x + residual
        return F.layer_norm(total, (n,), weight, bias).to(torch.bfloat16), total

    wide = [Spec(shape, float32) for shape in ((m, n), (n,), (n,))]
    options = {"normalized_shape": (n,), "dtype": "bfloat16"}
    return Case(add_layer_norm, f"{name} {m}×{n}, stream", ((m, n), *wide), options, theirs, cpu=False, archs=ONE_ARCH)


def _batch_moments(name: str, *shape: int, cpu: bool = False) -> Case:
    def theirs(x: Any) -> Any:
        var, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
        return mean, var

    return Case(batch_moments, f"{name} {shape}", (shape,), {}, theirs, cpu=cpu)


def _batch_norm(name: str, *shape: int, cpu: bool = False) -> Case:
    def theirs(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        return F.batch_norm(x, mean, var, weight, bias, training=True)

    channels = (shape[1],)
    options = {"training": True}
    needs = ("x", "weight", "bias")
    return Case(batch_norm, f"{name} {shape}", (shape, *[channels] * 4), options, theirs, cpu=cpu, needs=needs)


def _end_of_block(name: str, *shape: int) -> Case:
    """relu(bn(x) + residual), the end of a ResNet's block."""

    def theirs(x: Any, weight: Any, bias: Any, mean: Any, var: Any, residual: Any) -> Any:
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=True) + residual)

    shapes, options = (shape, *[(shape[1],)] * 4, shape), {"training": True, "activation": "relu"}
    needs = ("x", "weight", "bias", "residual")
    return Case(batch_norm, f"{name} {shape}", shapes, options, theirs, cpu=False, needs=needs)


def _conv_batch_norm(name: str, x: tuple, o: int, k: int, added: bool = False, cpu: bool = False) -> Case:
    """relu(bn(conv(x)) + residual), what ResNet's blocks are made of."""

    def theirs(x: Any, w: Any, b: Any, gamma: Any, beta: Any, mean: Any, var: Any, *residual: Any) -> Any:
        y = F.batch_norm(F.conv2d(x, w, padding=k // 2), mean, var, gamma, beta, training=True)
        return F.relu(y + residual[0] if added else y)

    n, c, h, w = x
    shapes = (x, (o, c, k, k), None, *[(o,)] * 4, *[(n, o, h, w)] * added)
    options = {"padding": k // 2, "training": True, "activation": "relu"}
    needs = ("x", "weight", "gamma", "beta", *["residual"] * added)
    text = f"{name} {k}×{k} {c}→{o}, {n}×{h}²{', + residual' * added}, relu"
    flops = 2 * n * o * h * w * c * k * k
    return Case(conv_batch_norm, text, shapes, options, theirs, flops, cpu=cpu, needs=needs, tf32="cudnn.conv")


def _group_norm(name: str, groups: int, *shape: int, cpu: bool = False) -> Case:
    def theirs(x: Any, weight: Any, bias: Any) -> Any:
        return F.group_norm(x, groups, weight, bias)

    shapes, options = (shape, (shape[1],), (shape[1],)), {"num_groups": groups}
    return Case(group_norm, f"{name} {shape}, {groups} groups", shapes, options, theirs, cpu=cpu)


def _norm_silu(name: str, *shape: int, cpu: bool = False) -> Case:
    """silu(group_norm(x)), what a diffusion model's blocks begin with."""

    def theirs(x: Any, weight: Any, bias: Any) -> Any:
        return F.silu(F.group_norm(x, 32, weight, bias))

    shapes, options = (shape, (shape[1],), (shape[1],)), {"num_groups": 32, "activation": "silu"}
    return Case(group_norm, f"{name} {shape}, 32 groups, silu", shapes, options, theirs, cpu=cpu)


def _norm_relu(name: str, *shape: int, cpu: bool = False) -> Case:
    """relu(group_norm(x) + residual), what a residual block ends with."""

    def theirs(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
        return F.relu(F.group_norm(x, 32, weight, bias) + residual)

    shapes, options = (shape, (shape[1],), (shape[1],), shape), {"num_groups": 32, "activation": "relu"}
    return Case(group_norm, f"{name} {shape}, 32 groups, residual, relu", shapes, options, theirs, cpu=cpu)


def _instance_norm(name: str, *shape: int, cpu: bool = False) -> Case:
    def theirs(x: Any, weight: Any, bias: Any) -> Any:
        return F.instance_norm(x, None, None, weight, bias)

    shapes = shape, (shape[1],), (shape[1],)
    return Case(instance_norm, f"{name} {shape}", shapes, torch=theirs, cpu=cpu)


def _local_response_norm(name: str, *shape: int, cpu: bool = False) -> Case:
    def theirs(x: Any) -> Any:
        return F.local_response_norm(x, 5)

    return Case(local_response_norm, f"{name} {shape}", (shape,), {"size": 5}, theirs, cpu=cpu)


def _channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _of_samples() -> list[Case]:
    """Group, instance and local response norm, in both memory orders."""
    found = [
        _group_norm("small", 8, 4, 32, 16, 16, cpu=True),
        _group_norm("Stable Diffusion", 32, 2, 320, 64, 64),
        _group_norm("Stable Diffusion", 32, 2, 640, 32, 32),
        _group_norm("Stable Diffusion", 32, 2, 1280, 16, 16),
        _group_norm("Stable Diffusion, decoder", 32, 1, 128, 512, 512),
        _group_norm("ResNet-50 stage 1", 32, 128, 256, 56, 56),
        _group_norm("ResNet-50 stage 4", 32, 128, 2048, 7, 7),
        _norm_silu("small", 4, 32, 16, 16, cpu=True),
        _norm_silu("Stable Diffusion", 2, 320, 64, 64),
        _norm_silu("Stable Diffusion, decoder", 1, 128, 512, 512),
        _norm_relu("small", 4, 32, 16, 16, cpu=True),
        _norm_relu("ResNet-50 stage 1", 128, 256, 56, 56),
        _instance_norm("small", 4, 32, 16, 16, cpu=True),
        _instance_norm("style transfer", 8, 64, 256, 256),
        _local_response_norm("small", 4, 16, 13, 13, cpu=True),
        _local_response_norm("AlexNet", 128, 96, 55, 55),
    ]
    last = [c._replace(name=f"{c.name}, channels last", put=_channels_last, cpu=False) for c in found if not c.cpu]
    return found + last


def cases() -> list[Case]:
    return [
        _layer_norm("small", 64, 256, cpu=True),
        _layer_norm("GPT-2", 2048, 1024, cpu=True),
        _layer_norm("GPT-2, 32 sequences", 32768, 768),
        _layer_norm("ViT-L", 50432, 1024),
        _layer_norm("GPT-3 13B", 8192, 5120)._replace(headline=True),
        _layer_norm("wide", 4096, 65536),
        _layer_norm("few long rows", 16, 4194304),
        _batch_moments("small", 8, 64, 28, 28, cpu=True),
        _batch_moments("ResNet-50", 128, 256, 56, 56),
        _rms_norm("small", 64, 256, cpu=True),
        _rms_norm("TinyLlama", 1024, 2048, cpu=True),
        _rms_norm("Llama-3 8B", 8192, 4096)._replace(headline=True),
        _rms_norm("Llama-3 70B", 8192, 8192),
        _rms_norm("Qwen-3 heads", 262144, 128),
        _add_layer_norm("GPT-2", 2048, 1024, cpu=True),
        _add_layer_norm("GPT-3 13B", 8192, 5120),
        _add_rms_norm("TinyLlama", 1024, 2048, cpu=True),
        _add_rms_norm("Llama-3 8B", 8192, 4096),
        _batch_norm("classifier", 256, 512, cpu=True),
        _batch_norm("ResNet-18 stage 3", 16, 256, 14, 14, cpu=True),
        _batch_norm("ResNet-50 stem", 128, 64, 112, 112),
        _batch_norm("ResNet-50 stage 1", 128, 256, 56, 56)._replace(headline=True),
        _batch_norm("ResNet-50 stage 4", 128, 2048, 7, 7),
        _end_of_block("ResNet-50 stage 1, + residual, relu", 128, 256, 56, 56),
        _conv_batch_norm("ResNet-18 stage 3", (8, 256, 14, 14), 256, 3, cpu=True),
        *[
            _conv_batch_norm(*case)._replace(put=_channels_last, headline=case[2] == 256)
            for case in (
                ("ResNet-50 stage 1", (128, 64, 56, 56), 64, 3),
                ("ResNet-50 stage 1", (128, 64, 56, 56), 256, 1, True),
                ("ResNet-50 stage 4", (128, 512, 7, 7), 2048, 1, True),
            )
        ],
        *_of_samples(),
        *sweep("row length, 4,096 rows", [(n, _layer_norm("", 4096, n)) for n in _LENGTHS]),
        *sweep("row length, 4,096 rows", [(n, _rms_norm("", 4096, n)) for n in _LENGTHS]),
    ]


IMAGES = 64, 256, 56, 56
EPILOGUES: tuple = (
    (CHANNELS_LAST, "relu", True, (80, 90, 100)),
    (CHANNELS_LAST, "relu", False, ONE_ARCH),
    (CHANNELS_LAST, "silu", True, ONE_ARCH),
    (CHANNELS_LAST, None, True, ONE_ARCH),
)
"""(memory order, activation, with a residual, architectures)"""


def audits() -> list[Case]:
    """The longest rows of each kernel; channels first and last, with what may follow a batch norm."""
    found = []
    for m, n, archs in (
        *((4096, n, ONE_ARCH) for n in (1000, 8192, 65536)),
        *((m, n, (80, 90, 100)) for m, n in ((4096, 16384), (4, 1 << 20))),
    ):
        weight = Spec((n,), float32)
        options = {"normalized_shape": (n,)}
        found.append(Case(layer_norm, f"{m}×{n}", ((m, n), weight, weight), options, archs=archs))
    found.append(_rms_norm("rows", 4096, 8192))
    found.append(_batch_moments("of a batch", 32, 256, 56, 56))
    for m, n, archs in ((4096, 8192, (80, 90, 100)), (4096, 65536, ONE_ARCH), (4, 1 << 20, ONE_ARCH)):
        weight = Spec((n,), float32)
        options = {"normalized_shape": (n,)}
        found.append(Case(add_layer_norm, f"{m}×{n}", ((m, n), (m, n), weight, weight), options, archs=archs))
    found.append(_stream("rows", 4096, 8192))
    channels = [Spec((256,), float32)] * 4
    for order, training in itertools.product((None, CHANNELS_LAST), (True, False)):
        options = {"training": training}
        needs = ("x", "weight", "bias")
        archs = (80, 90, 100) if training else ONE_ARCH
        found.append(Case(batch_norm, "images", (IMAGES, *channels), options, needs=needs, order=order, archs=archs))
    for name, shape, order in (
        ("a program a group", IMAGES, None),
        ("several programs a group", (2, 256, 56, 56), None),
        ("images", IMAGES, CHANNELS_LAST),
        ("groups across tiles", (2, 320, 64, 64), CHANNELS_LAST),
    ):
        arrays = (shape, *[Spec((shape[1],), float32)] * 2)
        for activation in (None, "silu") if shape[1] == 256 else ("silu",):
            options = {"num_groups": 32, "activation": activation}
            archs = ONE_ARCH if activation is None or order is None else (80, 90, 100)
            found.append(Case(group_norm, name, arrays, options, order=order, archs=archs))
        if shape[1] == 256:
            options = {"num_groups": 32, "activation": "gelu"}
            found.append(Case(group_norm, name, (*arrays, shape), options, order=order, archs=ONE_ARCH))
    found.append(Case(instance_norm, "images", (IMAGES, *channels), needs=("x",), archs=ONE_ARCH))
    for order in (None, CHANNELS_LAST):
        found.append(Case(local_response_norm, "images", (IMAGES,), {"size": 5}, order=order, archs=ONE_ARCH))
    for activation, added, biased, training in (
        ("relu", True, False, True),
        ("silu", False, True, True),
        ("relu", True, True, False),
    ):
        case = _conv_batch_norm("images", (64, 64, 56, 56), 256, 1, added)
        shapes = *case.shapes[:2], (256,) if biased else None, *channels, *case.shapes[7:]
        options = case.options | {"activation": activation, "training": training}
        needs = (*(case.needs or ()), *["bias"] * biased) if training else ()
        found.append(
            case._replace(shapes=shapes, options=options, needs=needs, order=CHANNELS_LAST, archs=ONE_ARCH, tf32="")
        )
    for order, activation, added, archs in EPILOGUES:
        shapes = (IMAGES, *channels, *[IMAGES] * added)
        options = {"training": True, "activation": activation}
        needs = ("x", "weight", "bias", *["residual"] * added)
        found.append(Case(batch_norm, "images", shapes, options, needs=needs, order=order, archs=archs))
    return found
