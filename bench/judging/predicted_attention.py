"""What attention takes on an H200 in bfloat16 at best, reckoned from its tiles' products, exponentials, instructions and bytes:
no GPU is asked.

    python -m gpulayers.bench.judging.predicted_attention

A step of a program, a block of queries against a block of keys, is products on the tensor cores and, beside them, the
instructions of a softmax. One program waits for the one and then for the other. Several on a multiprocessor do one's products
under another's softmax, until either is busy all the time, and nothing is lost between them. ``PRODUCTS``, ``COPY``, ``L2`` and
``START`` are those of ``predicted.py``; ``STEPS`` are counted in the machine code that Triton 3.7.1 makes of the shipped tiles
for sm_90; the rest is the chip's data sheet, not measured. To be held against the next run.
"""

from __future__ import annotations

from typing import NamedTuple

from gpulayers.bench.judging.predicted import CLOCK, COPY, H200, L2, PRODUCTS, START
from gpulayers.kernels.triton import _tile, attention

from gpulayers._table import table

ISSUED, EXPONENTIALS = 4, 16
"""Instructions of warps, and exponentials of elements, that a multiprocessor does in a cycle."""
OPENING = 1.5e-6
"""Seconds that a program takes beside its steps: its first loads come in, its result goes out. Not measured."""
STEPS = {
    ("forward", 64, 128, 64): (309, 385, 2),
    ("forward", 128, 128, 128): (490, 693, 1),
    ("keys", 64, 64, 64): (361, 569, 2),
    ("keys", 128, 64, 64): (429, 629, 2),
    ("queries", 64, 128, 64): (266, 338, 2),
    ("queries", 128, 64, 64): (290, 373, 2),
}
"""(kernel, width, queries, keys) -> instructions of a warp in a step without and with a mask, programs on a multiprocessor at
once."""
CHOICES = {"forward": attention.FORWARD, "keys": attention.KEYS, "queries": attention.QUERIES}
PER_STEP = {"forward": 2, "keys": 4, "queries": 3}
"""Products of a step: of queries and keys, of weights and values, and their gradients."""
SHAPES = (
    (16, 12, 1024, 64, True),
    (4, 32, 4096, 128, True),
    (4, 32, 4096, 128, False),
    (1, 32, 16384, 128, True),
    (1, 32, 16384, 128, False),
    (1, 32, 16384, 64, False),
)
"""(images, heads, tokens, width, causal)."""
PUBLISHED = {(64, False): (497, None), (128, False): (648, 561), (128, True): (616, None)}
"""(width, causal) -> FlashAttention-3's TFLOP/s forward and backward, of 16K tokens on an H100."""
HEAD = (
    "bfloat16",
    "µs",
    "TFLOP/s",
    "forward waits for",
    "µs",
    "TFLOP/s",
    "backward for",
    "FlashAttention-3 on an H100 (TFLOP/s)",
)


class Time(NamedTuple):
    seconds: float
    bound: str


class Shape(NamedTuple):
    n: int
    heads: int
    tokens: int
    width: int
    causal: bool

    @property
    def flops(self) -> float:
        """Forward; of what a mask leaves."""
        return 4 * self.n * self.heads * self.tokens**2 * self.width / (2 if self.causal else 1)

    @property
    def array(self) -> int:
        """Bytes of q, k, v or y."""
        return 2 * self.n * self.heads * self.tokens * self.width


def kernel(name: str, s: Shape) -> Time:
    """Of one kernel, and what it waits for most."""
    tile = CHOICES[name]["half_boxes"](H200, s.width, s.tokens)
    whole, masked, at_once = STEPS[name, s.width, tile.BM, tile.BN]
    own, other = (tile.BN, tile.BM) if name == "keys" else (tile.BM, tile.BN)
    programs = _tile.cdiv(s.tokens, own)
    cut = _tile.cdiv(own, other) if s.causal else 0  # blocks that the diagonal goes through
    reached = programs * _tile.cdiv(s.tokens, other)
    steps = sum(_tile.cdiv((i + 1) * own, other) for i in range(programs)) if s.causal else reached
    product = PER_STEP[name] * 2 * tile.BM * tile.BN * s.width * H200.sms / PRODUCTS
    exponentials = tile.BM * tile.BN / EXPONENTIALS / CLOCK
    parts = {"products": product * steps}
    issued = (whole * (steps - cut * programs) + masked * cut * programs) * tile.warps / ISSUED / CLOCK
    parts["softmax"] = max(issued, exponentials * steps)
    together = sum(parts.values()) / at_once
    bound = max(parts, key=lambda part: parts[part])
    seconds = max(together, parts[bound]) + programs * OPENING / at_once
    if together > parts[bound]:
        bound = "one after the other"
    heads = s.n * s.heads
    rounds = heads / H200.sms if s.causal else _tile.cdiv(programs * heads, H200.sms * at_once) * at_once / programs
    if s.causal:  # the last programs end at different times: by half a long one on the average
        seconds *= 1 + H200.sms * at_once / (programs * heads) / 2
    loaded = heads * steps * 2 * other * 2 * s.width / L2
    return max(Time(seconds * rounds, bound), Time(loaded, "L2"), Time(4 * s.array / COPY, "memory"))


def predicted(s: Shape) -> tuple[Time, Time]:
    """Forward, and backward: delta, the gradients of keys and values, that of queries."""
    forward = kernel("forward", s)
    keys, queries = kernel("keys", s), kernel("queries", s)
    delta = 2 * s.array / COPY
    backward = Time(keys.seconds + queries.seconds + delta + 3 * START, max(keys, queries).bound)
    return Time(forward.seconds + START, forward.bound), backward


def _cells(flops: float, time: Time) -> tuple[str, str, str]:
    return f"{time.seconds * 1e6:.0f}", f"{flops / time.seconds / 1e12:.0f}", time.bound


def lines() -> list[tuple[str, ...]]:
    found = []
    for shape in SHAPES:
        s = Shape(*shape)
        forward, backward = predicted(s)
        theirs = PUBLISHED.get((s.width, s.causal), (None, None)) if s.tokens >= 4096 else (None, None)
        beside = ", ".join("–" if t is None else str(t) for t in theirs)
        name = f"{s.n}×{s.heads}×{s.tokens}×{s.width}{', causal' if s.causal else ''}"
        found.append((name, *_cells(s.flops, forward), *_cells(2.5 * s.flops, backward), beside))
    return found


if __name__ == "__main__":
    print(table(HEAD, lines()))
