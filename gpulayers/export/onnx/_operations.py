"""The operations of a recorded graph as nodes of ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpulayers.export.onnx._graph import TYPES, Body
from gpulayers.export.recording import Formula, Graph, Node, Unrecordable, needed

_SAME = (
    "neg abs exp log sqrt tanh sin cos tan sinh cosh asin acos atan asinh acosh atanh floor ceil erf round reciprocal add "
    "sub mul div pow greater less equal and or xor not"
)
_PLAIN = {name: name.capitalize() for name in _SAME.split()} | {
    "maximum": "Max", "minimum": "Min", "greater_equal": "GreaterOrEqual", "less_equal": "LessOrEqual", "isnan": "IsNaN",
    "isinf": "IsInf", "matmul": "MatMul",
}  # fmt: skip
"""What takes its operands and nothing else."""
_OF_NUMBERS = ("greater", "less", "greater_equal", "less_equal")


class Operations:
    """Writes the nodes of one forward into the body of a function."""

    def __init__(self, body: Body, names: dict[Node, str], batch_of: str):
        self.body, self.names, self._batch_of = body, names, batch_of
        self._batch = ""

    def write(self, graph: Graph) -> list[str]:
        """The names of the outputs, none of them an input, none twice. Raises Unrecordable for what ONNX lacks."""
        outputs = [n for n in graph.outputs if n is not None]
        for node in needed(outputs, list(self.names)):
            if node.op == "draw":
                continue
            self.body.line = node.place.text if node.place else ""
            self.names[node] = self._value(node, [self.names[i] for i in node.inputs if i.op != "draw"])
        self.body.line = ""
        taken: set[str] = {self.names[n] for n in (*graph.inputs, *graph.weights.values())}
        found = []
        for node in outputs:
            name = self.names[node]
            found.append(self.body.op("Identity", name) if name in taken else name)
            taken.add(found[-1])
        return found

    # --- numbers that follow the batch -------------------------------------------------------------------------------

    def number(self, value: Any, kind: str = "i") -> str:
        """A tensor of one element."""
        if not isinstance(value, Formula):
            return self.body.constant([value], kind)
        op = self.body.op
        if not self._batch:
            self._batch = op("Shape", self._batch_of, start=0, end=1)
        n = op("Cast", self._batch, to=TYPES[kind]) if kind != "i" else self._batch
        y = self._line(n, value.a, value.b, kind)
        y = op("Div", y, self._line(n, value.d, value.c, kind)) if value.c or value.d != 1 else y
        y = op("Sqrt", y) if value.root else y
        if value.one is None:
            return y
        return op("Where", op("Greater", n, self.number(1, kind)), y, self.number(value.one, kind))

    def _line(self, n: str, a: float, b: float, kind: str) -> str:
        y = n if b == 1 else self.body.op("Mul", n, self.number(b, kind))
        return y if not a else self.body.op("Add", y, self.number(a, kind))

    def numbers(self, values: Sequence[Any]) -> str:
        if any(isinstance(v, Formula) for v in values):
            return self.body.op("Concat", *(self.number(v) for v in values), axis=0)
        return self.body.constant(list(values))

    # --- one operation -----------------------------------------------------------------------------------------------

    def _value(self, node: Node, xs: list[str]) -> str:
        own = getattr(self, f"_{node.op}", None)
        if own is not None:
            return own(node, xs, **node.attributes)
        if node.op in _OF_NUMBERS and node.inputs[0].kind == "b":
            xs = [self.body.op("Cast", x, to=TYPES["i"]) for x in xs]
        if node.op in ("floor", "ceil", "round") and node.kind == "i":
            return xs[0]
        if node.op not in _PLAIN:
            raise Unrecordable(f"{node.op} has no counterpart in ONNX", "", node.place)
        return self.body.op(_PLAIN[node.op], *xs)

    def _const(self, node: Node, xs: list[str], value: Any) -> str:
        if isinstance(value, Formula):
            return self.body.op("Squeeze", self.number(value, node.kind))
        return self.body.constant(value, node.kind)

    def _full(self, node: Node, xs: list[str], value: Any, shape: Any) -> str:
        return self.body.op("Expand", self.body.constant(value, node.kind), self.numbers(shape))

    def _cast(self, node: Node, xs: list[str]) -> str:
        return self.body.op("Cast", *xs, to=TYPES[node.kind])

    def _not_equal(self, node: Node, xs: list[str]) -> str:
        return self.body.op("Not", self.body.op("Equal", *xs))

    def _isfinite(self, node: Node, xs: list[str]) -> str:
        op = self.body.op
        return op("Not", op("Or", op("IsInf", *xs), op("IsNaN", *xs)))

    def _expm1(self, node: Node, xs: list[str]) -> str:
        """tanh(x / 2) (exp(x) + 1), which does not lose what exp(x) − 1 loses near 0; −1 where that is ∞ · 0."""
        op, half, one = self.body.op, self.body.constant(0.5, "f"), self.body.constant(1, "f")
        return op("Mul", op("Tanh", op("Mul", *xs, half)), op("Add", op("Exp", *xs), one))

    def _log1p(self, node: Node, xs: list[str]) -> str:
        """2 atanh(x / (2 + x)) near 0, likewise; log(1 + x) else."""
        op, half, one, two = self.body.op, *(self.body.constant(n, "f") for n in (0.5, 1, 2))
        near = op("Mul", two, op("Atanh", op("Div", *xs, op("Add", *xs, two))))
        return op("Where", op("Less", op("Abs", *xs), half), near, op("Log", op("Add", *xs, one)))

    def _sign(self, node: Node, xs: list[str]) -> str:
        if node.kind != "f":
            return self.body.op("Sign", *xs)
        return self.body.op("Where", self.body.op("IsNaN", *xs), *xs, self.body.op("Sign", *xs))

    def _mod(self, node: Node, xs: list[str]) -> str:
        """NumPy's: the sign is the divisor's."""
        op = self.body.op
        y = op("Mod", *xs, fmod=int(node.kind == "f"))
        if node.kind != "f":
            return y
        other = op("Less", op("Mul", y, xs[1]), self.body.constant(0, "f"))
        return op("Where", other, op("Add", y, xs[1]), y)

    def _floordiv(self, node: Node, xs: list[str]) -> str:
        y = self.body.op("Div", self.body.op("Sub", xs[0], self._mod(node, xs)), xs[1])
        return self.body.op("Round", y) if node.kind == "f" else y

    def _where(self, node: Node, xs: list[str]) -> str:
        op = self.body.op
        if node.kind != "b":
            return op("Where", *xs)
        condition, a, b = xs
        return op("Or", op("And", condition, a), op("And", op("Not", condition), b))

    # --- reductions --------------------------------------------------------------------------------------------------

    def _reduced(self, node: Node, xs: list[str], axes: Any, keepdims: bool) -> str:
        kind, x = {"any": "Max", "all": "Min"}.get(node.op, node.op.capitalize()), xs[0]
        if node.kind == "b":
            x = self.body.op("Cast", x, to=TYPES["i"])
        y = self.body.op(f"Reduce{kind}", x, self.body.constant(list(axes)), keepdims=int(keepdims))
        return self.body.op("Cast", y, to=TYPES["b"]) if node.kind == "b" else y

    _sum = _prod = _max = _min = _mean = _any = _all = _reduced

    def _argmax(self, node: Node, xs: list[str], axis: int) -> str:
        return self.body.op("ArgMax", *xs, axis=axis, keepdims=0)

    def _argmin(self, node: Node, xs: list[str], axis: int) -> str:
        return self.body.op("ArgMin", *xs, axis=axis, keepdims=0)

    def _cumsum(self, node: Node, xs: list[str], axis: int) -> str:
        return self.body.op("CumSum", *xs, self.body.constant(axis))

    # --- shapes ------------------------------------------------------------------------------------------------------

    def _reshape(self, node: Node, xs: list[str], shape: tuple) -> str:
        """−1 where one size follows the batch."""
        if sum(isinstance(n, Formula) for n in shape) == 1 and 0 not in shape:
            return self.body.op(
                "Reshape", *xs, self.body.constant([-1 if isinstance(n, Formula) else n for n in shape])
            )
        return self.body.op("Reshape", *xs, self.numbers(shape), allowzero=1)

    def _broadcast(self, node: Node, xs: list[str], shape: tuple) -> str:
        return self.body.op("Expand", *xs, self.numbers(shape))

    def _transpose(self, node: Node, xs: list[str], axes: tuple) -> str:
        return self.body.op("Transpose", *xs, perm=list(axes))

    def _concat(self, node: Node, xs: list[str], axis: int) -> str:
        return self.body.op("Concat", *xs, axis=axis)

    def _pad(self, node: Node, xs: list[str], edges: tuple, value: Any) -> str:
        sides = self.numbers([edge for side in zip(*edges) for edge in side])
        return self.body.op("Pad", *xs, sides, self.body.constant(value, node.kind))

    def _slice(self, node: Node, xs: list[str], spans: tuple) -> str:
        starts, stops, steps = (self.numbers(part) for part in zip(*spans))
        return self.body.op("Slice", *xs, starts, stops, self.body.constant(range(len(spans))), steps)

    def _reverse(self, node: Node, xs: list[str], axes: tuple) -> str:
        back = self.body.constant([-1] * len(axes))
        return self.body.op(
            "Slice", *xs, back, self.body.constant([-(2**62)] * len(axes)), self.body.constant(list(axes)), back
        )

    def _gather(self, node: Node, xs: list[str], axis: int) -> str:
        return self.body.op("Gather", *xs, axis=axis)

    def _segment_sum(self, node: Node, xs: list[str], size: int) -> str:
        op, zero = self.body.op, self.body.constant(0, node.kind)
        zeros = op("Expand", zero, self.numbers(node.shape))
        return op("ScatterND", zeros, op("Unsqueeze", xs[1], self.body.constant([-1])), xs[0], reduction="add")

    # --- chance ------------------------------------------------------------------------------------------------------

    def _like(self, shape: tuple) -> str:
        return self.body.op("Expand", self.body.constant(0, "f"), self.numbers(shape))

    def _random_bits(self, node: Node, xs: list[str], shape: tuple) -> str:
        return self.body.op("Floor", self.body.op("RandomUniformLike", self._like(shape), low=0.0, high=2.0**32))

    def _random_uniform(self, node: Node, xs: list[str], low: float, high: float, shape: tuple) -> str:
        return self.body.op("RandomUniformLike", self._like(shape), low=low, high=high)

    def _random_normal(self, node: Node, xs: list[str], mean: float, std: float, shape: tuple) -> str:
        return self.body.op("RandomNormalLike", self._like(shape), mean=mean, scale=std)
