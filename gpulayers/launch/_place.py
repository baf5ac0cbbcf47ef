"""Where a tape's arrays live: how its memory is allocated, and which stream is the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers import arrays
from gpulayers.arrays import Library, Spec
from gpulayers.launch import _settings


class Place(NamedTuple):
    """One device, and the library whose arrays live there."""

    address: Callable[[Any], int] | None
    """(array) → its address; None: array.data.ptr."""
    ordinal: int
    """The device's number."""
    stream: Callable[[int], int]
    """(device) → its current stream."""
    allocation: Callable[[Spec], tuple]
    """(spec) → (function, *its arguments) that give such an array."""


def place(home: Library, device: str) -> Place | None:
    """None where nothing is launched on a GPU."""
    if device == "cpu":
        stream = _settings.cpu_stream
        if home is not arrays.TORCH or stream is None:
            return None
        return Place(_data_ptr(), 0, stream, _tensor("cpu"))
    index = int(device.partition(":")[2] or 0)
    if home is arrays.CUPY:
        return Place(None, index, _cupy_stream(), _cupy)
    import torch

    return Place(_data_ptr(), index, torch._C._cuda_getCurrentRawStream, _tensor(device))


def _data_ptr() -> Any:
    import torch

    return torch.Tensor.data_ptr


@functools.cache
def _tensor(device: str) -> Callable[[Spec], tuple]:
    """Allocations of tensors by the functions that Inductor's code calls, a third of ``torch.empty_strided``'s cost."""
    import torch

    try:
        from torch._C import _dynamo

        guards: Any = _dynamo.guards
        function = guards._empty_strided_cpu if device == "cpu" else guards._empty_strided_cuda  # on the current one
    except (ImportError, AttributeError):

        def function(shape: Sequence[int], strides: Sequence[int], dtype: Any) -> Any:
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return lambda spec: (function, spec.shape, spec.strides, arrays.to_torch_dtype(spec.dtype))


def _cupy(spec: Spec) -> tuple:
    import cupy

    if spec.order is None:
        return cupy.ndarray, spec.shape, spec.dtype
    return _cupy_strided, spec.shape, tuple(s * spec.dtype.itemsize for s in spec.strides), spec.dtype


def _cupy_strided(shape: tuple, strides: tuple, dtype: np.dtype) -> Any:
    import cupy

    flat = cupy.ndarray((int(np.prod(shape)),), dtype)
    return cupy.ndarray(shape, dtype, flat.data, strides)


@functools.cache
def _cupy_stream() -> Callable[[int], int]:
    import cupy

    return lambda device: cupy.cuda.get_current_stream().ptr
