"""Layers that TF.js does not have: each by a JavaScript class of its own, recorded from its code."""

from __future__ import annotations

import copy
import importlib.resources
import re
import unicodedata
from collections.abc import Sequence

from gpulayers.definition import RuleError
from gpulayers.export.recording import Unrecordable
from gpulayers.export.tfjs._class import SHARED_TEXT, class_text, weight_names
from gpulayers.export.tfjs._topology import Tensor, Topology, Variable
from gpulayers.layers._calls import each_shape
from gpulayers.layers._layer import Layer
from gpulayers.layers.container import Sequential

WITHOUT_WASM = {"Conv1D", "Conv2D", "Conv2DTranspose", "DepthwiseConv2D", "MaxPooling1D", "MaxPooling2D"}
"""What TF.js's wasm backend cannot train, or not rightly, by itself."""
_TAKEN = (
    "Activation Add AlphaDropout Average AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization Bidirectional "
    "CategoryEncoding CenterCrop Concatenate Conv1D Conv2D Conv2DTranspose Conv3D Conv3DTranspose ConvLSTM2D ConvLSTM2DCell "
    "Cropping2D Dense DepthwiseConv2D Dot Dropout ELU Embedding Flatten Functional GRU GRUCell GaussianDropout GaussianNoise "
    "GlobalAveragePooling1D GlobalAveragePooling2D GlobalMaxPooling1D GlobalMaxPooling2D InputLayer LSTM LSTMCell "
    "LayerNormalization LeakyReLU Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum Model Multiply PReLU Permute "
    "RNN RandomWidth ReLU RepeatVector Rescaling Reshape Resizing SeparableConv2D Sequential SimpleRNN SimpleRNNCell Softmax "
    "SpatialDropout1D StackedRNNCells ThresholdedReLU TimeDistributed UpSampling2D ZeroPadding2D "
    "Array Boolean Date Error Function Infinity JSON Map Math NaN Number Object Promise Set String Symbol"
)
TAKEN = frozenset(_TAKEN.split())
"""Names that TF.js's own layers have, and that the text of a class may want."""
STANDS_FOR = "ClassNameOfThisLayer"
HEAD = """// Layers of this model that TensorFlow.js does not have, made from their Python code by gpulayers.
// register(tf) makes them known to tf.loadLayersModel; tf's backends are imported before it is called."""


class Classes:
    """The classes of one model, and the text of custom_layers.js."""

    def __init__(self, top: Topology):
        self.top = top
        self.names: dict[str, str] = {}
        """By the text of each class, in which another name stands for its own."""
        self._texts: dict[tuple, str] = {}

    def call(self, layer: Layer, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the layer gives, channels first in and out."""
        gives = each_shape(layer.output_shape(*(x.shape for x in xs)))
        subject = self._subject(layer)
        weights = subject.named_weights()
        variables = [Variable(name, weights[own]) for own, name in weight_names(subject).items()]
        return self.top.add(layer, self._class(layer, xs), {}, *xs, shapes=gives, variables=variables)

    def _subject(self, layer: Layer) -> Layer:
        """What is recorded: a layer that is in evaluation by itself stays so as a part of another."""
        return Sequential(copy.copy(layer)) if self.top.always_evaluates(layer) else layer

    def _class(self, layer: Layer, xs: Sequence[Tensor]) -> str:
        """The name of the class of this layer; layers of equal texts share one."""
        mark = (id(layer), *(x.shape for x in xs))
        if mark not in self._texts:
            self._texts[mark] = self._recorded(layer, xs)
        text = self._texts[mark]
        return self.names.setdefault(text, self._fresh(type(layer).__name__)) if text else type(layer).__name__

    def _recorded(self, layer: Layer, xs: Sequence[Tensor]) -> str:
        """The text of the layer's class; "" where it is refused. A model's inputs may turn out to be integers."""
        refused: list[Exception] = []
        for dtypes in self.top.possible_dtypes(xs):
            try:
                text = class_text(self._subject(layer), STANDS_FOR, [x.shape for x in xs], dtypes=dtypes)
            except (Unrecordable, RuleError) as error:
                refused.append(error)
            else:
                self.top.settle(xs, dtypes)
                return text
        reasons = sorted(refused, key=lambda error: isinstance(error, RuleError))  # which is one of the wrong dtype
        self.top.refuse(layer, str(reasons[0]))
        return ""

    def _fresh(self, name: str) -> str:
        """A name of a class, in the letters that model.json keeps: no _ among them."""
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        plain = "".join(word[:1].upper() + word[1:] for word in re.split(r"[^A-Za-z0-9]+", plain))
        plain = plain if plain[:1].isalpha() else f"Layer{plain}"
        plain = f"{plain}Layer" if plain in TAKEN else plain
        used = set(self.names.values())
        return next(n for n in (plain, *(f"{plain}{i}" for i in range(2, len(used) + 3))) if n not in used)

    def module(self) -> str:
        """custom_layers.js."""
        parts = [text.replace(STANDS_FOR, name) for text, name in self.names.items()]
        if parts and SHARED_TEXT:
            parts.insert(0, SHARED_TEXT)
        more = ""
        if any(entry["class_name"] in WITHOUT_WASM for entry in self.top.layers.values()):
            more = "\n" + importlib.resources.files(__package__).joinpath("wasm.js").read_text("utf-8")
            parts.insert(0, "completeWasm(tf);")
        body = "\n\n".join(part.strip() for part in parts)
        inside = re.sub(r"^(?=.)", "  ", body, flags=re.M) + "\n" if parts else ""
        return f"{HEAD}\nexport default function register(tf) {{\n{inside}}}\n{more}"
