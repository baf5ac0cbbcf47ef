"""Linear by torch's BLAS."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpulayers.arrays import Spec

from .._linears import BIASES, WEIGHTS, kept, named
from ._tensors import FLOAT32, plainly, refusal

REFUSALS = {"dtype": FLOAT32, "activation": "with an activation the NumPy kernel computes"}


def linear_refuses(
    x: Spec, weight: Spec, bias: Spec | None = None, *, needs: tuple = (), activation: str | None = None
) -> str | None:
    return refusal(x) or (None if activation is None else REFUSALS["activation"])


def linear_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: Any = None, *, needs: tuple = (), activation: str | None = None
) -> tuple[tuple, dict]:
    y = plainly(torch.nn.functional.linear, x, weight, bias)
    saved = {"x": x} if "weight" in needs else {}
    if "x" in needs:
        saved["weight"] = weight
    return (y.contiguous(),), saved


def linear_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, activation: str | None = None) -> tuple:
    return plainly(_gradients, dys[0], saved, inputs, needs)


def _gradients(dy: torch.Tensor, saved: dict, inputs: tuple, needs: tuple) -> tuple:
    out, features = inputs[1].shape
    rows = dy.reshape(math.prod(inputs[0].shape[:-1]), out)
    dx = dweight = dbias = None
    if "x" in needs:
        dx = torch.mm(rows, saved["weight"]).view(inputs[0].shape)
    if "weight" in needs:
        dweight = torch.mm(rows.t(), saved["x"].reshape(len(rows), features))
    if "bias" in needs:
        dbias = rows.sum(0)
    return dx, dweight, dbias


# --- several weights of one x ----------------------------------------------------------------------------------------


def linears_refuses(x: Spec, *_: Spec | None, needs: tuple = ()) -> str | None:
    return refusal(x)


def linears_forward(
    x: torch.Tensor, weight: Any, weight_2: Any, weight_3: Any = None, bias: Any = None, bias_2: Any = None,
    bias_3: Any = None, *, needs: tuple = (),
) -> tuple[tuple, dict]:  # fmt: skip
    given = named((weight, weight_2, weight_3))
    ys = plainly(_each, x, [*given.values()], (bias, bias_2, bias_3))
    return ys, kept(x, given, needs)


def _each(x: torch.Tensor, weights: list, biases: tuple) -> tuple:
    return tuple(torch.nn.functional.linear(x, w, b).contiguous() for w, b in zip(weights, biases))


def linears_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    return plainly(_gradients_of_several, dys, saved, inputs, needs)


def _gradients_of_several(dys: tuple, saved: dict, inputs: tuple, needs: tuple) -> tuple:
    """Those of an output that nobody used are 0."""
    x, dx = inputs[0], None
    grads: dict[str, torch.Tensor] = {}
    like = next(dy for dy in dys if dy is not None)
    for dy, weight, name, bias in zip(dys, inputs[1:4], WEIGHTS, BIASES):
        if dy is None:
            shapes = {name: weight.shape, bias: weight.shape[:1]}
            grads |= {n: like.new_zeros(shape) for n, shape in shapes.items() if n in needs}
            continue
        rows = dy.reshape(math.prod(x.shape[:-1]), weight.shape[0])
        if "x" in needs:
            dx = torch.mm(rows, saved[name]) if dx is None else dx.addmm_(rows, saved[name])
        if name in needs:
            grads[name] = torch.mm(rows.t(), saved["x"].reshape(len(rows), x.shape[-1]))
        if bias in needs:
            grads[bias] = rows.sum(0)
    return None if dx is None else dx.view(x.shape), *(grads.get(n) for n in WEIGHTS + BIASES)


# --- products in batches ---------------------------------------------------------------------------------------------


def matmul_refuses(a: Spec, b: Spec, c: Spec | None = None, *, needs: tuple = (), alpha: float = 1.0) -> str | None:
    return refusal(a)


def matmul_forward(
    a: torch.Tensor, b: torch.Tensor, c: Any = None, *, needs: tuple = (), alpha: float = 1.0
) -> tuple[tuple, dict]:
    y = plainly(_product, a, b, c, alpha)
    return (y,), {name: x for name, x, of in (("a", a, "b"), ("b", b, "a")) if of in needs}


def _product(a: torch.Tensor, b: torch.Tensor, c: Any, alpha: float) -> torch.Tensor:
    y = torch.matmul(a, b).contiguous()
    y = y if alpha == 1 else y.mul_(alpha)
    return y if c is None else y.add_(c)


def matmul_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, alpha: float = 1.0) -> tuple:
    return plainly(_gradients_of_product, dys[0], saved, inputs, needs, alpha)


def _gradients_of_product(dy: torch.Tensor, saved: dict, inputs: tuple, needs: tuple, alpha: float) -> tuple:
    scaled, (a, b) = dy if alpha == 1 else dy * alpha, inputs[:2]
    da = db = None
    if "a" in needs:
        da = torch.matmul(scaled, saved["b"].mT).sum_to_size(a.shape).contiguous()
    if "b" in needs:
        x = saved["a"]
        if len(b.shape) == 2 and x.shape[:-1] == dy.shape[:-1]:
            db = torch.mm(x.reshape(-1, x.shape[-1]).t(), scaled.reshape(-1, dy.shape[-1]))
        else:
            db = torch.matmul(x.mT, scaled).sum_to_size(b.shape).contiguous()
    return da, db, dy.clone(memory_format=torch.contiguous_format) if "c" in needs else None
