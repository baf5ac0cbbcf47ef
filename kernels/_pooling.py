"""The launchers of pooling that every backend shares: they make a launch's arrays, and a backend's bodies fill them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ._window import Window, image, output_order


class Divisor(NamedTuple):
    """What a window's sum is divided by."""

    override: int | None
    """This number, where one is given."""
    include_pad: bool
    """Else the window's taps on the image, or on the image and its padding."""


def pooling_window(kernel: tuple, stride: tuple, padding: tuple, dilation: tuple | None = None) -> Window:
    """Of images where it is of sequences."""
    dilation = dilation or (1,) * len(kernel)
    if len(kernel) == 1:
        return Window((1, *kernel), (1, *stride), (0, *padding), (1, *dilation))
    return Window(kernel, stride, padding, dilation)


def max_pool(forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """Launchers from forward(x, y, tap or None, indices or None, window, empty) and backward(dy, tap, dx, window), which see
    images or volumes."""

    def max_pool_forward(
        x: Any,
        *,
        needs: tuple = (),
        kernel_size: tuple,
        stride: tuple,
        padding: tuple,
        dilation: tuple,
        ceil_mode: bool,
        return_indices: bool,
        empty: Any,
    ) -> tuple[tuple, dict]:
        size = Window(kernel_size, stride, padding, dilation).output_size(x.shape[2:], padding, ceil_mode)
        window, order = pooling_window(kernel_size, stride, padding, dilation), output_order(x)
        y = empty((*x.shape[:2], *size), x.dtype, order)
        tap = empty(y.shape, window.tap_dtype, order) if needs else None
        indices = empty(y.shape, "int64", order) if return_indices else None
        views = [a if a is None else image(a) for a in (x, y, tap, indices)]
        forward(*views, window, empty)
        return (y, indices) if return_indices else (y,), {"tap": tap} if needs else {}

    def max_pool_backward(
        dys: tuple,
        saved: dict,
        *,
        inputs: tuple,
        needs: tuple,
        kernel_size: tuple,
        stride: tuple,
        padding: tuple,
        dilation: tuple,
        ceil_mode: bool,
        return_indices: bool,
        empty: Any,
    ) -> tuple:
        (x,) = inputs
        dx = empty(x.shape, x.dtype, x.like().order)
        window = pooling_window(kernel_size, stride, padding, dilation)
        backward(image(dys[0]), image(saved["tap"]), image(dx), window)
        return (dx,)

    return max_pool_forward, max_pool_backward


def avg_pool(forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """Launchers from forward(x, y, window, divisor) and backward(dy, dx, window, divisor)."""

    def avg_pool_forward(
        x: Any,
        *,
        needs: tuple = (),
        kernel_size: tuple,
        stride: tuple,
        padding: tuple,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
        empty: Any,
    ) -> tuple[tuple, dict]:
        plain = Window(kernel_size, stride, padding, (1,) * len(kernel_size))
        y = empty((*x.shape[:2], *plain.output_size(x.shape[2:], padding, ceil_mode)), x.dtype, output_order(x))
        divisor = Divisor(divisor_override, bool(count_include_pad))
        forward(image(x), image(y), pooling_window(kernel_size, stride, padding), divisor)
        return (y,), {}

    def avg_pool_backward(
        dys: tuple,
        saved: dict,
        *,
        inputs: tuple,
        needs: tuple,
        kernel_size: tuple,
        stride: tuple,
        padding: tuple,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
        empty: Any,
    ) -> tuple:
        (x,) = inputs
        dx = empty(x.shape, x.dtype, x.like().order)
        divisor = Divisor(divisor_override, bool(count_include_pad))
        backward(image(dys[0]), image(dx), pooling_window(kernel_size, stride, padding), divisor)
        return (dx,)

    return avg_pool_forward, avg_pool_backward


def adaptive_avg_pool(
    average: tuple[Callable, Callable], forward: Callable, backward: Callable, widest: float = math.inf
) -> tuple[Callable, Callable]:
    """Launchers from forward(x, y, empty) and backward(dy, dx).

    average: avg_pool's launchers, which do the same where several parts divide the image, if none is over ``widest``.
    """

    def divided(x: Any, output_size: tuple) -> dict | None:
        """The options of that ``avg_pool``."""
        if set(output_size) == {1} or 0 in output_size or any(n % o for n, o in zip(x.shape[2:], output_size)):
            return None
        window = tuple(n // o for n, o in zip(x.shape[2:], output_size))
        plain = {"padding": (0,) * len(window), "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
        return {"kernel_size": window, "stride": window, **plain} if window[-1] <= widest else None

    def adaptive_avg_pool_forward(x: Any, *, needs: tuple = (), output_size: tuple, empty: Any) -> tuple[tuple, dict]:
        if options := divided(x, output_size):
            return average[0](x, needs=needs, **options, empty=empty)
        y = empty((*x.shape[:2], *output_size), x.dtype, output_order(x))
        forward(image(x), image(y), empty)
        return (y,), {}

    def adaptive_avg_pool_backward(
        dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple, empty: Any
    ) -> tuple:
        (x,) = inputs
        if options := divided(x, output_size):
            return average[1](dys, saved, inputs=inputs, needs=needs, **options, empty=empty)
        dx = empty(x.shape, x.dtype, x.like().order)
        backward(image(dys[0]), image(dx))
        return (dx,)

    return adaptive_avg_pool_forward, adaptive_avg_pool_backward
