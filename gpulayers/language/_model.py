"""A small GPT in native layers: bytes in, logits of the next byte out."""

from __future__ import annotations

import math
from typing import Any

import gpulayers as gl
from gpulayers.language._data import VOCABULARY


@gl.register(name="language.PositionEmbedding")
class PositionEmbedding(gl.Layer):
    """y[n, l] = x[n, l] + weight[l], a learned row for each position; x (N, L, C), L ≤ ``positions``.

    Weights: ``weight`` (positions, C).
    """

    def __init__(self, positions: int):
        self.positions = positions

    def build(self, input_shape: tuple) -> None:
        self.weight = self.add_weight("weight", (self.positions, input_shape[2]), "normal")

    def output_shape(self, input_shape: tuple) -> tuple:
        if len(input_shape) != 3 or input_shape[1] > self.positions:
            rule = f"x.shape = [N, L, C], L ≤ {self.positions}"
            raise RuntimeError(f"{self.name}: the rule is {rule}; got {list(input_shape)}")
        return input_shape

    def forward(self, x: Any) -> Any:
        self.output_shape(x.shape)
        return x + self.weight[: x.shape[1]]

    def extend(self, x: Any, start: int) -> Any:
        """The same for tokens whose first stands at place ``start``."""
        return x + self.weight[start : start + x.shape[1]]

    def backward(self, dy: Any) -> Any:
        self.weight.grad[: dy.shape[1]] += dy.sum(0)
        return dy


@gl.register(name="language.NextTokenLoss")
class NextTokenLoss(gl.CrossEntropyLoss):
    """Cross-entropy of logits (N, L, vocabulary) and the tokens (N, L) that came, averaged over all."""

    def forward(self, x: Any, target: Any) -> Any:
        self.save(x.shape)
        return super().forward(x.reshape(-1, x.shape[-1]), target.reshape(-1))

    def backward(self, dy: Any) -> Any:
        (shape,) = self.saved
        return super().backward(dy).reshape(shape)

    def output_shape(self, *_: tuple) -> tuple:
        return ()


def gpt(
    *, context: int = 128, width: int = 128, layers: int = 4, heads: int = 4, vocabulary: int = VOCABULARY
) -> gl.Sequential:
    """A decoder of GPT-2's form (Radford et al. 2019): norms before each part, learned positions, GELU.

    (N, L) tokens, L ≤ context → (N, L, vocabulary) logits. Parts that add to the stream start smaller, by 1 / √(2 layers).
    """
    blocks = [part for _ in range(layers) for part in _block(width, heads)]
    model = gl.Sequential(
        gl.Embedding(vocabulary, width),
        PositionEmbedding(context),
        *blocks,
        gl.LayerNorm(width),
        gl.Linear(width, vocabulary),
    )
    model.ensure_built((None, context))
    model[0].weight *= 0.05
    for attention, mlp in zip(blocks[::2], blocks[1::2]):
        for last in (attention[1].out, mlp[3]):
            last.weight *= 1 / math.sqrt(2 * max(layers, 1))
    return model


def _block(width: int, heads: int) -> tuple[gl.Residual, gl.Residual]:
    return (
        gl.Residual(gl.LayerNorm(width), gl.MultiHeadAttention(width, heads, causal=True)),
        gl.Residual(gl.LayerNorm(width), gl.Linear(width, 4 * width), gl.GELU(), gl.Linear(4 * width, width)),
    )


def context_of(model: Any) -> int:
    """How many tokens ``model`` sees. Raises ValueError for a model of another kind."""
    for layer in model.layers():
        if isinstance(layer, PositionEmbedding):
            return layer.positions
    raise ValueError(f"{model.name}: the rule is a language model, as `gpulayers train text` makes it")
