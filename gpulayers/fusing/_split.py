"""A layer that no one kernel computes, in pieces: fused kernels, the library's own ops, and array code for the rest."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gpulayers import arrays, dispatch
from gpulayers.arrays import FLOATS, Spec
from gpulayers.export.recording import Node, Recording, Unrecordable, authors_name, needed
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing._alone import Alone, Around, ArrayCode, Result, View, alone, drawn
from gpulayers.fusing._axes import REDUCTIONS
from gpulayers.fusing._cuts import VIEWS, Group, Piece, pieces
from gpulayers.fusing._file import file_text
from gpulayers.fusing._fusion import snake
from gpulayers.fusing._kernel import Kernel
from gpulayers.fusing._kernels import module_with
from gpulayers.fusing._piece import Part
from gpulayers.fusing._statements import identifier
from gpulayers.fusing._tidy import DRAWN, number, tidy

Step = Part | Alone


class Explained(NamedTuple):
    """A step of a layer in pieces, and who would compute it."""

    direction: str
    """ "forward" or "backward"."""
    name: str
    """The kernel's, or the op's; "array code" for what neither computes."""
    line: str
    """Of the author's."""
    backend: str
    reasons: dict[str, str]
    """Why each backend before it did not serve the step."""


_WORTH = 2
"""Operations in kernels for each that is left to array code, at least."""


Kept = tuple[dict[Node, Any], int, Any]
"""What a forward leaves for its backward: values, the batch's size, the inputs' dtype."""


class Split:
    """recording: of the layer. title: what its file calls it. why: it is not one kernel.

    ``forward`` and ``backward`` have the steps of each direction, in order; ``text`` is the file with the kernels. Raises
    ``why`` where no piece could be fused.
    """

    def __init__(self, recording: Recording, title: str, why: Unrecordable):
        self.title, self.why, self.layer = title, why, recording.name
        self.name = identifier(snake(recording.name), ())
        forward, backward = recording.forward, recording.backward
        self.inputs, self.dys, self.weights = forward.inputs, backward.inputs, forward.weights
        self.drawn = [n for n in forward.nodes if n.op in DRAWN]
        self.late = [n for n in backward.nodes if n.op in DRAWN and n not in self.drawn]
        """What backward draws itself."""
        given = [*self.inputs, *self.weights.values(), *self.drawn]
        roots = [n for g in (forward, backward) for n in g.roots]
        stands = tidy(roots, [*given, *self.dys, *self.late])
        self.ys = [stands[n] for n in forward.outputs if n is not None]
        self.states = {name: stands[n] for name, n in forward.states.items()}
        self.dxs = [None if n is None else stands[n] for n in backward.outputs]
        self.gradients = {name: stands[n] for name, n in backward.gradients.items()}
        first, last = [stands[n] for n in forward.roots], [stands[n] for n in backward.roots]
        first += _rows(first, last, given)
        self.names = self._named([*first, *last], given)
        self.forward = self._steps(first, given)
        known = [*given, *(n for s in self.forward for n in s.outputs)]
        self.backward = self._steps(last, [*known, *self.dys, *self.late])
        self.kept = {*last, *(n for s in self.backward for n in s.loads)}.intersection(known)
        self._require_worth()
        self.text = file_text(self.docstring, self._kernels())
        self._forward = _scheduled(self.forward, {*given, *self.ys, *self.states.values(), *self.kept})
        self._backward: dict[tuple[bool, ...], list[tuple[Step, list[Node]]]] = {}
        """By which inputs' gradients are wanted."""

    @property
    def parts(self) -> list[Part]:
        """The fused pieces."""
        return [s for s in (*self.forward, *self.backward) if isinstance(s, Part)]

    @property
    def between(self) -> list[Alone]:
        """What computes, and is no kernel of these."""
        return [s for s in (*self.forward, *self.backward) if not isinstance(s, Part | View | Result)]

    def _require_worth(self) -> None:
        """Raises where kernels would take over little of what array code does: each of its operations is a pass."""
        taken = sum(n.op not in VIEWS and number(n) is None for part in self.parts for n in part.group.nodes)
        left = sum(isinstance(s, ArrayCode) and number(s.node) is None for s in self.between)
        if not taken:
            raise self.why
        if taken < _WORTH * left:
            reason = (
                f"{self.why.reason}; cut there, too little is fused: {taken} operations, and {left} stay array code"
            )
            raise Unrecordable(reason, self.why.advice, self.why.place)

    def _kernels(self) -> list[Kernel]:
        return [k for part in self.parts for k in part.texts()]

    @functools.cached_property
    def module(self) -> Any:
        """The kernels, compiled by nobody yet."""
        return module_with(self.name, self.text, self._kernels())

    def _named(self, roots: Sequence[Node], given: Sequence[Node]) -> dict[Node, str]:
        """What kernels call arrays: the author's names where there are some."""
        users: dict[Node, list[Node]] = {}
        known = [*given, *self.dys, *self.late]
        nodes = [n for n in needed(roots, known) if number(n) is None]
        for node in nodes:
            for operand in node.inputs:
                users.setdefault(operand, []).append(node)
        said = {n: f"d{x.name}" for n, x in zip(self.dxs, self.inputs) if n is not None}
        said |= {n: f"d{name}" for name, n in self.gradients.items()}
        said |= {n: f"new_{name}" for name, n in self.states.items()}
        said |= {n: f"y{i}" if len(self.ys) > 1 else "y" for i, n in enumerate(self.ys)}
        said |= {n: n.name or f"drawn{i}" for i, n in enumerate(known)}
        names: dict[Node, str] = {}
        for node in dict.fromkeys([*known, *said, *nodes]):
            name = said.get(node) or authors_name(node, users.get(node, ())) or f"v{len(names)}"
            names[node] = identifier(name, names.values())
        return names

    def _steps(self, roots: Iterable[Node], given: Iterable[Node]) -> list[Step]:
        final = {*self.ys, *(n for n in self.dxs if n is not None)}

        def make(group: Group) -> Part:
            return Part(f"{self.name}_{self.names[group.outputs[0]]}", group, self.names, final, lambda: self.module)

        return [step.made if isinstance(step, Piece) else alone(step) for step in pieces(roots, given, make)]

    @property
    def docstring(self) -> str:
        """What the file says of itself."""
        return (
            f"{self.title} as Triton kernels, written by gpulayers from its array code, with what runs between them.\n\n"
            f"One kernel cannot compute it all: {self.why.reason}.\n\n"
            f"Forward:\n{self._listed(self.forward)}\n\nBackward:\n{self._listed(self.backward)}\n\n"
            "Under each line of the author's stands what it became; arithmetic is float32.\n"
        )

    def _listed(self, steps: Sequence[Step]) -> str:
        lines = []
        for step in steps:
            if isinstance(step, View | Result):
                continue
            outputs = ", ".join(self.names.get(n, "") for n in step.outputs)
            if isinstance(step, Part):
                lines.append(f"    {outputs} = {step.name}({', '.join(self.names[n] for n in step.loads)})")
            else:
                place = f"    # {step.node.place.text}" if step.node.place else ""
                lines.append(f"    {outputs} = {step.what}{place}")
        return "\n".join(lines)

    def explained(self, xs: Sequence[Any], weights: dict[str, Any]) -> list[Explained]:
        """Its steps, forward first, with who would compute each for inputs like these. Launches nothing."""
        around = self._around(xs)
        specs: dict[Node, Any] = {n: arrays.spec(x) for n, x in zip(self.inputs, xs)}
        specs |= {node: arrays.spec(weights[name]) for name, node in self.weights.items()}
        specs |= {n: Spec(tuple(at_batch(n.shape, around.batch)), n.dtype) for n in (*self.drawn, *self.late)}
        specs |= {n: Spec(tuple(at_batch(n.shape, around.batch)), around.dtype) for n in self.dys}
        found = []
        for way, steps in (("forward", self.forward), ("backward", self.backward)):
            for step in steps:
                given = [specs[n] for n in step.loads]
                if isinstance(step, Part):
                    plan, _ = dispatch.plan_for(step.op, given, (), {}, around.like)
                    specs.update(zip(step.outputs, plan.rule.outputs.values()))
                    found.append(Explained(way, step.name, step.line, plan.backend, plan.reasons))
                    continue
                specs[step.node] = step.spec(given, around)
                if not isinstance(step, View | Result):
                    line = step.node.place.text if step.node.place else ""
                    found.append(Explained(way, step.what, line, *step.plan(given, around)))
        return found

    # --- its calls ---------------------------------------------------------------------------------------------------

    def run_forward(self, xs: Sequence[Any], weights: dict[str, Any]) -> tuple[tuple, dict[str, Any], Kept]:
        """(outputs, what becomes of weights, what backward needs)."""
        around = self._around(xs)
        values = dict(zip(self.inputs, xs)) | {node: weights[name] for name, node in self.weights.items()}
        values |= drawn(self.drawn, around)
        _run(self._forward, values, around)
        states = {name: values[node] for name, node in self.states.items()}
        kept = {n: values[n] for n in self.kept}
        return tuple(values[y] for y in self.ys), states, (kept, around.batch, around.dtype)

    def run_backward(self, kept: Kept, dys: Sequence[Any], wanted: Sequence[bool]) -> tuple[list[Any], dict[str, Any]]:
        """(gradients of inputs, None where not ``wanted``; those of weights)."""
        known, batch, dtype = kept
        around = Around(self.layer, dys[0], batch, dtype)
        values = known | dict(zip(self.dys, dys)) | drawn(self.late, around)
        dxs = [dx if want else None for dx, want in zip(self.dxs, wanted)]
        if (steps := self._backward.get(key := tuple(wanted))) is None:
            roots = {*filter(None, dxs), *self.gradients.values()}
            given = {*known, *self.dys, *self.late}
            steps = self._backward[key] = _scheduled(_asked(self.backward, roots), given | roots)
        _run(steps, values, around)
        return [None if dx is None else values[dx] for dx in dxs], {n: values[g] for n, g in self.gradients.items()}

    def _around(self, xs: Sequence[Any]) -> Around:
        dtype = next((d for x in xs if (d := arrays.library(x).dtype(x)) in FLOATS), arrays.float32)
        return Around(self.layer, xs[0], xs[0].shape[0], dtype)

    def serves(self) -> bool:
        """Whether dispatch may launch its kernels."""
        return "triton" in dispatch.permitted() and dispatch.installed("triton")


def _rows(first: Sequence[Node], last: Sequence[Node], given: Sequence[Node]) -> list[Node]:
    """What forward sums up, and backward takes: a few numbers are kept rather than computed again."""
    forward = needed(first, given)
    backward = {*needed(last, given)}
    return [n for n in forward if n in backward and n.op in REDUCTIONS and n.kind == "f" and number(n) is None]


def _scheduled(steps: Sequence[Step], kept: set[Node]) -> list[tuple[Step, list[Node]]]:
    """Each step with the values that nobody takes after it, but for those that are ``kept``."""
    last = {n: step for step in steps for n in step.loads}
    return [(step, [n for n in dict.fromkeys(step.loads) if last[n] is step and n not in kept]) for step in steps]


def _run(steps: Sequence[tuple[Step, list[Node]]], values: dict[Node, Any], around: Around) -> None:
    """Fills ``values``."""
    for step, gone in steps:
        xs = [values[n] for n in step.loads]
        if isinstance(step, Part):
            ys = step.op(*xs)
            values.update(zip(step.outputs, ys if isinstance(ys, tuple) else (ys,)))
        else:
            values[step.node] = step.run(xs, around)
        for node in gone:
            del values[node]


def _asked(steps: Sequence[Step], roots: set[Node]) -> list[Step]:
    """The steps that ``roots`` come from."""
    asked, found = set(roots), []
    for step in reversed(steps):
        if asked.intersection(step.outputs):
            asked.update(step.loads)
            found.append(step)
    return found[::-1]
