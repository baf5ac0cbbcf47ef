"""Optimizers over the parameters of whole models: one update of every array."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpulayers.kernels._updates import adam_numbers, lamb_numbers, lars_numbers, rmsprop_numbers

from gpulayers.arrays import Spec, bfloat16, float32
from gpulayers.ops import optim as ops

from .cases.case import ONE_ARCH, Case, Seeds, Squares


def _transformer(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
    return [(vocabulary, width), *block * layers]


def _way(params: Any) -> dict[str, bool]:
    """Torch's fastest: its fused kernel on a GPU; where it compiles, the list's own operations, which Inductor fuses."""
    fused = params[0].is_cuda and not torch.compiler.is_compiling()
    return {"foreach": not fused, "fused": fused}


def _adamw(params: Any, grads: Any, m: Any, v: Any) -> None:
    # torch counts up first. It keeps them from step to step: here one launch makes them all, or none where it compiles.
    compiling, device = torch.compiler.is_compiling(), params[0].device
    steps = (
        [torch.zeros((), device=device) for _ in params] if compiling else [*torch.zeros(len(params), device=device)]
    )
    torch.optim._functional.adamw(
        params, grads, m, v, [], steps, **_way(params), capturable=compiling,  # else it would need the steps' values
        amsgrad=False, beta1=0.9, beta2=0.999, lr=1e-3, weight_decay=1e-2, eps=1e-8, maximize=False,
    )  # fmt: skip


def _lamb(params: Any, grads: Any, m: Any, v: Any) -> None:
    """torch has none: by its operations on lists, the first step with ``_lamb_options``."""
    torch._foreach_lerp_(m, grads, 0.1)
    torch._foreach_mul_(v, 0.999)
    torch._foreach_addcmul_(v, grads, grads, 0.001)
    root = torch._foreach_sqrt(torch._foreach_div(v, 0.001))
    taken = torch._foreach_div(torch._foreach_div(m, 0.1), torch._foreach_add(root, 1e-6))
    torch._foreach_add_(taken, params, alpha=0.01)
    sizes = zip(torch._foreach_norm(params), torch._foreach_norm(taken))
    ratios = [torch.where((w == 0) | (d == 0), 1.0, w / d) for w, d in sizes]
    torch._foreach_mul_(taken, ratios)
    torch._foreach_add_(params, taken, alpha=-1e-3)


def _sgd(params: Any, grads: Any, m: Any) -> None:
    torch.optim._functional.sgd(
        params, grads, list(m), **_way(params),
        weight_decay=0.0, momentum=0.9, lr=1e-3, dampening=0.0, nesterov=False, maximize=False,
    )  # fmt: skip


def _norm(grads: Any) -> Any:
    norm = torch.nn.utils.get_total_norm(grads).reshape(1)
    return norm, torch.clamp(1.0 / (norm + 1e-6), max=1.0)


def _adam_options() -> dict[str, Any]:
    """AdamW's first step, as ``_adamw`` makes it."""
    numbers = adam_numbers(1, 1e-3, (0.9, 0.999), 1e-8)[1]
    return {"rule": "adam", "numbers": numbers, "shrink": 1 - 1e-3 * 1e-2}


def _lamb_options() -> dict[str, Any]:
    rule, options = lamb_numbers(1, (0.9, 0.999), 1e-6, 0.01, math.inf)
    return {"rule": rule, **options}


def cases() -> list[Case]:
    found = []
    for name, shapes, cpu in (
        ("tutorial network, 0.1M", [(128, 784), (128,), (10, 128), (10,)], True),
        ("small transformer, 4M", _transformer(256, 4, 4096), True),
        ("GPT-2, 124M", _transformer(768, 12, 50257), False),
        ("539M", _transformer(1536, 16, 50257), False),
    ):
        squares, headline = [Squares(s) for s in shapes], name.startswith("GPT-2")
        adamw = (shapes, shapes, shapes, squares)
        found.append(Case(ops.adamw_update, name, adamw, {}, _adamw, cpu=cpu, headline=headline))
        found.append(Case(ops.grad_norm, name, (shapes,), {"max_norm": 1.0}, _norm, cpu=cpu))
        if name.startswith("small"):
            found.append(Case(ops.optimizer_update, name, adamw, _adam_options(), _adamw, cpu=cpu))
            found.append(Case(ops.layerwise_update, f"{name}, LAMB", adamw, _lamb_options(), _lamb, cpu=cpu))
        found.append(Case(ops.sgd_update, name, (shapes,) * 3, {"momentum": 0.9}, _sgd, cpu=cpu))
    return found


def audits() -> list[Case]:
    """Parameters of any type, their state in float32; the rules that a kernel has for 16-bit parameters."""
    shapes = [(4096, 4096), (4096,), (33, 7)]
    state, halves = ([Spec(s, t) for s in shapes] for t in (float32, bfloat16))
    scale = Spec((1,), float32)
    adam = _adam_options()
    rmsprop = {"rule": "rmsprop_centered_momentum", "numbers": rmsprop_numbers(1e-3, 0.99, 1e-8, 0.9, True)[1]}
    return [
        Case(ops.adamw_update, "state in float32", (shapes, shapes, state, state)),
        Case(ops.sgd_update, "nesterov", (shapes, shapes, state), {"momentum": 0.9, "nesterov": True}),
        Case(ops.sgd_update, "without momentum", (shapes, shapes, None), archs=ONE_ARCH),
        Case(ops.optimizer_update, "Adam, masters", (shapes, shapes, state, state, None, state), adam),
        Case(
            ops.optimizer_update,
            "Adam, rounded by chance",
            (*[halves] * 4, None, None, scale, Seeds()),
            adam,
            archs=ONE_ARCH,
        ),
        Case(ops.optimizer_update, "RMSprop", (shapes, shapes, state, state, state), rmsprop, archs=ONE_ARCH),
        Case(ops.layerwise_update, "LAMB, masters", (shapes, shapes, state, state, state, scale), _lamb_options()),
        Case(
            ops.layerwise_update,
            "LARS",
            (shapes, shapes, state),
            lars_numbers(0.9, 1e-4, 1e-3, 1e-8)[1],
            archs=ONE_ARCH,
        ),
        Case(ops.grad_norm, "parameters", (shapes,), {"max_norm": 1.0}),
    ]
