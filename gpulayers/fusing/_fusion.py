"""A layer for given shapes in one mode: its programs, its kernels, and the op that they serve."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import arrays
from gpulayers.arrays import Spec, float32
from gpulayers.definition import Rule
from gpulayers.export.recording import Node, Recording
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing._definition import compute
from gpulayers.fusing._file import file_text, module_of
from gpulayers.fusing._kernel import HELD, LOOPED, TILED, Namer, Writer, finishing
from gpulayers.fusing._launch import Kernels, Launch
from gpulayers.fusing._program import COLUMN, ONE, Output, Program
from gpulayers.fusing._refusal import misfit
from gpulayers.fusing._statements import identifier
from gpulayers.ops._op import Op, ShapeError, require_float


class Fusion:
    """recording: of the layer. title: what its file calls it.

    ``op`` takes the layer's inputs, then its weights in the order of ``named_weights``; ``text`` is the file with the
    kernels. Raises Unrecordable for what no fused kernel computes.
    """

    def __init__(self, recording: Recording, title: str):
        forward, backward = recording.forward, recording.backward
        if forward.states:
            name, node = next(iter(forward.states.items()))
            raise misfit(node, f"forward writes into the weight {name}", "evaluation mode, in which it is read alone")
        self.recording, self.title = recording, title
        self.inputs = forward.inputs
        self.given = [*forward.inputs, *forward.weights.values()]
        self.name = identifier(_snake(recording.name), ())
        names = self._names()
        ys = _counted("y", [n for n in forward.outputs if n is not None])
        outputs = [Output(name, node, node.shape) for name, node in ys]
        wanted: dict[Node, Any] = dict(zip(forward.inputs, backward.outputs))
        wanted |= {forward.weights[name]: node for name, node in backward.gradients.items()}
        gradients = [Output(f"d{names[n]}", wanted[n], n.shape) for n in self.given if wanted.get(n) is not None]
        self.dys = backward.inputs
        self.differentiable = [names[n] for n in self.given if wanted.get(n) is not None]
        self.names = names
        self.forward = Program(f"{self.name}_forward", self.given, outputs)
        self.backward = Program(f"{self.name}_backward", [*self.given, *self.dys], gradients, optional=True)
        formulas = [*self.forward.formulas(), *self.backward.formulas()]
        namer = Namer([*names.items(), *((dy, f"d{y.name}") for dy, y in zip(self.dys, outputs))], formulas)
        self.kernels = {p: _kernels(p, namer) for p in (self.forward, self.backward)}
        self.text = file_text(self.docstring, [k for each in self.kernels.values() for k in each.texts()])
        self.saved = [n for n in self.given if n in self.backward.given]
        self.op = self._op()

    def _names(self) -> dict[Node, str]:
        """Of inputs and weights, none of them a gradient's or an output's."""
        names: dict[Node, str] = {}
        for node in self.given:
            plain = node.name if node in self.inputs else identifier(node.name)
            taken = {*names.values(), *(f"d{n}" for n in names.values())}
            clash = node not in self.inputs and re.fullmatch(r"d?[xy]\d*", plain)
            names[node] = identifier(f"{plain}_weight" if clash else plain, taken)
        return names

    @property
    def docstring(self) -> str:
        """What the file says of itself."""
        loads = [self.names.get(n, n.name) for n in self.backward.given]
        return (
            f"{self.title} as Triton kernels, written by gpulayers from its array code.\n\n"
            f"Under each line of the author's stands what it became. Arithmetic is float32. Backward computes forward's "
            f"values\nagain, from {', '.join(loads)}: they cost fewer bytes than what forward would have to store.\n"
        )

    # --- the op ------------------------------------------------------------------------------------------------------

    def _op(self) -> Op:
        positional = [inspect.Parameter(self.names[n], inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in self.given]

        def rule(*specs: Any, needs: tuple = ()) -> Rule:
            return self._rule(specs, needs)

        def forward(*xs: Any, needs: tuple = ()) -> tuple[tuple, dict]:
            return self._defined_forward(xs, needs)

        def backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
            return self._defined_backward(dys, saved, inputs, needs)

        needs = inspect.Parameter("needs", inspect.Parameter.KEYWORD_ONLY, default=())
        for function, name in ((rule, "rule"), (forward, "forward"), (backward, "backward")):
            function.__name__ = function.__qualname__ = f"{self.name}_{name}"
        forward.__signature__ = inspect.Signature([*positional, needs])  # type: ignore[attr-defined]
        forward.__doc__ = f"{self.title}, fused."
        triton = types.SimpleNamespace()
        setattr(triton, f"{self.name}_forward", self._launched_forward)
        setattr(triton, f"{self.name}_backward", self._launched_backward)
        setattr(triton, f"{self.name}_refuses", self._refuses)
        return Op(
            rule, forward, backward, differentiable=self.differentiable, kernels={"triton": triton}, family="fused"
        )

    def _batch(self, specs: Sequence[Any]) -> int:
        return specs[0].shape[0]

    def _rule(self, specs: tuple, needs: tuple) -> Rule:
        for node, spec in zip(self.given, specs):
            wanted = at_batch(node.shape, specs[0].shape[0] if specs[0].shape else 0)
            if tuple(spec.shape) != tuple(wanted):
                name = self.names[node]
                raise ShapeError(name, f"{name}.shape = {[*wanted]}", list(spec.shape))
            if node.kind == "f":
                require_float(self.names[node], spec)
        dtype = next((s.dtype for s in specs if s.dtype in arrays.FLOATS), float32)
        shapes = [(o.name, tuple(at_batch(o.shape, self._batch(specs)))) for o in self.forward.outputs]
        have = dict(zip(self.given, specs))
        saved = {self.names[n]: have[n] for n in self.saved} if needs else {}
        grads = {self.names[n]: Spec(tuple(s.shape), s.dtype) for n, s in have.items()}
        return Rule({name: Spec(shape, dtype) for name, shape in shapes}, saved, grads=grads)

    def _kept(self, xs: Sequence[Any], needs: tuple) -> dict[str, Any]:
        have = dict(zip(self.given, xs))
        return {self.names[n]: have[n] for n in self.saved} if needs else {}

    def _all(self, dys: Sequence[Any], saved: dict, inputs: Sequence[Any], zeros: Callable) -> dict[Node, Any]:
        """The arrays that backward takes."""
        outputs = self._rule(tuple(inputs), ()).outputs.values()
        given = {n: saved[self.names[n]] for n in self.saved}
        for node, dy, spec in zip(self.dys, dys, outputs):
            if node in self.backward.given:
                given[node] = zeros(spec) if dy is None else dy
        return given

    def _defined_forward(self, xs: tuple, needs: tuple) -> tuple[tuple, dict]:
        rule = self._rule(tuple(map(arrays.spec, xs)), needs)
        given = {n: x for n, x in zip(self.given, xs) if n in self.forward.given}
        found = compute(self.forward, given or dict(zip(self.given, xs)), self._batch(xs))
        return tuple(_rounded(found[n], s.dtype) for n, s in rule.outputs.items()), self._kept(xs, needs)

    def _defined_backward(self, dys: tuple, saved: dict, inputs: tuple, needs: tuple) -> tuple:
        like = next(dy for dy in dys if dy is not None)
        given = self._all(dys, saved, inputs, lambda s: arrays.namespace(like).zeros(s.shape, s.dtype))
        found = compute(self.backward, given or dict(zip(self.dys, dys)), self._batch(inputs))
        names = [self.names[n] for n in self.given]
        return tuple(_rounded(found[f"d{n}"], s.dtype) if n in needs else None for n, s in zip(names, inputs))

    # --- its kernels -------------------------------------------------------------------------------------------------

    def module(self) -> Any:
        """The kernels, compiled by nobody yet."""
        module = module_of(self.name, self.text)
        if not hasattr(module, "BUDGETS"):
            from gpulayers.kernels._budget import Budget

            kernels = [k for each in self.kernels.values() for k in each.texts()]
            module.BUDGETS = {k.name: Budget(narrow=k.narrow) for k in kernels}
        return module

    def _refuses(self, *specs: Any, needs: tuple = ()) -> str | None:
        return None

    def _launched_forward(self, *xs: Any, needs: tuple = (), empty: Callable) -> tuple[tuple, dict]:
        rule = self._rule(tuple(map(arrays.spec, xs)), needs)
        outputs = {name: empty(s.shape, s.dtype) for name, s in rule.outputs.items()}
        given = {n: x for n, x in zip(self.given, xs) if n in self.forward.given}
        self._launch(self.forward, given, outputs, xs, empty)
        return tuple(outputs.values()), self._kept(xs, needs)

    def _launched_backward(self, dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Callable) -> tuple:
        names = [self.names[n] for n in self.given]
        grads = {f"d{n}": empty(s.shape, s.dtype) if n in needs else None for n, s in zip(names, inputs)}
        given = self._all(dys, saved, inputs, lambda s: _zeros(s, empty))
        self._launch(self.backward, given, grads, inputs, empty)
        return tuple(grads[f"d{n}"] for n in names)

    def _launch(self, program: Program, given: dict, outputs: dict, xs: Sequence[Any], empty: Callable) -> None:
        Launch(self.kernels[program], self.module(), given, outputs, self._batch(xs), empty).run()


def _kernels(program: Program, namer: Namer) -> Kernels:
    held = looped = tiled = None
    if program.passes:
        held, looped = (Writer(program, namer, form).kernel() for form in (HELD, LOOPED))
    if not program.passes or program.parts(COLUMN):
        tiled = Writer(program, namer, TILED).kernel()
    finish = {layout: finishing(program, namer, layout) for layout in (COLUMN, ONE)}
    return Kernels(program, held, looped, tiled, {layout: k for layout, k in finish.items() if k is not None})


def _snake(name: str) -> str:
    """0.MyLayer → my_layer."""
    last = name.rpartition(".")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", last).lower()


def _counted(name: str, nodes: Sequence[Node]) -> list[tuple[str, Node]]:
    return [(f"{name}{i}" if len(nodes) > 1 else name, node) for i, node in enumerate(nodes)]


def _rounded(a: Any, dtype: Any) -> Any:
    return a.astype(dtype, order="C")


def _zeros(spec: Spec, empty: Callable) -> Any:
    found = empty(spec.shape, spec.dtype)
    found[...] = 0
    return found
