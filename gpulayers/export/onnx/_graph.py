"""A graph of ONNX while it is made: the model's own, or the body of a local function."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from gpulayers import transfer
from gpulayers.export._error import Refusal
from gpulayers.layers._layer import Layer
from gpulayers.layers._weight import Weight

OPSET = 20
"""The first that has Gelu."""
ATTENTION = 23
"""The first that has Attention: of models where that stands alone, so that older runtimes load all others."""
IR_VERSIONS = {OPSET: 9, ATTENTION: 11}
DOMAIN = "gpulayers"
"""Of local functions."""
TYPES = {"f": TensorProto.FLOAT, "i": TensorProto.INT64, "b": TensorProto.BOOL}
DTYPES: dict[str, np.dtype] = {"f": np.dtype(np.float32), "i": np.dtype(np.int64), "b": np.dtype(bool)}


class Tensor(NamedTuple):
    """A value of the model's graph."""

    name: str
    shape: tuple
    """Batch first (None)."""
    kind: str = "f"
    """ "f", "i" or "b"; "" for an input of the model, whose kind the first layer that takes it says."""


class Body:
    """Nodes in order. Names of values are numbered, unless the caller gives them."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.line = ""
        """The author's line that the next nodes come from."""
        self._numbers = itertools.count(1)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """The name of a new node's output, or a list of names where there are several."""
        names = [f"v{next(self._numbers)}" for _ in range(outputs)]
        self.nodes.append(
            helper.make_node(kind, list(inputs), names, domain=domain, doc_string=self.line or None, **attributes)
        )
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, kind: str = "i") -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.ascontiguousarray(value, DTYPES[kind])))


class ModelGraph(Body):
    """The model's graph: its weights under their names, the functions that it calls, and what stands in its way."""

    def __init__(self, model: Layer):
        super().__init__()
        self.weights: dict[str, TensorProto] = {}
        self.functions: dict[str, FunctionProto] = {}
        self.kinds: dict[str, str] = {}
        """Of the model's inputs, once a layer has said so."""
        self.refusals: list[Refusal] = []
        self.opset = OPSET
        self._names = {id(w): name for name, w in model.named_weights().items()}
        self._places = {id(layer): place for place, layer in model.named_layers()}

    def weight(self, layer: Layer, w: Weight) -> str:
        """The name of an initializer that holds this weight: its name in the state dict."""
        name = self._names[id(w)]
        if name not in self.weights:
            value = transfer.to_numpy(w.data)
            value = value.astype(DTYPES["f" if value.dtype.kind not in "iub" else "i"])
            if bad := int(np.isnan(value).sum()):
                self.refuse(layer, f"{name} is not a number (NaN) at {bad} of {value.size} places")
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def refuse(self, layer: Layer, reason: str) -> None:
        refusal = Refusal(self._places.get(id(layer), ""), layer.name, reason)
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    def function(self, wanted: str, inputs: Sequence[str], outputs: Sequence[str], body: Body, about: str) -> str:
        """The name of a local function with this body: one that is there, if it is the same."""
        for name in (wanted if n == 1 else f"{wanted}_{n}" for n in itertools.count(1)):
            opsets = [helper.make_opsetid("", OPSET)]
            made = helper.make_function(DOMAIN, name, inputs, outputs, body.nodes, opsets, doc_string=about)
            if self.functions.setdefault(name, made) == made:
                return name
        raise AssertionError
