"""What changes an image's size or the order of its pixels, its maxima by parts, and norms over channels: as nodes of ONNX.

Each function is as those of ``_builtin.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers.export.onnx._graph import ModelGraph, Tensor
from gpulayers.layers import norm, pooling, resize, window
from gpulayers.layers._calls import each_shape
from gpulayers.ops._window import numbers


def _reshaped(graph: ModelGraph, x: str, shape: Sequence[int]) -> str:
    return graph.op("Reshape", x, graph.constant(list(shape)))


def _known(shape: Sequence[Any]) -> bool:
    return not any(n is None or n == 0 for n in shape[1:])


# --- sizes -----------------------------------------------------------------------------------------------------------

_RESIZED: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"},
    "nearest-exact": {
        "mode": "nearest",
        "nearest_mode": "round_prefer_ceil",
        "coordinate_transformation_mode": "half_pixel",
    },
    "linear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    "cubic": {"mode": "cubic", "cubic_coeff_a": -0.75, "coordinate_transformation_mode": "half_pixel"},
}


def _upsample(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    options = layer._sized(x.shape)
    how = _RESIZED.get(options["mode"])
    if how is None or not _known(x.shape):  # a mean of parts
        return None
    size = each_shape(layer.output_shape(x.shape))[0][2:]
    if options["align_corners"]:
        how = how | {"coordinate_transformation_mode": "align_corners"}
    axes, scales = list(range(2, len(x.shape))), options.get("scales")
    if not scales:
        return graph.op("Resize", x.name, "", "", graph.constant(size), axes=axes, **how)
    if [int(np.floor(np.float32(s) * n)) for s, n in zip(scales, x.shape[2:])] != list(size):
        return None  # float32 rounds to another size
    return graph.op("Resize", x.name, "", graph.constant(scales, "f"), axes=axes, **how)


def _largest(graph: ModelGraph, x: Tensor, parts: Sequence[Sequence[tuple[int, int]]]) -> str:
    """The maxima over [first, last) of each of an axis' parts, along one axis after the other."""
    name = x.name
    for axis, along in enumerate(parts, 2):
        ends = [[graph.constant([end]) for end in part] for part in along]
        at = graph.constant([axis])
        cut = [graph.op("Slice", name, *end, at) for end in ends]
        each = [graph.op("ReduceMax", piece, at, keepdims=1) for piece in cut]
        name = graph.op("Concat", *each, axis=axis)
    return name


def _adaptive_max(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if layer.return_indices or not _known(x.shape):
        return None
    sizes, size = x.shape[2:], each_shape(layer.output_shape(x.shape))[0][2:]
    if not any(n % o for n, o in zip(sizes, size)):
        kernel = [n // o for n, o in zip(sizes, size)]
        return graph.op("MaxPool", x.name, kernel_shape=kernel, strides=kernel)
    return _largest(graph, x, [[(i * n // o, -(-(i + 1) * n // o)) for i in range(o)] for n, o in zip(sizes, size)])


def _fractional_max(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    """In evaluation, when windows' steps are those of u = ½."""
    if layer.return_indices or not _known(x.shape):
        return None
    size, u = each_shape(layer.output_shape(x.shape))[0][2:], np.float32(0.5)
    parts = []
    for n, k, o in zip(x.shape[2:], numbers("kernel_size", layer.kernel_size, 1, layer.spatial), size):
        alpha = np.float32(n - k) / np.float32(max(o - 1, 1))
        first = [int((np.float32(i) + u) * alpha) - int(u * alpha) for i in range(o - 1)] + [n - k]
        parts.append([(f, f + k) for f in first])
    return _largest(graph, x, parts)


def _lp_pool(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    p = layer.norm_type
    if layer.ceil_mode or p % 2 or p <= 0:  # ONNX's is of |x|, and does not scale what hangs over the end
        return None
    kernel = numbers("kernel_size", layer.kernel_size, 1, layer.spatial)
    stride = kernel if layer.stride is None else numbers("stride", layer.stride, 1, layer.spatial)
    return graph.op("LpPool", x.name, kernel_shape=kernel, strides=stride, p=int(p))


# --- pixels and channels ---------------------------------------------------------------------------------------------


def _pixel_shuffle(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    return graph.op("DepthToSpace", x.name, blocksize=layer.upscale_factor, mode="CRD") if len(x.shape) == 4 else None


def _pixel_unshuffle(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    """ONNX's SpaceToDepth deals channels out in another order."""
    if len(x.shape) != 4 or not _known(x.shape):
        return None
    (_, c, h, w), r = x.shape, layer.downscale_factor
    y = _reshaped(graph, x.name, (-1, c, h // r, r, w // r, r))
    return _reshaped(graph, graph.op("Transpose", y, perm=[0, 1, 3, 5, 2, 4]), (-1, c * r * r, h // r, w // r))


def _channel_shuffle(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if not _known(x.shape):
        return None
    c, g, rest = x.shape[1], layer.groups, int(np.prod(x.shape[2:]))
    y = graph.op("Transpose", _reshaped(graph, x.name, (-1, g, c // g, rest)), perm=[0, 2, 1, 3])
    return _reshaped(graph, y, (-1, *x.shape[1:]))


# --- norms -----------------------------------------------------------------------------------------------------------


def _scaled(graph: ModelGraph, layer: Any, y: str, rank: int) -> str:
    """``y`` times the layer's weight plus its bias, for each channel."""
    shape = [-1, *[1] * (rank - 2)]
    for kind, weight in (("Mul", layer.weight), ("Add", layer.bias)):
        if weight is not None:
            y = graph.op(kind, y, _reshaped(graph, graph.weight(layer, weight), shape))
    return y


def _group_norm(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    """A group is an instance of one channel: ONNX's own, before its opset 21, has a scale for each group."""
    if not _known(x.shape):
        return None
    groups = layer.num_groups
    ones, zeros = (graph.constant(np.full(groups, v), "f") for v in (1, 0))
    y = _reshaped(graph, x.name, (-1, groups, int(np.prod(x.shape[1:])) // groups))
    y = graph.op("InstanceNormalization", y, ones, zeros, epsilon=float(layer.eps))
    return _scaled(graph, layer, _reshaped(graph, y, (-1, *x.shape[1:])), len(x.shape))


def _instance_norm(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    n = layer.num_features
    scale = graph.constant(np.ones(n), "f") if layer.weight is None else graph.weight(layer, layer.weight)
    bias = graph.constant(np.zeros(n), "f") if layer.bias is None else graph.weight(layer, layer.bias)
    if layer.running_mean is None:
        return graph.op("InstanceNormalization", x.name, scale, bias, epsilon=float(layer.eps))
    running = [graph.weight(layer, w) for w in (layer.running_mean, layer.running_var)]
    return graph.op("BatchNormalization", x.name, scale, bias, *running, epsilon=float(layer.eps))


def _local_response_norm(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if layer.size % 2 == 0:  # of an even number of channels ONNX takes the odd one from the other side
        return None
    options: dict[str, Any] = {"alpha": float(layer.alpha), "beta": float(layer.beta), "bias": float(layer.k)}
    return graph.op("LRN", x.name, size=layer.size, **options) if len(x.shape) == 4 else None


RESAMPLING: dict[type, Callable[[ModelGraph, Any, Tensor], str | None]] = {
    resize.Upsample: _upsample, pooling.AdaptiveMaxPool: _adaptive_max, pooling.FractionalMaxPool: _fractional_max,
    pooling.LPPool: _lp_pool, window.PixelShuffle: _pixel_shuffle, window.PixelUnshuffle: _pixel_unshuffle,
    window.ChannelShuffle: _channel_shuffle, norm.GroupNorm: _group_norm, norm._InstanceNorm: _instance_norm,
    norm.LocalResponseNorm: _local_response_norm,
}  # fmt: skip
REFUSED: dict[type, str] = {
    pooling.MaxUnpool: "ONNX's MaxUnpool counts places over the whole batch, and torch's in each channel",
}
"""Of layers that neither a node nor recorded array code can be, why."""
