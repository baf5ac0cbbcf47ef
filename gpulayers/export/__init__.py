"""Models for elsewhere: ``model.export("out", format="tfjs")`` is ``export.export(model, "out", format="tfjs")``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

from gpulayers.definition import RuleError
from gpulayers.export._error import ExportError, Refusal
from gpulayers.layers._layer import Layer

FORMATS = {"tfjs": "gpulayers.export.tfjs", "onnx": "gpulayers.export.onnx"}
"""The room of each format, which has ``write(model, path, input_shapes)``; read when it is asked for."""

NEXT_STEPS = {
    "tfjs": "cd {} && npm install\nnode predict.mjs input.json   # a batch as nested lists; prints the outputs\n"
    "npm start                     # then open http://localhost:8000",
    "onnx": "pip install onnxruntime, then in Python:\nonnxruntime.InferenceSession({!r}).run(None, {{'input': x}})",
}
"""What to do with what was written to {}, for people."""


def export(
    model: Layer, path: str | os.PathLike, *, format: str = "tfjs", input_shapes: Sequence[Sequence] | None = None
) -> None:
    """Write the model to ``path``, to predict (and, in TensorFlow.js, to be trained on) without Python, in float32.

    format: "tfjs": a folder with a layers model of TensorFlow.js (model.json, weights, custom_layers.js), predict.mjs for
        Node.js and index.html for a browser. What such a folder holds from before is replaced when all is complete. What is
        frozen, or in evaluation by itself, stays so there; regularizers and constraints stay behind.
        "onnx": one file, for onnxruntime, with the model as it is in evaluation; it needs the package onnx.
    input_shapes: of each input, batch first, as in [(None, 1, 8, 8)]; by default those that the model was called with.

    Raises ExportError, before anything is written, for what cannot be exported: it lists each layer with its reason.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format: the rule is one of {', '.join(FORMATS)}; got {format!r}")
    importlib.import_module(FORMATS[format]).write(model, path, _shapes(model, input_shapes))


def _shapes(model: Layer, given: Sequence[Sequence] | None) -> tuple[tuple, ...]:
    """The inputs' shapes, batch first and not known, all else known; the model is built for them."""
    called = next(reversed(model._output_shapes), None) if model._built_by_init else None
    shapes = given if given is not None else called or model._input_shapes
    if not shapes:
        raise RuntimeError(
            f"{model.name}: export needs the input's shape: call the model once, or give input_shapes=[(None, …)]"
        )
    if not all(isinstance(shape, tuple | list) and shape for shape in shapes):
        raise ValueError(f"{model.name}: export: the rule is a shape for each input, as [(None, 8)]; got {shapes}")
    known = tuple((None, *shape[1:]) for shape in shapes)
    if not all(isinstance(n, int) and n >= 0 for shape in known for n in shape[1:]):
        raise ValueError(f"{model.name}: export: the rule is sizes that are known, but for the batch's; got {shapes}")
    model.ensure_built(*known)
    try:
        model.output_shape(*known)
    except RuleError:
        raise
    except (TypeError, ValueError) as error:
        raise ValueError(f"{model.name}: export: it takes no inputs of the shapes {[*known]}: {error}") from error
    return known


Layer.export = export  # type: ignore[method-assign]

__all__ = ["FORMATS", "NEXT_STEPS", "ExportError", "Refusal", "export"]
