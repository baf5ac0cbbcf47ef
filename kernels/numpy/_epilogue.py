"""What becomes of a sum, block by block while it is in the cache: y = f(scale · sum + bias + residual)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._activation import FROM_Y, numbers_of
from . import _blocks
from . import activation as activations


class Epilogue(NamedTuple):
    """Of sums in float32. scale and bias have one number for each channel; residual and z have y's shape."""

    bias: np.ndarray | None = None
    scale: np.ndarray | None = None
    residual: np.ndarray | None = None
    z: np.ndarray | None = None
    """Where y before f is kept."""
    activation: str | None = None

    @property
    def affine(self) -> bool:
        """Whether nothing follows scale and bias."""
        return self.residual is None and self.activation is None

    def viewed(self, view: Callable[[np.ndarray], np.ndarray]) -> Epilogue:
        """That of a part of y: of view(y)."""
        residual, z = (None if a is None else view(a) for a in (self.residual, self.z))
        return self._replace(residual=residual, z=z)

    def scaled(self, total: np.ndarray, channels: slice = slice(None)) -> None:
        """total (channels, …) = scale · total + bias, in place."""
        for combine, row in ((np.multiply, self.scale), (np.add, self.bias)):
            if row is not None:
                combine(total, row[channels].reshape(-1, *(1,) * (total.ndim - 1)), out=total)

    def added(self, total: np.ndarray, where: tuple) -> None:
        """total += residual[where], in place; and so z is kept there."""
        if self.residual is not None:
            total += self.residual[where]
        if self.z is not None:
            self.z[where] = total

    def activated(self, total: np.ndarray) -> None:
        """total = f(total), in place; dense."""
        if self.activation is not None:
            flat = total.reshape(-1)
            activations.value(self.activation, flat, flat, numbers_of(self.activation))

    def put(self, total: np.ndarray, y: np.ndarray, where: tuple, buffer: np.ndarray) -> None:
        """What follows scale and bias, into y[where]. total: a view of ``buffer``, which is dense; both change."""
        self.added(total, where)
        self.activated(buffer)
        y[where] = total


def epilogue(y: np.ndarray, needs: tuple, bias: Any, scale: Any, residual: Any, activation: str | None) -> Epilogue:
    """That of one call; with memory for z, where backward computes from it."""
    bias, scale = (None if a is None else a.astype(np.float32, copy=False) for a in (bias, scale))
    keeps = needs and activation is not None and activation not in FROM_Y
    return Epilogue(bias, scale, residual, np.empty_like(y) if keeps else None, activation)


def before(dy: np.ndarray, saved: dict, activation: str | None) -> np.ndarray:
    """dz = dy f'(z), in float32; dy itself where nothing is to be done."""
    if activation is None:
        return dy
    kept = saved["y" if activation in FROM_Y else "z"]
    dz = np.empty_like(kept, np.float32)
    flat, dys, keeps = _blocks.flat(dz), _blocks.flat_like(dy, dz), _blocks.flat_like(kept, dz)
    activations.gradient(activation, dys, keeps, flat, numbers_of(activation))
    return dz
