"""Windows of images as columns, and back; pixels to channels, and back; channels dealt out anew."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, arranged, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._window import ordered_as, output_order, pair, require_image, window

# --- unfold and fold -------------------------------------------------------------------------------------------------


def _options(kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> dict[str, Any]:
    return {
        "kernel_size": pair("kernel_size", kernel_size, 1),
        "dilation": pair("dilation", dilation, 1),
        "padding": pair("padding", padding, 0),
        "stride": pair("stride", stride, 1),
    }


def _windows(size: Any, kernel: int, dilation: int, padding: int, stride: int, axis: str) -> Any:
    """How many windows lie along an axis."""
    if size is None:
        return None
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if room < 0:
        rule = f"⌊({axis} + 2 · {padding} − {dilation} · ({kernel} − 1) − 1) / {stride}⌋ + 1 ≥ 1 windows"
        raise ShapeError("x", rule, f"{axis} = {size}")
    return room // stride + 1


def _counts(size: tuple, options: dict[str, Any]) -> tuple:
    names = "kernel_size", "dilation", "padding", "stride"
    kernel, dilation, padding, stride = (options[name] for name in names)
    return tuple(map(_windows, size, kernel, dilation, padding, stride, "HW"))


def unfold_rule(
    x: Spec, *, needs: tuple = (), kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Rule:
    require_float("x", x)
    require_image(x)
    options = _options(kernel_size, dilation, padding, stride)
    if 0 in x.shape[1:]:
        raise ShapeError("x", "C, H, W ≥ 1 (N may be 0)", list(x.shape))
    (n, c, *size), (kh, kw) = x.shape, options["kernel_size"]
    rows, columns = _counts(tuple(size), options)
    count = None if rows is None or columns is None else rows * columns
    return Rule({"y": Spec((n, None if c is None else c * kh * kw, count), x.dtype)}, {}, options)


def _unfolded(x: Any, kernel: tuple, dilation: tuple, padding: tuple, stride: tuple) -> Any:
    """(N, C · kh · kw, windows), a tap at a time."""
    xp, (n, c, *size) = namespace(x), x.shape
    how = dict(zip(("kernel_size", "dilation", "padding", "stride"), (kernel, dilation, padding, stride)))
    (rows, columns), (kh, kw) = _counts(tuple(size), how), kernel
    wide = xp.pad(x, ((0, 0), (0, 0), *[(p, p) for p in padding]))
    y = xp.empty((n, c, kh, kw, rows, columns), x.dtype)
    for r in range(kh):
        for q in range(kw):
            y[:, :, r, q] = window(wide, (r, q), dilation, stride, (rows, columns))
    return y.reshape(n, c * kh * kw, rows * columns)


def _folded(y: Any, size: tuple, kernel: tuple, dilation: tuple, padding: tuple, stride: tuple) -> Any:
    """(N, C, *size): the sum of the columns where their windows lie, in the dtype it is computed in."""
    g, (kh, kw) = up(y), kernel
    how = dict(zip(("kernel_size", "dilation", "padding", "stride"), (kernel, dilation, padding, stride)))
    rows, columns = _counts(size, how)
    n, c = len(y), y.shape[1] // (kh * kw)
    g = g.reshape(n, c, kh, kw, rows, columns)
    (h, w), (top, left) = size, padding
    wide = namespace(y).zeros((n, c, h + 2 * top, w + 2 * left), g.dtype)
    for r in range(kh):
        for q in range(kw):
            window(wide, (r, q), dilation, stride, (rows, columns))[...] += g[:, :, r, q]
    return wide[:, :, top : top + h, left : left + w]


def unfold_forward(
    x: Any, *, needs: tuple = (), kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> tuple[tuple, dict]:
    """y[n, (c · kh + r) · kw + q, i · OW + j] = x[n, c, i·stride + r·dilation − top, j·stride + q·dilation − left].

    x: (N, C, H, W), float, C, H, W ≥ 1; zeros lie around it. kernel_size, dilation, padding, stride: integers or pairs
    (height, width).

    Returns y: (N, C · kh · kw, OH · OW), OH = ⌊(H + 2 · padding − dilation · (kh − 1) − 1) / stride⌋ + 1, in x's dtype.
    Raises ShapeError (a RuntimeError) where there is no window. As torch.nn.functional.unfold. Saves nothing.
    """
    return (_unfolded(x, kernel_size, dilation, padding, stride),), {}


def unfold_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, kernel_size: tuple, dilation: tuple, padding: tuple, stride: tuple
) -> tuple:  # fmt: skip
    """dx = fold(dy): each pixel's sum over the windows that it lies in."""
    (dy,), (x,) = dys, inputs
    dx = _folded(dy, x.shape[2:], kernel_size, dilation, padding, stride)
    return (arranged(dx.astype(x.dtype, copy=False), x.like().order),)


unfold = Op(unfold_rule, unfold_forward, unfold_backward)


def fold_rule(
    x: Spec,
    *,
    needs: tuple = (),
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Rule:
    require_float("x", x)
    options = _options(kernel_size, dilation, padding, stride)
    size, (kh, kw) = pair("output_size", output_size, 1), options["kernel_size"]
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ShapeError("x", "x.shape = (N, C · kh · kw, windows), C · windows ≥ 1", list(x.shape))
    n, columns, count = x.shape
    if columns is not None and columns % (kh * kw):
        raise ShapeError("x", f"x.shape[1] is a multiple of kh · kw = {kh * kw}", list(x.shape))
    rows, across = _counts(size, options)
    if count is not None and count != rows * across:
        raise ShapeError("x", f"x.shape[2] = {rows} · {across} windows in {list(size)}", list(x.shape))
    y = Spec((n, None if columns is None else columns // (kh * kw), *size), x.dtype)
    return Rule({"y": y}, {}, {"output_size": size, **options})


def fold_forward(
    x: Any,
    *,
    needs: tuple = (),
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> tuple[tuple, dict]:
    """y[n, c, h, w] = the sum of x over the windows' places that lie on (h, w): what unfold's backward does.

    x: (N, C · kh · kw, OH · OW), float, as unfold gives it for images (N, C, *output_size) with the same options.

    Returns y: (N, C, *output_size), in x's dtype. Raises ShapeError (a RuntimeError) where x is no such array. As
    torch.nn.functional.fold. Saves nothing.
    """
    return (_folded(x, output_size, kernel_size, dilation, padding, stride).astype(x.dtype),), {}


def fold_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    output_size: tuple,
    kernel_size: tuple,
    dilation: tuple,
    padding: tuple,
    stride: tuple,
) -> tuple:
    """dx = unfold(dy)."""
    dx = _unfolded(dys[0], kernel_size, dilation, padding, stride)
    return (arranged(dx, inputs[0].like().order),)


fold = Op(fold_rule, fold_forward, fold_backward)


# --- pixels to channels, and back ------------------------------------------------------------------------------------


def _factor(argument: str, value: Any) -> int:
    if not hasattr(value, "__index__") or isinstance(value, bool):
        raise KindError(argument, "an integer", repr(value))
    if value < 1:
        raise ShapeError(argument, f"{argument} ≥ 1", value)
    return value


def _scaled(size: Any, factor: int) -> Any:
    return None if size is None else size * factor


def _copied(parts: Any, *shape: int) -> Any:
    """A view's elements as an array of this shape, never the view itself."""
    y = namespace(parts).empty(parts.shape, parts.dtype)
    y[...] = parts
    return y.reshape(shape)


def _shuffled(x: Any, r: int) -> Any:
    n, c, h, w = x.shape
    parts = x.reshape(n, c // (r * r), r, r, h, w).transpose(0, 1, 4, 2, 5, 3)
    return _copied(parts, n, c // (r * r), h * r, w * r)


def _unshuffled(x: Any, r: int) -> Any:
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // r, r, w // r, r).transpose(0, 1, 3, 5, 2, 4)
    return _copied(parts, n, c * r * r, h // r, w // r)


def pixel_shuffle_rule(x: Spec, *, needs: tuple = (), upscale_factor: int) -> Rule:
    require_float("x", x)
    require_image(x)
    r, (n, c, h, w) = _factor("upscale_factor", upscale_factor), x.shape
    if c is not None and c % (r * r):
        raise ShapeError("x", f"C is a multiple of upscale_factor² = {r * r}", f"C = {c} in {list(x.shape)}")
    shape = n, None if c is None else c // (r * r), _scaled(h, r), _scaled(w, r)
    return Rule({"y": Spec(shape, x.dtype, output_order(x))}, {}, {"upscale_factor": r})


def pixel_shuffle_forward(x: Any, *, needs: tuple = (), upscale_factor: int) -> tuple[tuple, dict]:
    """y[n, c, h·r + i, w·r + j] = x[n, (c·r + i)·r + j, h, w], r = upscale_factor.

    x: (N, C · r², H, W), float. Returns y: (N, C, H · r, W · r), x's dtype, channels-last in memory where x is. Raises
    ShapeError (a RuntimeError) where r² does not divide the channels. As torch.nn.functional.pixel_shuffle. Saves nothing.
    """
    return (ordered_as(_shuffled(x, upscale_factor), x),), {}


def pixel_shuffle_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, upscale_factor: int) -> tuple:
    """dx = pixel_unshuffle(dy)."""
    return (arranged(_unshuffled(dys[0], upscale_factor), inputs[0].like().order),)


pixel_shuffle = Op(pixel_shuffle_rule, pixel_shuffle_forward, pixel_shuffle_backward)


def pixel_unshuffle_rule(x: Spec, *, needs: tuple = (), downscale_factor: int) -> Rule:
    require_float("x", x)
    require_image(x)
    r, (n, c, *size) = _factor("downscale_factor", downscale_factor), x.shape
    for side, axis in zip(size, "HW"):
        if side is not None and side % r:
            raise ShapeError("x", f"{axis} is a multiple of downscale_factor = {r}", f"{axis} = {side}")
    shape = n, _scaled(c, r * r), *(None if side is None else side // r for side in size)
    return Rule({"y": Spec(shape, x.dtype, output_order(x))}, {}, {"downscale_factor": r})


def pixel_unshuffle_forward(x: Any, *, needs: tuple = (), downscale_factor: int) -> tuple[tuple, dict]:
    """y[n, (c·r + i)·r + j, h, w] = x[n, c, h·r + i, w·r + j], r = downscale_factor: pixel_shuffle's inverse.

    x: (N, C, H · r, W · r), float. Returns y: (N, C · r², H, W), x's dtype, channels-last in memory where x is. Raises
    ShapeError (a RuntimeError) where r does not divide the sizes. As torch.nn.functional.pixel_unshuffle. Saves nothing.
    """
    return (ordered_as(_unshuffled(x, downscale_factor), x),), {}


def pixel_unshuffle_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, downscale_factor: int) -> tuple:
    """dx = pixel_shuffle(dy)."""
    return (arranged(_shuffled(dys[0], downscale_factor), inputs[0].like().order),)


pixel_unshuffle = Op(pixel_unshuffle_rule, pixel_unshuffle_forward, pixel_unshuffle_backward)


# --- channels dealt out anew -----------------------------------------------------------------------------------------


def _dealt(x: Any, groups: int) -> Any:
    n, c, *size = x.shape
    return _copied(x.reshape(n, groups, c // groups, *size).swapaxes(1, 2), *x.shape)


def channel_shuffle_rule(x: Spec, *, needs: tuple = (), groups: int) -> Rule:
    require_float("x", x)
    if x.ndim < 3:
        raise ShapeError("x", "x.shape = (N, C, *sizes) with at least one size", list(x.shape))
    g = _factor("groups", groups)
    if x.shape[1] is not None and (x.shape[1] % g or x.shape[1] < g):
        raise ShapeError("x", f"C ≥ 1 is a multiple of groups = {g}", f"C = {x.shape[1]} in {list(x.shape)}")
    return Rule({"y": Spec(x.shape, x.dtype, output_order(x))}, {}, {"groups": g})


def channel_shuffle_forward(x: Any, *, needs: tuple = (), groups: int) -> tuple[tuple, dict]:
    """y[n, k·groups + g] = x[n, g·(C / groups) + k]: the first channel of each group, then the second of each, and so on.

    x: (N, C, *sizes), float. Returns y of x's shape and dtype, channels-last in memory where x is. Raises ShapeError (a
    RuntimeError) where groups does not divide C. As torch.nn.functional.channel_shuffle. Saves nothing.
    """
    return (ordered_as(_dealt(x, groups), x),), {}


def channel_shuffle_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, groups: int) -> tuple:
    """dx = channel_shuffle(dy) with C / groups groups."""
    return (arranged(_dealt(dys[0], dys[0].shape[1] // groups), inputs[0].like().order),)


channel_shuffle = Op(channel_shuffle_rule, channel_shuffle_forward, channel_shuffle_backward)
