"""What a layer is. A layer of your own says its shapes and writes ``forward`` and ``backward`` in array code::

    class Swish(gl.Layer):
        def build(self, input_shape):
            self.beta = self.add_weight("beta", (), init="ones")

        def output_shape(self, input_shape):
            return input_shape

        def forward(self, x):
            s = 1 / (1 + np.exp(-self.beta * x))
            self.save(x, s)
            return x * s

        def backward(self, dy):
            x, s = self.saved
            slope = x * s * (1 - s)
            self.beta.grad += (dy * x * slope).sum()
            return dy * (s + self.beta * slope)

What ``save`` keeps belongs to one call: each forward makes a frame, each backward takes the newest one of its thread, so
a layer may be used twice in a model, or called twice before the backwards (which then come in reverse order).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gpulayers import arrays, transfer
from gpulayers.arrays import FLOATS, Spec
from gpulayers.definition import RuleError
from gpulayers.layers._calls import Calls
from gpulayers.layers._config import Seen, holds_parts
from gpulayers.layers._summary import Row, summary
from gpulayers.layers._weight import Weight, unwrapped
from gpulayers.ops._op import Op


class Layer(Calls):
    """One layer: shapes, weights, forward, backward. See the top of this file for one of your own.

    A subclass writes ``build``, ``output_shape``, ``forward`` and ``backward``; it has ``add_weight``, ``save``, ``saved``,
    ``run`` and ``run_backward`` for it.

    neuron_type: "fully connected", "convolutional", "pooling", or "" for none of these.
    training: False makes dropout and batch normalisation behave as in evaluation; see ``train`` and ``eval``.
    """

    neuron_type = ""
    if TYPE_CHECKING:  # gpulayers.train and gpulayers.export give every layer these
        fit: Callable
        evaluate: Callable
        predict: Callable
        export: Callable

    def __setattr__(self, name: str, value: Any) -> None:
        if callable(getattr(Layer, name, None)) and (isinstance(value, Layer) or not callable(value)):
            raise TypeError(
                f"{self.name}.{name}: the rule is a name that no method of Layer has, as blocks; got {name!r}"
            )
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Layer:
        """Training mode for this layer and all inside it."""
        for layer in self.layers():
            layer.training = mode
        return self

    def eval(self) -> Layer:
        """Evaluation mode for this layer and all inside it. A part of a model that is in this mode stays so in ``fit``."""
        return self.train(False)

    def to(self, where: Any) -> Layer:
        """Move every weight to a device ("cpu", "cuda", "cuda:1"), or cast the floating-point ones to a dtype."""
        text, dtype = str(where), None
        move: Callable
        if text == "cpu" or text.startswith("cuda"):
            move = functools.partial(transfer.to_device, device=text)
        else:
            with contextlib.suppress(TypeError):
                dtype = arrays.dtype(where)
            if dtype is None or dtype not in FLOATS:
                rule = f"cpu, cuda[:index] or a dtype ∈ {{{', '.join(map(str, FLOATS))}}}"
                raise TypeError(f"{self.name}: to: the rule is {rule}; got {where!r}")
            move = lambda x: arrays.cast(x, dtype) if arrays.library(x).dtype(x) in FLOATS else x  # noqa: E731
        for w in self.weights:
            w.data = move(w.data)
            w.zero_grad()
        return self

    @property
    def device(self) -> str:
        """Where the weights are ("cpu" if there are none)."""
        return next((arrays.library(w.data).device(w.data) for w in self.weights), "cpu")

    def rows(self, *input_shapes: Any, **_: Any) -> Iterator[tuple[int, Layer, tuple, tuple]]:
        """(depth, layer, input shape, output shape) for the summary; containers yield their layers' rows, too."""
        yield 0, self, input_shapes[0] if len(input_shapes) == 1 else input_shapes, self.output_shape(*input_shapes)

    def exported(self) -> Layer:
        """What an export reads in place of this layer, whose forward and backward it turns into the target's operations.

        A layer whose own code cannot be read (it calls another library, or branches on values) returns one here that
        computes the same in array code: same inputs, outputs, and weights under the same names.
        """
        return self

    def summary(self, *input_shapes: tuple) -> str:
        """A table: layer, neuron type, input shape, output shape, parameters, memory of weights and of the output a row.

        input_shapes: batch first; by default those the model was built for.
        """
        shapes = input_shapes or self._input_shapes
        if not shapes:
            raise RuntimeError(f"{self.name}: summary(input_shape) needs the shape: the model has not been called yet")
        self.ensure_built(*shapes)
        rows = list(self.rows(*shapes))
        listed = {id(layer) for _, layer, _, _ in rows}
        seen: set[int] = set()
        cells = []
        for depth, layer, shape, out in rows:
            inner = [part for part in layer.layers() if part is layer or id(part) not in listed]
            own = {id(w): w for part in inner for w in part.own_weights().values()}
            leaf = not any(id(part) in listed for part in layer.children().values())
            new = [w for i, w in own.items() if i not in seen]
            cells.append(Row(depth, layer.name, layer.neuron_type, shape, out, new, leaf))
            seen |= own.keys()
        return summary(cells, self.weights)

    def state_dict(self, ties: bool = False) -> dict[str, np.ndarray]:
        """Every weight by name ("0.weight"), as NumPy arrays of their own: torch's names, layouts and shapes.

        ties: a weight that is shared stands under each of its names, as in torch; by default under the first.
        """
        self.build_status()
        state = {name: np.array(transfer.to_numpy(w.data)) for name, w in self.named_weights().items()}
        return state | ({name: state[first].copy() for name, first in self.ties().items()} if ties else {})

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Fill the weights from arrays (NumPy, CuPy, torch) by name; they keep the layer's dtypes and device.

        A weight that is shared may come under any of its names, or under several with the same values. Raises KeyError
        (names) or ValueError (shapes, values) before anything is changed. strict: every name must match.
        """
        self.build_status()
        weights, ties = self.named_weights(), self.ties()
        found: dict[str, Any] = {}
        for name, value in state.items():
            first = ties.get(name, name)
            if first in found and not _same(found[first], value):
                raise ValueError(f"{self.name}: the rule is equal values for a shared weight; {name} is not {first}")
            found.setdefault(first, unwrapped(value))
        missing, unknown = sorted(weights.keys() - found.keys()), sorted(found.keys() - weights.keys())
        if strict and (missing or unknown):
            raise KeyError(
                f"{self.name}: the state dict lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}"
            )
        known = sorted(weights.keys() & found.keys())
        wrong = [
            f"{n}: {list(weights[n].shape)} ← {list(found[n].shape)}"
            for n in known
            if weights[n].shape != tuple(found[n].shape)
        ]
        if wrong:
            raise ValueError(f"{self.name}: the rule is equal shapes; got {'; '.join(wrong)}")
        for name in known:
            w = weights[name]
            fresh = np.array(transfer.to_numpy(found[name]).astype(w.dtype))
            w.data = transfer.to_device(fresh, arrays.library(w.data).device(w.data))

    # --- how it is saved, beside its arguments -----------------------------------------------------------------------

    def _remember(self) -> None:
        super()._remember()
        self._built_by_init = self._input_shapes is not None

    def _config_of_changes(self, seen: Seen) -> dict[str, Any]:
        config = super()._config_of_changes(seen)
        if self._input_shapes is not None and self._builds() and not self._built_by_init:
            config["built"] = [list(shape) for shape in self._input_shapes]
        inside: dict[str, Any] = {}
        for name, child in self.children().items():
            if id(child) not in seen.places and id(child) not in seen.inside:
                seen.inside.add(id(child))
                if changes := child._config_of_changes(seen):
                    inside[name] = changes
        return config | ({"inside": inside} if inside else {})

    def _apply(self, changes: dict[str, Any]) -> None:
        if "built" in changes:
            settings = {name: v for name, v in changes.get("set", {}).items() if not holds_parts(v)}
            super()._apply({"set": settings})
            self.ensure_built(*map(tuple, changes["built"]))
        super()._apply(changes)
        children = self.children()
        for name, inner in changes.get("inside", {}).items():
            children[name]._apply(inner)

    def __repr__(self) -> str:
        args, kwargs = self._config_arguments()
        now = self._changed()
        parameters = list(self._arguments.signature.parameters.values())[1:]
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        pairs = [repr(now.get(n, a)) for n, a in zip(names, args)] + [repr(a) for a in args[len(names) :]]
        pairs += [f"{k}={now.get(k, v)!r}" for k, v in kwargs.items()]
        return f"{type(self).__name__}({', '.join(pairs)})"


def _same(a: Any, b: Any) -> bool:
    one, other = transfer.to_numpy(a), transfer.to_numpy(unwrapped(b))
    return a is b or np.array_equal(one, other, equal_nan=one.dtype in FLOATS)


class OpLayer(Layer):
    """A layer that is one op: it says which, and the arguments and options of its calls."""

    op: Op
    casts_weights = False
    """The op wants weights of x's dtype (mixed precision casts them)."""
    skips_input_grad = True

    def __setattr__(self, name: str, value: Any) -> None:
        op = getattr(self, "op", None)
        if op and name in (*op.differentiable, *op.updates) and _is_array(value) and self.__dict__.get(name) is None:
            rule = f"a Weight, as gl.Weight({name!r}, …), for an input of {op.name}, to be trained and saved"
            raise TypeError(f"{self.name}.{name}: the rule is {rule}; got a plain array")
        super().__setattr__(name, value)

    def arguments(self, *xs: Any, **_: Any) -> tuple:
        """The op's inputs: arrays, Weights and Nones."""
        return xs

    def options(self) -> dict[str, Any]:
        return {}

    def forward(self, *xs: Any, **_: Any) -> Any:
        inputs = self.arguments(*xs)
        if self.casts_weights:
            dtype = arrays.library(xs[0]).dtype(xs[0])
            inputs = tuple(_Cast(x, dtype) if isinstance(x, Weight) else x for x in inputs)
        return self.run(self.op, *inputs, **self.options())

    def backward(self, *dys: Any, **_: Any) -> Any:
        return self.run_backward(*dys)

    def output_shape(self, *input_shapes: Any, **_: Any) -> tuple:
        """From the op's rule, with a batch of 2 where the batch is not known yet; a tuple where there are several."""
        known = [tuple(2 if n is None else n for n in shape) for shape in input_shapes]
        inputs = self.arguments(*(Spec(shape, arrays.float32) for shape in known))
        specs = [Spec(x.shape, arrays.float32) if isinstance(x, Weight) else x for x in inputs]
        specs += [None] * (len(self.op.inputs) - len(specs))
        try:
            rule = self.op.rule(
                *specs, **{k: v for k, v in (self.op.options | self.options()).items() if k not in self.op.dynamic}
            )
        except RuleError as error:
            error.where = self.name
            raise
        unknown = bool(input_shapes[0]) and input_shapes[0][0] is None
        shapes = tuple((None, *y.shape[1:]) if y.shape and unknown else y.shape for y in rule.outputs.values())
        return shapes if len(shapes) > 1 else shapes[0]


def _is_array(value: Any) -> bool:
    try:
        return arrays.library(value) is not None
    except TypeError:
        return False


class _Cast(Weight):
    """A weight seen in another dtype; gradients go to the weight itself."""

    def __init__(self, weight: Weight, dtype: Any):
        self.__dict__.update(weight=weight, name=weight.name, trainable=weight.trainable, _data=weight.as_dtype(dtype))

    def add_grad(self, value: Any) -> None:
        self.__dict__["weight"].add_grad(value)
