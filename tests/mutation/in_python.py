"""Faults in Triton and NumPy kernels and in launchers: found in the syntax tree, made in the text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

Change = tuple[str, int, int, bytes]
"""(kind, start, end, new text)."""

COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
OPPOSITE = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "fmax": "fmin", "fmin": "fmax"}
SYMMETRIC = {
    *OPPOSITE,
    "add",
    "multiply",
    "isinstance",
    "static_assert",
    "device_assert",
    "zip",
    "equal",
    "shares_memory",
}
WIDTHS = {"num_warps", "num_stages", "warps", "stages"}
"""Arguments that change how fast a kernel is, and not what it computes."""
SIZES = {
    "BLOCK", "BP", "BC", "BM", "BN", "BK", "ROWS", "COLS", "GROUP", "block", "warps", "entry", "rounds", "splits", "each",
    "tile", "high", "wide", "pixels", "channels", "budget", "size", "share", "elements", "threads",
}  # fmt: skip
"""Names that launchers give to a tile's sizes, which come from tables: any of them is right."""
TILES = {
    "pixel_tile", "pixel_plan", "flat_tile", "_looped_tile", "class_tile", "_hold", "held_rows", "block_rows", "each",
    "threads", "_asked", "_choose", "_choose_for_weight", "_tile_for", "_weight_tile", "_narrow", "choices", "resident_blocks",
}  # fmt: skip
"""Functions that choose sizes of tiles, and one that says what machine code may look like."""


def faults(source: bytes) -> Iterator[Change]:
    tree = ast.parse(source)
    yield from _Finder(source).walk(tree)


class _Finder:
    def __init__(self, source: bytes):
        self.source = source
        lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in lines:
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            self.starts[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def text(self, node: ast.AST) -> bytes:
        start, end = self.span(node)
        return self.source[start:end]

    def replace(self, kind: str, node: ast.AST, new: bytes) -> Change:
        return (kind, *self.span(node), new)

    def between(self, kind: str, left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Change]:
        """The operator between two operands changed."""
        start, end = self.span(left)[1], self.span(right)[0]
        found = self.source[start:end].split(b"#")[0].find(old.encode())
        if found >= 0:
            yield kind, start + found, start + found + len(old.encode()), new.encode()

    def walk(self, node: ast.AST) -> Iterator[Change]:
        if _untouched(node):
            return
        yield from getattr(self, f"of_{type(node).__name__}", lambda node: ())(node)
        for child in _children(node):
            yield from self.walk(child)

    # --- what each part of the syntax can get wrong ------------------------------------------------------------------

    def of_Compare(self, node: ast.Compare) -> Iterator[Change]:
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, node.comparators):
            yield from self.between("comparison", left, right, *COMPARISONS[type(op)])

    def of_BinOp(self, node: ast.BinOp) -> Iterator[Change]:
        left, right = b"(%b)" % self.text(node.left), b"(%b)" % self.text(node.right)
        if isinstance(node.op, ast.BitAnd | ast.BitOr) and _is_condition(node):
            yield self.replace("mask", node, left)
            yield self.replace("mask", node, right)
        elif isinstance(node.op, ast.Add | ast.Sub) and not isinstance(node.left, ast.List | ast.Tuple):
            plus = isinstance(node.op, ast.Add)
            yield from self.between("sign", node.left, node.right, *("+-" if plus else "-+"))
            yield self.replace("term", node, left)
            if plus:
                yield self.replace("term", node, right)
                yield from self._steps_swapped(node)
        elif isinstance(node.op, ast.Mult | ast.Div | ast.FloorDiv | ast.Mod):
            yield self.replace("factor", node, left)
            if isinstance(node.op, ast.Mult):
                yield self.replace("factor", node, right)

    def _steps_swapped(self, node: ast.BinOp) -> Iterator[Change]:
        """a · s + b · t becomes a · t + b · s."""
        products = [p for p in (node.left, node.right) if isinstance(p, ast.BinOp) and isinstance(p.op, ast.Mult)]
        if len(products) == 2 and all(isinstance(p.right, ast.Name) for p in products):
            (a, b), (c, d) = (self.span(p.right) for p in products)
            if self.source[a:b] != self.source[c:d]:
                new = self.source[c:d] + self.source[b:c] + self.source[a:b]
                yield "swapped", a, d, new

    def of_UnaryOp(self, node: ast.UnaryOp) -> Iterator[Change]:
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            yield self.replace("sign", node, b"(%b)" % self.text(node.operand))
        if isinstance(node.op, ast.Not):
            yield self.replace("condition", node, b"bool(%b)" % self.text(node.operand))

    def of_BoolOp(self, node: ast.BoolOp) -> Iterator[Change]:
        words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:]):
            yield from self.between("condition", left, right, *words)

    def of_IfExp(self, node: ast.IfExp) -> Iterator[Change]:
        body, test, other = (b"(%b)" % self.text(part) for part in (node.body, node.test, node.orelse))
        yield self.replace("condition", node, b"%b if %b else %b" % (other, test, body))

    def of_If(self, node: ast.If) -> Iterator[Change]:
        if isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
            yield self.replace("condition", node.test, b"not (%b)" % self.text(node.test))

    def of_FunctionDef(self, node: ast.FunctionDef) -> Iterator[Change]:
        """A kernel that refuses every call, which the definition then computes."""
        if not node.name.endswith("_refuses"):
            return
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return) and isinstance(inner.value, ast.IfExp):
                parts = inner.value.body, inner.value.orelse
                yield self.replace("refusal", inner.value, self.text(parts[getattr(parts[0], "value", "") is None]))
            elif isinstance(inner, ast.Return) and getattr(inner.value, "value", "") is None:
                yield self.replace("refusal", inner.value, b'"never"')  # type: ignore[arg-type]

    def of_AugAssign(self, node: ast.AugAssign) -> Iterator[Change]:
        if isinstance(node.op, ast.Add | ast.Sub):
            yield from self.between(
                "term", node.target, node.value, "+=" if isinstance(node.op, ast.Add) else "-=", "="
            )

    def of_Constant(self, node: ast.Constant) -> Iterator[Change]:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            return
        value = node.value
        changed = value + 1 if isinstance(value, int) else (value * 2 or 1.0)
        yield self.replace("constant", node, repr(changed).encode())

    def of_Attribute(self, node: ast.Attribute) -> Iterator[Change]:
        if self.text(node) in (b"np.int64", b"np.float64"):
            yield self.replace("narrow", node, self.text(node).replace(b"64", b"32"))

    def of_Call(self, node: ast.Call) -> Iterator[Change]:
        name = _name(node.func)
        if name == "to" and len(node.args) == 1 and isinstance(node.func, ast.Attribute):
            kind = {b"tl.int64": "narrow", b"tl.float32": "accumulator"}.get(self.text(node.args[0]))
            if kind:
                yield self.replace(kind, node, self.text(node.func.value))
        elif name in ("zeros", "full", "cast"):
            for part in node.args:
                if self.text(part) in (b"tl.float32", b"tl.int64"):
                    new = b"tl.float16" if b"float" in self.text(part) else b"tl.int32"
                    yield self.replace("accumulator" if b"float" in new else "narrow", part, new)
        elif name in ("load", "store") and self.text(node.func).startswith(b"tl."):
            yield from self._memory(node, 1 if name == "load" else 2)
        elif name == "cdiv" and len(node.args) == 2:
            a, b = map(self.text, node.args)
            yield self.replace("block", node, b"(%b) // (%b)" % (a, b))
        elif name == "range" and len(node.args) == 3:
            first, last, step = map(self.text, node.args)
            yield self.replace("block", node.args[0], b"%b + %b" % (first, step))
            yield self.replace("block", node.args[1], b"%b - %b" % (last, step))
        elif name == "where" and len(node.args) == 3:
            test, a, b = map(self.text, node.args)
            yield self.replace("condition", node, self.text(node.func) + b"(%b, %b, %b)" % (test, b, a))
        elif name in ("dense", "contiguous", "arranged", "ascontiguousarray"):
            inner = node.func.value if name == "contiguous" else node.args[0]  # type: ignore[attr-defined]
            yield self.replace("layout", node, self.text(inner))
        elif name == "compute_dtype" and len(node.args) == 1:
            yield self.replace("accumulator", node, self.text(node.args[0]))
        elif name == "float" and isinstance(node.args[0], ast.Constant):
            yield self.replace("constant", node, b"0.0")
        elif name == "debug_barrier":
            yield self.replace("barrier", node, b"None")
        if (name in OPPOSITE and len(node.args) > 1) or (
            name in ("max", "min") and self.text(node.func).startswith(b"tl.")
        ):
            end = self.span(node.func)[1]
            yield "min-max", end - len(name), end, OPPOSITE[name].encode()
        if name not in SYMMETRIC:
            yield from self._swapped(node)

    def _memory(self, node: ast.Call, at: int) -> Iterator[Change]:
        """A load or a store without its mask, and a load whose masked lanes hold something else."""
        masks = [*node.args[at : at + 1], *(k.value for k in node.keywords if k.arg == "mask")]
        others = [k for k in node.keywords if k.arg == "other"]
        if masks:
            start, end = self.span(node.args[at - 1])[1], self.span(node)[1] - 1
            yield "mask", start, end, b""
        for other in others:
            if isinstance(other.value, ast.Constant) and isinstance(other.value.value, int | float):
                yield self.replace("other", other.value, b"1.0" if other.value.value == 0 else b"0.0")

    def _swapped(self, node: ast.Call) -> Iterator[Change]:
        """Two neighbouring arguments, each in the other's place."""
        plain = ast.Name | ast.Attribute | ast.Subscript
        for a, b in zip(node.args, node.args[1:]):
            if isinstance(a, plain) and isinstance(b, plain) and self.text(a) != self.text(b):
                start, middle, last, end = *self.span(a), *self.span(b)
                yield "swapped", start, end, self.text(b) + self.source[middle:last] + self.text(a)


def _name(function: ast.AST) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_condition(node: ast.BinOp) -> bool:
    """A mask, not arithmetic on bits."""
    return any(isinstance(n, ast.Compare) or "mask" in getattr(n, "id", "") for n in ast.walk(node))


def _untouched(node: ast.AST) -> bool:
    """What holds no code of a kernel: imports, errors, choices of tiles, constants of the module, texts."""
    if isinstance(
        node, ast.Import | ast.ImportFrom | ast.Raise | ast.Assert | ast.JoinedStr | ast.AnnAssign | ast.Global
    ):
        return True
    if isinstance(node, ast.ClassDef) and any(_name(base) == "NamedTuple" for base in node.bases):
        return True
    if isinstance(node, ast.FunctionDef):
        return node.name in TILES
    if isinstance(node, ast.Call):
        return _name(node.func) in ("static_assert", "device_assert", "lru_cache", "Budget", "rows", "tiles")
    if isinstance(node, ast.Assign) and node.col_offset == 0:
        return _name(node.targets[0]).isupper()
    if isinstance(node, ast.Assign):
        targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
        return all(isinstance(t, ast.Name) and t.id in SIZES for t in targets)
    return isinstance(node, ast.keyword) and (node.arg in WIDTHS or node.arg in SIZES)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.FunctionDef):
        yield from node.body  # not its decorators, annotations and defaults
    elif isinstance(node, ast.Subscript) and re.fullmatch(r"[a-z]*(shape|strides|grid)", _name(node.value)):
        yield node.value
        yield from ([] if isinstance(node.slice, ast.Constant) else [node.slice])
    elif isinstance(node, ast.Call) and _name(node.func) == "reshape":
        yield from (n for n in [node.func, *node.args] if ast.unparse(n) != "-1")  # any negative size means the rest
    else:
        yield from ast.iter_child_nodes(node)
