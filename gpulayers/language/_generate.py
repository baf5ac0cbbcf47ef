"""Text that goes on: one token after the other from a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import gpulayers as gl
from gpulayers import transfer
from gpulayers.language._model import context_of
from gpulayers.layers._frames import mode


def generate(
    model: Any,
    prompt: bytes,
    count: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[bytes]:
    """``count`` bytes after ``prompt``, each when it is there; the same arguments give the same bytes.

    temperature: what logits are divided by; 0 takes the likeliest. top_k: only the k likeliest. top_p: only the fewest
    that have this share together (Holtzman et al. 2020). An empty prompt is a line's end.

    Raises ValueError for other values.
    """
    _require(count, temperature, top_k, top_p)
    random = np.random.default_rng(seed)
    reader = Reader(model)
    logits = reader.read(np.frombuffer(prompt or b"\n", np.uint8))
    for i in range(count):
        token = drawn(logits, random, temperature, top_k, top_p)
        yield bytes([token])
        if i + 1 < count:
            logits = reader.read(np.array([token], np.uint8))


def drawn(
    logits: np.ndarray, random: np.random.Generator, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """One token by its logits (vocabulary,)."""
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    wide = logits[order].astype(np.float64) / temperature
    shares = np.exp(wide - wide[0])
    shares /= shares.sum()
    if top_p is not None:
        kept = int(np.searchsorted(np.cumsum(shares), top_p)) + 1
        order, shares = order[:kept], shares[:kept] / shares[:kept].sum()
    place = int(np.searchsorted(np.cumsum(shares), random.random(), side="right"))
    return int(order[min(place, len(order) - 1)])


def _require(count: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if count < 0 or not temperature >= 0:
        raise ValueError(f"generate: the rule is count ≥ 0 and temperature ≥ 0; got {count} and {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k: the rule is an integer ≥ 1 or None; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p: the rule is 0 < top_p ≤ 1 or None; got {top_p}")


class Reader:
    """A model that reads on: each call gives the logits of the next token.

    When its context is full it goes on from the latest half.
    """

    def __init__(self, model: Any):
        self.model, self.context = model, context_of(model)
        self.tokens = np.zeros(0, np.uint8)

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (L,), L ≥ 1 → logits (vocabulary,) after the last."""
        self.tokens = np.concatenate([self.tokens, tokens])[-self.context :]
        x = transfer.to_device(self.tokens[None].astype(np.int64), self.model.device)
        with gl.no_grad(), mode(False):
            return transfer.to_numpy(self.model(x)[0, -1]).astype(np.float32)
