"""Linear: ``torch.nn.Linear`` and ``torch.nn.functional.linear``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import linear as ops
from gpulayers.torch import _autocast, _epilogue
from gpulayers.torch._arguments import held
from gpulayers.torch._matmul import Bilinear as Bilinear
from gpulayers.torch._matmul import addmm as addmm
from gpulayers.torch._matmul import baddbmm as baddbmm
from gpulayers.torch._matmul import bilinear as bilinear
from gpulayers.torch._matmul import bmm as bmm
from gpulayers.torch._matmul import einsum as einsum
from gpulayers.torch._matmul import matmul as matmul
from gpulayers.torch._op import TorchOp


def _flops(x: Sequence[int], weight: Sequence[int], y: Sequence[int]) -> dict[str, int]:
    return dict.fromkeys(("y", "x", "weight"), 2 * math.prod(x) * math.prod(weight[:-1]))


def _twin(x: Tensor, weight: Tensor, bias: Any, activation: str | None = None) -> Tensor:
    return _epilogue.applied(activation, F.linear(x, weight, bias))


def _again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    """By y, or by z computed again from what it depends on."""
    (x, weight), activation = (saved.get(k) for k in ("x", "weight")), options["activation"]
    kept = saved.get("y")
    if activation is not None and kept is None:
        if x is None:
            raise NotImplementedError(
                f"linear: the gradient of a gradient through activation={activation!r} needs a weight that requires one"
            )
        kept = F.linear(x, weight, saved.get("bias"))
    dz = _epilogue.gradient(activation, dys[0], kept)
    rows = dz.reshape(-1, dz.shape[-1])
    return [
        None if weight is None else dz @ weight,
        None if x is None else rows.t() @ x.reshape(-1, x.shape[-1]),
        None if inputs[2] is None else rows.sum(0),
    ]


_linear = TorchOp(
    ops.linear, _twin, "str? activation", buffers=("z",), again=_again, cast=_autocast.LOWER, flops=_flops, direct=True
)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """y = f(x Wᵀ + b); input: (…, in), weight: (out, in) or (in,), bias: (out,). As ``torch.nn.functional.linear``.

    activation: f, applied in the same pass, by its name in ``gpulayers.ops.activation.ACTIVATIONS`` with torch's default
    numbers; None for none.
    """
    return _linear(input, weight, bias, activation)


def _several(x: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, w, b) for w, b in zip(given[:3], given[3:]) if w is not None)


def _flops_of_several(x: Sequence[int], *shapes: Sequence[int]) -> dict[str, int]:
    each = [2 * math.prod(x) * weight[0] for weight in shapes[:-1]]
    return {"y": sum(each), "x": sum(each)} | dict(zip(("weight", "weight_2", "weight_3"), each))


_linears = TorchOp(
    ops.linears,
    _several,
    outputs=("y", "y_2", "y_3"),
    cast=_autocast.LOWER,
    flops=_flops_of_several,
    counted=4,
    direct=True,
)


def linears(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """y_i = x W_iᵀ + b_i for two or three weights, in one launch: queries, keys and values, or a gated unit's two halves.

    input: (…, in), weights: (out_i, in) each, biases: (out_i,) or None each; None for none. Weights lie where they are, and
    the input's gradient is one sum. Raises ValueError for another number of weights or of biases.
    """
    if not 2 <= len(weights) <= 3 or (biases is not None and len(biases) != len(weights)):
        came = f"{len(weights)} and {'none' if biases is None else len(biases)}"
        raise ValueError(f"linears: weights: the rule is two or three weights, and as many biases or None; got {came}")
    none = [None] * (3 - len(weights))
    ys = _linears(input, *weights, *none, *(biases or [None] * len(weights)), *none)
    return ys[: len(weights)]  # a traced op gives three always


class Linear(nn.Linear):
    """``torch.nn.Linear`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, held(self, "weight"), held(self, "bias"))


class LazyLinear(nn.LazyLinear):
    """``torch.nn.LazyLinear``: its first call makes it a Linear over gpulayers' kernels."""

    cls_to_become = Linear  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, held(self, "weight"), held(self, "bias"))


class Flatten(nn.Flatten):
    """``torch.nn.Flatten``: a view, nothing to compute."""
