"""Exponentials that cost one instruction of the special function unit, and what is made of them, on float32 tiles.

Numbers below 2⁻¹²⁶ are 0 to them. What bounds a pass over memory in 16 bits is how many instructions an element takes:
Triton's own exp, sigmoid and erf also scale numbers that small, and erf computes two polynomials to choose from.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def opened(x, gate):
    """x σ(gate)."""
    return libdevice.fast_dividef(x, 1 + libdevice.exp2(gate * -1.4426950408889634))


@triton.jit
def sigmoid(x):
    return opened(1.0, x)


@triton.jit
def normal(x):
    """(Φ(x), exp(−x² / 2)): Φ(−|x|) is the second times a polynomial of 1 / (1 + 0.34 |x|), after Hastings ("Approximations for
    Digital Computers", 1955), fit to 2e-8 and, of numbers as small as Φ(−14), to one part in 100,000."""
    a = tl.abs(x)
    t = libdevice.fast_dividef(1.0, 1 + 0.34 * a)
    e = libdevice.exp2(x * x * -0.7213475204444817)
    p = (((0.04361593 * t - 0.19541368) * t + 0.25534295) * t - 0.02305613) * t + 0.15296552
    q = ((p * t + 0.13059804) * t + 0.13594735) * t * e
    return tl.where(x < 0, q, 1 - q), e


@triton.jit
def log1p(e):
    """log(1 + e) for −1 ≤ e ≤ 1, without losing a small e (Kahan): the rounding of 1 + e is divided out."""
    u = 1 + e
    d = u - 1
    return tl.where(d == 0, e, tl.log(u) * (e / tl.where(d == 0, 1.0, d)))
