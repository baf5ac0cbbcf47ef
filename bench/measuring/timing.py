"""Samples of calls that take turns, and what is kept of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

QUANTILES = {"min": 0.0, "p5": 0.05, "p20": 0.2, "p50": 0.5, "p80": 0.8, "p95": 0.95, "max": 1.0}


def quantiles(samples: Iterable[float]) -> dict[str, float]:
    """{"min", "p5", "p20", "p50", "p80", "p95", "max"} of the samples, in their unit."""
    values = np.fromiter(samples, float)
    return {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}


def take_turns(
    replays: Mapping[str, Callable[[], list[float]]], rounds: int, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Samples (seconds a call) of each provider; all take their turns, in reversed order each round.

    A first round that warms caches and clocks is not kept. Goes on for ``rounds`` rounds, and until each provider's
    samples add up to ``seconds``.
    """
    samples: dict[str, list[float]] = {name: [] for name in replays}
    if not samples:
        return samples
    order, turn = list(replays), 0
    while turn <= rounds or min(map(sum, samples.values())) < seconds:
        for name in order:
            found = replays[name]()
            if turn:
                samples[name] += found
        order.reverse()
        turn += 1
    return samples


CALLS, ROUNDS = 100, 120
"""Of something that takes microseconds: calls in a sample, and samples."""


def calls(call: Callable[[], Any]) -> Callable[[], float]:
    """() → seconds a call."""

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - begin) / CALLS

    return sample


def costs(samples: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """µs of each; they take turns, or a machine that slows down for a while would slow one of them down alone."""
    found = take_turns({name: lambda s=sample: [s()] for name, sample in samples.items()}, ROUNDS)  # type: ignore[misc]
    return {name: quantiles(seconds)["p20"] * 1e6 for name, seconds in found.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; 1.0 of none."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / max(1, len(logs)))
