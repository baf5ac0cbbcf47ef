"""A fused piece of a layer that is cut: one program, its kernels, and an op without a backward that launches them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from gpulayers import arrays
from gpulayers.arrays import Spec, compute_dtype, float32
from gpulayers.definition import Rule
from gpulayers.export.recording import Formula, Node
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing._cuts import Group
from gpulayers.fusing._definition import compute
from gpulayers.fusing._kernel import Kernel, Namer
from gpulayers.fusing._kernels import kernels_of, refusal
from gpulayers.fusing._launch import Launch
from gpulayers.fusing._program import FULL, Output, Program
from gpulayers.fusing._refusal import misfit
from gpulayers.ops._op import Op, ShapeError


class Part:
    """name: of its kernels. names: of all values that arrays hold. final: outputs and gradients of inputs, which have the
    inputs' dtype. module: gives the module with the kernels.

    ``op`` takes the arrays of ``loads`` and gives those of ``outputs``. Raises Misfit for what does not fit into a kernel.
    """

    def __init__(
        self, name: str, group: Group, names: Mapping[Node, str], final: Container[Node], module: Callable[[], Any]
    ):
        self.group, self._final = group, final
        self.name, self.loads, self.outputs, self._module = name, group.loads, group.outputs, module
        self.stands = {n: _given(n, names[n]) for n in group.loads}
        outputs = [Output(names[n], n, n.shape) for n in group.outputs]
        given = [*self.stands.values()]
        self.program = program = Program(name, given, outputs, loaded=self.stands)
        if any(_follows(n) for n in group.outputs) and not any(_follows(n) for n in group.loads):
            raise misfit(group.outputs[-1], "an output whose size follows the batch, from inputs that do not")
        views = [(v, f"{v.attributes['of'].name}_part{i}") for i, v in enumerate(program.views)]
        self.namer = Namer([(n, n.name) for n in given], program.formulas())
        self.namer.add(views)
        self.kernels = kernels_of(program, self.namer)
        self.op = self._op()

    @property
    def line(self) -> str:
        """Where its first output stands in the author's code."""
        place = self.group.outputs[0].place
        return place.text if place else ""

    def texts(self) -> list[Kernel]:
        return self.kernels.texts()

    def _op(self) -> Op:
        given = [inspect.Parameter(n.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in self.stands.values()]

        def rule(*specs: Any, needs: tuple = ()) -> Rule:
            return Rule(self._specs(specs))

        def forward(*xs: Any, needs: tuple = ()) -> tuple[tuple, dict]:
            specs = self._specs(xs)
            values = compute(self.program, dict(zip(self.stands.values(), xs)), self._batch(xs))
            return tuple(values[name].astype(s.dtype, order="C") for name, s in specs.items()), {}

        forward.__name__ = forward.__qualname__ = f"{self.name}_forward"
        needs = inspect.Parameter("needs", inspect.Parameter.KEYWORD_ONLY, default=())
        forward.__signature__ = inspect.Signature([*given, needs])  # type: ignore[attr-defined]
        forward.__doc__ = f"{', '.join(n.name for n in self.stands.values())} → {', '.join(self.namesakes())}, fused."
        triton = types.SimpleNamespace()
        setattr(triton, f"{self.name}_forward", self._launched)
        setattr(triton, f"{self.name}_refuses", lambda *_, **__: refusal(self.program))
        return Op(rule, forward, kernels={"triton": triton}, family="fused")

    def namesakes(self) -> list[str]:
        """The names of the outputs."""
        return [o.name for o in self.program.whole]

    @functools.cached_property
    def counted(self) -> tuple[int, int, Formula] | None:
        """(array, axis, its size) by which the batch's size is known; None where no array follows it."""
        for i, node in enumerate(self.loads):
            for axis, size in enumerate(node.shape):
                if isinstance(size, Formula) and size.is_whole and size.b:
                    return i, axis, size
        return None

    def _batch(self, xs: Sequence[Any]) -> int:
        if self.counted is None:
            return 1
        i, axis, size = self.counted
        return (xs[i].shape[axis] - int(size.a)) // int(size.b)

    def _specs(self, xs: Sequence[Any]) -> dict[str, Spec]:
        """Of the outputs: values with an element for each row and column have the dtype of such inputs."""
        batch = self._batch(xs)
        for stand, x in zip(self.stands.values(), xs):
            if tuple(x.shape) != (shape := at_batch(stand.shape, batch)):
                raise ShapeError(stand.name, f"{stand.name}.shape = {[*shape]}", list(x.shape))
        floats = [(s, x) for s, x in zip(self.stands.values(), xs) if s.kind == "f"]
        wide = [x for s, x in floats if self.is_wide(s)]
        dtype = (wide or [x for _, x in floats])[0].dtype if floats else float32
        kinds = {o.name: dtype if self.is_rounded(o) else compute_dtype(dtype) for o in self.program.whole}
        return {o.name: Spec(at_batch(o.shape, batch), kinds[o.name]) for o in self.program.whole}

    def is_rounded(self, output: Output) -> bool:
        """Whether it has the inputs' dtype: sums of rows that other pieces take are float32."""
        layout = self.program.layout.get(self.program.stands[output.node], FULL)
        return layout is FULL or (layout.rows and output.node in self._final)

    def is_wide(self, stand: Node) -> bool:
        """Whether an array has an element for each row and column, or its parts have."""
        views = [v for v in self.program.views if v.attributes["of"] is stand]
        program = self.program
        return any(program.layout.get(n) is FULL and n not in program.period for n in (stand, *views))

    def _launched(self, *xs: Any, needs: tuple = (), empty: Callable) -> tuple[tuple, dict]:
        found = {name: empty(s.shape, s.dtype) for name, s in self._specs([*map(arrays.spec, xs)]).items()}
        parts = {o.name: found[o.of][..., slice(*o.span)] for o in self.program.outputs if o.of}
        given = {n: x for n, x in zip(self.stands.values(), xs) if self.program.takes(n)}
        Launch(self.kernels, self._module(), given, found | parts, self._batch(xs), empty).run()
        return tuple(found.values()), {}


def _given(node: Node, name: str) -> Node:
    return Node("draw" if node.op == "draw" else "input", (), {}, node.shape, node.dtype, None, name)


def _follows(node: Node) -> bool:
    return any(isinstance(n, Formula) and n.b for n in node.shape)
