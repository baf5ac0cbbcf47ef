"""What the fused loss of a language model's head should take on an H200 and an H100 in bfloat16: no GPU is asked.

    python -m gpulayers.bench.judging.predicted_loss

For each chunk of tokens that the launcher makes: the logits' product, the pass over them (read for their sum, read again for
their gradient, which is written), dx' product, and dweight's, which adds to what is there; at the end both gradients times dy.
Products as ``predicted_linear.py`` has them, passes by their bytes. An H100 differs in its memory alone, by data sheets. To be
held against the next run.
"""

from __future__ import annotations

from typing import NamedTuple

from gpulayers.bench.judging.predicted import COPY, SHARE, START
from gpulayers.bench.judging.predicted_linear import product
from gpulayers.kernels.triton import _linear_cross_entropy, _tile

from gpulayers._table import table

MEMORY = {"H200": 1.0, "H100": 3.35 / 4.8}
SIZES = [("Llama-3 8B", 8192, 4096, 128256), ("GPT-2", 16384, 768, 50257)]
HEAD = ("head", "products, ms", "passes, ms", "all, ms", "TFLOP/s (goal: 650)")


class Times(NamedTuple):
    """Seconds of forward and backward."""

    products: float
    passes: float
    """Over logits and gradients."""

    @property
    def all(self) -> float:
        return self.products + self.passes


def predicted(tokens: int, features: int, classes: int, gpu: str) -> Times:
    chunk = _linear_cross_entropy.tokens_at_once(tokens)
    products = moved = 0.0
    for start in range(0, tokens, chunk):
        n = min(chunk, tokens - start)
        products += product(n, classes, features) + product(n, features, classes) + product(classes, features, n)
        moved += 3 * 2 * n * classes + (2 * classes * features if start else 0)
    moved += 2 * 2 * (tokens + classes) * features
    launches = _tile.cdiv(tokens, chunk) + 4
    return Times(products, moved / (SHARE * COPY * MEMORY[gpu]) + launches * START)


def flops(tokens: int, features: int, classes: int) -> float:
    """Of the three products."""
    return 6.0 * tokens * features * classes


def lines() -> list[tuple[str, ...]]:
    found = []
    for name, *size in SIZES:
        for gpu in MEMORY:
            times = predicted(*size, gpu)
            title = f"{name} {'×'.join(map(str, size[:2]))}→{size[2]}, {gpu}"
            figures = (f"{t * 1e3:.2f}" for t in (*times, times.all))
            found.append((title, *figures, f"{flops(*size) / times.all / 1e12:.0f}"))
    return found


if __name__ == "__main__":
    print(table(HEAD, lines()))
