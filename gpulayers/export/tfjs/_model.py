"""A model, layer by layer, into a topology: containers by their parts, layers by TF.js's own or by a class of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpulayers.definition import RuleError
from gpulayers.export._code import same_code
from gpulayers.export.tfjs._builtin import BUILT_IN, REFUSED
from gpulayers.export.tfjs._custom import Classes
from gpulayers.export.tfjs._topology import Tensor, Topology, last_axis
from gpulayers.layers._calls import each_shape
from gpulayers.layers._layer import Layer
from gpulayers.layers.container import Parallel, Residual, Sequential
from gpulayers.ops._op import normal_axis


class Walk:
    """Exports layers, one call after the other."""

    def __init__(self, top: Topology, classes: Classes):
        self.top, self.classes = top, classes

    def __call__(self, layer: Layer, *xs: Tensor) -> tuple[Tensor, ...]:
        """What the layer gives for these. One that cannot be exported is refused, and the walk goes on behind it."""
        parts = same_code(layer, CONTAINERS)
        if parts is not None:
            return parts(self, layer, *xs)
        if (why := same_code(layer, REFUSED)) is not None:
            self.top.refuse(layer, why)
            return tuple(
                xs[0]._replace(shape=shape) for shape in each_shape(layer.output_shape(*(x.shape for x in xs)))
            )
        native = same_code(layer, BUILT_IN)
        try:
            y = native(self.top, layer, *xs) if native is not None and len(xs) == 1 else None
        except RuleError as error:
            self.top.refuse(layer, str(error))
            y = None
        return (y,) if y is not None else self.classes.call(layer, [self.top.first(x) for x in xs])


def _sequential(walk: Walk, layer: Sequential, *xs: Tensor) -> tuple[Tensor, ...]:
    for part in layer:
        xs = walk(part, *xs)
    return xs if len(layer) else xs[:1]


def _residual(walk: Walk, layer: Residual, x: Tensor) -> tuple[Tensor, ...]:
    past = walk(layer.shortcut, x) if layer.shortcut is not None else (x,)
    return (_added(walk, layer, [*past, *_sequential(walk, layer, x)]),)


def _parallel(walk: Walk, layer: Parallel, x: Tensor) -> tuple[Tensor, ...]:
    ys = [y for branch in layer for y in walk(branch, x)]
    if len(ys) < 2:
        return tuple(ys)
    if layer.merge == "sum":
        return (_added(walk, layer, ys),)
    shape = each_shape(layer.output_shape(x.shape))[0]
    axis = normal_axis(layer.axis, len(shape), "axis")
    if axis == 0:
        walk.top.refuse(layer, "it joins rows of the batch, and TF.js's layers keep to one row each")
    ys = walk.top.like(ys)
    place = last_axis(axis, len(shape)) if ys[0].last else axis
    return walk.top.add(layer, "Concatenate", {"axis": place}, *ys, shapes=[shape], last=ys[0].last)


def _added(walk: Walk, layer: Layer, xs: Sequence[Tensor]) -> Tensor:
    xs = walk.top.like(xs)
    return walk.top.add(layer, "Add", {}, *xs, shapes=[xs[0].shape], last=xs[0].last)[0]


CONTAINERS: dict[type, Callable[..., tuple[Tensor, ...]]] = {
    Sequential: _sequential,
    Residual: _residual,
    Parallel: _parallel,
}
