"""Pooling by windows of random steps: fractional_max_pool of images and volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import pooling as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import each
from gpulayers.torch._op import TorchOp
from gpulayers.torch._pooling import Pool, first, to_where_it_won
from gpulayers.torch.dropout import draw_seed


def _twin(x: Tensor, seed: Any, samples: Any, kernel: Any, size: Any, indices: bool) -> Any:
    if samples is None:
        samples = torch.rand(*x.shape[:2], len(kernel), dtype=x.dtype, device=x.device)
    theirs: Any = torch._C._nn.fractional_max_pool2d if len(kernel) == 2 else torch._C._nn.fractional_max_pool3d
    found = theirs(x, kernel, size, samples)
    return found if indices else found[0]


def _again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    return [to_where_it_won(dys[0], saved["index"], inputs[0]), None, None]


_fractional_max_pool = TorchOp(
    ops.fractional_max_pool,
    _twin,
    "int[] kernel_size, SymInt[] output_size, bool return_indices",
    outputs=("y", "indices"),
    buffers=("index",),
    again=_again,
    cast=_autocast.ON_CPU,
)


def _by_random_steps(
    axes: int, theirs: Callable, input: Any, kernel: Any, output_size: Any, ratio: Any, indices: bool, samples: Any
) -> Any:
    given = isinstance(input, Tensor) and input.dim() in (axes + 1, axes + 2) and isinstance(samples, Tensor | None)
    if not given or (output_size is None) == (ratio is None):
        return theirs(input, kernel, output_size, ratio, indices, samples)  # raises, or records itself
    if output_size is None:
        output_size = [int(n * r) for n, r in zip(input.shape[-axes:], each(ratio, axes))]
    kernel, size = each(kernel, axes), each(output_size, axes)
    room = zip(input.shape[-axes:], kernel, size)
    if not len(kernel) == len(size) == axes or (axes == 3 and any([o + k > n for n, k, o in room])):
        return theirs(input, kernel, size, None, indices, samples)  # torch refuses windows as large as this of volumes
    batch = input if input.dim() == axes + 2 else input.unsqueeze(0)
    seed = draw_seed(input) if samples is None else None
    found = _fractional_max_pool(batch, seed, samples, kernel, size, indices)
    if batch is not input:
        found = tuple([y.squeeze(0) for y in found]) if isinstance(found, tuple) else found.squeeze(0)
    return first(found, indices)


def fractional_max_pool2d(
    input: Tensor,
    kernel_size: Any,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """As ``torch.nn.functional.fractional_max_pool2d``; its steps are Philox's, by a seed from torch's generator."""
    given = kernel_size, output_size, output_ratio, return_indices, _random_samples
    return _by_random_steps(2, F.fractional_max_pool2d, input, *given)


def fractional_max_pool3d(
    input: Tensor,
    kernel_size: Any,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """As ``torch.nn.functional.fractional_max_pool3d``; its steps are Philox's, by a seed from torch's generator."""
    given = kernel_size, output_size, output_ratio, return_indices, _random_samples
    return _by_random_steps(3, F.fractional_max_pool3d, input, *given)


class _FractionalMaxPool(Pool):
    _options = ("kernel_size", "output_size", "output_ratio", "return_indices", "_random_samples")


class FractionalMaxPool2d(_FractionalMaxPool, nn.FractionalMaxPool2d):
    """``torch.nn.FractionalMaxPool2d`` over gpulayers' kernels."""

    _function = staticmethod(fractional_max_pool2d)


class FractionalMaxPool3d(_FractionalMaxPool, nn.FractionalMaxPool3d):
    """``torch.nn.FractionalMaxPool3d`` over gpulayers' kernels."""

    _function = staticmethod(fractional_max_pool3d)
