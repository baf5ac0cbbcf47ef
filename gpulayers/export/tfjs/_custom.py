"""Layers that TF.js does not have: each by a JavaScript class of its own, recorded from its code."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence

from gpulayers.export.tfjs._topology import Tensor, Topology
from gpulayers.layers._calls import each_shape
from gpulayers.layers._layer import Layer


class Classes:
    """The classes of one model, and the text of custom_layers.js."""

    def __init__(self, top: Topology):
        self.top = top
        self.texts: dict[str, str] = {}
        """Each class's text by its name."""

    def call(self, layer: Layer, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the layer gives, channels first in and out."""
        shapes = each_shape(layer.output_shape(*(x.shape for x in xs)))
        self.top.refuse(layer, "TF.js has no such layer")
        return self.top.add(layer, type(layer).__name__, {}, *xs, shapes=shapes)

    def module(self) -> str:
        """custom_layers.js."""
        parts = list(self.texts.values())
        more = ""
        if any(entry["class_name"] in WITHOUT_WASM for entry in self.top.layers.values()):
            more = "\n" + importlib.resources.files(__package__).joinpath("wasm.js").read_text("utf-8")
            parts.insert(0, "  completeWasm(tf);")
        body = "".join(f"{part}\n\n" for part in parts).removesuffix("\n")
        return f"{HEAD}\nexport default function register(tf) {{\n{body}}}\n{more}"


WITHOUT_WASM = {"Conv2D", "DepthwiseConv2D", "MaxPooling2D"}
"""What TF.js's wasm backend cannot train, or not rightly, by itself."""
HEAD = """// Layers of this model that TensorFlow.js does not have, made from their Python code by gpulayers.
// register(tf) makes them known to tf.loadLayersModel."""
