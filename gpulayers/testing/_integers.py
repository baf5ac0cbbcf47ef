"""Integers as a GPU computes them, on NumPy arrays: what LLVM's sdiv, srem, shl, fptosi … give in compiled kernels.

They wrap at their width, and division goes towards zero. What LLVM leaves undefined is refused: the compiler takes for
granted that it never happens, so it drops whatever code guards against it, and the kernel is wrong elsewhere.
"""

from __future__ import annotations

import numpy as np


class UndefinedError(ArithmeticError):
    """A kernel computed what has no result on a GPU."""


def _refuse(bad: np.ndarray, what: str) -> None:
    if bad.any():
        raise UndefinedError(f"{what}, in {int(bad.sum())} of {bad.size} lanes: undefined on a GPU, masked off or not")


def _check_division(a: np.ndarray, b: np.ndarray) -> None:
    _refuse(b == 0, "integer division by zero")
    if a.dtype.kind == "i" and (least := b == -1).any():
        _refuse(least & (a == np.iinfo(a.dtype).min), f"the least {a.dtype} divided by −1")


def _by_positive(a: np.ndarray, b: np.ndarray) -> bool:
    """Numbers from 0 on by one positive number, of a type: rounding down, which NumPy does fast, is towards zero."""
    if b.size != 1 or a.dtype != b.dtype or a.dtype.kind not in "iu" or b.item() <= 0:
        return False
    return bool((a.item() if a.size == 1 else a.min(initial=0)) >= 0)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b towards zero (NumPy's `//` rounds down)."""
    if _by_positive(a, b):
        return a // b
    _check_division(a, b)
    return a if a.dtype == bool else (a - np.fmod(a, b)) // b


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What `divide` leaves, with a's sign."""
    if _by_positive(a, b):
        return a - a // b * b
    _check_division(a, b)
    return np.zeros_like(a) if a.dtype == bool else np.fmod(a, b)


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One bit has no carry: True + True is False."""
    return a ^ b if a.dtype == bool else a + b


def subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a ^ b if a.dtype == bool else a - b


def _check_shift(a: np.ndarray, n: np.ndarray) -> None:
    width = 1 if a.dtype == bool else 8 * a.itemsize
    _refuse((n < 0) | (n >= width), f"a shift of {width} bits by {width} or more, or by less than 0")


def shift_left(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    _check_shift(a, n)
    return a if a.dtype == bool else np.left_shift(a, n)


def shift_right(a: np.ndarray, n: np.ndarray, signed: bool) -> np.ndarray:
    """`signed`: the sign's bit comes in from the left, whatever a's own type says; else zeros do."""
    _check_shift(a, n)
    if a.dtype == bool:
        return a
    kind = np.dtype(f"{'i' if signed else 'u'}{a.itemsize}")
    return np.right_shift(a.view(kind), n.view(kind)).view(a.dtype)


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of an unsigned product."""
    x, y = (np.ascontiguousarray(v).view(np.dtype(f"u{v.itemsize}")) for v in (a, b))
    if x.itemsize == 8:
        return _multiply_high_64(x, y).view(a.dtype)
    wide = np.dtype(f"u{2 * x.itemsize}")
    return ((x.astype(wide) * y.astype(wide)) >> wide.type(8 * x.itemsize)).astype(x.dtype).view(a.dtype)


def _multiply_high_64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a1, a0, b1, b0 = a >> half, a & low, b >> half, b & low
    middle = a1 * b0 + (a0 * b0 >> half)
    carry = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (carry >> half)


def from_float(x: np.ndarray, kind: np.dtype) -> np.ndarray:
    """PTX's cvt.rzi: towards zero, held within the type's range. 8 bits are converted as 16, so out of range they depend on
    what the compiler does next: refused.

    NaN gives 0; to or from 64 bits the sign's bit alone (PTX ISA, cvt).
    """
    info, wide = np.iinfo(kind), x.astype(np.float64)
    whole = np.trunc(wide)
    low, high = whole < float(info.min), whole >= float(info.max + 1)
    if kind.itemsize == 1:
        _refuse(low | high, f"a number beyond {kind}, converted")
    out = np.where(low | high | np.isnan(wide), 0, whole).astype(kind)
    out = np.where(low, info.min, np.where(high, info.max, out)).astype(kind, copy=False)
    if max(x.itemsize, kind.itemsize) == 8:
        sign = np.array(1 << (8 * kind.itemsize - 1), np.uint64).astype(f"u{kind.itemsize}").view(kind)
        out = np.where(np.isnan(wide), sign, out)
    return out
