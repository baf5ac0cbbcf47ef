"""Products of matrices: ``torch.matmul``, ``bmm``, ``addmm``, ``baddbmm``, ``einsum`` and torch.nn's Bilinear."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import linear as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import held
from gpulayers.torch._op import TorchOp


def _twin(a: Tensor, b: Tensor, c: Tensor | None, alpha: float) -> Tensor:
    y = torch.matmul(a, b) if alpha == 1 else alpha * torch.matmul(a, b)
    return y if c is None else y + c


def _flops(a: Sequence[int], b: Sequence[int], y: Sequence[int]) -> dict[str, int]:
    return dict.fromkeys(("y", "a", "b"), 2 * math.prod(y) * a[-1])


_matmul = TorchOp(ops.matmul, _twin, "float alpha", cast=_autocast.LOWER, flops=_flops)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """As ``torch.matmul``: vectors, matrices, and batches of them that broadcast."""
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)) or not (input.dim() and other.dim()):
        return torch.matmul(input, other)  # raises
    a = input.unsqueeze(0) if input.dim() == 1 else input
    b = other.unsqueeze(1) if other.dim() == 1 else other
    y = _matmul(a, b, None, 1.0)
    y = y.squeeze(-1) if other.dim() == 1 else y
    return y.squeeze(-2 if other.dim() > 1 else -1) if input.dim() == 1 else y


def _checked(name: str, dims: int, *xs: Any) -> bool:
    return all(isinstance(x, Tensor) and x.dim() == dims for x in xs)


def bmm(input: Tensor, mat2: Tensor) -> Tensor:
    """As ``torch.bmm``: (B, M, K) and (B, K, N) to (B, M, N)."""
    if not _checked("bmm", 3, input, mat2) or input.shape[0] != mat2.shape[0]:
        return torch.bmm(input, mat2)  # raises
    return _matmul(input, mat2, None, 1.0)


def _added(function: Any, dims: int, input: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any) -> Tensor:
    """beta · input + alpha · a b, the sum in the product's epilogue."""
    fits = _checked(function.__name__, dims, a, b) and isinstance(input, Tensor) and a.shape[:-2] == b.shape[:-2]
    if not fits or a.shape[-1] != b.shape[-2] or input.dtype != a.dtype:
        return function(input, a, b, beta=beta, alpha=alpha)  # raises, or casts
    try:
        c = None if beta == 0 else input.expand(*a.shape[:-1], b.shape[-1])
    except RuntimeError:
        return function(input, a, b, beta=beta, alpha=alpha)  # raises in its own words
    return _matmul(a, b, c if c is None or beta == 1 else c * beta, float(alpha))


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """As ``torch.addmm``: β input + α mat1 mat2, (M, K) and (K, N); input broadcasts to (M, N)."""
    return _added(torch.addmm, 2, input, mat1, mat2, beta, alpha)


def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """As ``torch.baddbmm``: β input + α batch1 batch2, (B, M, K) and (B, K, N); input broadcasts to (B, M, N)."""
    return _added(torch.baddbmm, 3, input, batch1, batch2, beta, alpha)


# --- einsum -----------------------------------------------------------------------------------------------------------


def einsum(equation: str, *operands: Any) -> Tensor:
    """As ``torch.einsum``: operands are contracted from the left, each pair by one product of matrices in batches.

    Ellipses, an index twice in one operand, and operands given with lists of indices are torch's own.
    """
    xs = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    terms, out = _parsed(equation, xs)
    if terms is None:
        return torch.einsum(equation, *operands)
    (x, names), *rest = zip(xs, terms)
    for i, (y, others) in enumerate(rest):
        later = {*out}.union(*terms[i + 2 :])
        x, names = _contracted(x, names, y, others, later)
    x, names = _summed(x, names, set(out))
    return x.permute([names.index(i) for i in out])


def _parsed(equation: Any, xs: Sequence[Any]) -> tuple[list[str] | None, str]:
    """(each operand's indices, the result's); None for what is left to torch."""
    if not isinstance(equation, str) or not xs or not all(isinstance(x, Tensor) for x in xs):
        return None, ""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    known = "".join(terms)
    if not arrow:
        out = "".join(sorted(i for i in {*known} if known.count(i) == 1))
    plain = all(t.isalpha() and t.isascii() and len({*t}) == len(t) == x.dim() for t, x in zip(terms, xs))
    sizes: dict[str, int] = {}
    alike = plain and all(sizes.setdefault(i, n) == n for t, x in zip(terms, xs) for i, n in zip(t, x.shape))
    fits = alike and len(terms) == len(xs) and len({*out}) == len(out) and {*out} <= {*known}
    return (terms if fits else None), out


def _summed(x: Tensor, names: str, kept: set[str]) -> tuple[Tensor, str]:
    alone = [i for i, name in enumerate(names) if name not in kept]
    return (x.sum(alone) if alone else x), "".join(n for n in names if n in kept)


def _contracted(x: Tensor, a: str, y: Tensor, b: str, later: set[str]) -> tuple[Tensor, str]:
    """(the sum over what both have and nobody needs later, its indices)."""
    x, a = _summed(x, a, {*b} | later)
    y, b = _summed(y, b, {*a} | later)
    both = [i for i in a if i in b]
    batch, inner = [i for i in both if i in later], [i for i in both if i not in later]
    rows, columns = [i for i in a if i not in both], [i for i in b if i not in both]
    sizes = dict(zip(a, x.shape)) | dict(zip(b, y.shape))

    def matrices(t: Tensor, names: str, first: list[str], last: list[str]) -> Tensor:
        t = t.permute([names.index(i) for i in (*batch, *first, *last)])
        return t.reshape(*(math.prod(sizes[i] for i in group) for group in (batch, first, last)))

    found = bmm(matrices(x, a, rows, inner), matrices(y, b, inner, columns))
    names = "".join((*batch, *rows, *columns))
    return found.reshape([sizes[i] for i in names]), names


# --- bilinear ---------------------------------------------------------------------------------------------------------


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``torch.nn.functional.bilinear``: y[…, o] = input1 W[o] input2 + bias[o], by two products of matrices.

    input1: (…, I1), input2: (…, I2), weight: (O, I1, I2), bias: (O,).
    """
    given = (input1, input2, weight, bias)
    if not all(isinstance(t, Tensor) for t in given[:3]):
        return F.bilinear(*given)  # raises
    device = input1.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        if device == "cuda":  # on a GPU autocast takes the widest type, on a CPU it has no rule
            dtypes = {t.dtype for t in given if t is not None}
            if not dtypes <= {torch.float32, torch.get_autocast_dtype(device)}:
                return F.bilinear(*given)  # raises
            widest = functools.reduce(torch.promote_types, dtypes)
            input1, input2, weight, bias = (t if t is None else t.to(widest) for t in given)
        with torch.autocast(device, enabled=False):
            return bilinear(input1, input2, weight, bias)
    fits = weight.dim() == 3 and input1.shape[:-1] == input2.shape[:-1] and input1.dtype == input2.dtype
    if not fits or (input1.shape[-1:], input2.shape[-1:]) != (weight.shape[1:2], weight.shape[2:]):
        return F.bilinear(*given)  # raises
    out, one, two = weight.shape
    rows = math.prod(input1.shape[:-1])
    left = _matmul(input1.reshape(rows, one), weight, None, 1.0).transpose(0, 1)  # (rows, O, I2)
    c = None if bias is None else bias.expand(rows, out).unsqueeze(-1)
    return _matmul(left, input2.reshape(rows, two, 1), c, 1.0).view(*input1.shape[:-1], out)


class Bilinear(nn.Bilinear):
    """``torch.nn.Bilinear`` over gpulayers' kernels."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return bilinear(input1, input2, held(self, "weight"), held(self, "bias"))
