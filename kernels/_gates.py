"""The launchers of rrelu, which every backend makes of one body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def rrelu(sloped: Callable) -> tuple[Callable, Callable]:
    """Launchers from sloped(dy or None, x, seed or None, lower, upper, empty): dy (x for None) times the slope at x, in
    x's memory order; the mean slope without a seed."""

    def rrelu_forward(
        x: Any,
        seed: Any = None,
        *,
        needs: tuple = (),
        lower: float = 1 / 8,
        upper: float = 1 / 3,
        training: bool = False,
        empty: Any,
    ) -> tuple[tuple, dict]:
        saved = {"x": x} | ({"seed": seed} if training else {})
        return (sloped(None, x, saved.get("seed"), lower, upper, empty),), saved if needs else {}

    def rrelu_backward(
        dys: tuple,
        saved: dict,
        *,
        inputs: tuple,
        needs: tuple,
        lower: float = 1 / 8,
        upper: float = 1 / 3,
        training: bool = False,
        empty: Any,
    ) -> tuple:
        return sloped(dys[0], saved["x"], saved.get("seed"), lower, upper, empty), None

    return rrelu_forward, rrelu_backward
