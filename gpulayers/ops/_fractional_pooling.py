"""Maxima under windows of random steps: fractional max pooling."""

from __future__ import annotations

import itertools
import math
from typing import Any

from gpulayers.arrays import Spec, int64, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape
from gpulayers.ops._pooling import place_dtype, to_where_it_won
from gpulayers.ops._random import random_bits, shares
from gpulayers.ops._window import AXES, numbers, ordered_as, output_order, require_images


def fractional_max_pool_rule(
    x: Spec,
    seed: Spec | None = None,
    samples: Spec | None = None,
    *,
    needs: tuple = (),
    kernel_size: Any,
    output_size: Any,
    return_indices: bool = False,
) -> Rule:
    require_float("x", x)
    count = require_images(x)
    if seed is not None and samples is not None:
        raise KindError("seed", "seed or samples", "both")
    if seed is not None and (seed.dtype != int64 or seed.shape != (2,)):
        raise KindError("seed", "int64 [seed, offset]", f"{seed.dtype} {list(seed.shape)}")
    if samples is not None:
        require_same_dtype(x, samples=samples)
        require_shape("samples", samples, (*x.shape[:2], count), "samples.shape = (N, C, axes)")
    if 0 in x.shape[1:]:
        raise ShapeError("x", f"C, {', '.join(AXES[count])} ≥ 1 (N may be 0)", list(x.shape))
    kernel = numbers("kernel_size", kernel_size, 1, count)
    size = numbers("output_size", output_size, 1, count)
    for n, k, o, axis in zip(x.shape[2:], kernel, size, AXES[count]):
        if n is not None and o + k - 1 > n:
            raise ShapeError("output_size", f"O{axis} + kernel_size − 1 ≤ {axis}", f"{o} + {k} − 1 with {axis} = {n}")
    y = Spec((*x.shape[:2], *size), x.dtype, output_order(x))
    outputs = {"y": y} | ({"indices": y._replace(dtype=int64)} if return_indices else {})
    options = {"kernel_size": kernel, "output_size": size, "return_indices": bool(return_indices)}
    return Rule(outputs, {"index": y._replace(dtype=place_dtype)} if needs else {}, options)


def sample_of_axis(axis: int, count: int) -> int:
    """Which of a channel's samples an axis takes: torch counts an image's from the last axis, a volume's from the first."""
    return axis if count == 3 else count - 1 - axis


def _starts(x: Any, samples: Any, kernel: tuple, size: tuple) -> list[Any]:
    """Where the windows begin, for each axis: (N, C, O), or (1, 1, O)."""
    xp, count, found = namespace(x), len(size), []
    for axis, (n, k, o) in enumerate(zip(x.shape[2:], kernel, size)):
        s = samples[..., sample_of_axis(axis, count)][..., None]
        alpha = s.dtype.type(n - k) / s.dtype.type(max(o - 1, 1))
        steps = ((xp.arange(o, dtype=s.dtype) + s) * alpha).astype(int64) - (s * alpha).astype(int64)
        found.append(xp.where(xp.arange(o) == o - 1, xp.asarray(n - k, int64), steps))
    return found


def _spread(values: Any, axis: int, count: int) -> Any:
    """(N, C, O) so that it meets arrays over all spatial axes."""
    n, c, o = values.shape
    return values.reshape(n, c, *(1,) * axis, o, *(1,) * (count - 1 - axis))


def fractional_max_pool_forward(
    x: Any,
    seed: Any = None,
    samples: Any = None,
    *,
    needs: tuple = (),
    kernel_size: Any,
    output_size: Any,
    return_indices: bool = False,
) -> tuple[tuple, dict]:
    """y[n, c, i, j] = max_{r, q} x[n, c, a_i + r, b_j + q], a_i = ⌊(i + u) α⌋ − ⌊u α⌋ with α = (H − kh) / (OH − 1), the last
    one H − kh, and b_j likewise: windows in steps of random length (Graham, "Fractional max-pooling", 2014).

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float. Each u is in [0, 1), one for each channel of each image and each
    axis: samples (N, C, axes), x's dtype (an image's last axis takes the first, a volume's the last, as in torch);
    Philox's, of seed, int64 [seed, offset]; or ½ without either. kernel_size, output_size: an integer, or one for each
    axis; OH + kh − 1 ≤ H.

    Returns y: (N, C, OH, OW), x's dtype, channels-last in memory where x is; the gradient goes to the first of equal
    maxima, to the last NaN. return_indices: also returns where each maximum lies in its channel, counted row-major, int64.
    Steps are computed in float32, of float64 x in float64. Saves that place in place_dtype.
    """
    xp, v, count = namespace(x), up(x), x.ndim - 2
    if seed is not None:
        words = random_bits(seed, math.prod(x.shape[:2]) * count)
        samples = shares(words, v.dtype).reshape(*x.shape[:2], count)
    starts = _starts(
        x, xp.full((1, 1, count), 0.5, v.dtype) if samples is None else up(samples), kernel_size, output_size
    )
    y = xp.full((*x.shape[:2], *output_size), float("-inf"), v.dtype)
    index = xp.full(y.shape, -1, place_dtype)
    images = [xp.arange(n).reshape(-1, *(1,) * (count + 1 - a)) for a, n in enumerate(x.shape[:2])]
    for tap in itertools.product(*map(range, kernel_size)):
        places = [_spread(start + t, axis, count) for axis, (start, t) in enumerate(zip(starts, tap))]
        under, at = v[(*images, *places)], xp.zeros((), int64)
        for n, place in zip(x.shape[2:], places):
            at = at * n + place
        better = (under > y) | (under != under) | (index < 0)
        y, index = xp.where(better, under, y), xp.where(better, at.astype(place_dtype), index)
    outputs = (ordered_as(y.astype(x.dtype, copy=False), x), ordered_as(index.astype(int64), x))
    return outputs if return_indices else outputs[:1], {"index": ordered_as(index, x)} if needs else {}


def fractional_max_pool_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: tuple,
    output_size: tuple,
    return_indices: bool,
) -> tuple:
    """dx[n, c, h, w] = the sum of dy over the windows in which (h, w) won."""
    return to_where_it_won(dys[0], saved["index"], inputs[0]), None, None


fractional_max_pool = Op(
    fractional_max_pool_rule,
    fractional_max_pool_forward,
    fractional_max_pool_backward,
    differentiable=("x",),
    family="pooling",
)
