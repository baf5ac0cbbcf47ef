"""Random layers in array code, to be fused: element-wise work, masks (some of them drawn), broadcasts, and reductions
along the last axis.

Their backwards are no gradients, but as random as their forwards: a kernel must give what the code says, whatever that is.
"""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import numpy as np

_ONE = (
    "np.tanh({})", "1 / (1 + np.exp(-{}))", "np.sqrt(np.abs({}) + 0.5)", "{} / (1 + np.abs({}))", "np.log(1.5 + np.abs({}))",
    "np.exp(-np.abs({}))", "-{}", "2 * {} - 0.25", "np.square({})", "np.abs({})", "np.maximum({}, 0.1)", "np.minimum({}, 0.5)",
    "np.log1p(np.abs({}))", "np.sin({})", "np.clip({}, -0.75, 0.8)", "0.5 * {} ** 3", "np.sign(x) * {}",
)  # fmt: skip
_TWO = (
    "{} + {}", "{} - {}", "{} * {}", "{} / (1 + np.abs({}))", "np.where(x > 0.1, {}, {})", "np.where(mask, {}, {})",
    "np.maximum({}, {})", "0.3 * {} - 0.7 * {}", "{} * (x < 0) + {}",
)  # fmt: skip
_OF_ROWS = (
    "{}.sum(-1, keepdims=True)", "{}.mean(-1, keepdims=True)", "{}.max(-1, keepdims=True)", "{}.min(axis=-1, keepdims=True)",
    "np.sqrt(({} * {}).mean(-1, keepdims=True) + 0.1)",
)  # fmt: skip
_DRAWN = (
    "gl.random.uniform(x.shape, like=x) >= 0.3", "gl.random.bits(x.shape, like=x) < 2**31",
    "gl.random.uniform((*x.shape[:-1], 1), like=x) < 0.8", "gl.random.bits(x.shape[-1:], like=x) > 10**9",
)  # fmt: skip
"""Masks: for each number, each row, each column."""
_HEAD = '''"""A random layer."""

import numpy as np

import gpulayers as gl


@gl.register
class {name}(gl.Layer):
    def build(self, *shapes):
        self.w = self.add_weight("w", shapes[0][-1:], init=1.25)
        self.b = self.add_weight("b", (), init=0.75)

    def output_shape(self, *shapes):
        return {outputs}

'''


class _Code:
    """The lines of one direction, and the values that they have so far, by what they follow."""

    def __init__(self, random: np.random.Generator, full: list[str]):
        self.random, self.lines = random, ["w, b = self.w.data, self.b.data"]
        self.values = {"full": list(full), "row": [], "column": ["w"], "one": ["b"]}

    def any(self, *kinds: str) -> str:
        found = [v for kind in kinds for v in self.values[kind]]
        return str(self.random.choice(found[-3:] if len(found) > 3 and self.random.random() < 0.7 else found))

    def add(self, kind: str, text: str) -> None:
        name = f"v{sum(map(len, self.values.values()))}"
        self.lines.append(f"{name} = {text}")
        self.values[kind].append(name)

    def step(self) -> None:
        roll = self.random.random()
        if roll < 0.25:
            reduction = str(self.random.choice(_OF_ROWS))
            value = self.any("full")
            self.add("row", reduction.format(*[value] * reduction.count("{}")))
        elif roll < 0.35 and len(self.values["row"]):
            self.add("row", self._one(self.any("row")))
        elif roll < 0.4:
            self.add("column", self._one(self.any("column")))
        elif roll < 0.7:
            self.add("full", self._one(self.any("full")))
        else:
            two = str(self.random.choice(_TWO))
            kinds = ["row", "row", "full", "column", "one"] if self.values["row"] else ["full", "column", "one"]
            self.add("full", two.format(self.any("full"), self.any(str(self.random.choice(kinds)))))

    def _one(self, value: str) -> str:
        allowed = [
            t for t in _ONE if "x" not in t.replace("exp", "").replace("max", "") or value in self.values["full"]
        ]
        text = str(self.random.choice(allowed))
        return text.format(*[value] * text.count("{}"))


def layer(seed: int, folder: pathlib.Path) -> tuple[Any, list[tuple]]:
    """(a layer, shapes of its inputs) from a seed; its source is a file in ``folder``."""
    random = np.random.default_rng(seed)
    lead = [(3,), (1,), (2, 3), (5,)][random.integers(4)]
    shape = (*lead, int(random.choice([1, 2, 5, 8, 13, 33])))
    count, ys = int(random.integers(1, 3)), int(random.integers(1, 3))
    xs = ["x", "x1"][:count]
    forward = _Code(random, xs)
    forward.lines.append("mask = (x > -0.3) & (x < 0.6)")
    chance = np.random.default_rng([seed, 1])
    if chance.random() < 0.25:
        forward.add("full", "gl.random.normal(x.shape, like=x)")
    for _ in range(int(random.integers(3, 10))):
        forward.step()
    outputs = [str(random.choice(forward.values["full"][-3:])) + " * 1.0" for _ in range(ys)]
    rows = len(forward.values["row"]) and random.random() < 0.3
    drawn = [f"drawn{i} = {chance.choice(_DRAWN)}" for i in range(chance.integers(-2, 3))]
    masks = [line.partition(" ")[0] for line in drawn]
    outputs = [f"np.where({chance.choice(masks)}, {y}, 0.2 * x)" if drawn else y for y in outputs]
    forward.lines += drawn
    if rows:
        outputs[-1] = forward.any("row")
    kept = [*xs, *(n for n in (*forward.values["full"][count:], *forward.values["row"]) if random.random() < 0.5)]
    kept += masks
    dys = [f"dy{i}" for i in range(ys)]
    backward = _Code(random, [*xs, *dys[: ys - bool(rows)]])
    backward.values["row"] += dys[ys - bool(rows) :] + [k for k in kept if k in forward.values["row"]]
    backward.values["full"] += [k for k in kept if k in forward.values["full"] and k not in xs]
    backward.lines = [f"{', '.join(kept)}, = self.saved", *backward.lines, "mask = (x > -0.2)"]
    renamed = {"full": [], "row": [], "column": ["w"], "one": ["b"]}
    for kind in ("full", "row"):
        renamed[kind] = backward.values[kind]
    backward.values = renamed
    for k in range(int(random.integers(3, 10))):
        before = {kind: list(v) for kind, v in backward.values.items()}
        backward.step()
        for kind, names in backward.values.items():  # its own names, whatever forward's are called
            if len(names) > len(before[kind]):
                old, new = names[-1], f"u{k}"
                names[-1] = new
                backward.lines[-1] = backward.lines[-1].replace(f"{old} = ", f"{new} = ", 1)
    full = backward.any("full")
    axes = tuple(range(len(shape) - 1))
    backward.lines.append(f"self.w.grad += ({full} * {backward.any('full')}).sum({axes})")
    product = f"{backward.any('full', 'row')} * {backward.any('full')}"
    backward.lines.append(f"self.b.grad += np.abs({product}).sum()")  # of terms that cancel, float32 knows too little
    dxs = [f"{backward.any('full')} * {chance.choice(masks) if drawn else 0.9}" for _ in xs]
    name = f"Random{seed}"
    row_shape = "(*shapes[0][:-1], 1)"
    said = ["shapes[0]"] * (ys - bool(rows)) + [row_shape] * bool(rows)
    text = _HEAD.format(name=name, outputs=said[0] if ys == 1 else f"({', '.join(said)})")
    text += _method("forward", xs, [*forward.lines, f"self.save({', '.join(kept)})"], outputs)
    text += _method("backward", dys, backward.lines, dxs)
    path = folder / f"random_{seed}.py"
    path.write_text(text)
    return _made(path, name), [shape] * count


_CUT = """

class Cut{seed}(Random{seed}):
    def build(self, *shapes):
        super().build(*shapes)
        self.m = self.add_weight("m", (shapes[0][-1],) * 2, init="fan_in_uniform")

    def forward(self, *xs):
        self.save(xs[0])
        first = {first}
        ys = super().forward(first, *xs[1:])
        ys = ys if isinstance(ys, tuple) else (ys,)
        y = {y}
        return (y, *ys[1:]) if ys[1:] else y

    def backward(self, *dys):
        (x,) = self.saved
        dy = {dy}
        dxs = super().backward(dy, *dys[1:])
        dxs = dxs if isinstance(dxs, tuple) else (dxs,)
        g = dxs[0]
        self.m.grad += x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, x.shape[-1])
        dx = {dx}
        return (dx, *dxs[1:]) if dxs[1:] else dx
"""
_CUTS = {
    "first": ("xs[0] @ self.m", "xs[0] - xs[0].mean(0)", "xs[0]"),
    "y": ("ys[0] - ys[0].mean(0)", "np.tanh(ys[0] - ys[0].sum(0) * 0.1)", "ys[0] * 1.5"),
    "dy": ("dys[0] - dys[0].mean(0)", "dys[0]"),
    "dx": ("g @ self.m.T", "g - g.mean(0)", "g + (g @ self.m) * x"),
}


def cut(seed: int, folder: pathlib.Path) -> tuple[Any, list[tuple]]:
    """As ``layer``, with matrix products and sums over the batch before and after."""
    _, shapes = layer(seed, folder)
    random = np.random.default_rng([seed, 2])
    lines = {name: str(random.choice(ways)) for name, ways in _CUTS.items()}
    text = (folder / f"random_{seed}.py").read_text().replace("@gl.register\n", "")
    path = folder / f"cut_{seed}.py"
    path.write_text(text + _CUT.format(seed=seed, **lines))
    return _made(path, f"Cut{seed}"), shapes


def _made(path: pathlib.Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def _method(name: str, arguments: list[str], lines: list[str], results: list[str]) -> str:
    body = [*lines, f"return {', '.join(results)}"]
    return "\n".join([f"    def {name}(self, {', '.join(arguments)}):", *(f"        {line}" for line in body)]) + "\n\n"
