"""The library's own layers as layers that TF.js has, where those compute the same, forwards and backwards.

Each function takes (topology, layer, x) and gives y, or None where TF.js has no such layer or has it wrong: its ELU takes
no alpha, its convolution ignores ``groups`` and has no gradient with a dilation, its gradient of average pooling counts the
padding, its batch normalisation moves the running variance by the biased one. Of volumes the wasm backend has the gradient
of a convolution wrong, and both have that of equal maxima; of resizing to the nearest pixel the cpu backend has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpulayers.export.tfjs._topology import Tensor, Topology, Variable, last_axis
from gpulayers.layers import activation, container, conv, dropout, embedding, linear, norm, padding, pooling, softmax
from gpulayers.layers._calls import each_shape
from gpulayers.layers._layer import Layer
from gpulayers.ops._op import normal_axis
from gpulayers.ops._window import Sides, numbers
from gpulayers.ops.conv import padding_sides

ACTIVATIONS = {
    "relu": "relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "softsign": "softsign",
    "softplus": "softplus",
    "selu": "selu",
    "elu": "elu",
    "gelu": "gelu",
    "silu": "swish",
    "mish": "mish",
}
"""Ops as TF.js's activations, with the numbers that both have by default."""


def _out(layer: Layer, x: Tensor) -> tuple:
    return each_shape(layer.output_shape(x.shape))[0]


def _fully_connected(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    f = "linear" if layer.activation is None else ACTIVATIONS.get(layer.activation)
    if f is None or len(x.shape) < 2 or not _together(layer.weight, layer.bias):
        return None
    config = {"units": layer.out_features, "activation": f, "use_bias": layer.bias is not None}
    variables = [Variable("kernel", layer.weight, order=(1, 0)), *_named("bias", layer.bias)]
    return top.one(layer, "Dense", config, top.first(x), _out(layer, x), variables=variables)


def _named(name: str, weight: Any) -> list[Variable]:
    return [] if weight is None else [Variable(name, weight)]


def _together(*weights: Any) -> bool:
    """Trained all, or none of them: TF.js freezes layers, not weights."""
    return len({w.trainable for w in weights if w is not None}) <= 1


def _conv(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    f = "linear" if layer.activation is None else ACTIVATIONS.get(layer.activation)
    stride, dilation = (numbers(name, getattr(layer, name), 1, layer.spatial) for name in ("stride", "dilation"))
    if layer.spatial > 2 or f is None or set(dilation) != {1} or not _together(layer.weight, layer.bias):
        return None
    deep = layer.spatial == 2 and layer.groups == layer.in_channels and stride[0] == stride[1]
    if (layer.groups > 1 and not deep) or layer._around():  # another padding than zeros
        return None
    shape = _out(layer, x)
    sides = padding_sides(layer.padding, layer.kernel_size, stride, dilation)
    same = all(_same(*each) for each in zip(x.shape[2:], layer.kernel_size, stride, sides))
    if not same and any(map(any, sides)) and layer.spatial != 2:
        return None  # there is no ZeroPadding1D
    x = top.last(x) if same else _zeros_around(top, layer, x, sides)
    config: dict[str, Any] = {
        "kernel_size": list(layer.kernel_size),
        "strides": list(stride),
        "padding": "same" if same else "valid",
    }
    config |= {"use_bias": layer.bias is not None, "activation": f}
    bias = _named("bias", layer.bias)
    if layer.groups == 1:
        config["filters"] = layer.out_channels
        variables = [Variable("kernel", layer.weight, order=_kernel_last(layer)), *bias]
        return top.one(layer, f"Conv{layer.spatial}D", config, x, shape, variables=variables)
    many = layer.out_channels // layer.in_channels
    config["depth_multiplier"] = many
    split = (layer.in_channels, many, *layer.kernel_size)
    variables = [Variable("depthwise_kernel", layer.weight, split, (2, 3, 0, 1)), *bias]
    return top.one(layer, "DepthwiseConv2D", config, x, shape, variables=variables)


def _kernel_last(layer: Any) -> tuple[int, ...]:
    """A kernel's axes in TF.js's order: where, then the second of channels and outputs, then the first."""
    return (*range(2, layer.spatial + 2), 1, 0)


def _conv_transpose(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    """Without padding, and what padding would cut off is cut off behind it."""
    f = "linear" if layer.activation is None else ACTIVATIONS.get(layer.activation)
    stride, dilation = (numbers(name, getattr(layer, name), 1, 2) for name in ("stride", "dilation"))
    if f is None or dilation != (1, 1) or layer.groups > 1 or not _together(layer.weight, layer.bias):
        return None
    shape = _out(layer, x)
    sides = padding_sides(layer.padding, layer.kernel_size, stride, dilation)
    full = [n * s + max(k - s, 0) for n, s, k in zip(x.shape[2:], stride, layer.kernel_size)]
    cut = [[first, n - first - out] for n, (first, _), out in zip(full, sides, shape[2:])]
    if min(map(min, cut)) < 0:
        return None
    config = {"filters": layer.out_channels, "kernel_size": list(layer.kernel_size), "strides": list(stride)}
    config |= {"padding": "valid", "use_bias": layer.bias is not None, "activation": f}
    variables = [Variable("kernel", layer.weight, order=_kernel_last(layer)), *_named("bias", layer.bias)]
    y = top.one(layer, "Conv2DTranspose", config, top.last(x), (*shape[:2], *full), variables=variables)
    return top.one(layer, "Cropping2D", {"cropping": cut}, y, shape) if any(map(any, cut)) else y


def _same(size: int, kernel: int, stride: int, sides: tuple[int, int]) -> bool:
    """Whether this padding is what TF.js means by "same"."""
    before, after = _same_sides(size, kernel, stride)
    return sides == (before, after)


def _same_sides(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _zeros_around(top: Topology, layer: Layer, x: Tensor, sides: Sides) -> Tensor:
    """``x``, channels last, with so many zeros at each side."""
    x = top.last(x)
    if not any(map(any, sides)):
        return x
    (n, c, h, w), (top_bottom, left_right) = x.shape, sides
    shape = (n, c, h + sum(top_bottom), w + sum(left_right))
    return top.one(layer, "ZeroPadding2D", {"padding": [list(top_bottom), list(left_right)]}, x, shape)


def _pool(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    count = len(x.shape) - 2
    kernel = numbers("kernel_size", layer.kernel_size, 1, count)
    stride = kernel if layer.stride is None else numbers("stride", layer.stride, 1, count)
    around = numbers("padding", layer.padding, 0, count)
    shape, config = _out(layer, x), {"pool_size": list(kernel), "strides": list(stride)}
    sizes = list(zip(x.shape[2:], kernel, stride, around, shape[2:]))
    valid = all(p == 0 and (size - k) // s + 1 == out for size, k, s, p, out in sizes)
    if isinstance(layer, pooling.MaxPool):
        if count > 2 or layer.return_indices or set(numbers("dilation", layer.dilation, 1, count)) != {1}:
            return None
        same = all(_same_sides(size, k, s)[0] == p and -(-size // s) == out for size, k, s, p, out in sizes)
        return _pooled(top, layer, "MaxPooling", x, config, valid or same, "valid" if valid else "same", shape)
    if layer.divisor_override is not None:
        return None
    if not valid and layer.count_include_pad and any(around) and not layer.ceil_mode and count == 2:
        x, valid = _zeros_around(top, layer, x, ((around[0],) * 2, (around[1],) * 2)), True
    return _pooled(top, layer, "AveragePooling", x, config, valid, "valid", shape)


def _pooled(
    top: Topology, layer: Layer, kind: str, x: Tensor, config: dict, possible: bool, around: str, shape: tuple
) -> Tensor | None:
    kind = f"{kind}{len(shape) - 2}D"
    return top.one(layer, kind, {**config, "padding": around}, top.last(x), shape) if possible else None


def _adaptive(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    """Parts of equal size are an ordinary pooling."""
    most = isinstance(layer, pooling.AdaptiveMaxPool)
    if most and (layer.return_indices or len(x.shape) > 4):
        return None
    shape = _out(layer, x)
    sizes = list(zip(x.shape[2:], shape[2:]))
    window = [size // max(out, 1) for size, out in sizes]
    config = {"pool_size": window, "strides": window}
    possible = all(out and size % out == 0 and size for size, out in sizes)
    return _pooled(top, layer, "MaxPooling" if most else "AveragePooling", x, config, possible, "valid", shape)


def _zero_pad(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    given = layer.options()["padding"]
    sides = given if isinstance(given, tuple) else ((given, given), (given, given))
    if len(x.shape) != 4 or min(map(min, sides)) < 0 or getattr(layer, "value", 0) != 0:
        return None
    return _zeros_around(top, layer, x, sides)


def _layer_norm(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    if layer.weight is None or layer.bias is None or not _together(layer.weight, layer.bias):
        return None  # its gradient wants both
    config = {"axis": list(range(-len(layer.normalized_shape), 0)), "epsilon": layer.eps}
    variables = [Variable("gamma", layer.weight), Variable("beta", layer.bias)]
    return top.one(layer, "LayerNormalization", config, top.first(x), x.shape, variables=variables)


def _embedding(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    """Of the model's own input, which is integers then. TF.js trains every row, and as often as its index occurs."""
    if layer.padding_idx is not None or layer.scale_grad_by_freq:
        top.refuse(
            layer, "TF.js trains every row alike, and padding_idx and scale_grad_by_freq ask for other gradients"
        )
        return x._replace(shape=_out(layer, x))
    if ["int64"] not in top.possible_dtypes([x]):
        return None
    top.settle([x], ["int64"])
    config = {"input_dim": layer.num_embeddings, "output_dim": layer.embedding_dim}
    shape = (*x.shape, layer.embedding_dim)
    return top.one(layer, "Embedding", config, x, shape, variables=[Variable("embeddings", layer.weight)])


def _embedding_bag(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    """Means of (B, L) indices."""
    if layer.mode != "mean" or len(x.shape) != 2:
        top.refuse(layer, "TF.js' own layers hold means of as many indices in each bag")
        return x._replace(shape=_out(layer, x))
    rows = _embedding(top, layer, x)
    if rows is None or layer.padding_idx is not None or layer.scale_grad_by_freq:
        return rows
    return top.one(layer, "GlobalAveragePooling1D", {}, rows, _out(layer, x))


def _dropout(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    if layer.p == 0 or top.always_evaluates(layer):
        return x
    return top.one(layer, "Dropout", {"rate": layer.p}, x, x.shape) if layer.p < 1 else None


def _flatten(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    """A Reshape, too: a batch of rows, each row-major."""
    shape = _out(layer, x)
    if shape[0] is not None or len(shape) < 2:
        return None
    if shape == x.shape:
        return x
    x = x._replace(last=False) if set(x.shape[2:]) == {1} else top.first(x)
    return top.one(layer, "Reshape", {"target_shape": list(shape[1:])}, x, shape)


def _softmax(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    """TF.js has it over the last axis."""
    rank = len(x.shape)
    axis = normal_axis(layer.options()["axis"], rank, "dim")
    x = top.last(x) if rank == 4 and axis == 1 else top.first(x) if x.last and axis == rank - 1 else x
    if (last_axis(axis, rank) if x.last else axis) != rank - 1 or rank < 2:
        return None
    name = "logSoftmax" if isinstance(layer, softmax.LogSoftmax) else "softmax"
    return top.one(layer, "Activation", {"activation": name}, x, x.shape)


def _prelu(top: Topology, layer: Any, x: Tensor) -> Tensor | None:
    """One slope for all numbers, or one along the last axis: the wasm backend takes them in turn, whatever their shape."""
    rank = len(x.shape)
    if rank < 2 or (rank not in (2, 4) and layer.num_parameters > 1):
        return None
    x = top.last(x) if rank == 4 and layer.num_parameters > 1 else x
    shape = (*[1] * (rank - 2), layer.num_parameters)
    shared = [i for i, n in enumerate(shape, 1) if n == 1]
    variables = [Variable("alpha", layer.weight, shape=shape)]
    return top.one(layer, "PReLU", {"shared_axes": shared}, x, x.shape, variables=variables)


def _activation(name: str, applies: Callable[[Any], bool] = lambda layer: True) -> Callable:
    def call(top: Topology, layer: Layer, x: Tensor) -> Tensor | None:
        return top.one(layer, "Activation", {"activation": name}, x, x.shape) if applies(layer) else None

    return call


def _leaky_relu(top: Topology, layer: Any, x: Tensor) -> Tensor:
    return top.one(layer, "LeakyReLU", {"alpha": layer.negative_slope}, x, x.shape)


BUILT_IN: dict[type, Callable[[Topology, Any, Tensor], Tensor | None]] = {
    linear.FullyConnected: _fully_connected,
    conv.Convolutional: _conv,
    conv.ConvTranspose2d: _conv_transpose,
    pooling.MaxPool: _pool,
    pooling.AvgPool: _pool,
    pooling.AdaptiveAvgPool: _adaptive,
    pooling.GlobalAvgPool2d: _adaptive,
    pooling.AdaptiveMaxPool: _adaptive,
    padding.ZeroPad2d: _zero_pad,
    padding.ConstantPad2d: _zero_pad,
    norm.LayerNorm: _layer_norm,
    embedding.Embedding: _embedding,
    embedding.EmbeddingBag: _embedding_bag,
    dropout.Dropout: _dropout,
    container.Flatten: _flatten,
    container.Reshape: _flatten,
    softmax.Softmax: _softmax,
    softmax.LogSoftmax: _softmax,
    softmax.Softmax2d: _softmax,
    activation.ReLU: _activation("relu"),
    activation.Sigmoid: _activation("sigmoid"),
    activation.Tanh: _activation("tanh"),
    activation.Softsign: _activation("softsign"),
    activation.Softplus: _activation("softplus", lambda f: f.beta == 1 and f.threshold >= 17),
    activation.SELU: _activation("selu"),
    activation.ELU: _activation("elu", lambda f: f.alpha == 1),
    activation.CELU: _activation("elu", lambda f: f.alpha == 1),
    activation.GELU: _activation("gelu", lambda f: f.approximate == "none"),
    activation.SiLU: _activation("swish"),
    activation.Mish: _activation("mish"),
    activation.LeakyReLU: _leaky_relu,
    activation.PReLU: _prelu,
}
"""By the class whose code computes it."""

REFUSED: dict[type, str] = {
    pooling.MaxUnpool: "its indices are whole numbers from another layer, and the layers of TF.js pass float32 on",
    pooling.FractionalMaxPool: "where its windows lie is drawn for each channel, and a recording cannot index by what is drawn",
}
"""Of layers that neither a layer of TF.js nor recorded array code can be, why."""
