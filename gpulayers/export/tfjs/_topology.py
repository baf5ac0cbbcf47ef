"""A model as a graph of TF.js's layers: what model.json says of it, and the weights that go with it.

Images are channels first in gpulayers and channels last in TF.js's own layers. Each tensor knows which it is, and a
``Permute`` stands where that changes, so that a row of convolutions and poolings has one at its head and one at its end.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers import transfer
from gpulayers.export._error import Refusal
from gpulayers.layers._layer import Layer
from gpulayers.layers._weight import Weight


def last_axis(axis: int, rank: int) -> int:
    """Where an axis, channels first, is when they are last."""
    return rank - 1 if axis == 1 else max(axis - 1, 0)


class Tensor(NamedTuple):
    """What a layer gives."""

    layer: str
    node: int
    """Which of the layer's calls."""
    output: int
    """Which of its outputs."""
    shape: tuple
    """As gpulayers has it: batch first (None), channels first."""
    last: bool = False
    """In TF.js the channels are the last axis."""

    @property
    def key(self) -> list:
        return [self.layer, self.node, self.output]


class Variable(NamedTuple):
    """A weight as one of TF.js."""

    name: str
    """What the layer in TF.js calls it: "kernel"."""
    weight: Weight
    split: tuple[int, ...] | None = None
    """Its shape before ``order``, where that is not the weight's own."""
    order: tuple[int, ...] | None = None
    """Its axes in TF.js's order."""
    shape: tuple[int, ...] | None = None
    """Its shape at the end, where that is another still."""

    def value(self) -> np.ndarray:
        """In TF.js's layout, and in one of its dtypes."""
        data = transfer.to_numpy(self.weight.data)
        data = data.reshape(self.split or data.shape)
        data = data.transpose(self.order) if self.order else data
        return data.reshape(self.shape or data.shape).astype("int32" if data.dtype.kind in "biu" else "float32")

    def way_back(self) -> dict[str, list[int]]:
        """What makes an array of TF.js's layout one of the weight's own: a transposition, then a shape."""
        turned = {"transpose": np.argsort(self.order).tolist()} if self.order else {}
        return turned | {"shape": list(self.weight.shape)}


class Topology:
    """The graph while it is made."""

    def __init__(self, model: Layer):
        self.model = model
        self.layers: dict[str, dict[str, Any]] = {}
        """By name, what model.json says of each, in an order in which they can run."""
        self.variables: dict[str, Variable] = {}
        """By "layer/name"."""
        self.refusals: list[Refusal] = []
        self.dtypes: dict[str, str] = {}
        """Of the inputs whose first layer said it, by their names: "float32" or "int64"."""
        self._places = {id(layer): place for place, layer in model.named_layers()}
        self._names = {id(w): name for name, w in model.named_weights().items()}
        self._used: dict[tuple, str] = {}
        self._turned: dict[Tensor, Tensor] = {}

    def input(self, shape: tuple, name: str) -> Tensor:
        """One of the model's inputs, as gpulayers has it."""
        name = self._fresh(name)
        config = {"batch_input_shape": list(shape), "dtype": "float32", "sparse": False, "name": name}
        self.layers[name] = {"class_name": "InputLayer", "name": name, "config": config, "inbound_nodes": []}
        return Tensor(name, 0, 0, shape)

    def add(
        self,
        layer: Layer | None,
        kind: str,
        config: Mapping[str, Any],
        *xs: Tensor,
        shapes: Sequence[tuple],
        last: bool = False,
        variables: Sequence[Variable] = (),
        name: str = "",
    ) -> tuple[Tensor, ...]:
        """A call of a TF.js layer, which gives tensors of these ``shapes`` (gpulayers' own), channels last or not.

        layer: of gpulayers, whose part this is. One that is used again is one layer in TF.js too, if it has weights.
        name: for a layer that is nobody's part.
        """
        mark = (id(layer), kind, repr(dict(config)))
        found = self._used.get(mark) if variables else None
        if found is None:
            found = self._fresh(name or self.name_of(layer, kind))
            learned = [v.weight.trainable for v in variables if v.weight.learned]
            frozen = {"trainable": False} if learned and not any(learned) else {}
            full = {**config, **frozen, "name": found}
            self.layers[found] = {"class_name": kind, "name": found, "config": full, "inbound_nodes": []}
            self._used[mark] = found
            for v in variables:
                self.variables[f"{found}/{v.name}"] = v
        nodes = self.layers[found]["inbound_nodes"]
        nodes.append([[*x.key, {}] for x in xs])
        return tuple(Tensor(found, len(nodes) - 1, i, shape, last) for i, shape in enumerate(shapes))

    def one(
        self, layer: Layer | None, kind: str, config: Mapping[str, Any], x: Tensor, shape: tuple, **more: Any
    ) -> Tensor:
        """``add`` for one input and one output of ``shape``; the channels are where they were unless ``last`` says so."""
        return self.add(layer, kind, config, x, shapes=[shape], **{"last": x.last, **more})[0]

    def possible_dtypes(self, xs: Sequence[Tensor]) -> list[list[str]]:
        """What these may be: numbers, or integers where they are inputs of the model that no layer has seen yet."""
        known = [self.dtypes.get(x.layer, "" if self._is_input(x) else "float32") for x in xs]
        return [[dtype or other for dtype in known] for other in (("float32", "int64") if "" in known else ("",))]

    def settle(self, xs: Sequence[Tensor], dtypes: Sequence[str]) -> None:
        """They are this."""
        for x, dtype in zip(xs, dtypes):
            if self._is_input(x):
                self.dtypes.setdefault(x.layer, dtype)
                self.layers[x.layer]["config"]["dtype"] = "int32" if self.dtypes[x.layer] == "int64" else "float32"

    def _is_input(self, x: Tensor) -> bool:
        return self.layers[x.layer]["class_name"] == "InputLayer"

    def first(self, x: Tensor) -> Tensor:
        """``x`` in gpulayers' own order."""
        rank = len(x.shape)
        return self._permuted(x, [rank - 1, *range(1, rank - 1)], False) if x.last else x

    def last(self, x: Tensor) -> Tensor:
        """The sequence, image or volume ``x`` with its channels last."""
        return x if x.last else self._permuted(x, [*range(2, len(x.shape)), 1], True)

    def like(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """All in the order of most of them."""
        turn = self.last if 2 * sum(x.last for x in xs) > len(xs) else self.first
        return [turn(x) for x in xs]

    def _permuted(self, x: Tensor, dims: list[int], last: bool) -> Tensor:
        """``dims``: the axes of TF.js's Permute, which counts from 1 behind the batch."""
        if x not in self._turned:
            name = "to_channels_last" if last else "to_channels_first"
            y = self.one(None, "Permute", {"dims": dims}, x, x.shape, last=last, name=name)
            self._turned[x], self._turned[y] = y, x
        return self._turned[x]

    def refuse(self, layer: Layer, reason: str) -> None:
        place = self.place(layer)
        if not any((r.place, r.reason) == (place, reason) for r in self.refusals):
            self.refusals.append(Refusal(place, layer.name, reason))

    def place(self, layer: Layer) -> str:
        """Where it stands in the model: "3.0"."""
        return self._places.get(id(layer), "")

    def always_evaluates(self, layer: Layer) -> bool:
        """It was set to evaluation by itself, and stays so while the model trains."""
        return self.model._training and not layer._training

    def name_of(self, layer: Layer | None, kind: str) -> str:
        """A name that says where in the model this is, in the letters that TF.js takes: "Conv2d_3_0"."""
        if layer is None:
            return kind
        cls = type(layer).__name__
        own = layer.name if not re.fullmatch(rf"(\d+\.)?{re.escape(cls)}", layer.name) else ""
        words = own or f"{cls} {self.place(layer)}"
        plain = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
        name = re.sub(r"[^A-Za-z0-9]+", "_", plain).strip("_")
        return name if name[:1].isalpha() else f"layer_{name}".strip("_")

    def _fresh(self, name: str) -> str:
        tries = (name if n == 1 else f"{name}_{n}" for n in range(1, len(self.layers) + 2))
        return next(n for n in tries if n not in self.layers and n != "layers")  # what TF.js's own savers call all

    def weight_name(self, variable: Variable) -> str:
        """In the model's state_dict."""
        return self._names.get(id(variable.weight), variable.name)

    def config(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, Any]:
        """model.json's "model_config"."""
        ends = {"input_layers": [x.key for x in inputs], "output_layers": [y.key for y in outputs]}
        return {"class_name": "Model", "config": {"name": name, "layers": list(self.layers.values()), **ends}}
