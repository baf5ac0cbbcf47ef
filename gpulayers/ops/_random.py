"""Random bits: Philox4x32-10, the same on every backend.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). It is the generator of
``tl.philox``, cuRAND and torch on CUDA: four 32-bit words of bits from a 128-bit counter under a 64-bit key.

The convention of this project: ``seed`` is an int64 array [seed, offset]; the key is the seed, the counter is
[i // 4, offset] (two 64-bit halves), and element i of an array, counted row-major, takes word i % 4. So a draw is named
by (seed, offset) alone, two offsets never share a counter, and arrays may have more than 2³² elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpulayers.arrays import namespace

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF


def philox(key: Any, first: Any, second: Any) -> tuple[Any, Any, Any, Any]:
    """Four arrays of 32-bit words, held in uint64, from uint64 key and counter halves (arrays that broadcast)."""
    c0, c1, c2, c3 = first & LOW, first >> 32, second & LOW, second >> 32
    k0, k1 = key & LOW, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW, (p0 >> 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def random_bits(seed: Any, count: int) -> Any:
    """The uint32 words (count,) of the elements 0 … count − 1 under ``seed``, an int64 array [seed, offset].

    A seed that stands for one not known yet says itself what its words are.
    """
    if (own := getattr(seed, "random_bits", None)) is not None:
        return own(count)
    xp = namespace(seed)
    key, offset = seed.view(xp.uint64).reshape(2, 1)
    counter = xp.arange(-(-count // 4), dtype=xp.uint64)
    return xp.stack(philox(key, counter, offset), axis=1).reshape(-1)[:count].astype(xp.uint32)


def shares(words: Any, dtype: Any) -> Any:
    """Numbers in [0, 1) of random words: their upper 24 bits make a float32 without rounding."""
    return (words >> 8).astype(dtype) * 2.0**-24


_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
_TAILS = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip
"""Of erf's inverse, by powers of what follows from its logarithm, the highest first."""


def normals(words: Any) -> Any:
    """Numbers of the standard normal distribution, float32, up to 5.4: √2 erf⁻¹ of their upper 24 bits, in (-1, 1).

    Source: Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011), in float32. Logarithms and roots alone:
    a cosine's range reduction would take a GPU's local memory.
    """
    x = shares(words, "float32") * 2 + (2.0**-24 - 1)
    xp = namespace(x)
    w = -xp.log((1 - x) * (1 + x))
    p = xp.where(w < 5, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAILS, xp.sqrt(w) - 3))
    return p * x * math.sqrt(2)


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    found: Any = coefficients[0]
    for c in coefficients[1:]:
        found = c + found * x
    return found
