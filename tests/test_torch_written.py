"""Layers of one input and gated units, found in the source of a forward: what is fused, and that it computes the same."""

import ast
import textwrap

import pytest

pytest.importorskip("torch")

from gpulayers.torch._written import ACT_MUL, PRODUCTS, put_beside, put_gated

SOURCES = {
    "two and what is between": ("a = self.p(x).real\nn = x.shape\nb, c = self.q(x) * 3, n\nreturn a, b, c", ["p | q"]),
    "four": (
        "a = self.p(x)\nb = self.q(x)\nc = self.r(x)\nd = self.s(x) + self.p(d)\nreturn a, b, c, d",
        ["p | q | r"],
    ),
    "in a branch": ("if x:\n    a = self.p(x)\n    x = self.q(x)\n    b = self.r(x)\nreturn a, b", ["p | q"]),
    "two inputs": ("a = self.p(x) + self.q(x)\nb = self.r(d) + self.s(d)\nreturn a, b", ["p | q", "r | s"]),
    "another value": ("a = self.p(x)\nx = d\nb = self.q(x)\nreturn a, b", []),
    "an input that is read": ("a = self.p(x)\nc = self.write(x)\nb = self.q(x)\nreturn a, b, c", []),
    "an input that is written to": ("a = self.p(x)\nx += 1\nb = self.q(x)\nreturn a, b", []),
    "something in place": ("a = self.p(x)\nc = a.add_\nb = self.q(x)\nreturn a, b", []),
    "what may not run": ("a = self.p(x) if d else 0\nb = self.q(x)\nreturn a, b", []),
    "two branches": ("if d:\n    a = self.p(x)\nelse:\n    a = self.q(x)\nreturn a", []),
    "one layer twice": ("a = self.p(x)\nb = self.p(x)\nreturn a, b", []),
    "more arguments": ("a = self.p(x, 2)\nb = self.q(x)\nreturn a, b", []),
    "no layer": ("a = self.write(x)\nb = self.q(x)\nreturn a, b", []),
    "a gated unit": ("a = self.act(self.p(x))\nb = self.q(x)\nx = b * a\nreturn x", ["act → mul", "p | q"]),
    "a gate that is read": ("a = self.act(self.p(x))\nb = self.r(d)\ny = a * b\nreturn y + a", []),
    "a gate of two": ("a = self.act(self.p(x))\nif d:\n    a = 2\ny = a * d\nreturn y", []),
    "a square": ("a = self.act(self.p(x))\ny = a * a\nreturn y", []),
    "a gate in a branch": ("a = self.act(self.p(x))\nif d:\n    y = a * d\nreturn y", []),
    "an activation of what is kept": ("a = self.act(x)\nx = d\ny = a * d\nreturn y, x", []),
}


class Number(int):
    """One that has what a tensor is asked for."""

    shape, add_ = 7, 0


class Block:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def layer(x, *more):
            self.calls.append(name)
            return Number(ord(name[0]) * x + sum(more))

        return layer


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_found_in_a_source(name):
    body, rows = SOURCES[name]
    tree = ast.parse("def forward(self, x, d):\n" + textwrap.indent(body, "    "))
    results = []
    for fused in (False, True):
        if fused:
            function = tree.body[0]
            found = put_gated(function, "self", {"act"}) + put_beside(function, "self", {"p", "q", "r", "s"})
            assert found == rows
        block, together = Block(), []
        scope = {
            PRODUCTS: lambda x, *layers, together=together: together.append(len(layers)) or [f(x) for f in layers],
            ACT_MUL: lambda act, a, b: act(a) * b,
        }
        exec(compile(tree, name, "exec"), scope)
        results.append((scope["forward"](block, Number(3), Number(5)), sorted(block.calls)))
    assert results[0] == results[1]
    assert together == [row.count("|") + 1 for row in rows if "|" in row]
