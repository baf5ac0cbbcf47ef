"""Convolution of images with a kernel: dense, grouped and depthwise."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, arranged, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape
from gpulayers.ops._window import Pair, Sides, ordered_as, output_order, pair, require_image, sides, window


def padding_sides(padding: Any, kernel: Pair, stride: Pair, dilation: Pair) -> Sides:
    """((top, bottom), (left, right)) from any form that ``padding`` may have."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ShapeError("padding", 'stride = 1 where padding = "same"', f"stride {stride}")
        return tuple((d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation))  # type: ignore[return-value]
    if isinstance(padding, str):
        raise ShapeError(
            "padding", '"same", "valid", an integer, a pair or ((top, bottom), (left, right))', repr(padding)
        )
    return sides("padding", padding, 0)


def _output_size(size: Any, kernel: int, sides: Pair, stride: int, dilation: int, axis: str) -> Any:
    if size is None:
        return None
    room = size + sum(sides) - dilation * (kernel - 1) - 1
    if room < 0:
        rule = f"O{axis} = ⌊({axis} + {sides[0]} + {sides[1]} − {dilation} · ({kernel} − 1) − 1) / {stride}⌋ + 1 ≥ 1"
        raise ShapeError("x", rule, f"{axis} = {size}")
    return room // stride + 1


def conv2d_rule(
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
    require_float("x", x)
    require_image(x)
    require_same_dtype(x, weight=weight, bias=bias)
    if weight.ndim != 4:
        raise ShapeError("weight", "weight.shape = (O, C / groups, kh, kw)", list(weight.shape))
    n, c, h, w = x.shape
    o, c_group, *kernel = weight.shape
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    if not isinstance(groups, int):
        raise KindError("groups", "an integer", repr(groups))
    if groups < 1:
        raise ShapeError("groups", "groups ≥ 1", groups)
    if c is not None and c != c_group * groups:
        raise ShapeError("x", f"C = groups · weight.shape[1] = {groups} · {c_group}", f"C = {c} in {list(x.shape)}")
    if o % groups or o == 0 or 0 in kernel:
        rule = f"weight.shape = (O, C / groups, kh, kw), O ≥ 1 a multiple of groups = {groups}, kh and kw ≥ 1"
        raise ShapeError("weight", rule, list(weight.shape))
    if bias is not None:
        require_shape("bias", bias, (o,), "bias.shape = (O,)")
    around = padding_sides(padding, tuple(kernel), stride, dilation)
    size = tuple(map(_output_size, (h, w), kernel, around, stride, dilation, "HW"))
    y = Spec((n, o, *size), x.dtype, output_order(x))
    saved = {"x": x} if "weight" in needs else {}
    saved |= {"weight": weight} if "x" in needs else {}
    return Rule({"y": y}, saved, {"stride": stride, "padding": around, "dilation": dilation, "groups": groups})


def _padded(x: Any, padding: Sides) -> Any:
    return namespace(x).pad(x, ((0, 0), (0, 0), *padding))


def conv2d_forward(
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

    x: (N, C, H, W), float; zeros lie around it. weight: (O, C / groups, kh, kw). bias: (O,). All of one dtype.
    stride, dilation: integers or pairs (height, width). padding: an integer, a pair, ((top, bottom), (left, right)),
    "valid" (none) or "same" (OH = H, OW = W; the odd row and column lie at the bottom and the right; stride 1).
    groups: output channel o sees the C / groups input channels of its group; groups = C is a depthwise convolution.

    Returns y: (N, O, OH, OW), OH = ⌊(H + top + bottom − dilation · (kh − 1) − 1) / stride⌋ + 1 and OW likewise, in
    x's dtype, channels-last in memory where x is. Raises ShapeError (a RuntimeError) for what does not fit.
    """
    xp = namespace(x)
    n, c, h, w = x.shape
    o, _, kh, kw = weight.shape
    size = tuple(map(_output_size, (h, w), (kh, kw), padding, stride, dilation, "HW"))
    v = _padded(up(x), padding)
    taps = up(weight).reshape(groups, o // groups, c // groups, kh, kw)
    y = xp.zeros((n, groups, o // groups, size[0] * size[1]), v.dtype)
    for r in range(kh):
        for q in range(kw):
            under = window(v, (r, q), dilation, stride, size)
            y += xp.matmul(taps[..., r, q], under.reshape(n, groups, c // groups, size[0] * size[1]))
    y = y.reshape(n, o, *size)
    if bias is not None:
        y += up(bias)[:, None, None]
    saved = {"x": x} if "weight" in needs else {}
    saved |= {"weight": weight} if "x" in needs else {}
    return (ordered_as(y.astype(x.dtype, copy=False), x),), saved


def conv2d_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, stride: Pair, padding: Sides, dilation: Pair, groups: int
) -> tuple:
    """Each tap of the kernel joins one view of x with dy, in both directions.

    dx under the tap += weight[tap]ᵀ · dy; dweight[tap] = Σ_n dy · (x under the tap)ᵀ; dbias = Σ_{n, i, j} dy.
    """
    (dy,), (x, weight, bias) = dys, inputs
    xp = namespace(dy)
    n, c, h, w = x.shape
    o, _, kh, kw = weight.shape
    size = dy.shape[2:]
    of_group, pixels = (n, groups, c // groups), size[0] * size[1]
    g = up(dy).reshape(n, groups, o // groups, pixels)
    dx = dweight = dbias = None
    if "x" in needs:
        taps = up(saved["weight"]).reshape(groups, o // groups, c // groups, kh, kw)
        (top, bottom), (left, right) = padding
        dx = xp.zeros((*of_group, h + top + bottom, w + left + right), g.dtype)
    if "weight" in needs:
        v = _padded(up(saved["x"]), padding)
        dweight = xp.zeros((groups, o // groups, c // groups, kh, kw), g.dtype)
    for r in range(kh):
        for q in range(kw):
            if dx is not None:
                part = xp.matmul(taps[..., r, q].swapaxes(-1, -2), g)
                window(dx, (r, q), dilation, stride, size)[...] += part.reshape(*of_group, *size)
            if dweight is not None:
                under = window(v, (r, q), dilation, stride, size).reshape(*of_group, pixels)
                dweight[..., r, q] = xp.matmul(g, under.swapaxes(-1, -2)).sum(0)
    if dx is not None:
        dx = dx.reshape(n, c, *dx.shape[3:])[:, :, top : top + h, left : left + w]
        dx = arranged(dx.astype(x.dtype), x.like().order)
    if dweight is not None:
        dweight = arranged(dweight.reshape(weight.shape).astype(weight.dtype, copy=False), weight.like().order)
    if "bias" in needs:
        dbias = up(dy).sum((0, 2, 3)).astype(bias.dtype, copy=False)
    return dx, dweight, dbias


conv2d = Op(conv2d_rule, conv2d_forward, conv2d_backward)
