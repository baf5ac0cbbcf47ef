"""A layer for given shapes in one mode: its programs, its kernels, and the op that they serve."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import arrays
from gpulayers.arrays import Spec, compute_dtype, float32
from gpulayers.definition import KindError, Rule
from gpulayers.export.recording import Node, Recording, authors_name
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing._definition import compute
from gpulayers.fusing._file import file_text, key_of
from gpulayers.fusing._kernel import Namer
from gpulayers.fusing._kernels import kernels_of, module_with, refusal
from gpulayers.fusing._launch import Launch
from gpulayers.fusing._measured import Choice
from gpulayers.fusing._program import Output, Program
from gpulayers.fusing._refusal import misfit
from gpulayers.fusing._saving import Programs, Saving
from gpulayers.fusing._statements import identifier
from gpulayers.ops._op import Op, ShapeError, require_float


class Fusion:
    """recording: of the layer. title: what its file calls it. choice: what was measured; by default counted bytes choose.

    ``op`` takes the layer's inputs, then its weights in the order of ``named_weights``, then a seed for each of ``draws``;
    ``text`` is the file with the kernels. Raises Unrecordable for what no fused kernel computes.
    """

    def __init__(self, recording: Recording, title: str, choice: Choice | None = None):
        forward, backward = recording.forward, recording.backward
        if forward.states:
            name, node = next(iter(forward.states.items()))
            raise misfit(node, f"forward writes into the weight {name}", "evaluation mode, in which it is read alone")
        self.recording, self.title, self.choice = recording, title, choice
        if (late := next((n for n in backward.nodes if n.op == "draw"), None)) is not None:
            raise misfit(late, "backward draws random numbers", "them in forward, and self.save(…)")
        self.inputs = forward.inputs
        self.draws = [n for n in forward.nodes if n.op == "draw"]
        """Those that forward makes of ``gl.random``, in their order, whether they are used or not."""
        self.given = [*forward.inputs, *forward.weights.values(), *self.draws]
        self.name = identifier(snake(recording.name), ())
        self.names = names = self._names()
        self.dys = backward.inputs
        ys = [Output(name, node, node.shape) for name, node in _counted("y", forward.outputs)]
        wanted: dict[Node, Any] = dict(zip(forward.inputs, backward.outputs))
        wanted |= {forward.weights[name]: node for name, node in backward.gradients.items()}
        gradients = [Output(f"d{names[n]}", wanted[n], n.shape) for n in self.given if wanted.get(n) is not None]
        self.differentiable = [names[n] for n in self.given if wanted.get(n) is not None]
        self.ways = Programs(self.name, self.given, self.dys, ys, gradients, [*names.values()]).ways()
        """How the work may be divided, by name."""
        counted = min(self.ways.values(), key=Saving.weight)
        self.saving = saving = counted if choice is None else self.ways.get(choice.saving, counted)
        self.forward, self.backward = saving.forward, saving.backward
        formulas = [*self.forward.formulas(), *self.backward.formulas()]
        arrays_by_name = [*names.items(), *((dy, f"d{y.name}") for dy, y in zip(self.dys, ys))]
        arrays_by_name += [(n, n.name) for n in saving.loaded.values()]
        self.namer = namer = Namer(arrays_by_name, formulas)
        namer.add(self._views())
        tiles: tuple = ({}, {}) if choice is None else (choice.forward, choice.backward)
        self.kernels = {p: kernels_of(p, namer, t) for p, t in zip((self.forward, self.backward), tiles)}
        self.text = file_text(self.docstring, [k for each in self.kernels.values() for k in each.texts()])
        self.saved = self.saved_inputs()
        self.op = self._op()

    def _names(self) -> dict[Node, str]:
        """Of inputs and weights, none of them a gradient's or an output's."""
        names: dict[Node, str] = {}
        for node in self.given:
            plain = node.name if node in self.inputs else identifier(node.name or "seed")
            taken = {*names.values(), *(f"d{n}" for n in names.values())}
            clash = node not in self.inputs and re.fullmatch(r"d?[xy]\d*", plain)
            names[node] = identifier(f"{plain}_weight" if clash else plain, taken)
        return names

    def _views(self) -> list[tuple[Node, str]]:
        """Parts of given arrays, the same ones of forward and backward under one name."""
        views = [(p, v) for p in (self.forward, self.backward) for v in p.views]
        order = list(dict.fromkeys((v.attributes["of"], v.attributes["spans"]) for _, v in views))
        found = []
        for program, view in views:
            whole, spans = view.attributes["of"], view.attributes["spans"]
            own = authors_name(view, [n for n in program.nodes if view in n.inputs])
            place = [s for w, s in order if w is whole].index(spans)
            found.append((view, own or f"{self.names.get(whole, whole.name)}_part{place}"))
        return found

    @property
    def docstring(self) -> str:
        """What the file says of itself."""
        lines = [
            f"{self.title} as Triton kernels, written by gpulayers from its array code.\n",
            "Under each line of the author's stands what it became; arithmetic is float32.",
            self.saving.said([self.names[n] for n in self.saved_inputs()]),
            *([self.choice.said()] if self.choice and self.choice.gpu else []),
        ]
        return "\n".join([*lines, ""])

    def saved_inputs(self) -> list[Node]:
        """The inputs and weights that backward loads."""
        return [n for n in self.given if self.backward.takes(n)]

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
            if node in self.draws and spec.dtype != arrays.int64:
                raise KindError(self.names[node], "dtype = int64", spec.dtype)
        dtype = next((s.dtype for s in specs if s.dtype in arrays.FLOATS), float32)
        found = {o.name: Spec(tuple(at_batch(o.shape, self._batch(specs))), dtype) for o in self.forward.whole}
        found |= {o.name: Spec(found[o.name].shape, compute_dtype(dtype)) for o in self.forward.whole if o.kept}
        ys = {o.name: found[o.name] for o in self.forward.whole if not o.kept}
        have = {self.names[n]: s for n, s in zip(self.given, specs)}
        grads = {name: Spec(tuple(s.shape), s.dtype) for name, s in have.items()}
        return Rule(ys, self._kept(have | found, needs), grads=grads)

    def _kept(self, have: dict[str, Any], needs: tuple) -> dict[str, Any]:
        """What backward takes of inputs, outputs and what forward keeps for it."""
        names = [*(self.names[n] for n in self.saved), *(n.name for n in self.saving.loaded.values())]
        return {name: have[name] for name in names} if needs else {}

    def _all(self, dys: Sequence[Any], saved: dict, inputs: Sequence[Any], zeros: Callable) -> dict[Node, Any]:
        """The arrays that backward takes."""
        outputs = self._rule(tuple(inputs), ()).outputs.values()
        given = {n: saved[self.names[n]] for n in self.saved} | {n: saved[n.name] for n in self.saving.loaded.values()}
        for node, dy, spec in zip(self.dys, dys, outputs):
            if self.backward.takes(node):
                given[node] = zeros(spec) if dy is None else dy
        return given

    def _defined_forward(self, xs: tuple, needs: tuple) -> tuple[tuple, dict]:
        specs = self._specs(xs)
        given = {n: x for n, x in zip(self.given, xs) if self.forward.takes(n)}
        values = compute(self.forward, given or dict(zip(self.given, xs)), self._batch(xs))
        found = {name: _rounded(values[name], s.dtype) for name, s in specs.items()}
        return self._results(found, xs, needs)

    def _specs(self, xs: Sequence[Any]) -> dict[str, Spec]:
        """All that forward gives, whether anybody asks for it or not."""
        rule = self._rule(tuple(map(arrays.spec, xs)), ("",))
        own = {o.name for o in self.forward.whole if o.kept}
        return rule.outputs | {name: s for name, s in rule.saved.items() if name in own}

    def _results(self, found: dict[str, Any], xs: Sequence[Any], needs: tuple) -> tuple[tuple, dict]:
        have = {self.names[n]: x for n, x in zip(self.given, xs)} | found
        return tuple(found[o.name] for o in self.forward.whole if not o.kept), self._kept(have, needs)

    def _defined_backward(self, dys: tuple, saved: dict, inputs: tuple, needs: tuple) -> tuple:
        like = next(dy for dy in dys if dy is not None)
        given = self._all(dys, saved, inputs, lambda s: arrays.namespace(like).zeros(s.shape, s.dtype))
        found = compute(self.backward, given or dict(zip(self.dys, dys)), self._batch(inputs))
        names = [self.names[n] for n in self.given]
        return tuple(_rounded(found[f"d{n}"], s.dtype) if n in needs else None for n, s in zip(names, inputs))

    # --- its kernels -------------------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """What its file is called."""
        return key_of(self.name, self.text)

    @functools.cached_property
    def module(self) -> Any:
        """The kernels, compiled by nobody yet."""
        return module_with(self.name, self.text, [k for each in self.kernels.values() for k in each.texts()])

    def _refuses(self, *specs: Any, needs: tuple = ()) -> str | None:
        for program in (self.forward, *((self.backward,) if needs else ())):
            if (reason := refusal(program)) is not None:
                return reason
        return None

    def _launched_forward(self, *xs: Any, needs: tuple = (), empty: Callable) -> tuple[tuple, dict]:
        kept = {o.name for o in self.forward.whole if o.kept}
        specs = self._specs(xs)
        found = {n: empty(s.shape, s.dtype) if needs or n not in kept else None for n, s in specs.items()}
        given = {n: x for n, x in zip(self.given, xs) if self.forward.takes(n)}
        self._launch(self.forward, given, found, xs, empty)
        return self._results(found, xs, needs)

    def _launched_backward(self, dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Callable) -> tuple:
        names = [self.names[n] for n in self.given]
        grads = {f"d{n}": empty(s.shape, s.dtype) if n in needs else None for n, s in zip(names, inputs)}
        given = self._all(dys, saved, inputs, lambda s: _zeros(s, empty))
        self._launch(self.backward, given, grads, inputs, empty)
        return tuple(grads[f"d{n}"] for n in names)

    def _launch(self, program: Program, given: dict, outputs: dict, xs: Sequence[Any], empty: Callable) -> None:
        joined = [(o, outputs[o.of]) for o in program.outputs if o.of]
        parts = {o.name: None if x is None else x[..., slice(*o.span)] for o, x in joined}
        Launch(self.kernels[program], self.module, given, outputs | parts, self._batch(xs), empty).run()


def snake(name: str) -> str:
    """0.MyLayer → my_layer."""
    last = name.rpartition(".")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", last).lower()


def _counted(name: str, nodes: Sequence[Node | None]) -> list[tuple[str, Node]]:
    found = [n for n in nodes if n is not None]
    return [(f"{name}{i}" if len(found) > 1 else name, node) for i, node in enumerate(found)]


def _rounded(a: Any, dtype: Any) -> Any:
    return a.astype(dtype, order="C")


def _zeros(spec: Spec, empty: Callable) -> Any:
    found = empty(spec.shape, spec.dtype)
    found[...] = 0
    return found
