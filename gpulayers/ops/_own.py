"""``gl.op``: an op of one's own, from array code and, where one wants them, kernels."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays
from gpulayers.arrays import FLOATS, Spec, compute_dtype, namespace, up
from gpulayers.definition import Rule
from gpulayers.ops._op import Op, require_float

Pair = tuple[Callable, Callable]


def op(
    name: str,
    forward: Callable,
    backward: Callable,
    *,
    shape: Callable | None = None,
    outputs: Sequence[str] = ("y",),
    differentiable: Sequence[str] | None = None,
    triton: Pair | None = None,
    cuda: Pair | None = None,
) -> Op:
    """An op of your own, which layers ``run`` as the library's: dispatched, explained, checked and measured like those.

    forward(*inputs, **options): array code; gives y, or a tuple of the outputs and of what else backward asks for. Its
    docstring is the op's; inputs are positional, options keyword-only. 16-bit inputs come as float32, and results are
    rounded to the dtype of the first floating-point input.
    backward(dy, …, **options): first a gradient for each output; its other parameters name what forward keeps for it:
    inputs, outputs, or what else forward returned, in that order. Gives the input's gradient, or a tuple of one for each.
    shape(*input shapes, **options): y's shape, or {name: shape or Spec} of what forward returns; by default all have the
    first input's shape.
    outputs: their names. differentiable: the inputs that have gradients; by default all.
    triton, cuda: (forward, backward) that launch kernels. They take and give what the definition does, and take
    ``empty(shape, dtype)``, which allocates. Arrays come as torch's, or CuPy's, row-major and with elements in them.

    Raises TypeError for functions whose parameters do not fit together; further ones with a default may be there.
    """
    own = _Own(name, forward, backward, shape, tuple(outputs))
    kernels = {b: own.launchers(b, *pair) for b, pair in (("triton", triton), ("cuda", cuda)) if pair is not None}
    return Op(own.rule, own.forward, own.backward, differentiable=differentiable, kernels=kernels)


class _Own:
    """What an op's functions and its launchers share: the names of inputs and outputs, and of what backward asks for."""

    def __init__(self, name: str, forward: Callable, backward: Callable, shape: Callable | None, outputs: tuple):
        if not name.isidentifier():
            raise ValueError(f"op: name: the rule is an identifier, as signed_square; got {name!r}")
        self.name, self.shape, self.outputs = name, shape, outputs
        self.given = {"forward": forward, "backward": backward}
        inputs, self.options = _parameters(forward)
        self.inputs = tuple(p.name for p in inputs)
        wants = [p.name for p in _parameters(backward)[0]]
        if len(wants) < len(outputs):
            rule = "backward(dy, …), a gradient for each output first"
            raise TypeError(f"{name}: the rule is {rule}; got backward({', '.join(wants)})")
        self.kept = tuple(wants[len(outputs) :])
        self.extras = tuple(n for n in self.kept if n not in (*self.inputs, *outputs))
        self._require_same("backward", backward, wants)

        def run_rule(*specs: Any, needs: tuple = (), **options: Any) -> Rule:
            return self._rule(specs, needs, options)

        def run_forward(*xs: Any, needs: tuple = (), **options: Any) -> tuple[tuple, dict]:
            first = next(x for x in xs if x is not None and x.dtype in FLOATS)
            found = self._named(forward(*map(_up, xs), **options))
            for n, a in found.items():
                found[n] = _rounded(a, first.dtype if n in outputs else compute_dtype(first.dtype), first)
            return self._kept(found, xs, needs)

        def run_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, **options: Any) -> tuple:
            like = next(dy for dy in dys if dy is not None)
            zeros = lambda s: namespace(like).zeros(s.shape, s.dtype)  # noqa: E731
            dys = self._each_dy(dys, inputs, options, zeros)
            grads = self._grads(backward(*map(_up, dys), *(_up(saved.get(n)) for n in self.kept), **options), needs)
            return tuple(g if g is None else _rounded(g, s.dtype, like) for g, s in zip(grads, inputs))

        self.rule = _signed(run_rule, f"{name}_rule", forward, self.options)
        self.forward = _signed(run_forward, f"{name}_forward", forward, [*inputs, *self.options])
        self.backward = _signed(run_backward, f"{name}_backward", backward, self.options)

    def _require_same(self, what: str, function: Callable, names: Sequence[str]) -> None:
        """Backends follow one another: kernels take what the definition takes."""
        wanted = [*names, *(p.name for p in self.options)]
        may_differ = lambda p: p.name == "empty" or (p.name not in wanted and p.default is not p.empty)  # noqa: E731
        came, options = ([p.name for p in found if not may_differ(p)] for found in _parameters(function))
        if came != [*names] or {*came, *options} != {*wanted}:
            got = ", ".join((*came, *options))
            raise TypeError(f"{self.name}: {what}: the rule is ({', '.join(wanted)}); got ({got})")

    def _rule(self, specs: tuple, needs: tuple, options: dict[str, Any]) -> Rule:
        specs = specs + (None,) * (len(self.inputs) - len(specs))
        floats = [s for s in specs if s is not None and s.dtype in FLOATS]
        if not floats:
            require_float(self.inputs[0], specs[0])
        first = floats[0]
        said: Any = {} if self.shape is None else self.shape(*(s and s.shape for s in specs), **options)
        shapes = said if isinstance(said, dict) else {self.outputs[0]: said}

        def spec(name: str, dtype: Any) -> Spec:
            found: Any = shapes.get(name, first.shape)
            return found if isinstance(found, Spec) else Spec(tuple(found), dtype)

        ys = {name: spec(name, first.dtype) for name in self.outputs}
        extras = {name: spec(name, compute_dtype(first.dtype)) for name in self.extras}
        have = dict(zip(self.inputs, specs)) | ys | extras
        saved = {name: have[name] for name in self.kept if have[name] is not None} if needs else {}
        return Rule(ys, saved, grads={n: Spec(s.shape, s.dtype) for n, s in zip(self.inputs, specs) if s is not None})

    def _named(self, found: Any) -> dict[str, Any]:
        """What a forward gave, by name."""
        values, names = found if isinstance(found, tuple) else (found,), (*self.outputs, *self.extras)
        if len(values) != len(names):
            rule = f"forward gives {', '.join(names)}, as backward asks for"
            raise TypeError(f"{self.name}: the rule is {rule}; got {len(values)} values")
        return dict(zip(names, values))

    def _kept(self, found: dict[str, Any], xs: tuple, needs: tuple) -> tuple[tuple, dict]:
        """(outputs, what backward asks for)."""
        have = dict(zip(self.inputs, xs)) | found
        saved = {n: have[n] for n in self.kept if have.get(n) is not None} if needs else {}
        return tuple(found[n] for n in self.outputs), saved

    def _grads(self, found: Any, needs: tuple) -> tuple:
        """What a backward gave, for the inputs that need it."""
        grads = found if isinstance(found, tuple) else (found,)
        if len(grads) != len(self.inputs):
            rule = f"backward gives a gradient, or None, for each of {', '.join(self.inputs)}"
            raise TypeError(f"{self.name}: the rule is {rule}; got {len(grads)} values")
        for name, g in zip(self.inputs, grads):
            if name in needs and g is None:
                rule = f"a gradient of {name}, unless differentiable=… leaves it out"
                raise TypeError(f"{self.name}: backward: the rule is {rule}; got None")
        return tuple(g if name in needs else None for name, g in zip(self.inputs, grads))

    def _each_dy(self, dys: tuple, inputs: tuple, options: dict[str, Any], zeros: Callable) -> tuple:
        """Zeros for outputs that were not used."""
        if not any(dy is None for dy in dys):
            return dys
        specs = self._rule(inputs, (), options).outputs.values()
        return tuple(zeros(s) if dy is None else dy for dy, s in zip(dys, specs))

    def launchers(self, backend: str, forward: Callable, backward: Callable) -> Any:
        """A stand-in for a module with an op's launchers."""
        for what, launcher in (("forward", forward), ("backward", backward)):
            names = [p.name for p in _parameters(self.given[what])[0]]
            self._require_same(f"{backend}'s {what}", launcher, names)

        def run_forward(*xs: Any, needs: tuple = (), empty: Callable, **options: Any) -> tuple[tuple, dict]:
            if any(x is not None and 0 in x.shape for x in xs):
                rule = self._rule(tuple(x if x is None else arrays.spec(x) for x in xs), self.kept[:1], options)
                specs = rule.outputs | {n: rule.saved[n] for n in self.extras}
                return self._kept({n: _zeros(s, empty) for n, s in specs.items()}, xs, needs)
            found = self._named(forward(*(_dense(backend, x, empty) for x in xs), empty=empty, **options))
            return self._kept(found, xs, needs)

        def run_backward(
            dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Callable, **options: Any
        ) -> tuple:
            if any(s is not None and 0 in s.shape for s in inputs):
                return tuple(_zeros(s, empty) if n in needs else None for n, s in zip(self.inputs, inputs))
            dys = self._each_dy(dys, inputs, options, lambda s: _zeros(s, empty))
            given = (_dense(backend, x, empty) for x in (*dys, *(saved.get(n) for n in self.kept)))
            return self._grads(backward(*given, empty=empty, **options), needs)

        run = {f"{self.name}_forward": run_forward, f"{self.name}_backward": run_backward}
        return types.SimpleNamespace(**run)


def _dense(backend: str, x: Any, empty: Callable) -> Any:
    """``x`` row-major for a backend's launchers, copied by a kernel of the backend's where it is not."""
    if x is None:
        return None
    if backend == "triton":
        from gpulayers.kernels.triton import _tile

        return _tile.dense(x, empty)
    from gpulayers.kernels.cuda import _copy

    return _copy.dense(x, None, empty)


def _parameters(function: Callable) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """(positional parameters, options) of a function."""
    found = list(inspect.signature(function).parameters.values())
    options = [p for p in found if p.kind is p.KEYWORD_ONLY]
    return [p for p in found if p.kind is p.POSITIONAL_OR_KEYWORD], options


def _signed(function: Any, name: str, like: Callable, parameters: Sequence[inspect.Parameter]) -> Any:
    """``function`` under a name, with these parameters, as if it stood where ``like`` does."""
    needs = inspect.Parameter("needs", inspect.Parameter.KEYWORD_ONLY, default=())
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    function.__signature__ = inspect.Signature([*positional, needs, *options])
    function.__name__ = function.__qualname__ = name
    function.__doc__, function.__module__ = like.__doc__, like.__module__
    return function


def _up(x: Any) -> Any:
    return x if x is None or x.dtype not in FLOATS else up(x)


def _rounded(a: Any, dtype: Any, like: Any) -> Any:
    """What array code gave, as an array of its own: row-major, floating-point numbers in this dtype."""
    a = namespace(like).asarray(a) if isinstance(a, np.generic | float | int) else a
    return a.astype(dtype if a.dtype in FLOATS else a.dtype, order="C")


def _zeros(of: Spec, empty: Callable) -> Any:
    found = empty(of.shape, of.dtype)
    found[...] = 0
    return found
