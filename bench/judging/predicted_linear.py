"""What GPT-2's and Llama's linear layers should take on an H200 in bfloat16: no GPU is asked.

    python -m gpulayers.bench.judging.predicted_linear

Tiles, splits of K and launches are those that the launchers choose there; a launch takes as long as ``predicted.py`` has it for
so many tiles, and a second stage as the bytes that it moves. dweight's product brings dbias, which costs it nothing here. cuBLAS:
these layers at the share of the limit that it had there over other ones, most of them larger. To be held against the next run.
"""

from __future__ import annotations

from typing import NamedTuple

from gpulayers.bench.judging.predicted import COPY, H200, PRODUCTS, START, of_tiles
from gpulayers.kernels.triton import _matmul, _tile

from gpulayers._table import table

CUBLAS = 0.94
"""Of the limit, forward and backward together."""
HEAD = ("layer, times in µs", "forward", "dx", "dweight", "all", "limit", "cuBLAS", "of it")


class Layer(NamedTuple):
    name: str
    tokens: int
    features: int
    outs: tuple[int, ...]
    """Of several weights: they are one launch."""


class Times(NamedTuple):
    """In seconds."""

    forward: float
    dx: float
    dweight: float


LAYERS = [
    *(Layer("GPT-2", 16 * 1024, *sizes) for sizes in ((768, (2304,)), (768, (768,) * 3), (768, (768,)))),
    *(Layer("GPT-2", 16 * 1024, *sizes) for sizes in ((768, (3072,)), (3072, (768,)))),
    *(Layer("Llama-3 8B", 8192, *sizes) for sizes in ((4096, (4096,)), (4096, (1024,)), (4096, (4096, 1024, 1024)))),
    *(Layer("Llama-3 8B", 8192, *sizes) for sizes in ((4096, (14336,)), (4096, (14336,) * 2), (14336, (4096,)))),
]


def product(m: int, n: int, k: int) -> float:
    """A (M, K) · B (K, N): the tiles' rounds, and what is split added up."""
    tile, splits = _matmul.HALF_TMA(H200, m, n, k, 2, True, True)
    tiles = _tile.cdiv(m, tile.BM) * _tile.cdiv(n, tile.BN)
    inner = _tile.cdiv(_tile.cdiv(k, tile.BK), splits) * tile.BK
    parts = 4 * splits * m * n if splits > 1 else 0
    found = of_tiles(tile, tiles * splits, inner, 2 * (m + n) * k + (parts or 2 * m * n))
    return found + ((parts + 2 * m * n) / COPY + START if parts else 0.0)


def predicted(layer: Layer) -> Times:
    out = sum(layer.outs)
    return Times(
        product(layer.tokens, out, layer.features),
        product(layer.tokens, layer.features, out),
        product(out, layer.features, layer.tokens),
    )


def limit(layer: Layer) -> float:
    """Of each of the three."""
    return 2 * layer.tokens * layer.features * sum(layer.outs) / PRODUCTS


def lines() -> list[tuple[str, ...]]:
    found = []
    for layer in LAYERS:
        times, least = predicted(layer), 3 * limit(layer)
        name = f"{layer.name} {layer.tokens}×{layer.features}→{'+'.join(map(str, layer.outs))}"
        figures = (f"{t * 1e6:.1f}" for t in (*times, sum(times), least, least / CUBLAS))
        found.append((name, *figures, f"{sum(times) / least * CUBLAS:.2f}"))
    return found


if __name__ == "__main__":
    print(table(HEAD, lines()))
