"""Multi-head self-attention, and caches for decoding."""

from __future__ import annotations

from typing import Any

from gpulayers import arrays, random, transfer
from gpulayers.definition import ArgumentError, ShapeError
from gpulayers.layers._caches import KVCache as KVCache
from gpulayers.layers._caches import PagedKVCache as PagedKVCache
from gpulayers.layers._layer import Layer
from gpulayers.layers.linear import Linear
from gpulayers.ops.attention import attention


class MultiHeadAttention(Layer):
    """Self-attention over a sequence: (N, L, embed_dim) → (N, L, embed_dim).

    One product makes queries, keys and values, ``num_heads`` heads attend, one product joins what they found.

    num_kv_heads: heads of keys and values, each shared by as many of the queries' (grouped queries); all by default.
    causal: a token sees itself and those before it. window: (left, right), how many on each side, -1 for no limit.
    dropout: the share of weights that are 0 in training; drawn from gl.random. scale, softcap: as the op attention takes
    them.
    Weights: those of ``qkv`` (embed_dim → (num_heads + 2 num_kv_heads) · head) and ``out``, two Linear layers.
    """

    skips_input_grad = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        window: tuple = (-1, -1),
        scale: float | None = None,
        softcap: float = 0.0,
    ):
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ArgumentError("num_heads", "num_heads ≥ 1 divides embed_dim", f"{num_heads}, {embed_dim}")
        if groups < 1 or num_heads % groups:
            raise ArgumentError("num_kv_heads", "num_kv_heads ≥ 1 divides num_heads", f"{groups}, {num_heads}")
        if not 0 <= dropout <= 1:
            raise ArgumentError("dropout", "0 ≤ dropout ≤ 1", dropout)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.dropout, self.causal, self.window, self.scale, self.softcap = dropout, causal, window, scale, softcap
        self.qkv = Linear(embed_dim, (num_heads + 2 * groups) * (embed_dim // num_heads), bias)
        self.out = Linear(embed_dim, embed_dim, bias)

    def output_shape(self, input_shape: tuple) -> tuple:
        if len(input_shape) != 3 or input_shape[2] != self.embed_dim:
            error = ShapeError("x", f"x.shape = [N, L, embed_dim] = [N, L, {self.embed_dim}]", list(input_shape))
            error.where = self.name
            raise error
        return input_shape

    @property
    def _groups(self) -> int:
        """How many heads keys and values have."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def _heads(self, x: Any) -> tuple[Any, Any, Any]:
        """Queries, keys and values (N, heads, L, head) of x."""
        self.output_shape(x.shape)
        n, length, _ = x.shape
        head = self.embed_dim // self.num_heads
        groups = self._groups
        joint = self.qkv(x).reshape(n, length, self.num_heads + 2 * groups, head).swapaxes(1, 2)
        return joint[:, : self.num_heads], joint[:, self.num_heads : -groups], joint[:, -groups:]

    def cache(self, batch: int, capacity: int) -> KVCache:
        """Room for ``extend``: ``batch`` sequences of up to ``capacity`` tokens, where the weights are."""
        head = self.embed_dim // self.num_heads
        return KVCache(batch, capacity, self._groups, head, dtype=self.qkv.weight.dtype, device=self.device)

    def extend(self, x: Any, cache: KVCache) -> Any:
        """What ``forward`` in evaluation gives for new tokens x (N, L, embed_dim) behind those in ``cache``, which gets them.

        For inference. Raises ValueError if the layer is not causal, or the cache is full.
        """
        if not self.causal:
            raise ValueError(f"{self.name}: extend: the rule is causal=True; got {self.causal}")
        y = cache(*self._heads(x), window=self.window, scale=self.scale, softcap=self.softcap)
        return self.out(y.swapaxes(1, 2).reshape(x.shape))

    def forward(self, x: Any) -> Any:
        parts = self._heads(x)
        drops = self.training and self.dropout > 0
        seed = transfer.beside(random.draw(), x) if drops else None
        y, _ = self.run(
            attention, *parts, None, None, seed,
            causal=self.causal, window=self.window, scale=self.scale, softcap=self.softcap, p=self.dropout if drops else 0.0,
        )  # fmt: skip
        return self.out(y.swapaxes(1, 2).reshape(x.shape))

    def backward(self, dy: Any) -> Any:
        dy = self.out.backward(dy)
        n, length, _ = dy.shape
        head = self.embed_dim // self.num_heads
        grads = self.run_backward(dy.reshape(n, length, self.num_heads, head).swapaxes(1, 2), None)
        joint = [g.swapaxes(1, 2).reshape(n, length, g.shape[1] * head) for g in grads]
        return self.qkv.backward(arrays.concatenate(joint, 2))
