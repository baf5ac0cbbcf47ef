"""A model, layer by layer, into a graph of ONNX: containers by their parts, layers by nodes or by a function of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from gpulayers.definition import RuleError
from gpulayers.export._code import same_code
from gpulayers.export.onnx._builtin import BUILT_IN
from gpulayers.export.onnx._graph import DOMAIN, DTYPES, Body, ModelGraph, Tensor
from gpulayers.export.onnx._operations import Operations
from gpulayers.export.onnx._resampling import REFUSED
from gpulayers.export.recording import Recording, Unrecordable, check_replay, record
from gpulayers.layers._calls import each_shape
from gpulayers.layers._layer import Layer
from gpulayers.layers.container import Parallel, Residual, Sequential
from gpulayers.ops._op import normal_axis


def walk(graph: ModelGraph, layer: Layer, *xs: Tensor) -> tuple[Tensor, ...]:
    """What the layer gives for these. One that cannot be exported is refused, and the walk goes on behind it."""
    parts = same_code(layer, CONTAINERS)
    if parts is not None:
        return parts(graph, layer, *xs)
    native, why = same_code(layer, BUILT_IN), same_code(layer, REFUSED)
    shapes = each_shape(layer.output_shape(*(x.shape for x in xs)))
    if why is not None:
        graph.refuse(layer, why)
        return tuple(Tensor(xs[0].name, shape) for shape in shapes)
    try:
        if native is not None and len(xs) == 1 and (y := native(graph, layer, xs[0])) is not None:
            graph.kinds.setdefault(xs[0].name, "f")
            return (Tensor(y, shapes[0], "f"),)
        return _recorded(graph, layer, xs, shapes)
    except (Unrecordable, RuleError) as error:
        graph.refuse(layer, str(error))
        return tuple(Tensor(xs[0].name, shape) for shape in shapes)


def _recorded(graph: ModelGraph, layer: Layer, xs: Sequence[Tensor], shapes: Sequence[tuple]) -> tuple[Tensor, ...]:
    """A call of a local function, made from the layer's code."""
    recording = _read(graph, layer, xs)
    body = Body()
    forward = recording.forward
    names = {node: node.name for node in forward.inputs}
    for name, node in forward.weights.items():
        plain = re.sub(r"\W", "_", name)
        names[node] = plain if plain not in names.values() and not re.fullmatch(r"v\d+", plain) else f"{plain}_"
    inputs = list(names.values())
    outputs = Operations(body, names, forward.inputs[0].name).write(forward)
    name = graph.function(type(layer).__name__, inputs, outputs, body, repr(layer))
    weights = [graph.weight(layer, w) for w in layer.named_weights().values()]
    ys = graph.op(name, *(x.name for x in xs), *weights, outputs=len(shapes), domain=DOMAIN)
    kinds = [n.kind for n in forward.outputs if n is not None]
    return tuple(Tensor(*y) for y in zip([ys] if len(shapes) == 1 else ys, shapes, kinds))


def _read(graph: ModelGraph, layer: Layer, xs: Sequence[Tensor]) -> Recording:
    """The layer recorded in evaluation. An input of the model that nobody has used yet may turn out to be integers."""
    shapes = [x.shape for x in xs]
    kinds = [x.kind or graph.kinds.get(x.name, "") for x in xs]
    failed: Unrecordable | RuleError | None = None
    for unknown in "fi" if "" in kinds else "f":
        tried = [kind or unknown for kind in kinds]
        dtypes = [DTYPES[kind] for kind in tried]
        try:
            recording = record(layer, shapes, training=False, dtypes=dtypes)
            check_replay(layer, recording, shapes, dtypes)
        except (Unrecordable, RuleError) as error:
            failed = failed or error
            continue
        for x, kind in zip(xs, tried):
            graph.kinds.setdefault(x.name, kind)
        return recording
    assert failed is not None
    raise failed


def _sequential(graph: ModelGraph, layer: Sequential, *xs: Tensor) -> tuple[Tensor, ...]:
    for part in layer:
        xs = walk(graph, part, *xs)
    return xs if len(layer) else xs[:1]


def _residual(graph: ModelGraph, layer: Residual, x: Tensor) -> tuple[Tensor, ...]:
    past = walk(graph, layer.shortcut, x) if layer.shortcut is not None else (x,)
    (y,) = _sequential(graph, layer, x)
    return (y._replace(name=graph.op("Add", past[0].name, y.name)),)


def _parallel(graph: ModelGraph, layer: Parallel, x: Tensor) -> tuple[Tensor, ...]:
    ys = [y for branch in layer for y in walk(graph, branch, x)]
    shape = each_shape(layer.output_shape(x.shape))[0]
    if layer.merge == "sum":
        return (Tensor(graph.op("Sum", *(y.name for y in ys)), shape),)
    axis = normal_axis(layer.axis, len(shape), "axis")
    return (Tensor(graph.op("Concat", *(y.name for y in ys), axis=axis), shape),)


CONTAINERS: dict[type, Callable[..., tuple[Tensor, ...]]] = {
    Sequential: _sequential,
    Residual: _residual,
    Parallel: _parallel,
}
