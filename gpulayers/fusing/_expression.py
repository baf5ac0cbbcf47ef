"""The operations of a recorded graph as expressions of Triton's language, in float32."""

from __future__ import annotations

import math
from typing import NamedTuple

from gpulayers.export.recording import Node
from gpulayers.fusing._refusal import misfit

CALL, UNARY, PRODUCT, SUM, AND, XOR, OR, COMPARISON = range(8)
"""How tightly an expression holds together, the tightest first."""


class Expression(NamedTuple):
    text: str
    binding: int = CALL

    def within(self, binding: int) -> str:
        """As an operand of an operator of this binding."""
        return self.text if self.binding <= binding else f"({self.text})"


_NAN = "propagate_nan=tl.PropagateNan.ALL"
_OF_TRITON = "abs exp log sqrt erf floor ceil sin cos"
_OF_LIBDEVICE = "expm1 log1p tan tanh sinh cosh asin acos atan asinh acosh atanh"
_CALLS = (
    {name: f"tl.{name}({{}})" for name in _OF_TRITON.split()}
    | {name: f"libdevice.{name}({{}})" for name in _OF_LIBDEVICE.split()}
    | {
        "round": "libdevice.rint({})", "pow": "libdevice.pow({}, {})", "mod": "_mod({}, {})", "sign": "_sign({})",
        "maximum": f"tl.maximum({{}}, {{}}, {_NAN})", "minimum": f"tl.minimum({{}}, {{}}, {_NAN})",
        "where": "tl.where({}, {}, {})", "isinf": "_isinf({})", "isfinite": "_isfinite({})",
    }
)  # fmt: skip
_BINARY = {
    "add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT), "and": ("&", AND),
    "or": ("|", OR), "xor": ("^", XOR), "greater": (">", COMPARISON), "less": ("<", COMPARISON),
    "greater_equal": (">=", COMPARISON), "less_equal": ("<=", COMPARISON), "equal": ("==", COMPARISON),
    "not_equal": ("!=", COMPARISON),
}  # fmt: skip
TYPES = {"f": "tl.float32", "i": "tl.int64", "b": "tl.int1"}
_WORDS = "add sub mul greater less greater_equal less_equal equal not_equal maximum minimum neg abs where"
_OF_INTEGERS = frozenset(_WORDS.split())
_MOST_FACTORS = 4

HELPERS = {
    "_mod": '''@triton.jit
def _mod(a, b):
    """What a leaves, with b's sign, as np.mod does."""
    return a - b * tl.floor(a / b)
''',
    "_sign": '''@triton.jit
def _sign(x):
    """-1, 0 or 1; NaN stays."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
''',
    "_isinf": """@triton.jit
def _isinf(x):
    return tl.abs(x) == float("inf")
""",
    "_isfinite": """@triton.jit
def _isfinite(x):
    return tl.abs(x) < float("inf")
""",
    "_larger": '''@triton.jit
def _larger(a, b):
    """The maximum, NaN where there is one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
    "_smaller": '''@triton.jit
def _smaller(a, b):
    """The minimum, NaN where there is one."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
}
"""What the text of a kernel calls besides Triton."""


def literal(value: float) -> Expression:
    if isinstance(value, bool):
        return Expression(repr(value))
    if isinstance(value, float) and not math.isfinite(value):
        return Expression('float("nan")' if value != value else 'float("inf")' if value > 0 else 'float("-inf")')
    return Expression(repr(value), UNARY if value < 0 else CALL)


def _short(text: str) -> str:
    """A whole number without its fraction: beside a tile of floats it is one."""
    return text.removesuffix(".0") if text.removesuffix(".0").lstrip("-").isdecimal() else text


def expression(node: Node, operands: list[Expression]) -> Expression:
    """What computes an element-wise operation. Raises Unrecordable where a kernel has none."""
    op = node.op
    if any(i.kind == "i" for i in node.inputs) and op not in _OF_INTEGERS and op != "cast":
        raise misfit(node, f"{op} of integers", "x.astype(np.float32) first")
    if op in _BINARY:
        sign, binding = _BINARY[op]
        left, right = (binding, binding - 1) if binding in (SUM, PRODUCT) else (SUM, SUM)
        a, b = (e._replace(text=_short(e.text)) for e in operands)
        return Expression(f"{a.within(left)} {sign} {b.within(right)}", binding)
    match op:
        case "neg":
            return Expression(f"-{operands[0].within(UNARY - 1)}", UNARY)
        case "not":
            return Expression(f"~{operands[0].within(UNARY - 1)}", UNARY)
        case "reciprocal":
            return Expression(f"1 / {operands[0].within(UNARY)}", PRODUCT)
        case "isnan":
            return Expression(f"{operands[0].within(SUM)} != {operands[0].within(SUM)}", COMPARISON)
        case "cast":
            return _cast(node, operands[0])
        case "pow" if (power := _whole(operands[1])) is not None:
            return Expression(" * ".join([operands[0].within(UNARY)] * power), PRODUCT)
    if op not in _CALLS:
        raise misfit(node, f"{op} has no counterpart in a fused kernel")
    return Expression(_CALLS[op].format(*(e.text for e in operands)))


def takes_twice(node: Node) -> bool:
    """Whether the expression names its operand more than once."""
    return node.op in ("isnan", "pow")


def _whole(exponent: Expression) -> int | None:
    """A small whole exponent, for which a product is written."""
    try:
        power = float(exponent.text)
    except ValueError:
        return None
    return int(power) if power in range(2, _MOST_FACTORS + 1) else None


def _cast(node: Node, x: Expression) -> Expression:
    if node.kind == "b":
        return Expression(f"{x.within(SUM)} != 0", COMPARISON)
    return Expression(f"{x.within(CALL)}.to({TYPES[node.kind]})")
