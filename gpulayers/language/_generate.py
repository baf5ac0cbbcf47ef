"""Text that goes on: one token after the other from a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import gpulayers as gl
from gpulayers import transfer
from gpulayers.language._model import PositionEmbedding, context_of
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
    """A model that reads on: each call gives the logits of the next token, and computes what is new alone.

    When its context is full it reads the latest half of it again.
    """

    def __init__(self, model: Any):
        self.model, self.context = model, context_of(model)
        self.tokens = np.zeros(0, np.uint8)
        self.caches: dict[int, Any] = {}

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (L,), L ≥ 1 → logits (vocabulary,) after the last."""
        kept = len(self.tokens)
        self.tokens = np.concatenate([self.tokens, tokens])
        if len(self.tokens) > self.context:
            kept, self.tokens = 0, self.tokens[-max(1, self.context // 2) :]
            for cache in self.caches.values():
                cache.reset()
        x = transfer.to_device(self.tokens[None, kept:].astype(np.int64), self.model.device)
        with gl.no_grad(), mode(False):
            return transfer.to_numpy(self._through(self.model, x, kept)[0, -1]).astype(np.float32)

    def _through(self, layer: Any, x: Any, start: int) -> Any:
        """``layer`` of new tokens, the first of them at place ``start``."""
        if isinstance(layer, gl.MultiHeadAttention):
            if id(layer) not in self.caches:
                self.caches[id(layer)] = layer.cache(1, self.context)
            return layer.extend(x, self.caches[id(layer)])
        if isinstance(layer, PositionEmbedding):
            return layer.extend(x, start)
        if not isinstance(layer, gl.Sequential):
            return layer(x)  # it sees each token alone
        y = x
        for part in layer:
            y = self._through(part, y, start)
        return x + y if isinstance(layer, gl.Residual) else y
