"""Rotary position embeddings, a batch and its heads at a time: four products, no array but the result's halves."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, compute_dtype, empty_numpy, float64, spec

REFUSALS = {"float64": "float64 is left to the definition"}


def rotary_refuses(q: Spec, *others: Any, needs: tuple, interleaved: bool) -> str | None:
    return REFUSALS["float64"] if q.dtype == float64 else None


def _of_tokens(table: np.ndarray, positions: Any, length: int) -> np.ndarray:
    """(N or 1, 1, L, pairs), float32."""
    rows = table if table.ndim == 3 else table[None, :length] if positions is None else table[positions]
    return rows[:, None].astype(np.float32, copy=False)


def turned(x: np.ndarray, like: Spec, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    y, pairs = empty_numpy(like.like()), cos.shape[-1]
    if interleaved:
        one, other = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        one, other = slice(pairs), slice(pairs, 2 * pairs)
    v = x[..., : 2 * pairs].astype(compute_dtype(x.dtype), copy=False)
    a, b = v[..., one], v[..., other]
    found = a * cos
    found -= b * sin
    y[..., one] = found
    np.multiply(b, cos, out=found)
    found += a * sin
    y[..., other] = found
    y[..., 2 * pairs :] = x[..., 2 * pairs :]
    return y


def rotary_forward(
    q: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    k: Any = None,
    positions: Any = None,
    *,
    needs: tuple = (),
    interleaved: bool,
) -> tuple[tuple, dict]:
    c, s = (_of_tokens(t, positions, q.shape[2]) for t in (cos, sin))
    found = tuple(turned(x, spec(x), c, s, interleaved) for x in (q, k) if x is not None)
    return found, ({"cos": cos, "sin": sin} | ({} if positions is None else {"positions": positions}) if needs else {})


def rotary_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, interleaved: bool) -> tuple:
    positions, length = saved.get("positions"), inputs[0].shape[2]
    c, s = (_of_tokens(saved[name], positions, length) for name in ("cos", "sin"))
    grads = {}
    for name, dy, x in zip("qk", (*dys, None), (inputs[0], inputs[3])):
        if name in needs:
            dy = np.zeros(x.shape, x.dtype) if dy is None else dy
            grads[name] = turned(dy, x, c, -s, interleaved)
    return grads.get("q"), None, None, grads.get("k"), None
