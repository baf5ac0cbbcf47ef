"""Activations in blocks that fit the cache, each a chain of in-place ufuncs that NumPy vectorises.

What costs in NumPy is not what costs elsewhere (ns an element, one core): ``np.where`` 1.2 and a maximum with a scalar
0.4, against 0.1 for arithmetic and bit operations and 0.4–0.6 for exp and tanh. So selections work on bits, and the
error function is a tanh of a polynomial. The chains are in _piecewise.py and _smooth.py; prelu, rrelu and glu in _gates.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._activation import OPTIONS, launchers
from . import _blocks, _piecewise, _smooth
from ._gates import REFUSALS
from ._gates import glu_backward as glu_backward
from ._gates import glu_forward as glu_forward
from ._gates import glu_refuses as glu_refuses
from ._gates import prelu_backward as prelu_backward
from ._gates import prelu_forward as prelu_forward
from ._gates import prelu_refuses as prelu_refuses
from ._gates import rrelu_backward as rrelu_backward
from ._gates import rrelu_forward as rrelu_forward
from ._gates import rrelu_refuses as rrelu_refuses

_CHAINS = vars(_piecewise) | vars(_smooth)


def _in_float32(body: Callable, inputs: tuple[np.ndarray, ...], out: np.ndarray, numbers: tuple[float, ...]) -> None:
    """body(*inputs, out, *numbers) on float32 blocks of flat arrays; 16-bit blocks are cast there and back."""

    def work(lo: int, hi: int) -> None:
        o = out[lo:hi]
        t = o if o.dtype == np.float32 else np.empty(hi - lo, np.float32)
        with np.errstate(all="ignore"):  # exp(88.8) is Inf, as it should be
            body(*(a[lo:hi].astype(np.float32, copy=False) for a in inputs), t, *numbers)
            if t is not o:
                o[...] = t

    _blocks.each(out.size, _blocks.CHAIN, work)


def value(name: str, x: np.ndarray, out: np.ndarray, numbers: tuple[float, ...] = ()) -> None:
    """out = f(x). Flat arrays; ``out`` may be ``x``."""
    _in_float32(_CHAINS[name], (x,), out, numbers)


def gradient(name: str, dy: np.ndarray, kept: np.ndarray, out: np.ndarray, numbers: tuple[float, ...] = ()) -> None:
    """out = dy f'(x), from what the forward kept. Flat arrays; ``out`` is neither of the others."""
    _in_float32(_CHAINS[f"{name}_gradient"], (dy, kept), out, numbers)


def _forward(name: str, x: np.ndarray, _: None, *numbers: float) -> np.ndarray:
    y = _blocks.empty_like(x)
    value(name, _blocks.flat_like(x, x), y.reshape(-1) if y.flags.c_contiguous else _blocks.flat_like(y, y), numbers)
    return y


def _backward(name: str, dy: np.ndarray, kept: np.ndarray, _: None, *numbers: float) -> np.ndarray:
    dx = _blocks.empty_like(kept)
    gradient(name, _blocks.flat_like(dy, dx), _blocks.flat_like(kept, dx), _blocks.flat_like(dx, dx), numbers)
    return dx


def _refuses(x: Any, *, needs: tuple = (), **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


globals().update(launchers(_forward, _backward))  # relu_forward, relu_backward and so on
globals().update(dict.fromkeys([f"{name}_refuses" for name in OPTIONS], _refuses))
