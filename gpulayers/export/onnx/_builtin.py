"""The library's own layers as nodes that ONNX has, as they are in evaluation.

Each function takes (graph, layer, x) and gives the name of y, or None where no node computes the same: the layer is then
recorded. ONNX's pooling with ceil_mode counts windows that torch's leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.export.onnx import _attention
from gpulayers.export.onnx._graph import TYPES, ModelGraph, Tensor
from gpulayers.export.onnx._resampling import RESAMPLING
from gpulayers.layers import activation, container, conv, dropout, embedding, linear, norm, padding, pooling, softmax
from gpulayers.layers._calls import each_shape
from gpulayers.ops._op import normal_axis
from gpulayers.ops._window import around, numbers
from gpulayers.ops.conv import padding_sides


def _one(kind: str, **attributes: str) -> Callable:
    """One node; attributes: {ONNX's name: the layer's}."""

    def write(graph: ModelGraph, layer: Any, x: Tensor) -> str:
        numbers: dict[str, Any] = {name: float(getattr(layer, own)) for name, own in attributes.items()}
        return graph.op(kind, x.name, **numbers)

    return write


def _clip(least: float | str, most: float | str) -> Callable:
    def write(graph: ModelGraph, layer: Any, x: Tensor) -> str:
        ends = (getattr(layer, end) if isinstance(end, str) else end for end in (least, most))
        return graph.op("Clip", x.name, *(graph.constant(end, "f") for end in ends))

    return write


def _gelu(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    return graph.op("Gelu", x.name, approximate=layer.approximate)


def _silu(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    return graph.op("Mul", x.name, graph.op("Sigmoid", x.name))


def _quick_gelu(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    gate = graph.op("Sigmoid", graph.op("Mul", x.name, graph.constant(1.702, "f")))
    return graph.op("Mul", x.name, gate)


def _logsigmoid(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    return graph.op("Neg", graph.op("Softplus", graph.op("Neg", x.name)))


def _tanhshrink(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    return graph.op("Sub", x.name, graph.op("Tanh", x.name))


def _hardsigmoid(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    return graph.op("HardSigmoid", x.name, alpha=1 / 6, beta=0.5)


def _softshrink(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    return graph.op("Shrink", x.name, lambd=float(layer.lambd), bias=float(layer.lambd))


def _threshold(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    above = graph.op("Greater", x.name, graph.constant(layer.threshold, "f"))
    return graph.op("Where", above, x.name, graph.constant(layer.value, "f"))


def _rrelu(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    return graph.op("LeakyRelu", x.name, alpha=(layer.lower + layer.upper) / 2)


def _prelu(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    across = [-1] + [1] * (len(x.shape) - 2) if len(x.shape) > 1 and layer.num_parameters > 1 else [1]
    return graph.op("PRelu", x.name, graph.op("Reshape", graph.weight(layer, layer.weight), graph.constant(across)))


def _glu(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    axis = normal_axis(layer.dim, len(x.shape), "dim")
    a, b = graph.op("Split", x.name, outputs=2, axis=axis, num_outputs=2)
    return graph.op("Mul", a, graph.op("Sigmoid", b))


def _relu_squared(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    y = graph.op("Relu", x.name)
    return graph.op("Mul", y, y)


def _gated(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    a, b = graph.op("Split", x.name, outputs=2, axis=len(x.shape) - 1, num_outputs=2)
    name = layer.options()["activation"]
    f = activation.GELU("tanh") if name == "gelu_tanh" else _BY_NAME[name]()
    half = (*x.shape[:-1], layer.output_shape(x.shape)[-1])
    return graph.op("Mul", ACTIVATIONS[type(f)](graph, f, Tensor(a, half)), b)


ACTIVATIONS: dict[Any, Callable] = {
    activation.ReLU: _one("Relu"), activation.LeakyReLU: _one("LeakyRelu", alpha="negative_slope"),
    activation.ReLU6: _clip(0, 6), activation.ReLUSquared: _relu_squared, activation.QuickGELU: _quick_gelu,
    activation.Hardtanh: _clip("min_val", "max_val"), activation.Hardsigmoid: _hardsigmoid,
    activation.Hardswish: _one("HardSwish"), activation.Hardshrink: _one("Shrink", lambd="lambd"),
    activation.Softshrink: _softshrink, activation.Threshold: _threshold, activation.GELU: _gelu, activation.SiLU: _silu,
    activation.Sigmoid: _one("Sigmoid"), activation.LogSigmoid: _logsigmoid, activation.Tanh: _one("Tanh"),
    activation.Tanhshrink: _tanhshrink, activation.Softsign: _one("Softsign"), activation.ELU: _one("Elu", alpha="alpha"),
    activation.CELU: _one("Celu", alpha="alpha"), activation.SELU: _one("Selu"), activation.Mish: _one("Mish"),
    activation.RReLU: _rrelu, activation.PReLU: _prelu, activation.GLU: _glu,
    **dict.fromkeys((activation.SwiGLU, activation.GEGLU, activation.ReGLU), _gated),
}  # fmt: skip

_BY_NAME = {cls.op.name: cls for cls in ACTIVATIONS if cls.op.name not in ("prelu", "rrelu", "glu", "gated")}


def _fully_connected(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if not _has_activation(layer):
        return None
    weight, bias = graph.weight(layer, layer.weight), layer.bias
    if len(x.shape) == 2:
        rest = [] if bias is None else [graph.weight(layer, bias)]
        y = graph.op("Gemm", x.name, weight, *rest, transB=1)
    else:
        y = graph.op("MatMul", x.name, graph.op("Transpose", weight, perm=[1, 0]))
        y = y if bias is None else graph.op("Add", y, graph.weight(layer, bias))
    return _activated(graph, layer, y, x)


def _has_activation(layer: Any) -> bool:
    """Whether an activation that a layer applies, if it does, is known by its name."""
    return layer.activation is None or layer.activation in _BY_NAME


def _activated(graph: ModelGraph, layer: Any, y: str, x: Tensor) -> str | None:
    if layer.activation is None:
        return y
    f = _BY_NAME[layer.activation]
    return ACTIVATIONS[f](graph, f(), Tensor(y, each_shape(layer.output_shape(x.shape))[0]))


# --- images ----------------------------------------------------------------------------------------------------------

_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _padded(graph: ModelGraph, x: Tensor, padding: Any, mode: str, value: float = 0.0) -> str | None:
    before, after = zip(*around("padding", padding, None, len(x.shape) - 2))
    if min(*before, *after) < 0:
        return None
    edges = graph.constant([0, 0, *before, 0, 0, *after])
    more = [graph.constant(value, "f")] if mode == "constant" else []
    return graph.op("Pad", x.name, edges, *more, mode=_MODES[mode])


def _pad(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    options = layer.options()
    return _padded(graph, x, options["padding"], options["mode"], options.get("value", 0.0))


def _conv(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if not _has_activation(layer):
        return None
    name = x.name
    if before := layer._around():
        name = _padded(graph, x, before, layer.padding_mode) or ""
    return _activated(graph, layer, graph.op("Conv", name, *_filter(graph, layer), **_steps(layer)), x)


def _conv_transpose(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if not _has_activation(layer):
        return None
    more = numbers("output_padding", layer.output_padding, 0, layer.spatial)
    y = graph.op("ConvTranspose", x.name, *_filter(graph, layer), **_steps(layer), output_padding=more)
    return _activated(graph, layer, y, x)


def _filter(graph: ModelGraph, layer: Any) -> list[str]:
    return [graph.weight(layer, w) for w in (layer.weight, layer.bias) if w is not None]


def _steps(layer: Any) -> dict[str, Any]:
    """The attributes that both kinds of convolution have."""
    stride, dilation = (numbers(n, getattr(layer, n), 1, layer.spatial) for n in ("stride", "dilation"))
    before, after = zip(*padding_sides(layer.options()["padding"], layer.kernel_size, stride, dilation))
    return {"strides": stride, "pads": (*before, *after), "dilations": dilation, "group": layer.groups}


def _windows(layer: Any) -> dict[str, Any]:
    axes = layer.spatial
    kernel = numbers("kernel_size", layer.kernel_size, 1, axes)
    stride = kernel if layer.stride is None else numbers("stride", layer.stride, 1, axes)
    return {"kernel_shape": kernel, "strides": stride, "pads": numbers("padding", layer.padding, 0, axes) * 2}


def _max_pool(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if layer.ceil_mode or layer.return_indices:
        return None
    return graph.op(
        "MaxPool", x.name, **_windows(layer), dilations=numbers("dilation", layer.dilation, 1, layer.spatial)
    )


def _avg_pool(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if layer.ceil_mode or layer.divisor_override is not None:
        return None
    return graph.op("AveragePool", x.name, **_windows(layer), count_include_pad=int(layer.count_include_pad))


def _adaptive_pool(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    size = each_shape(layer.output_shape(x.shape))[0][2:]
    if any(n % o for n, o in zip(x.shape[2:], size)):
        return None
    kernel = [n // o for n, o in zip(x.shape[2:], size)]
    return graph.op("AveragePool", x.name, kernel_shape=kernel, strides=kernel)


# --- the rest --------------------------------------------------------------------------------------------------------


def _layer_norm(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    shape = layer.normalized_shape
    scale = graph.constant(np.ones(shape), "f") if layer.weight is None else graph.weight(layer, layer.weight)
    bias = [] if layer.bias is None else [graph.weight(layer, layer.bias)]
    return graph.op("LayerNormalization", x.name, scale, *bias, axis=-len(shape), epsilon=float(layer.eps))


def _embedding(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if (x.kind or graph.kinds.setdefault(x.name, "i")) != "i":
        return None
    return graph.op("Gather", graph.weight(layer, layer.weight), x.name, axis=0)


def _embedding_bag(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    """Of (B, L) indices. Padding's rows are nothing, or lower than all others; an empty bag is 0."""
    rows = _embedding(graph, layer, x)
    if rows is None or len(x.shape) != 2:
        return None
    axis, one = graph.constant([1]), graph.constant(1, "f")
    if layer.padding_idx is None:
        kind = {"sum": "ReduceSum", "mean": "ReduceMean", "max": "ReduceMax"}[layer.mode]
        return graph.op(kind, rows, axis, keepdims=0)
    here = graph.op("Not", graph.op("Equal", x.name, graph.constant(layer.padding_idx)))
    counts = graph.op("ReduceSum", graph.op("Cast", here, to=TYPES["f"]), axis, keepdims=1)
    each, zero = graph.op("Unsqueeze", here, graph.constant([2])), graph.constant(0, "f")
    if layer.mode == "max":
        rows = graph.op("Where", each, rows, graph.constant(-np.inf, "f"))
        y = graph.op("ReduceMax", rows, axis, keepdims=0)
        return graph.op("Where", graph.op("Greater", counts, zero), y, zero)
    y = graph.op("ReduceSum", graph.op("Where", each, rows, zero), axis, keepdims=0)
    return graph.op("Div", y, graph.op("Max", counts, one)) if layer.mode == "mean" else y


def _batch_norm(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    if layer.running_mean is None:
        return None
    n = layer.num_features
    scale = graph.constant(np.ones(n), "f") if layer.weight is None else graph.weight(layer, layer.weight)
    bias = graph.constant(np.zeros(n), "f") if layer.bias is None else graph.weight(layer, layer.bias)
    running = [graph.weight(layer, w) for w in (layer.running_mean, layer.running_var)]
    return graph.op("BatchNormalization", x.name, scale, bias, *running, epsilon=float(layer.eps))


def _softmax(kind: str) -> Callable:
    def write(graph: ModelGraph, layer: Any, x: Tensor) -> str:
        axis = normal_axis(layer.options()["axis"], len(x.shape), "axis")
        return graph.op(kind, x.name, axis=axis)

    return write


def _softmin(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    return _softmax("Softmax")(graph, layer, Tensor(graph.op("Neg", x.name), x.shape))


_DROPOUTS = (
    *(dropout.Dropout, dropout.Dropout1d, dropout.Dropout2d, dropout.Dropout3d),
    *(dropout.AlphaDropout, dropout.FeatureAlphaDropout),
)


def _dropout(graph: ModelGraph, layer: Any, x: Tensor) -> str:
    return x.name


def _reshape(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    shape = each_shape(layer.output_shape(x.shape))[0]
    if shape[0] is not None or None in shape[1:] or 0 in shape[1:]:
        return None
    return graph.op("Reshape", x.name, graph.constant([-1, *shape[1:]]))


BUILT_IN: dict[type, Callable[[ModelGraph, Any, Tensor], str | None]] = {
    **ACTIVATIONS, linear.FullyConnected: _fully_connected, conv.Convolutional: _conv,
    conv.Transposed: _conv_transpose, pooling.MaxPool: _max_pool,
    pooling.AvgPool: _avg_pool, pooling.AdaptiveAvgPool: _adaptive_pool, pooling.GlobalAvgPool2d: _adaptive_pool,
    norm.LayerNorm: _layer_norm, norm.BatchNorm1d: _batch_norm, norm.BatchNorm2d: _batch_norm,
    norm.BatchNorm3d: _batch_norm, **dict.fromkeys(_DROPOUTS, _dropout),
    softmax.Softmax: _softmax("Softmax"), softmax.LogSoftmax: _softmax("LogSoftmax"), softmax.Softmin: _softmin,
    softmax.Softmax2d: _softmax("Softmax"), container.Flatten: _reshape, container.Reshape: _reshape,
    padding.Pad: _pad, embedding.Embedding: _embedding, embedding.EmbeddingBag: _embedding_bag, **RESAMPLING,
    **_attention.nodes_of(_fully_connected),
}  # fmt: skip
