"""Convolution over one to three spatial axes, dense, grouped and depthwise; and transposed: the same sums, walked back.

x's rank says how many axes there are: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from gpulayers.arrays import Spec, arranged, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape
from gpulayers.ops._window import AXES, Pair, around, numbers, ordered_as, output_order, window

_KERNELS = {1: "k", 2: "kh, kw", 3: "kd, kh, kw"}


def padding_sides(padding: Any, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple:
    """((before, after), …) from any form that ``padding`` may have."""
    count = len(kernel)
    if padding == "valid":
        return ((0, 0),) * count
    if padding == "same":
        if set(stride) != {1}:
            raise ShapeError("padding", 'stride = 1 where padding = "same"', f"stride {stride}")
        return tuple((d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation))
    if isinstance(padding, str):
        forms = {1: "(left, right)", 2: "a pair or ((top, bottom), (left, right))", 3: "three or ((before, after), …)"}
        raise ShapeError("padding", f'"same", "valid", an integer, {forms[count]}', repr(padding))
    return around("padding", padding, 0, count)


def _checked(x: Spec, weight: Spec, bias: Spec | None, groups: Any, channels: str) -> int:
    """How many spatial axes there are. channels: what the first two axes of weight count."""
    require_float("x", x)
    require_same_dtype(x, weight=weight, bias=bias)
    count = (weight if weight.ndim - 2 in AXES else x).ndim - 2
    if count not in AXES:
        raise ShapeError("x", "x.shape = (N, C, *sizes) with one to three sizes", list(x.shape))
    form = f"weight.shape = ({channels}, {_KERNELS[count]})"
    if x.ndim != count + 2:
        raise ShapeError("x", f"x.shape = (N, C, {', '.join(AXES[count])}) where {form}", list(x.shape))
    if weight.ndim != count + 2 or 0 in weight.shape:
        raise ShapeError("weight", f"{form}, none of them 0", list(weight.shape))
    if not isinstance(groups, int):
        raise KindError("groups", "an integer", repr(groups))
    if groups < 1:
        raise ShapeError("groups", "groups ≥ 1", groups)
    if weight.shape[0] % groups:
        raise ShapeError("weight", f"{form}, {channels[0]} a multiple of groups = {groups}", list(weight.shape))
    return count


def _output_size(size: Any, kernel: int, sides: Pair, stride: int, dilation: int, axis: str) -> Any:
    if size is None:
        return None
    room = size + sum(sides) - dilation * (kernel - 1) - 1
    if room < 0:
        rule = f"O{axis} = ⌊({axis} + {sides[0]} + {sides[1]} − {dilation} · ({kernel} − 1) − 1) / {stride}⌋ + 1 ≥ 1"
        raise ShapeError("x", rule, f"{axis} = {size}")
    return room // stride + 1


def _saved(x: Any, weight: Any, needs: tuple) -> dict:
    return ({"x": x} if "weight" in needs else {}) | ({"weight": weight} if "x" in needs else {})


# --- the three sums, in the dtype that they are computed in ----------------------------------------------------------


def _taps(weight: Any) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, weight.shape[2:]))


def _padded(x: Any, padding: Sequence[Pair]) -> Any:
    return namespace(x).pad(x, ((0, 0), (0, 0), *padding))


def _correlated(x: Any, weight: Any, size: tuple, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> Any:
    """y[n, o, p] = Σ_{c, tap} weight[o, c, tap] · x[n, c, p · stride + tap · dilation − before]: (N, O, *size)."""
    xp, v = namespace(x), _padded(up(x), padding)
    n, o, c_group, pixels = len(x), len(weight), weight.shape[1], math.prod(size)
    taps = up(weight).reshape(groups, o // groups, *weight.shape[1:])
    y = xp.zeros((n, groups, o // groups, pixels), v.dtype)
    for tap in _taps(weight):
        under = window(v, tap, dilation, stride, size)
        y += xp.matmul(taps[(..., *tap)], under.reshape(n, groups, c_group, pixels))
    return y.reshape(n, o, *size)


def _walked_back(dy: Any, weight: Any, size: tuple, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> Any:
    """What each y sends back along its taps, x[n, c, p · stride + tap · dilation − before] += weight[o, c, tap] · y[n, o, p]:
    (N, C, *size)."""
    xp, g = namespace(dy), up(dy)
    n, o, c_group = len(dy), len(weight), weight.shape[1]
    taps = up(weight).reshape(groups, o // groups, *weight.shape[1:]).swapaxes(1, 2)
    g = g.reshape(n, groups, o // groups, math.prod(dy.shape[2:]))
    wide = xp.zeros((n, groups, c_group, *[s + sum(p) for s, p in zip(size, padding)]), g.dtype)
    for tap in _taps(weight):
        part = xp.matmul(taps[(..., *tap)], g)
        window(wide, tap, dilation, stride, dy.shape[2:])[...] += part.reshape(*wide.shape[:3], *dy.shape[2:])
    inside = [slice(before, before + s) for s, (before, _) in zip(size, padding)]
    return wide.reshape(n, groups * c_group, *wide.shape[3:])[(slice(None), slice(None), *inside)]


def _weight_sums(dy: Any, x: Any, weight: Spec, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> Any:
    """Σ_{n, p} dy[n, o, p] · x[n, c, p · stride + tap · dilation − before], of weight's shape."""
    xp, v = namespace(dy), _padded(up(x), padding)
    (o, c_group, *kernel), n, pixels = weight.shape, len(dy), math.prod(dy.shape[2:])
    g = up(dy).reshape(n, groups, o // groups, pixels)
    total = xp.zeros((groups, o // groups, c_group, *kernel), g.dtype)
    for tap in _taps(weight):
        under = window(v, tap, dilation, stride, dy.shape[2:]).reshape(n, groups, c_group, pixels)
        total[(..., *tap)] = xp.matmul(g, under.swapaxes(-1, -2)).sum(0)
    return arranged(total.reshape(weight.shape).astype(weight.dtype, copy=False), weight.like().order)


def _output(y: Any, bias: Any, x: Any) -> Any:
    """y + bias, as the op gives it."""
    if bias is not None:
        y += up(bias).reshape(-1, *(1,) * (y.ndim - 2))
    return ordered_as(y.astype(x.dtype, copy=False), x)


def _input_gradient(dx: Any, x: Spec) -> Any:
    return arranged(dx.astype(x.dtype), x.like().order)


def _bias_gradient(dy: Any, bias: Spec) -> Any:
    return up(dy).sum((0, *range(2, dy.ndim))).astype(bias.dtype, copy=False)


# --- conv ------------------------------------------------------------------------------------------------------------


def conv_rule(
    x: Spec,
    weight: Spec,
    bias: Spec | None = None,
    *,
    needs: tuple = (),
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Rule:
    count = _checked(x, weight, bias, groups, "O, C / groups")
    stride, dilation = numbers("stride", stride, 1, count), numbers("dilation", dilation, 1, count)
    (n, c, *sizes), (o, c_group, *kernel) = x.shape, weight.shape
    if c is not None and c != c_group * groups:
        raise ShapeError("x", f"C = groups · weight.shape[1] = {groups} · {c_group}", f"C = {c} in {list(x.shape)}")
    if bias is not None:
        require_shape("bias", bias, (o,), "bias.shape = (O,)")
    around = padding_sides(padding, kernel, stride, dilation)
    size = map(_output_size, sizes, kernel, around, stride, dilation, AXES[count])
    options = {"stride": stride, "padding": around, "dilation": dilation, "groups": groups}
    return Rule({"y": Spec((n, o, *size), x.dtype, output_order(x))}, _saved(x, weight, needs), options)


def conv_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    needs: tuple = (),
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[tuple, dict]:
    """y[n, o, i, j] = bias[o] + Σ_{c, r, q} weight[o, c, r, q] · x[n, c, i·stride + r·dilation − top, j·stride + …].

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float; zeros lie around it. weight: (O, C / groups, *kernel). bias:
    (O,). All of one dtype. stride, dilation: an integer, or one for each axis. padding: an integer, one for each axis,
    ((before, after), …), "valid" (none) or "same" (y has x's sizes; what is odd lies behind; stride 1).
    groups: output channel o sees the C / groups input channels of its group; groups = C is a depthwise convolution.

    Returns y: (N, O, OH, OW), OH = ⌊(H + top + bottom − dilation · (kh − 1) − 1) / stride⌋ + 1 and the other sizes
    likewise, in x's dtype, channels-last in memory where x is. Raises ShapeError (a RuntimeError) for what does not fit.
    """
    size = tuple(map(_output_size, x.shape[2:], weight.shape[2:], padding, stride, dilation, AXES[x.ndim - 2]))
    y = _correlated(x, weight, size, stride, padding, dilation, groups)
    return (_output(y, bias, x),), _saved(x, weight, needs)


def conv_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, stride: tuple, padding: tuple, dilation: tuple, groups: int
) -> tuple:
    """Each tap of the kernel joins one view of x with dy, in both directions.

    dx under the tap += weight[tap]ᵀ · dy; dweight[tap] = Σ_n dy · (x under the tap)ᵀ; dbias = Σ_{n, i, j} dy.
    """
    (dy,), (x, weight, bias), how = dys, inputs, (stride, padding, dilation, groups)
    dx = dweight = None
    if "x" in needs:
        dx = _input_gradient(_walked_back(dy, saved["weight"], x.shape[2:], *how), x)
    if "weight" in needs:
        dweight = _weight_sums(dy, saved["x"], weight, *how)
    return dx, dweight, _bias_gradient(dy, bias) if "bias" in needs else None


conv = Op(conv_rule, conv_forward, conv_backward)


# --- conv_transpose --------------------------------------------------------------------------------------------------


def _transposed_size(size: Any, kernel: int, sides: Pair, stride: int, dilation: int, more: int, axis: str) -> Any:
    if size is None:
        return None
    out = (size - 1) * stride - sum(sides) + dilation * (kernel - 1) + more + 1
    if size < 1 or out < 1:
        formula = f"({axis} − 1) · {stride} − {sides[0]} − {sides[1]} + {dilation} · ({kernel} − 1) + {more} + 1"
        raise ShapeError("x", f"{axis} ≥ 1 and O{axis} = {formula} ≥ 1", f"{axis} = {size}")
    return out


def conv_transpose_rule(
    x: Spec,
    weight: Spec,
    bias: Spec | None = None,
    *,
    needs: tuple = (),
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Rule:
    count = _checked(x, weight, bias, groups, "C, O / groups")
    stride, dilation = numbers("stride", stride, 1, count), numbers("dilation", dilation, 1, count)
    more = numbers("output_padding", output_padding, 0, count)
    around = padding_sides(padding if padding != "same" else repr(padding), weight.shape[2:], stride, dilation)
    (n, c, *sizes), (channels, o_group, *kernel) = x.shape, weight.shape
    if c is not None and c != channels:
        raise ShapeError("x", f"C = weight.shape[0] = {channels}", f"C = {c} in {list(x.shape)}")
    if any(m >= max(s, d) for m, s, d in zip(more, stride, dilation)):
        raise ShapeError("output_padding", f"output_padding < stride or dilation, {stride} or {dilation}", more)
    if bias is not None:
        require_shape("bias", bias, (o_group * groups,), "bias.shape = (O,)")
    size = map(_transposed_size, sizes, kernel, around, stride, dilation, more, AXES[count])
    options = {"stride": stride, "padding": around, "output_padding": more, "dilation": dilation, "groups": groups}
    y = Spec((n, o_group * groups, *size), x.dtype, output_order(x))
    return Rule({"y": y}, _saved(x, weight, needs), options)


def conv_transpose_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    needs: tuple = (),
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[tuple, dict]:
    """y[n, o, i·stride + r·dilation − top, …] += weight[c, o, r, q] · x[n, c, i, j], and bias[o]: the gradient of a
    convolution for its input, of x in the place of its output's gradient.

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float. weight: (C, O / groups, *kernel). bias: (O,). All of one dtype.
    Options: as conv's; padding is cut off from y (no "same"), and output_padding, an integer or one for each axis, lets y
    reach so much further behind; it is less than stride or dilation.

    Returns y: (N, O, OH, OW), OH = (H − 1) · stride − top − bottom + dilation · (kh − 1) + output_padding + 1 and the other
    sizes likewise, in x's dtype, channels-last in memory where x is. Raises ShapeError (a RuntimeError) for what does not
    fit.
    """
    kernel, axes = weight.shape[2:], AXES[x.ndim - 2]
    size = tuple(map(_transposed_size, x.shape[2:], kernel, padding, stride, dilation, output_padding, axes))
    y = _walked_back(x, weight, size, stride, padding, dilation, groups)
    return (_output(y, bias, x),), _saved(x, weight, needs)


def conv_transpose_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    output_padding: tuple,
    dilation: tuple,
    groups: int,
) -> tuple:
    """dx is the convolution of dy; dweight a convolution's, of x and dy in each other's place; dbias = Σ_{n, i, j} dy."""
    (dy,), (x, weight, bias), how = dys, inputs, (stride, padding, dilation, groups)
    dx = dweight = None
    if "x" in needs:
        dx = _input_gradient(_correlated(dy, saved["weight"], x.shape[2:], *how), x)
    if "weight" in needs:
        dweight = _weight_sums(saved["x"], dy, weight, *how)
    return dx, dweight, _bias_gradient(dy, bias) if "bias" in needs else None


conv_transpose = Op(conv_transpose_rule, conv_transpose_forward, conv_transpose_backward)
