"""Small calls of every drop-in of ``gpulayers.torch``, and one model of all of them: for tests of the mechanism.

Values are judged elsewhere, over many more calls (``check_torch.py``).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import gpulayers.torch as gt

PLAIN = (
    *("ReLU", "ReLU6", "LeakyReLU", "Hardtanh", "Hardsigmoid", "Hardswish", "Hardshrink", "Softshrink", "Sigmoid"),
    *(
        "LogSigmoid",
        "SiLU",
        "Tanh",
        "Tanhshrink",
        "Softsign",
        "Softplus",
        "ELU",
        "CELU",
        "SELU",
        "Mish",
        "GELU",
        "RReLU",
    ),
)
"""Activations that have no arguments without a default."""
_ROW, _IMAGE, _VOLUME = (2, 4, 5), (2, 4, 6, 5), (2, 4, 3, 2, 4)
_SAME: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}
"""A convolution that keeps its input's shape."""
_OF_LOGITS: dict[str, Any] = {}
if hasattr(nn, "LinearCrossEntropyLoss"):  # newer torch
    _smooth = {"bias": True, "label_smoothing": 0.1, "reduction": "none", "ignore_index": 1}
    _OF_LOGITS["LinearCrossEntropyLoss"] = [
        ({"in_features": 5, "num_classes": 4, **more}, (3, 5)) for more in ({}, _smooth, {"out_features": (2,)})
    ]
TARGETS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    **dict.fromkeys(("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"), lambda x, t: [x, t]),
    "BCELoss": lambda x, t: [x.sigmoid(), t.sigmoid()],
    **dict.fromkeys(("BCEWithLogitsLoss", "KLDivLoss"), lambda x, t: [x, t.sigmoid()]),
    "PoissonNLLLoss": lambda x, t: [x, t.exp()],
    "GaussianNLLLoss": lambda x, t: [x, t, (x - t).exp()],
    **dict.fromkeys(("HingeEmbeddingLoss", "SoftMarginLoss"), lambda x, t: [x, 1 - 2 * (t > 0).to(t.dtype)]),
    "MarginRankingLoss": lambda x, t: [x, t, 1 - 2 * (x + t > 0).to(t.dtype)],
    **dict.fromkeys(("TripletMarginLoss", "TripletMarginWithDistanceLoss"), lambda x, t: [x, t, x + 2 * t]),
    "CosineEmbeddingLoss": lambda x, t: [x, t, 1 - 2 * (x[..., 0] > t[..., 0]).to(t.dtype)],
    "MultiMarginLoss": lambda x, t: [x, torch.arange(x[..., 0].numel()).reshape(x.shape[:-1]) % x.shape[-1]],
    "MultiLabelSoftMarginLoss": lambda x, t: [x, t.sigmoid()],
    "MultiLabelMarginLoss": lambda x, t: [x, torch.arange(x.numel()).reshape(x.shape) * 3 % (x.shape[-1] + 1) - 1],
    "CTCLoss": lambda x, t: [x.unsqueeze(1), torch.tensor([[1, 2]]), torch.full((1,), x.shape[0]), torch.tensor([2])],
}
"""Losses: what they are called with, made of two arrays of one shape."""
_SHAPES: dict[str, list[tuple[dict[str, Any], tuple[int, ...]]]] = {
    **{name: [({}, (3, 5))] for name in PLAIN},
    "Threshold": [({"threshold": 0.1, "value": 2.0}, (3, 5))],
    "GLU": [({"dim": 1}, (3, 4, 5))],
    "PReLU": [({"num_parameters": 4}, _IMAGE)],
    "Softmax": [({"dim": 1}, (3, 5, 2))],
    "LogSoftmax": [({"dim": -1}, (3, 5))],
    "Softmin": [({"dim": 0}, (3, 5))],
    "Softmax2d": [({}, _IMAGE)],
    "Dropout": [({"p": 0.3}, (3, 5))],
    "AlphaDropout": [({"p": 0.3}, (3, 5))],
    "Dropout1d": [({"p": 0.3}, _ROW)],
    "Dropout2d": [({"p": 0.3}, _IMAGE)],
    "Dropout3d": [({"p": 0.3}, _VOLUME)],
    "FeatureAlphaDropout": [({"p": 0.3}, _IMAGE)],
    "Flatten": [({}, (2, 3, 4))],
    "Linear": [({"in_features": 5, "out_features": 3}, (2, 3, 5)), ({"in_features": 5, "out_features": 3, "bias": False}, (3, 5))],
    "LayerNorm": [({"normalized_shape": (5,)}, (3, 5)), ({"normalized_shape": (3, 5), "elementwise_affine": False}, (2, 3, 5))],
    "RMSNorm": [({"normalized_shape": (5,)}, (3, 5)), ({"normalized_shape": (5,), "elementwise_affine": False}, (2, 3, 5))],
    "BatchNorm1d": [({"num_features": 5}, (4, 5)), ({"num_features": 3, "affine": False}, (4, 3, 5))],
    "BatchNorm2d": [({"num_features": 4}, _IMAGE), ({"num_features": 4, "track_running_stats": False}, _IMAGE)],
    "AdaptiveMaxPool1d": [({"output_size": 3}, _ROW)],
    "AdaptiveMaxPool2d": [({"output_size": 3}, _IMAGE), ({"output_size": (2, 3), "return_indices": True}, _IMAGE)],
    "AdaptiveMaxPool3d": [({"output_size": 2}, _VOLUME)],
    "LPPool1d": [({"norm_type": 1, "kernel_size": 2}, _ROW)],
    "LPPool2d": [({"norm_type": 1, "kernel_size": 2, "stride": 1}, _IMAGE)],
    "LPPool3d": [({"norm_type": 1, "kernel_size": 2}, _VOLUME)],
    **{f"MaxUnpool{d}d": [({"kernel_size": 2}, s)] for d, s in ((1, _ROW), (2, _IMAGE), (3, _VOLUME))},
    # One window, which no random number moves.
    "FractionalMaxPool2d": [({"kernel_size": 2, "output_size": 1}, _IMAGE)],
    "FractionalMaxPool3d": [({"kernel_size": (1, 1, 2), "output_size": 1}, _VOLUME)],
    "MaxPool1d": [({"kernel_size": 2}, _ROW)],
    "MaxPool3d": [({"kernel_size": 2}, _VOLUME), ({"kernel_size": 2, "padding": 1, "return_indices": True}, _VOLUME)],
    "AvgPool1d": [({"kernel_size": 2, "padding": 1}, _ROW)],
    "AvgPool3d": [({"kernel_size": 2, "padding": 1}, _VOLUME)],
    "AdaptiveAvgPool1d": [({"output_size": 3}, _ROW)],
    "AdaptiveAvgPool3d": [({"output_size": (2, 1, 3)}, _VOLUME)],
    "BatchNorm3d": [({"num_features": 4}, (2, 4, 3, 2, 4))],
    "GroupNorm": [({"num_groups": 2, "num_channels": 4}, _IMAGE), ({"num_groups": 1, "num_channels": 4, "affine": False}, (3, 4))],
    "InstanceNorm1d": [({"num_features": 3, "affine": True}, (2, 3, 5)), ({"num_features": 3}, (3, 5))],
    "InstanceNorm2d": [({"num_features": 4, "affine": True, "track_running_stats": True}, _IMAGE)],
    "InstanceNorm3d": [({"num_features": 4}, (2, 4, 3, 2, 4))],
    "LocalResponseNorm": [({"size": 3, "alpha": 0.3}, _IMAGE), ({"size": 2, "k": 0.5, "beta": 0.5}, (2, 4, 5))],
    "MaxPool2d": [({"kernel_size": 2}, _IMAGE), ({"kernel_size": 3, "padding": 1, "return_indices": True}, _IMAGE)],
    "AvgPool2d": [({"kernel_size": 2, "padding": 1}, _IMAGE)],
    "AdaptiveAvgPool2d": [({"output_size": (2, 3)}, _IMAGE)],
    "ConstantPad1d": [({"padding": (2, -1), "value": 3.5}, _ROW)],
    "ConstantPad3d": [({"padding": (0, 2, 1, -1, 1, 0), "value": 3.5}, _VOLUME)],
    **{f"{kind}Pad1d": [({"padding": (1, 2)}, _ROW)] for kind in ("Zero", "Reflection", "Replication", "Circular")},
    **{f"{kind}Pad3d": [({"padding": 1}, _VOLUME)] for kind in ("Zero", "Reflection", "Replication", "Circular")},
    "ConstantPad2d": [({"padding": (0, 2, 1, -1), "value": 3.5}, _IMAGE)],
    "ZeroPad2d": [({"padding": 1}, _IMAGE)],
    "ReflectionPad2d": [({"padding": 1}, _IMAGE)],
    "ReplicationPad2d": [({"padding": 1}, _IMAGE)],
    "CircularPad2d": [({"padding": 1}, _IMAGE)],
    "Upsample": [({"size": (4, 7), "mode": "bicubic"}, _IMAGE), ({"scale_factor": 1.7, "mode": "linear"}, (2, 3, 5))],
    "UpsamplingNearest2d": [({"scale_factor": 2}, _IMAGE)],
    "UpsamplingBilinear2d": [({"size": (3, 4)}, _IMAGE)],
    "Unfold": [({"kernel_size": (2, 3), "stride": 2, "padding": 1}, _IMAGE)],
    "Fold": [({"output_size": (4, 3), "kernel_size": 2, "stride": (2, 1)}, (2, 4, 4))],
    "PixelShuffle": [({"upscale_factor": 2}, _IMAGE)],
    "PixelUnshuffle": [({"downscale_factor": 2}, (2, 3, 4, 6))],
    "ChannelShuffle": [({"groups": 2}, _IMAGE)],
    "Conv2d": [
        ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}, _IMAGE),
        ({"in_channels": 4, "out_channels": 4, "kernel_size": 2, "groups": 2, "stride": 2, "bias": False}, _IMAGE),
    ],
    "Conv1d": [(_SAME, _ROW)],
    "Conv3d": [(_SAME, _VOLUME)],
    "ConvTranspose1d": [(_SAME, _ROW)],
    "ConvTranspose2d": [(_SAME, _IMAGE), ({**_SAME, "stride": 2, "groups": 2, "output_padding": 1, "bias": False}, _IMAGE)],
    "ConvTranspose3d": [(_SAME, _VOLUME)],
    "CrossEntropyLoss": [({}, (3, 5)), ({"label_smoothing": 0.1, "reduction": "none"}, (2, 4, 3))],
    "NLLLoss": [({"ignore_index": 1}, (3, 5))],
    "Bilinear": [({"in1_features": 5, "in2_features": 5, "out_features": 3}, (3, 5))],
    "PairwiseDistance": [({}, (3, 5))],
    "CosineSimilarity": [({"dim": -1}, (3, 5))],
    **_OF_LOGITS,
    **{name: [({}, (3, 5))] for name in TARGETS},
    "KLDivLoss": [({"reduction": "batchmean"}, (3, 5))],
}  # fmt: skip
_OF_INDICES: dict[str, list[tuple[dict[str, Any], tuple[int, ...]]]] = {
    "Embedding": [({"num_embeddings": 6, "embedding_dim": 3, "padding_idx": 1}, (2, 4))],
    "EmbeddingBag": [({"num_embeddings": 6, "embedding_dim": 3, "mode": m}, (2, 4)) for m in ("max", "mean")],
}
"""Classes whose input is integers, which have no gradient."""


class Case(NamedTuple):
    """One call: a class by its name, its arguments, the shape of its input."""

    name: str
    arguments: dict[str, Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}-{'-'.join(str(v) for v in self.arguments.values())}".rstrip("-")

    def module(self, library: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module of ``gpulayers.torch`` or ``torch.nn``, the same weights from either."""
        module = getattr(library, self.name)(**self.arguments)
        for name, p in module.named_parameters():
            p.data = _draw(p.shape, name)
        return module.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        x = _draw(self.shape, f"{self.name}{seed}").to(dtype)
        if self.name in _OF_INDICES:
            return [torch.arange(x.numel()).reshape(x.shape) * (7 + seed) % self.arguments["num_embeddings"]]
        if self.name in OF_PAIRS:
            return [x, _draw(self.shape, f"target{seed}").to(dtype)]
        if self.name in TARGETS:
            given = TARGETS[self.name](x.double(), _draw(self.shape, f"target{seed}"))
            return [a.to(dtype) if a.is_floating_point() else a for a in given]
        if self.name in _OF_LOGITS:
            count, several = self.arguments["num_classes"], self.arguments.get("out_features", ())
            return [x, torch.arange(x.shape[0] * math.prod(several)).reshape(-1, *several) % count]
        if self.name in ("CrossEntropyLoss", "NLLLoss"):
            return [x, torch.arange(x.numel() // x.shape[1]).reshape(x.shape[:1] + x.shape[2:]) % x.shape[1]]
        if self.name.startswith("MaxUnpool"):
            return [x, _places(x)]
        return [x]


OF_PAIRS = ("Bilinear", "PairwiseDistance", "CosineSimilarity")
"""Classes of two inputs that are alike."""
CASES = [Case(name, *call) for name, calls in _SHAPES.items() for call in calls]
MADE_OF_OTHERS = (
    *("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"),
    *("TransformerEncoder", "TransformerDecoder", "Transformer"),
    *("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"),
    *("AdaptiveLogSoftmaxWithLoss", "NLLLoss2d", "SyncBatchNorm"),
)
"""Classes that only call others, and functions: tests of their own hold them against torch's."""
LOOKUPS = [Case(name, *call) for name, calls in _OF_INDICES.items() for call in calls]
_DROPOUTS = ("Dropout", "AlphaDropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout")
RANDOM = (*_DROPOUTS, "RReLU")
DIFFERENTIABLE = [c for c in CASES if c.name not in RANDOM]
DOUBLE = torch.float64


def first(found: Any) -> Any:
    """The first output."""
    return found[0] if isinstance(found, tuple) else found


def leaf(x: Tensor) -> Tensor:
    """``x`` with a gradient of its own, where it may have one."""
    return x.detach().requires_grad_() if x.is_floating_point() else x


def both(case: Case, dtype: torch.dtype = DOUBLE, training: bool = True) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's), equal."""
    return case.module(gt, dtype).train(training), case.module(nn, dtype).train(training)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the type of its error."""
    try:
        return call()
    except Exception as error:
        return type(error)


def agree(ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Both calls give the same, or an error of the same type."""
    a, b = outcome(ours), outcome(theirs)
    if isinstance(b, type):
        assert isinstance(a, type) and issubclass(a, b)
    else:
        torch.testing.assert_close(a, b)


def _places(x: Tensor) -> Tensor:
    """Places for the maxima of a channel, in an image twice as large along each axis."""
    return (torch.arange(x[0, 0].numel(), device=x.device) * 2 + 1).reshape(x.shape[2:]).expand(x.shape)


def _draw(shape: Any, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same values in other memory: as they come, with gaps, transposed, channels last; and an empty batch."""
    yield x
    yield torch.stack([x, x], -1)[..., 0]
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    yield x[:0]


_IN_THE_MODEL: dict[str, dict[str, Any]] = {
    "Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": 1},
    "Linear": {"in_features": 352, "out_features": 10},
    "Embedding": {"num_embeddings": 10, "embedding_dim": 3},
    "EmbeddingBag": {"num_embeddings": 10, "embedding_dim": 3},
    "LayerNorm": {"normalized_shape": 10},
    "RMSNorm": {"normalized_shape": 10},
    "BatchNorm1d": {"num_features": 10},
    "InstanceNorm1d": {"num_features": 4, "affine": True},
    "Bilinear": {"in1_features": 10, "in2_features": 10, "out_features": 3},
} | {name: {"in_features": 10, "num_classes": 10} for name in _OF_LOGITS}


class Everything(nn.Module):
    """Every class of ``library`` once, on images (N, 3, H, W) and labels (N,): each one's output by its name."""

    def __init__(self, library: Any):
        super().__init__()
        arguments = {name: calls[0][0] for name, calls in (_SHAPES | _OF_INDICES).items()} | _IN_THE_MODEL
        self.layers = nn.ModuleDict({name: getattr(library, name)(**kwargs) for name, kwargs in arguments.items()})
        for name, p in self.named_parameters():
            p.data = _draw(p.shape, name).float() / max(1, p[:1].numel()) ** 0.5

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def through(names: str, x: Tensor) -> Tensor:
            for name in names.split():
                x = found[name] = self.layers[name](x)
            return x

        x = through("ReflectionPad2d Conv2d BatchNorm2d PReLU MaxPool2d AvgPool2d AdaptiveAvgPool2d", x)
        x = x + through("ConvTranspose2d", x) + through("Conv1d ConvTranspose1d", x.flatten(2)).reshape(x.shape)
        x = through("Conv3d BatchNorm3d InstanceNorm3d ConvTranspose3d", x.unsqueeze(2)).squeeze(2)
        x = (
            x
            + through("GroupNorm InstanceNorm2d LocalResponseNorm", x)
            + through("InstanceNorm1d", x.flatten(2)).reshape(x.shape)
        )
        x = x + through("Softmax2d", x)
        for axes, given in ((1, x.flatten(2)), (2, x), (3, torch.stack([x, x], 2))):
            y = found[f"MaxUnpool{axes}d"] = self.layers[f"MaxUnpool{axes}d"](given, _places(given))
            x = x + y.flatten(2).mean(2)[..., None, None]
        x = x + through("ChannelShuffle PixelShuffle PixelUnshuffle", x)
        x = x + through("Upsample UpsamplingNearest2d UpsamplingBilinear2d", x).mean((2, 3), keepdim=True)
        x = x + through("Unfold Fold", x).mean((1, 2, 3), keepdim=True)
        pads = ("ConstantPad", "ZeroPad", "ReplicationPad", "CircularPad", "ReflectionPad")
        pools = ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "LPPool")
        row = through(" ".join(f"{name}1d" for name in pads + pools), x.flatten(2))
        volume = through(" ".join(f"{name}3d" for name in pads + pools), torch.stack([x, x], 2))
        x = x + row.mean(2)[..., None, None] + volume.mean((2, 3, 4))[..., None, None]
        x = x + through("LPPool2d AdaptiveMaxPool2d", x).mean((2, 3), keepdim=True)
        x = x + through("FractionalMaxPool2d", x) + through("FractionalMaxPool3d", torch.stack([x, x], 2)).squeeze(2)
        x = through("Dropout2d FeatureAlphaDropout", x)
        x = through("Dropout1d", x.flatten(2)).reshape(x.shape) + through("Dropout3d", x.unsqueeze(2)).squeeze(2)
        x = through("ConstantPad2d ZeroPad2d ReplicationPad2d CircularPad2d", x)
        x = through("Flatten Linear BatchNorm1d LayerNorm RMSNorm Dropout AlphaDropout", x)
        x = torch.stack([through(name, x) for name in (*PLAIN, "Threshold")]).mean(0)
        through("GLU", x.unsqueeze(-1))
        through("Embedding", labels.unsqueeze(-1))
        through("EmbeddingBag", labels.unsqueeze(-1))
        p, q = through("Softmax", x), through("Softmin", x)
        for name in OF_PAIRS:
            like = next(self.layers[name].parameters(), p)  # torch's Bilinear casts nothing
            found[name] = self.layers[name](p.to(like.dtype), q.to(like.dtype))
        found |= {name: self.layers[name](*given(p, q)) for name, given in TARGETS.items()}
        found["NLLLoss"] = self.layers["NLLLoss"](through("LogSoftmax", x), labels)
        found["CrossEntropyLoss"] = self.layers["CrossEntropyLoss"](x, labels)
        return found | {name: self.layers[name](x, labels) for name in _OF_LOGITS}


def loss(model: Everything, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(a number on which all classes have an influence, every class's output)."""
    found = model(x, labels)
    total = (
        found["GLU"].mean()
        + found["EmbeddingBag"].mean()
        + found["Embedding"].mean()
        + sum(found[name].sum() for name in OF_PAIRS)
        + found["NLLLoss"]
        + found["CrossEntropyLoss"]
        + sum(found[name] for name in (*TARGETS, *_OF_LOGITS))
    )
    return total, {name: y.detach() for name, y in found.items()}
