"""Tensor descriptors in interpreted kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Descriptor:
    """A tensor descriptor: the box of a tensor that one load or store moves."""

    base: Any
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: Any
    to_tf32: bool = False

    def __post_init__(self) -> None:
        size = self.base.dtype.element_ty.primitive_bitwidth // 8
        if int(self.base.data.item()) % 16:
            raise ValueError("tensor descriptor: the base address must be a multiple of 16 bytes")
        if any(s * size % 16 for s in self.strides[:-1]) or self.strides[-1] != 1:
            raise ValueError(f"tensor descriptor: strides {self.strides} are not multiples of 16 bytes, the last one 1")
        if min(self.shape) < 1:
            raise ValueError(f"tensor descriptor: every size of the tensor {self.shape} must be at least 1")
        if any(b > 256 for b in self.block_shape):
            raise ValueError(f"tensor descriptor: no side of the box {self.block_shape} may exceed 256 elements")

    def addresses(self, offsets: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of the box's elements at `offsets`, and which of them lie inside the tensor."""
        size = self.base.dtype.element_ty.primitive_bitwidth // 8
        where, inside = self.base.data.reshape(()), np.ones((), bool)
        for axis, (offset, n, stride, block) in enumerate(zip(offsets, self.shape, self.strides, self.block_shape)):
            index = int(offset.data.item()) + np.arange(block).reshape(-1, *(1,) * (len(self.shape) - axis - 1))
            where = where + (index * (stride * size)).astype(np.uint64)
            inside = inside & (index >= 0) & (index < n)
        return where, inside
