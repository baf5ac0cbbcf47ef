"""ONNX: one file, for onnxruntime, onnxruntime-web and whatever else reads it.

It needs the package ``onnx`` alone (``pip install "gpulayers[export]"``). The model is as in evaluation. The library's own
layers are ONNX's nodes; any other is a local function, made from the layer's recorded code, so that no runtime has to
know it. Weights stand under their names in the state dict.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
from collections.abc import Sequence

if importlib.util.find_spec("onnx") is None:
    raise ModuleNotFoundError('the export to ONNX needs the package onnx: pip install "gpulayers[export]"', name="onnx")

from onnx import ModelProto, checker, helper

from gpulayers._files import write_whole
from gpulayers.export._error import ExportError
from gpulayers.export.onnx._graph import DOMAIN, IR_VERSIONS, TYPES, ModelGraph, Tensor
from gpulayers.export.onnx._model import walk
from gpulayers.layers._layer import Layer


def write(model: Layer, path: str | os.PathLike, input_shapes: Sequence[tuple]) -> None:
    """The file ``path``; one that is there is replaced once the new one is whole. Raises ExportError."""
    target = pathlib.Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target}: the rule is the path of a file, as model.onnx; got a folder")
    write_whole(target, model_proto(model, input_shapes).SerializeToString())


def model_proto(model: Layer, input_shapes: Sequence[tuple]) -> ModelProto:
    """The model as onnx has it, checked by onnx.checker. Raises ExportError."""
    graph = ModelGraph(model)
    names = _names("input", len(input_shapes))
    inputs = [Tensor(name, tuple(shape), "") for name, shape in zip(names, input_shapes)]
    found = walk(graph, model, *inputs)
    if graph.refusals:
        raise ExportError(f"{model.name} cannot be exported to ONNX", graph.refusals)
    outputs = []
    for name, y in zip(_names("output", len(found)), found):
        graph.nodes.append(helper.make_node("Identity", [y.name], [name]))
        outputs.append(
            helper.make_tensor_value_info(name, TYPES[y.kind or graph.kinds.get(y.name, "f")], ["N", *y.shape[1:]])
        )
    given = [
        helper.make_tensor_value_info(x.name, TYPES[graph.kinds.get(x.name, "f")], ["N", *x.shape[1:]]) for x in inputs
    ]
    made = helper.make_graph(graph.nodes, model.name, given, outputs, list(graph.weights.values()))
    for function in graph.functions.values():
        function.opset_import[0].version = graph.opset
    opsets = [helper.make_opsetid("", graph.opset)] + ([helper.make_opsetid(DOMAIN, 1)] if graph.functions else [])
    proto = helper.make_model(
        made,
        functions=list(graph.functions.values()),
        opset_imports=opsets,
        ir_version=IR_VERSIONS[graph.opset],
        producer_name="gpulayers",
    )
    checker.check_model(proto, full_check=True)
    return proto


def _names(what: str, count: int) -> list[str]:
    return [what] if count == 1 else [f"{what}_{i + 1}" for i in range(count)]
