"""Whose array is this (NumPy, CuPy, torch), its metadata, and what gpulayers asks of each of the three libraries.

Importing this module needs NumPy alone; CuPy and torch are touched only when one of their arrays comes in.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float16 = np.dtype(np.float16)
float32 = np.dtype(np.float32)
float64 = np.dtype(np.float64)
int64 = np.dtype(np.int64)


class Guests(threading.local):
    """Whose memory a thread computes on, as far as kernels on NumPy need to know."""

    matmul: Callable[..., np.ndarray] = staticmethod(np.matmul)
    """``(a, b, out=None)``. Of arrays that came from torch, torch's BLAS multiplies: two pools of threads would each spin on
    cores that the other one needs."""
    cores = 0
    """That threads of theirs spin on for a while after each operation."""


guests = Guests()

FLOATS = (float64, float32, float16, bfloat16)
HALVES = (float16, bfloat16)
_BY_NAME = {str(d): d for d in FLOATS}


def dtype(name: Any) -> np.dtype:
    """The NumPy dtype for a name ("bfloat16"), a NumPy dtype or a torch dtype.

    Raises TypeError for what is none of these.
    """
    if isinstance(name, np.dtype):
        return name
    text = str(name).removeprefix("torch.")
    try:
        if name is None:
            raise TypeError  # NumPy takes it for float64
        return _BY_NAME.get(text) or np.dtype(text if isinstance(name, str) or "torch" in str(name) else name)
    except TypeError:
        raise TypeError(f"unknown dtype {name!r}: expected one of {', '.join(_BY_NAME)} or a NumPy dtype") from None


@functools.cache
def compute_dtype(of: np.dtype) -> np.dtype:
    """The dtype a definition computes in: float32 for 16-bit inputs, the input's own otherwise."""
    return float32 if of in HALVES else of


def up(x: Any) -> Any:
    """``x`` in the dtype that its definition computes in; itself where it is so already. NumPy and CuPy arrays."""
    return x.astype(compute_dtype(x.dtype), copy=False)


class Spec(NamedTuple):
    """Metadata of an array: all that a rule may look at. Sizes may be symbolic or None (not known yet)."""

    shape: tuple
    dtype: np.dtype
    order: tuple[int, ...] | None = None
    """Axes from the slowest to the fastest in memory; None for row-major. Meaningless for gaps and overlaps."""
    contiguous: bool = True
    """Dense in ``order``: no gaps, no overlaps."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def strides(self) -> tuple:
        """Strides of the dense array, in elements."""
        steps, step = [1] * len(self.shape), 1
        for axis in reversed(self.order or range(len(self.shape))):
            steps[axis] = step
            step = step * self.shape[axis]
        return tuple(steps)

    def like(self, dtype: np.dtype | None = None) -> Spec:
        """A dense spec of the same shape; it keeps the memory order if this array is dense."""
        return Spec(self.shape, dtype or self.dtype, self.order if self.contiguous else None)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def layout(shape: tuple, strides: tuple) -> tuple[tuple[int, ...] | None, bool]:
    """(order, dense) of an array from its shape and its strides in elements."""
    try:
        return _layout(shape, strides)
    except TypeError:  # symbols have no hash
        return _layout.__wrapped__(shape, strides)


@functools.lru_cache(maxsize=4096)
def _layout(shape: tuple, strides: tuple) -> tuple[tuple[int, ...] | None, bool]:
    axes = sorted((a for a in range(len(shape)) if shape[a] != 1), key=lambda a: (-strides[a], a))
    step = 1
    for axis in reversed(axes):
        if strides[axis] != step and 0 not in shape:
            return None, False
        step *= shape[axis]
    if axes == sorted(axes) or 0 in shape:
        return None, True
    # Axes of size 1 may stand anywhere: put them where channels-last order would have them.
    free = iter(axes)
    order = tuple(next(free) if shape[a] != 1 else a for a in range(len(shape)))
    last = tuple([0, *range(2, len(shape)), 1])
    fits = [a for a in last if shape[a] != 1] == axes
    return (last if fits and len(shape) > 2 else order), True


class Library:
    """What gpulayers asks of an array library. One instance for each; ``library(x)`` finds it."""

    name = "numpy"

    def signature(self, x: Any) -> tuple:
        """A hashable key of everything a plan may depend on."""
        return np.ndarray, x.shape, x.dtype, x.strides

    def strides(self, x: Any) -> tuple:
        return tuple(s // x.dtype.itemsize for s in x.strides)

    def dtype(self, x: Any) -> np.dtype:
        return x.dtype

    def device(self, x: Any) -> str:
        """ "cpu" or "cuda:<index>"."""
        return "cpu"

    def spec(self, x: Any) -> Spec:
        shape = tuple(x.shape)
        return Spec(shape, self.dtype(x), *layout(shape, self.strides(x)))

    def empty(self, spec: Spec, device: str) -> Any:
        return empty_numpy(spec)

    def on(self, device: str) -> contextlib.AbstractContextManager:
        """Makes ``device`` current."""
        return contextlib.nullcontext()

    def is_current(self, device: str) -> bool:
        """Whether nothing has to be done to make ``device`` current."""
        return True

    def is_only(self, device: str) -> bool:
        """Whether there is no other device of its kind."""
        return True

    def capability(self, device: str) -> tuple[int, int]:
        """(major, minor) of a CUDA device."""
        raise TypeError(f"{self.name} has no CUDA devices")


class _CuPy(Library):
    name = "cupy"

    def signature(self, x: Any) -> tuple:
        return type(x), x.shape, x.dtype, x.strides, x.device.id

    def device(self, x: Any) -> str:
        return f"cuda:{x.device.id}"

    def empty(self, spec: Spec, device: str) -> Any:
        import cupy

        with self.on(device):
            flat = cupy.empty(spec.size, spec.dtype)
        return cupy.ndarray(spec.shape, spec.dtype, flat.data, [s * spec.dtype.itemsize for s in spec.strides])

    def on(self, device: str) -> contextlib.AbstractContextManager:
        import cupy

        return cupy.cuda.Device(int(device.split(":")[1]))

    def is_current(self, device: str) -> bool:
        import cupy

        return cupy.cuda.runtime.getDevice() == int(device.split(":")[1])

    def is_only(self, device: str) -> bool:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() == 1

    def capability(self, device: str) -> tuple[int, int]:
        import cupy

        return divmod(int(cupy.cuda.Device(int(device.split(":")[1])).compute_capability), 10)


class _Torch(Library):
    name = "torch"

    def signature(self, x: Any) -> tuple:
        if x.is_neg():
            raise TypeError(
                "expected a tensor whose memory holds its values, got one that is negated lazily: resolve_neg()"
            )
        return type(x), x.shape, x.dtype, x.stride(), x.device

    def strides(self, x: Any) -> tuple:
        return tuple(x.stride())

    def dtype(self, x: Any) -> np.dtype:
        return from_torch_dtype(x.dtype)

    def device(self, x: Any) -> str:
        return "cpu" if x.device.type == "cpu" else str(x.device)

    def empty(self, spec: Spec, device: str) -> Any:
        import torch

        return torch.empty_strided(spec.shape, spec.strides, dtype=to_torch_dtype(spec.dtype), device=device)

    def on(self, device: str) -> contextlib.AbstractContextManager:
        import torch

        return torch.cuda.device(device) if device.startswith("cuda") else contextlib.nullcontext()

    def is_current(self, device: str) -> bool:
        import torch

        return device == "cpu" or torch.cuda.current_device() == int(device.split(":")[1])

    def is_only(self, device: str) -> bool:
        import torch

        return device == "cpu" or torch.cuda.device_count() == 1

    def capability(self, device: str) -> tuple[int, int]:
        import torch

        return torch.cuda.get_device_capability(device)


NUMPY, CUPY, TORCH = Library(), _CuPy(), _Torch()
_LIBRARIES: dict[type, Library] = {np.ndarray: NUMPY}
_NAMESPACES: dict[type, Any] = {}


def learn(kind: type, namespace: Any) -> None:
    """Arrays of this class stand in for NumPy's; definitions call the functions of ``namespace`` on them."""
    _LIBRARIES[kind], _NAMESPACES[kind] = NUMPY, namespace


def library(x: Any) -> Library:
    """The library whose array ``x`` is. Raises TypeError for what is no array."""
    try:
        return _LIBRARIES[type(x)]
    except KeyError:
        return _learn(type(x))


def _learn(kind: type) -> Library:
    roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
    if issubclass(kind, np.ndarray | np.generic):
        found = NUMPY
    elif "cupy" in roots:
        found = CUPY
    elif "torch" in roots and hasattr(kind, "stride"):
        found = TORCH
    else:
        raise TypeError(f"expected a NumPy, CuPy or torch array, got {kind.__module__}.{kind.__qualname__}")
    _LIBRARIES[kind] = found
    return found


def spec(x: Any) -> Any:
    """The Spec of an array, a list of Specs for a list of arrays, or None for None."""
    if x is None:
        return None
    if isinstance(x, list | tuple) and not isinstance(x, Spec):
        return [spec(a) for a in x]
    return x if isinstance(x, Spec) else library(x).spec(x)


def namespace(x: Any) -> Any:
    """The module (numpy or cupy) whose functions a definition calls on ``x``."""
    if isinstance(x, np.ndarray | np.generic):
        return np
    return _NAMESPACES.get(type(x)) or importlib.import_module(type(x).__module__.partition(".")[0])


def empty_numpy(of: Spec) -> np.ndarray:
    """An uninitialised NumPy array with the spec's shape, dtype and memory order."""
    if of.order is None:
        return np.empty(of.shape, of.dtype)
    back = sorted(range(len(of.order)), key=of.order.__getitem__)
    return np.empty([of.shape[a] for a in of.order], of.dtype).transpose(back)


def arranged(x: np.ndarray, order: tuple[int, ...] | None) -> np.ndarray:
    """``x`` dense in this memory order; ``x`` itself where it is so already. For NumPy and CuPy arrays."""
    xp = namespace(x)
    if order is None:
        return xp.ascontiguousarray(x) if x.ndim else x
    back = sorted(range(len(order)), key=order.__getitem__)
    return xp.ascontiguousarray(x.transpose(order)).transpose(back)


# --- dtypes of torch -------------------------------------------------------------------------------------------------


@functools.cache
def _torch_dtypes() -> tuple[dict, dict]:
    import torch

    names = [
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
    ]
    there = {np.dtype(n): getattr(torch, n) for n in names} | {bfloat16: torch.bfloat16}
    return there, {v: k for k, v in there.items()}


def to_torch_dtype(of: np.dtype) -> Any:
    return _torch_dtypes()[0][of]


def from_torch_dtype(of: Any) -> np.dtype:
    try:
        return _torch_dtypes()[1][of]
    except KeyError:
        raise TypeError(f"no NumPy dtype for {of}") from None


def cast(x: Any, to: np.dtype) -> Any:
    """``x`` (of any library) in another dtype; itself where it is so already."""
    if library(x) is TORCH:
        return x.to(to_torch_dtype(to))
    return x.astype(to, copy=False)


def zeros_like(x: Any) -> Any:
    """Zeros with the shape and dtype of ``x``, where ``x`` is."""
    lib = library(x)
    fresh = lib.empty(Spec(tuple(x.shape), lib.dtype(x)), lib.device(x))
    fresh[...] = 0
    return fresh


def concatenate(xs: Sequence[Any], axis: int) -> Any:
    """Arrays of one library joined along an axis."""
    if library(xs[0]) is TORCH:
        import torch

        return torch.cat(list(xs), axis)
    return namespace(xs[0]).concatenate(xs, axis)


def lists(arrays: Sequence[Any]) -> list[Any]:
    """Every array in a sequence of arrays, lists of arrays and Nones."""
    flat: list[Any] = []
    for a in arrays:
        if isinstance(a, list | tuple) and not isinstance(a, Spec):
            flat.extend(lists(a))
        elif a is not None:
            flat.append(a)
    return flat


def span(address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """(address of an array's lowest byte, bytes from there to past its highest). strides: in bytes."""
    if 0 in shape:
        return address, 0
    reach = [(n - 1) * s for n, s in zip(shape, strides)]
    return address + sum(r for r in reach if r < 0), sum(map(abs, reach)) + itemsize
