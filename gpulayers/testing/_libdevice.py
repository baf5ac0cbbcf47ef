"""NumPy bodies for CUDA's libdevice functions, found by their symbol (`__nv_tanhf`, `__nv_fast_expf`, …)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def special(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function of torch.special on NumPy arrays of float32 or float64; NumPy has no erf or lgamma of its own."""

    def function(x: np.ndarray) -> np.ndarray:
        import torch

        return getattr(torch.special, name)(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    return function


erf = special("erf")


def _round(x: np.ndarray) -> np.ndarray:  # halves away from zero, where NumPy's go to even
    return np.trunc(x + np.copysign(np.nextafter(x.dtype.type(0.5), x.dtype.type(0)), x))


def _bits(kind: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.ascontiguousarray(x).view(kind)


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) * y + z).astype(x.dtype)


def _numpy(names: str) -> dict[str, Callable[..., Any]]:
    return {name: getattr(np, name) for name in names.split()}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_numpy("exp exp2 expm1 log log1p log2 log10 sqrt cbrt sin cos tan sinh cosh tanh"),
    **_numpy("floor ceil trunc rint copysign hypot nextafter fmin fmax fmod ldexp isnan isinf signbit"),
    **{f"a{name}": getattr(np, f"arc{name}") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    "erf": erf,
    "erfc": special("erfc"),
    "erfinv": special("erfinv"),
    "lgamma": special("gammaln"),
    "i0": special("i0"),
    "atan2": np.arctan2,
    "fabs": np.abs,
    "abs": np.abs,
    "pow": np.power,
    "powi": np.power,
    "round": _round,
    "nearbyint": np.rint,
    "finite": np.isfinite,
    "isfinite": np.isfinite,
    "exp10": lambda x: np.power(x.dtype.type(10), x),
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x),
    "rcbrt": lambda x: x.dtype.type(1) / np.cbrt(x),
    "frcp_rn": lambda x: x.dtype.type(1) / x,
    "fdiv_rn": np.divide,
    "fdivide": np.divide,
    "fsqrt_rn": np.sqrt,
    "fadd_rn": np.add,
    "fmul_rn": np.multiply,
    "saturate": lambda x: np.clip(x, x.dtype.type(0), x.dtype.type(1)),
    "fma": _fma,
    "fmaf_rn": _fma,
    "float_as_int": _bits(np.int32),
    "int_as_float": _bits(np.float32),
    "popc": lambda x: np.bitwise_count(np.ascontiguousarray(x).view(f"u{x.itemsize}")),
}


def call(symbol: str, *args: np.ndarray) -> np.ndarray:
    """The value of the libdevice function `symbol`; NotImplementedError if it has no NumPy body here."""
    name = symbol.removeprefix("__nv_").removeprefix("fast_")
    function = FUNCTIONS.get(name) or FUNCTIONS.get(name[:-1]) or FUNCTIONS.get(name[:-2])  # suffixes f, d, ll
    if function is None:
        raise NotImplementedError(f"the libdevice function {symbol} has no NumPy body in the interpreter")
    return np.asarray(function(*args))
