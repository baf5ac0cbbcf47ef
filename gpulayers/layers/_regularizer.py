"""What pulls at weights (regularizers), and what holds them (constraints)."""

from __future__ import annotations

from typing import Any

from gpulayers.layers._config import Configurable


class L1(Configurable):
    """A penalty of ``rate`` Σ |w|; its gradient is rate · sign(w)."""

    def __init__(self, rate: float = 1e-4):
        self.rate = rate

    def __call__(self, w: Any) -> tuple[Any, Any]:
        return self.rate * abs(w).sum(), self.rate * ((w > 0).astype(w.dtype) - (w < 0).astype(w.dtype))


class L2(Configurable):
    """A penalty of ``rate`` Σ w²; its gradient is 2 · rate · w."""

    def __init__(self, rate: float = 1e-4):
        self.rate = rate

    def __call__(self, w: Any) -> tuple[Any, Any]:
        return self.rate * (w * w).sum(), 2 * self.rate * w


class NonNegative(Configurable):
    """After each update, w ← max(w, 0)."""

    def __call__(self, w: Any) -> Any:
        return w * (w > 0)


class MaxNorm(Configurable):
    """After each update, the norm of each output's weights is at most ``most``."""

    def __init__(self, most: float = 1.0):
        self.most = most

    def __call__(self, w: Any) -> Any:
        norm = (w * w).sum(tuple(range(1, w.ndim)), keepdims=True) ** 0.5
        return w * (self.most / norm.clip(self.most, None))
