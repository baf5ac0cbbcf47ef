"""Attention against torch's own (its math backend, in float64), forward and all gradients, over random calls::

    python tests/check_attention.py --count 500 --seed 1

Each call draws sizes, groups of heads, memory orders, masks and options. The definition is held in float64, the NumPy
kernel in float32. A window, packed sequences and sinks are said to torch by its mask and a further key; a cap and dropout,
which it lacks or draws otherwise, by its operations.
"""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpulayers as gl
from gpulayers.ops._random import random_bits
from gpulayers.ops.attention import attention

INPUTS = ("q", "k", "v", "bias", "sinks")
HEADS_LAST = (0, 2, 1, 3)


class Call(NamedTuple):
    inputs: dict[str, Any]
    """By the op's names; arrays in float64, or None."""
    options: dict[str, Any]

    def __str__(self) -> str:
        shapes = {n: f"{x.dtype}{list(x.shape)}" for n, x in self.inputs.items() if x is not None}
        return f"{shapes} {self.options}"


def draw(random: np.random.Generator) -> Call:
    groups, share = random.integers(1, 4, 2)
    heads, n = int(groups * share), int(random.integers(1, 4))
    rows, keys = (int(random.choice([1, 2, 5, 17, 33, 64])) for _ in range(2))
    width, values = (int(random.choice([1, 3, 8, 16])) for _ in range(2))
    packed = random.random() < 0.25
    n = 1 if packed else n

    def array(*shape: int) -> np.ndarray:
        x = random.standard_normal(shape)
        if len(shape) == 4 and random.random() < 0.5:
            x = random.standard_normal([shape[a] for a in HEADS_LAST]).transpose(HEADS_LAST)
        return x

    inputs: dict[str, Any] = dict(q=array(n, heads, rows, width), k=array(n, groups, keys, width))
    inputs |= dict(v=array(n, groups, keys, values), bias=None, sinks=None, seed=None, cu_q=None, cu_k=None)
    if (kind := random.integers(0, 4)) < 2:
        shape = [size if random.random() < 0.5 else 1 for size in (n, heads, rows, keys)]
        shape = shape[int(random.integers(0, 4)) :]
        inputs["bias"] = random.standard_normal(shape) if kind else random.random(shape) < 0.7
    if random.random() < 0.25:
        inputs["sinks"] = random.standard_normal(heads)
    if random.random() < 0.2:
        inputs["seed"] = random.integers(0, 2**40, 2)
    if packed:
        count = int(random.integers(1, 5))
        for name, most in (("cu_q", rows), ("cu_k", keys)):
            inputs[name] = np.sort(random.integers(0, most + 1, count + 1)).astype(random.choice(["int32", "int64"]))
    options: dict[str, Any] = {"p": 0.3 if inputs["seed"] is not None else 0.0}
    if random.random() < 0.4:
        options["causal"] = True
    if random.random() < 0.4:
        options["window"] = tuple(int(random.choice([-1, 0, 1, 4, 20])) for _ in range(2))
    if random.random() < 0.5:
        options["corner"] = "bottom_right"
    if random.random() < 0.3:
        options["scale"] = float(random.choice([0.0, 0.3, 1.0, -0.5]))
    if random.random() < 0.2:
        options["softcap"] = 1.5
    return Call(inputs, options)


def seen(call: Call) -> np.ndarray:
    """(Lq, Lk) bool, pair by pair."""
    rows, keys = call.inputs["q"].shape[2], call.inputs["k"].shape[2]
    cu_q, cu_k, options = call.inputs["cu_q"], call.inputs["cu_k"], call.options
    left, right = options.get("window", (-1, -1))
    right = 0 if options.get("causal") else right
    found = np.zeros((rows, keys), bool)
    parts = [(0, rows, 0, keys)] if cu_q is None else [*zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])]
    for q0, q1, k0, k1 in parts:
        shift = (k1 - k0) - (q1 - q0) if options.get("corner") == "bottom_right" else 0
        for i in range(q1 - q0):
            for j in range(k1 - k0):
                ahead = j - i - shift
                found[q0 + i, k0 + j] = (left < 0 or ahead >= -left) and (right < 0 or ahead <= right)
    return found


def torchs(call: Call, dy: np.ndarray) -> list[np.ndarray]:
    """[y, then the gradients of q, k, v, bias and sinks that are given]."""
    given = {n: None if x is None else torch.tensor(np.ascontiguousarray(x)) for n, x in call.inputs.items()}
    q, k, v, bias, sinks = (given[n] for n in INPUTS)
    leaves = [t.requires_grad_() for t in (q, k, v, bias, sinks) if t is not None and t.is_floating_point()]
    n, heads, rows, width = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    mask = torch.zeros(n, heads, rows, keys, dtype=torch.float64).masked_fill(~torch.tensor(seen(call)), -math.inf)
    if bias is not None:
        mask = mask.masked_fill(~bias, -math.inf) if bias.dtype is torch.bool else mask + bias
    if sinks is not None:
        mask = torch.cat([mask, sinks[None, :, None, None].expand(n, heads, rows, 1)], 3)
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (k, v))
    scale = call.options.get("scale", width**-0.5)
    if "softcap" in call.options or given["seed"] is not None:
        scores = q @ k.transpose(2, 3) * scale
        if cap := call.options.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        nothing = (mask == -math.inf).all(3, keepdim=True)
        weights = torch.softmax((scores + mask).masked_fill(nothing, 0.0), 3).masked_fill(nothing, 0.0)
        y = weights * _dropped(call, weights.shape) @ v
    else:
        with sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return [y.detach().numpy(), *(g.numpy() for g in torch.autograd.grad(y, leaves, torch.tensor(dy)))]


def _dropped(call: Call, shape: Any) -> torch.Tensor:
    *rows, _ = shape
    found = torch.ones(*shape, dtype=torch.float64)
    if call.inputs["seed"] is None:
        return found
    real, p = call.inputs["k"].shape[2], call.options["p"]
    wide = -(-real // 4) * 4
    bits = random_bits(call.inputs["seed"], math.prod(rows) * wide).reshape(*rows, wide)[..., :real]
    found[..., :real] = torch.tensor((bits >= round(p * 2**32)) / (1 - p))
    return found


def check(call: Call, dy: np.ndarray) -> None:
    """Raises AssertionError where the op's result is not torch's."""
    true = torchs(call, dy)
    for backend, dtype, bound in (("definition", np.float64, 1e-9), ("numpy", np.float32, 2e-4)):

        def typed(x: Any, dtype: Any = dtype) -> Any:
            return x.astype(dtype) if x is not None and x.dtype == np.float64 else x

        inputs = [typed(x) for x in call.inputs.values()]
        needs = tuple(n for n in INPUTS if call.inputs[n] is not None and call.inputs[n].dtype == np.float64)
        with gl.only(backend), np.errstate(all="raise", under="ignore"):
            (y, _), recorded = attention.record(*inputs, needs=needs, **call.options)
            grads = [g for g in recorded.backward(dy.astype(dtype), None) if g is not None]
        for name, mine, theirs in zip(("y", *needs), [y, *grads], true, strict=True):
            largest = max(1.0, float(np.abs(theirs).max(initial=0)))
            error = float(np.abs(mine - theirs).max(initial=0)) / largest
            assert error <= bound, f"{backend}: {name} is off by {error:.3g} of its largest: {call}"


def calls(count: int, seed: int) -> list[tuple[Call, np.ndarray]]:
    """So many random calls, each with a gradient of y."""
    random = np.random.default_rng(seed)
    drawn = [draw(random) for _ in range(count)]
    return [(c, random.standard_normal((*c.inputs["q"].shape[:3], c.inputs["v"].shape[3]))) for c in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for call, dy in calls(given.count, given.seed):
        check(call, dy)
    print(f"{given.count} calls agree with torch's attention")


if __name__ == "__main__":
    main()
