"""Convolution over one to three spatial axes, dense, grouped and depthwise; and transposed: the same sums, walked back.
And what may follow in the same pass, the epilogue: y = f(scale · sum + bias + residual).

x's rank says how many axes there are: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from gpulayers.arrays import Spec, arranged, compute_dtype, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.ops._activation import require_activation
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape
from gpulayers.ops._window import AXES, Pair, around, numbers, ordered_as, output_order, window
from gpulayers.ops.activation import ACTIVATIONS

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


def _checked(x: Spec, weight: Spec, groups: Any, channels: str) -> int:
    """How many spatial axes there are. channels: what the first two axes of weight count."""
    require_float("x", x)
    require_same_dtype(x, weight=weight)
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


# --- the epilogue ----------------------------------------------------------------------------------------------------


def _require_epilogue(
    y: Spec, bias: Spec | None, scale: Spec | None, residual: Spec | None, activation: str | None
) -> None:
    require_activation(activation)
    for name, row in (("bias", bias), ("scale", scale)):
        if row is None:
            continue
        if scale is None:
            require_same_dtype(y, bias=row)
        elif row.dtype not in (y.dtype, compute_dtype(y.dtype)):
            rule = f"{name}.dtype ∈ {{x.dtype, {compute_dtype(y.dtype)}}}"
            raise ShapeError(name, rule, f"{name} {row.dtype} with x {y.dtype}")
        require_shape(name, row, y.shape[1:2], f"{name}.shape = (O,)")
    if residual is not None:
        require_shape("residual", residual, y.shape, "residual.shape = y.shape")
        require_same_dtype(y, residual=residual)


def _saved(
    needs: tuple, activation: str | None, y: Any, z: Any, x: Any, weight: Any, bias: Any, scale: Any, residual: Any
) -> dict[str, Any]:
    """What backward computes from: f'(z) from y where that does, else from z, beside what the gradient of a gradient
    computes z again from."""
    saved = ({"x": x} if "weight" in needs else {}) | ({"weight": weight} if "x" in needs else {})
    if saved:
        saved["scale"] = scale
    if activation is not None and needs:
        by_y = ACTIVATIONS[activation].keeps == "y"
        saved |= {"y": y} if by_y else {"z": z, "weight": weight, "bias": bias, "scale": scale, "residual": residual}
    return {name: a for name, a in saved.items() if a is not None}


def _row(values: Any, ndim: int) -> Any:
    """One value for each channel, beside (N, O, *sizes)."""
    return up(values).reshape(-1, *(1,) * (ndim - 2))


def _finished(total: Any, bias: Any, scale: Any, residual: Any, activation: str | None, x: Any) -> tuple[Any, Any]:
    """(y, z) of the sum, as the op gives them: z is y before f."""
    if scale is not None:
        total = total * _row(scale, total.ndim)
    if bias is not None:
        total = total + _row(bias, total.ndim)
    if residual is not None:
        total = total + up(residual)
    y = z = ordered_as(total.astype(x.dtype, copy=False), x)
    if activation is not None:
        f = ACTIVATIONS[activation]
        y = ordered_as(f.value(total, *f.numbers).astype(x.dtype, copy=False), x)
    return y, z


def _before_activation(dy: Any, saved: dict, activation: str | None) -> Any:
    """dz = dy f'(z), in the dtype that sums are in."""
    if activation is None:
        return up(dy)
    f = ACTIVATIONS[activation]
    return f.gradient(up(dy), up(saved["z" if f.keeps == "x" else "y"]), *f.numbers)


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


def _input_gradient(dx: Any, x: Spec) -> Any:
    return arranged(dx.astype(x.dtype), x.like().order)


def _bias_gradient(dy: Any, bias: Spec) -> Any:
    return up(dy).sum((0, *range(2, dy.ndim))).astype(bias.dtype, copy=False)


# --- conv ------------------------------------------------------------------------------------------------------------


def conv_rule(
    x: Spec,
    weight: Spec,
    bias: Spec | None = None,
    scale: Spec | None = None,
    residual: Spec | None = None,
    *,
    needs: tuple = (),
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Rule:
    count = _checked(x, weight, groups, "O, C / groups")
    stride, dilation = numbers("stride", stride, 1, count), numbers("dilation", dilation, 1, count)
    (n, c, *sizes), (o, c_group, *kernel) = x.shape, weight.shape
    if c is not None and c != c_group * groups:
        raise ShapeError("x", f"C = groups · weight.shape[1] = {groups} · {c_group}", f"C = {c} in {list(x.shape)}")
    around = padding_sides(padding, kernel, stride, dilation)
    size = map(_output_size, sizes, kernel, around, stride, dilation, AXES[count])
    y = Spec((n, o, *size), x.dtype, output_order(x))
    _require_epilogue(y, bias, scale, residual, activation)
    options = {"stride": stride, "padding": around, "dilation": dilation, "groups": groups, "activation": activation}
    saved = _saved(needs, activation, y, y, x, weight, bias, scale, residual)
    return Rule({"y": y}, saved, options, {"residual": y})


def conv_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    scale: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    """y = f(z), z[n, o, i, j] = scale[o] · Σ_{c, r, q} weight[o, c, r, q] · x[n, c, i·stride + r·dilation − top, j·stride
    + …] + bias[o] + residual[n, o, i, j].

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float; zeros lie around it. weight: (O, C / groups, *kernel). bias:
    (O,). residual: of y's shape. All of one dtype. scale: (O,), as of a norm by statistics that do not change: it has no
    gradient; it and a bias beside it may be float32 where x has 16 bits. activation: f, a name in ``ACTIVATIONS`` with
    torch's default numbers, or none. stride, dilation: an integer, or one for each axis. padding: an integer, one for each axis,
    ((before, after), …), "valid" (none) or "same" (y has x's sizes; what is odd lies behind; stride 1).
    groups: output channel o sees the C / groups input channels of its group; groups = C is a depthwise convolution.

    Returns y: (N, O, OH, OW), OH = ⌊(H + top + bottom − dilation · (kh − 1) − 1) / stride⌋ + 1 and the other sizes
    likewise, in x's dtype, channels-last in memory where x is. Raises ShapeError (a RuntimeError) for what does not fit.
    """
    size = tuple(map(_output_size, x.shape[2:], weight.shape[2:], padding, stride, dilation, AXES[x.ndim - 2]))
    total = _correlated(x, weight, size, stride, padding, dilation, groups)
    y, z = _finished(total, bias, scale, residual, activation, x)
    return (y,), _saved(needs, activation, y, z, x, weight, bias, scale, residual)


def conv_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
) -> tuple:
    """With dz = dy f'(z), each tap of the kernel joins one view of x with g = scale · dz, in both directions.

    dx under the tap += weight[tap]ᵀ · g, and what else came back to x; dweight[tap] = Σ_n g · (x under the tap)ᵀ; dbias =
    Σ_{n, i, j} dz; dresidual = dz.
    """
    (dy, *others), (x, weight, bias, _, residual), how = dys, inputs, (stride, padding, dilation, groups)
    dx = dweight = dbias = dresidual = None
    dz = _before_activation(dy, saved, activation)
    if "residual" in needs:
        dresidual = arranged(namespace(dz).array(dz, residual.dtype), output_order(x))
    if "bias" in needs:
        dbias = _bias_gradient(dz, bias)
    g = dz * _row(saved["scale"], dz.ndim) if "scale" in saved else dz
    if "x" in needs:
        total = _walked_back(g, saved["weight"], x.shape[2:], *how)
        dx = _input_gradient(total + up(others[0]) if others else total, x)
    if "weight" in needs:
        dweight = _weight_sums(g, saved["x"], weight, *how)
    return dx, dweight, dbias, None, dresidual


conv = Op(conv_rule, conv_forward, conv_backward, differentiable=("x", "weight", "bias", "residual"), joins="x")


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
    activation: str | None = None,
) -> Rule:
    count = _checked(x, weight, groups, "C, O / groups")
    stride, dilation = numbers("stride", stride, 1, count), numbers("dilation", dilation, 1, count)
    more = numbers("output_padding", output_padding, 0, count)
    around = padding_sides(padding if padding != "same" else repr(padding), weight.shape[2:], stride, dilation)
    (n, c, *sizes), (channels, o_group, *kernel) = x.shape, weight.shape
    if c is not None and c != channels:
        raise ShapeError("x", f"C = weight.shape[0] = {channels}", f"C = {c} in {list(x.shape)}")
    if any(m >= max(s, d) for m, s, d in zip(more, stride, dilation)):
        raise ShapeError("output_padding", f"output_padding < stride or dilation, {stride} or {dilation}", more)
    size = map(_transposed_size, sizes, kernel, around, stride, dilation, more, AXES[count])
    options = {"stride": stride, "padding": around, "output_padding": more, "dilation": dilation, "groups": groups}
    y = Spec((n, o_group * groups, *size), x.dtype, output_order(x))
    _require_epilogue(y, bias, None, None, activation)
    saved = _saved(needs, activation, y, y, x, weight, bias, None, None)
    return Rule({"y": y}, saved, options | {"activation": activation})


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
    activation: str | None = None,
) -> tuple[tuple, dict]:
    """y = f(z), z[n, o, i·stride + r·dilation − top, …] += weight[c, o, r, q] · x[n, c, i, j], and bias[o]: the gradient of a
    convolution for its input, of x in the place of its output's gradient.

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float. weight: (C, O / groups, *kernel). bias: (O,). All of one dtype.
    activation: f, as conv's. Options: as conv's; padding is cut off from y (no "same"), and output_padding, an integer or
    one for each axis, lets y reach so much further behind; it is less than stride or dilation.

    Returns y: (N, O, OH, OW), OH = (H − 1) · stride − top − bottom + dilation · (kh − 1) + output_padding + 1 and the other
    sizes likewise, in x's dtype, channels-last in memory where x is. Raises ShapeError (a RuntimeError) for what does not
    fit.
    """
    kernel, axes = weight.shape[2:], AXES[x.ndim - 2]
    size = tuple(map(_transposed_size, x.shape[2:], kernel, padding, stride, dilation, output_padding, axes))
    total = _walked_back(x, weight, size, stride, padding, dilation, groups)
    y, z = _finished(total, bias, None, None, activation, x)
    return (y,), _saved(needs, activation, y, z, x, weight, bias, None, None)


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
    activation: str | None = None,
) -> tuple:
    """With dz = dy f'(z), dx is the convolution of dz; dweight a convolution's, of x and dz in each other's place; dbias =
    Σ_{n, i, j} dz."""
    (dy,), (x, weight, bias), how = dys, inputs, (stride, padding, dilation, groups)
    dx = dweight = None
    dz = _before_activation(dy, saved, activation)
    if "x" in needs:
        dx = _input_gradient(_correlated(dz, saved["weight"], x.shape[2:], *how), x)
    if "weight" in needs:
        dweight = _weight_sums(saved["x"], dz, weight, *how)
    return dx, dweight, _bias_gradient(dz, bias) if "bias" in needs else None


conv_transpose = Op(conv_transpose_rule, conv_transpose_forward, conv_transpose_backward)
