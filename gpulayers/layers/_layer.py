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

What ``save`` keeps belongs to one call: each forward pushes a frame, each backward takes the newest one, so a layer may
be used twice in a model, or called twice before the backwards (which then come in reverse order).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpulayers import arrays, random, transfer
from gpulayers.arrays import FLOATS, Spec
from gpulayers.layers._calls import Frame, is_float, managed_backward, managed_build, managed_forward, recording
from gpulayers.layers._config import Configurable
from gpulayers.layers._summary import summary
from gpulayers.layers._weight import Weight, initial
from gpulayers.ops._op import Op, RuleError


class Layer(Configurable):
    """One layer: shapes, weights, forward, backward. See the top of this file for one of your own.

    neuron_type: "fully connected", "convolutional", "pooling", or "" for none of these.
    training: False makes dropout and batch normalisation behave as in evaluation; see ``train`` and ``eval``.
    """

    neuron_type = ""
    training = True
    name: str
    _weights: dict[str, Weight]
    _children: dict[str, Layer]
    _frames: list[Frame]
    _scopes: list[type]
    _input_shapes: tuple | None
    _output_shapes: dict[tuple, tuple]
    _input_grad: bool
    if TYPE_CHECKING:  # gpulayers.train gives every layer these
        fit: Callable
        evaluate: Callable
        predict: Callable

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls, *args, **kwargs)
        # Set here, so that a layer of your own need not call super().__init__().
        state: dict[str, Any] = dict(
            name=cls.__name__,
            _weights={},
            _children={},
            _frames=[],
            _scopes=[],
            _input_shapes=None,
            _output_shapes={},
            _input_grad=True,
        )
        self.__dict__.update(state)
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method, manage in (("build", managed_build), ("forward", managed_forward), ("backward", managed_backward)):
            if method in cls.__dict__:
                setattr(cls, method, manage(cls, cls.__dict__[method]))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Layer):
            self._children[name] = value
        object.__setattr__(self, name, value)

    # --- what a layer of your own writes -----------------------------------------------------------------------------

    def build(self, *input_shapes: Any, **_: Any) -> None:
        """Add the weights that depend on the input shapes (batch first, None where the size is not known yet)."""

    def output_shape(self, *input_shapes: Any, **_: Any) -> tuple:
        """The shape of the output, batch included."""
        raise NotImplementedError(f"{type(self).__name__} must say its output_shape(input_shape)")

    def forward(self, *xs: Any, **_: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must write forward(x)")

    def backward(self, *dys: Any, **_: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must write backward(dy)")

    # --- what it uses ------------------------------------------------------------------------------------------------

    def add_weight(
        self,
        name: str,
        shape: Sequence[int] = (),
        init: str | float | Callable = "zeros",
        trainable: bool = True,
        regularizer: Callable | None = None,
        constraint: Callable | None = None,
        dtype: Any = "float32",
    ) -> Weight:
        """A new weight of this layer.

        init: a name ("zeros", "ones", "kaiming_uniform", …), a number, or a function of (shape, NumPy generator).
        regularizer: w → (penalty, its gradient), as gl.L2(1e-4). constraint: w → the w to keep, as gl.NonNegative().
        """
        if name in self._weights:
            raise ValueError(f"{self.name}: it has a weight {name!r} already")
        if not name or "." in name:
            raise ValueError(f"{self.name}: add_weight: the rule is a name without dots; got {name!r}")
        sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        if not all(isinstance(n, int | np.integer) and n >= 0 for n in sizes):
            raise ValueError(f"{self.name}: {name}: the rule is a shape of integers ≥ 0; got {shape!r}")
        data = initial(init, sizes, random.generator()).astype(arrays.dtype(dtype))
        if data.shape != sizes:
            raise ValueError(f"{self.name}: {name}: the rule is init(…).shape = {list(sizes)}; got {list(data.shape)}")
        self._weights[name] = Weight(f"{self.name}.{name}", data, trainable, regularizer, constraint)
        return self._weights[name]

    def save(self, *values: Any) -> None:
        """Keep these for the backward of this call."""
        if not self._scopes:
            raise RuntimeError(
                f"{self.name}: save(…) keeps arrays for backward, inside forward; gl.save(model, path) writes a model"
            )
        if recording.get():
            self._frames[-1].saved[self._scopes[-1]] = values

    @property
    def saved(self) -> tuple:
        """What ``save`` kept in the forward that this backward belongs to."""
        return self._frames[-1].saved.get(self._scopes[-1], ())

    def saved_by(self, cls: type) -> tuple:
        """What a base class's forward kept in this call."""
        return self._frames[-1].saved.get(cls, ())

    def run(self, op: Op, *inputs: Any, **options: Any) -> Any:
        """The op's output; inputs may be arrays, Weights and None. ``run_backward`` is its backward."""
        plain = [x.data if isinstance(x, Weight) else x for x in inputs]
        needs: list[str] = []
        if recording.get():
            wanted = [x.trainable if isinstance(x, Weight) else self._input_grad for x in inputs]
            pairs = zip(op.inputs, plain, wanted)
            needs = [n for n, x, want in pairs if want and n in op.differentiable and is_float(x)]
        if not needs:
            return op(*plain, **options)
        y, call = op.record(*plain, needs=needs, **options)
        self._frames[-1].calls.setdefault(self._scopes[-1], []).append((call, inputs))
        return y

    def run_backward(self, *dys: Any) -> Any:
        """Adds the gradients of Weights to them; returns that of the one array input, or a tuple where there are more."""
        calls = self._frames[-1].calls.get(self._scopes[-1])
        if not calls:
            return None  # no gradient was needed
        call, inputs = calls.pop()
        outputs = call.plan.rule.outputs.values()
        # Array code between an op and the layer's end may have widened 16 bits.
        dys = tuple(dy if dy is None else arrays.cast(dy, out.dtype) for dy, out in zip(dys, outputs))
        grads = call.backward(*dys)
        for x, g in zip(inputs, grads):
            if isinstance(x, Weight) and g is not None:
                x.add_grad(g)
        given = zip(call.plan.op.inputs, inputs, grads)
        rest = [
            g for n, x, g in given if n in call.plan.op.differentiable and not isinstance(x, Weight) and is_float(x)
        ]
        return rest[0] if len(rest) == 1 else tuple(rest)

    # --- what everyone calls -----------------------------------------------------------------------------------------

    def __call__(self, *xs: Any) -> Any:
        return self.forward(*xs)

    def children(self) -> dict[str, Layer]:
        """The layers directly inside this one, by name."""
        return self._children

    def layers(self) -> Iterator[Layer]:
        """This layer and all inside it, each once."""
        seen: set[int] = set()
        todo: list[Layer] = [self]
        while todo:
            layer = todo.pop(0)
            if id(layer) not in seen:
                seen.add(id(layer))
                yield layer
                todo = [*layer.children().values(), *todo]

    def named_weights(self) -> dict[str, Weight]:
        """Every weight in here by its name in a state dict ("0.weight"); a weight that is shared comes once."""
        found: dict[str, Weight] = {}
        seen: set[int] = set()

        def walk(layer: Layer, prefix: str) -> None:
            for name, w in layer._weights.items():
                if id(w) not in seen:
                    seen.add(id(w))
                    found[prefix + name] = w
            for name, child in layer.children().items():
                walk(child, f"{prefix}{name}.")

        walk(self, "")
        return found

    @property
    def weights(self) -> list[Weight]:
        return list(self.named_weights().values())

    @property
    def trainable_weights(self) -> list[Weight]:
        return [w for w in self.weights if w.trainable]

    def zero_grad(self) -> None:
        for w in self.weights:
            w.zero_grad()

    def train(self, mode: bool = True) -> Layer:
        """Training mode for this layer and all inside it."""
        for layer in self.layers():
            layer.training = mode
        return self

    def eval(self) -> Layer:
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

    def skip_input_grad(self, skip: bool = True) -> None:
        """Say that nobody asks for the gradient of this layer's input (it is data); saves computing it."""
        self._input_grad = not skip

    def rows(self, *input_shapes: Any, **_: Any) -> Iterator[tuple[int, Layer, tuple, tuple]]:
        """(depth, layer, input shape, output shape) for the summary; containers yield their layers' rows, too."""
        yield 0, self, input_shapes[0] if len(input_shapes) == 1 else input_shapes, self.output_shape(*input_shapes)

    def summary(self, *input_shapes: tuple) -> str:
        """A table: layer, neuron type, input shape, output shape, parameters, memory of weights and of the output a row.

        input_shapes: batch first; by default those the model was built for.
        """
        shapes = input_shapes or self._input_shapes
        if not shapes:
            raise RuntimeError(f"{self.name}: summary(input_shape) needs the shape: the model has not been called yet")
        self.ensure_built(*shapes)
        return summary(self, shapes)

    def ensure_built(self, *input_shapes: tuple) -> None:
        """Build, if that has not been done."""
        if self._input_shapes is None:
            self.build(*input_shapes)

    def waits(self) -> bool:
        """Whether this layer adds weights when it sees its input shape, and has not seen it."""
        return self._input_shapes is None and type(self).build is not Layer.build

    def build_status(self) -> None:
        """Raises RuntimeError if a layer in here waits for its input shape."""
        for layer in self.layers():
            if layer.waits():
                raise RuntimeError(f"{layer.name} is not built: call the model once, or model.build(input_shape)")

    def state_dict(self) -> dict[str, np.ndarray]:
        """Every weight by name ("0.weight"), as NumPy arrays of their own: torch's names, layouts and shapes."""
        self.build_status()
        return {name: np.array(transfer.to_numpy(w.data)) for name, w in self.named_weights().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Fill the weights from arrays (NumPy, CuPy, torch) by name; they keep the layer's dtypes and device.

        Raises KeyError (names) or ValueError (shapes) before anything is changed. strict: every name must match.
        """
        self.build_status()
        weights = self.named_weights()
        missing, unknown = sorted(weights.keys() - state.keys()), sorted(state.keys() - weights.keys())
        if strict and (missing or unknown):
            raise KeyError(
                f"{self.name}: the state dict lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}"
            )
        shared = weights.keys() & state.keys()
        wrong = [
            f"{n}: {list(weights[n].shape)} ← {list(state[n].shape)}"
            for n in sorted(shared)
            if weights[n].shape != tuple(state[n].shape)
        ]
        if wrong:
            raise ValueError(f"{self.name}: the rule is equal shapes; got {'; '.join(wrong)}")
        for name in shared:
            w = weights[name]
            fresh = np.array(transfer.to_numpy(state[name]).astype(w.dtype))
            w.data = transfer.to_device(fresh, arrays.library(w.data).device(w.data))

    def __repr__(self) -> str:
        bound = self._arguments
        pairs = [*map(repr, bound.args[1:]), *(f"{k}={v!r}" for k, v in bound.kwargs.items())]
        return f"{type(self).__name__}({', '.join(pairs)})"


class OpLayer(Layer):
    """A layer that is one op: it says which, and the arguments and options of its calls."""

    op: Op
    casts_weights = False
    """The op wants weights of x's dtype (mixed precision casts them)."""

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


class _Cast(Weight):
    """A weight seen in another dtype; gradients go to the weight itself."""

    def __init__(self, weight: Weight, dtype: Any):
        self.__dict__.update(weight=weight, name=weight.name, trainable=weight.trainable, _data=weight.as_dtype(dtype))

    def add_grad(self, value: Any) -> None:
        self.__dict__["weight"].add_grad(value)
