"""A layer as the text of its JavaScript class: what a recording of it says, written so that its author recognises it.

The layer's own backward travels: ``call`` is a ``tf.customGrad``, whose gradients are those of the recorded backward. The
weights are among its arguments, because it takes and gives gradients for arguments alone; ``w.read()`` gives the variable
itself, so the tape of ``fit`` hands it its gradient.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from gpulayers.export.recording import (
    Formula,
    Node,
    Recording,
    Unrecordable,
    authors_name,
    check_replay,
    needed,
    record,
)
from gpulayers.export.tfjs._operations import TYPES, call, number, takes_twice
from gpulayers.layers._layer import Layer

SHARED_TEXT = ""
"""What several classes share: nothing."""

_WORDS = (
    "N tf save inputs kwargs arguments packed parts ys layer await break case catch class const continue debugger default "
    "delete do else enum eval export extends false finally for function if implements import in instanceof interface let "
    "new null package private protected public return static super switch this throw true try typeof undefined var void "
    "while with yield async of get set NaN Infinity Math Array Object"
)
_RESERVED = frozenset(_WORDS.split())
_LONGEST = 96


def weight_names(layer: Layer) -> dict[str, str]:
    """{name in ``named_weights``: name in ``addWeight``}: letters, digits and _, a letter first, none of them twice."""
    names: dict[str, str] = {}
    for name in layer.named_weights():
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        plain = plain if plain[0].isalpha() else f"w{plain}"
        while plain in _RESERVED or plain in names.values() or re.fullmatch(r"d?[xy]\d*|v\d+", plain):
            plain += "_"
        names[name] = plain
    return names


def class_text(
    layer: Layer,
    class_name: str,
    input_shapes: Sequence[tuple],
    *,
    dtypes: Sequence[Any] = (),
) -> str:
    """The source of a class that extends tf.layers.Layer and registers itself; ``tf`` is free in it.

    input_shapes: of the layer's inputs, None for the batch, which is first; other sizes are known, and baked in as its
    settings are. dtypes: the inputs', float32 where not said. Its weights are made by ``addWeight`` in the order, layouts
    and shapes of ``named_weights``, under ``weight_names``; ``call`` follows ``kwargs.training``.

    Raises Unrecordable for code that cannot be read, or whose recording does not give what the layer gives.
    """
    shapes = [tuple(shape) for shape in input_shapes]
    modes = [record(layer, shapes, training=training, dtypes=dtypes) for training in (True, False)]
    for recording in modes:
        check_replay(layer, recording, shapes, dtypes)
    names = weight_names(layer)
    training, evaluation = (_Function(recording, names).lines() for recording in modes)
    if training != evaluation:
        training = ["if (kwargs.training) {", *_indented(training), "}", *evaluation]
    lines = [
        f"// {_comment(repr(layer))}, recorded: under each line of its author's stands what that line became.",
        f"class {class_name} extends tf.layers.Layer {{",
        f"  static className = '{class_name}';",
        "",
        "  constructor(config = {}) {",
        "    super(config);",
        "  }",
        "",
        "  getConfig() {",
        "    return super.getConfig();  // its settings are constants below",
        "  }",
        "",
        *_indented(_build(modes[0], names)),
        "",
        *_indented(_output_shape(modes[0])),
        "",
        "  call(inputs, kwargs) {",
        *_indented(training, 2),
        "  }",
        "}",
        f"tf.serialization.registerClass({class_name});",
    ]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """One line of JavaScript, which ends lines where Python does not."""
    return re.sub(r"[\n\r\u2028\u2029]+", " ", text)


def _indented(lines: list[str], by: int = 1) -> list[str]:
    return ["  " * by + line if line else line for line in lines]


def _build(recording: Recording, names: dict[str, str]) -> list[str]:
    """The weights, at zero: their values come with the model."""
    own = []
    for name, node in recording.forward.weights.items():
        rest = f"tf.initializers.zeros(), undefined, {number(recording.trainable[name])}"
        own.append(f"this.addWeight('{names[name]}', {number(node.shape)}, {TYPES[node.kind]}, {rest}),")
    listed = ["  this.own = [", *(f"    {line}" for line in own), "  ];"] if own else ["  this.own = [];"]
    return ["build(inputShape) {", *listed, "  super.build(inputShape);", "}"]


def _output_shape(recording: Recording) -> list[str]:
    several = len(recording.forward.inputs) > 1
    batch = "inputShape[0][0]" if several else "inputShape[0]"
    shapes = [f"[{', '.join(batch if n is None else number(n) for n in shape)}]" for shape in recording.output_shapes]
    text = shapes[0] if len(shapes) == 1 else f"[{', '.join(shapes)}]"
    return ["computeOutputShape(inputShape) {", f"  return {text};", "}"]


class _Function:
    """The statements of ``call`` for one mode."""

    def __init__(self, recording: Recording, weight_names: dict[str, str]):
        self.forward, self.backward = recording.forward, recording.backward
        self.ys = [n for n in self.forward.outputs if n is not None]
        self.given = {node: node.name for node in (*self.forward.inputs, *self.backward.inputs)}
        self.given |= {node: weight_names[name] for name, node in self.forward.weights.items()}

    def lines(self) -> list[str]:
        weights = list(self.forward.weights.values())
        body, names = self._forward()
        gradient, results = self._backward(names)
        saved = ", ".join(names[n] for n in self.backward.saved)
        arguments = "".join(f"{self.given[n]}, " for n in (*self.forward.inputs, *weights))
        several = len(self.ys) > 1
        y, dy = self._packed(names) if several else (self._output(names), self.given[self.backward.inputs[0]])
        inner = [
            *body,
            f"save([{saved}]);",
            *self._states(names),
            f"return {{value: {y}, gradFunc: ({dy}, [{saved}]) => {{",
            *_indented([*self._unpacked(), *gradient, f"return [{', '.join(results)}];"]),
            "}};",
        ]
        if _mentions_batch(inner):
            inner.insert(0, f"const N = {self.given[self.forward.inputs[0]]}.shape[0];")
        lines = [f"const f = tf.customGrad(({arguments}save) => {{", *_indented(inner), "});"]
        given = "...[].concat(inputs)" + (", ...this.own.map((w) => w.read())" if weights else "")
        if not several:
            return [*lines, f"return f({given});"]
        return ["return tf.tidy(() => {", *_indented([*lines, *self._parted(given)]), "});"]

    # --- both directions ---------------------------------------------------------------------------------------------

    def _forward(self) -> tuple[list[str], dict[Node, str]]:
        names = {n: self.given[n] for n in (*self.forward.inputs, *self.forward.weights.values())}
        roots = {*self.forward.roots, *self.backward.saved}
        nodes = needed(roots, names)
        return _statements(nodes, roots, names, set(self.given.values())), names

    def _backward(self, forward_names: dict[Node, str]) -> tuple[list[str], list[str]]:
        """(statements, one expression for each argument: tensors of their own, of the argument's shape)."""
        known = {n: forward_names[n] for n in self.backward.saved}
        known |= {n: self.given[n] for n in self.backward.inputs}
        weights = self.forward.weights
        own = {n: self.given[n] for n in (*self.forward.inputs, *weights.values())}
        taken = {*known.values(), *own.values()}
        lines = _statements(self.backward.nodes, set(self.backward.roots), known, taken)
        gradients = [*self.backward.outputs, *(self.backward.gradients.get(name) for name in weights)]
        arguments = [*self.forward.inputs, *weights.values()]
        results, used = [], {*self.backward.inputs, *self.backward.saved}
        for node, argument in zip(gradients, arguments):
            if node is None:
                results.append(f"tf.zeros({number(argument.shape)})")
            else:
                results.append(f"tf.clone({known[node]})" if node in used else known[node])
                used.add(node)
        return lines, results

    def _states(self, names: dict[Node, str]) -> list[str]:
        order = list(self.forward.weights)
        return [f"this.own[{order.index(name)}].write({names[n]});" for name, n in self.forward.states.items()]

    def _output(self, names: dict[Node, str]) -> str:
        (y,) = self.ys
        return f"tf.clone({names[y]})" if y in self.given else names[y]

    # --- several outputs: customGrad has one, so they travel as columns of one ---------------------------------------

    def _widths(self) -> str:
        return number([math.prod(n.shape[1:]) for n in self.ys])

    def _packed(self, names: dict[Node, str]) -> tuple[str, str]:
        if any(n.shape[:1] != (Formula(0, 1),) for n in self.ys):
            raise Unrecordable("several outputs, one of which is not rows of the batch", "outputs (N, …)")
        floats = [names[n] if n.kind == "f" else f"tf.cast({names[n]}, 'float32')" for n in self.ys]
        columns = [f"tf.reshape({y}, [N, {math.prod(n.shape[1:])}])" for y, n in zip(floats, self.ys)]
        return f"tf.concat([{', '.join(columns)}], 1)", "packed"

    def _unpacked(self) -> list[str]:
        if len(self.ys) == 1:
            return []
        given = self.backward.inputs
        parts = [f"const {self.given[dy]} = {_part(f'parts[{i}]', dy)};" for i, dy in enumerate(given)]
        return [f"const parts = tf.split(packed, {self._widths()}, 1);", *parts]

    def _parted(self, given: str) -> list[str]:
        shaped = [_part(f"ys[{i}]", n) for i, n in enumerate(self.ys)]
        return [
            "const N = [].concat(inputs)[0].shape[0];",
            f"const ys = tf.split(f({given}), {self._widths()}, 1);",
            f"return [{', '.join(shaped)}];",
        ]


def _part(columns: str, node: Node) -> str:
    """A tensor of the node's shape and type from columns of floats."""
    shaped = f"tf.reshape({columns}, {number(node.shape)})"
    return shaped if node.kind == "f" else f"tf.cast({shaped}, {TYPES[node.kind]})"


def _mentions_batch(lines: list[str]) -> bool:
    return any(re.search(r"\bN\b", line) for line in lines if not line.lstrip().startswith("//"))


def _statements(nodes: list[Node], roots: set[Node], names: dict[Node, str], taken: set[str]) -> list[str]:
    """Under each line of the author's, what became of it. ``names`` gets the name of every node that has one.

    A value that is used once, on its own line, stands inside the expression that uses it.
    """
    users: dict[Node, list[Node]] = {}
    for node in nodes:
        for operand in node.inputs:
            users.setdefault(operand, []).append(node)
    lines: list[str] = []
    at, taken = None, taken | _RESERVED
    for node in nodes:
        if node.op == "draw":
            continue
        text = call(node, [names[i] for i in node.inputs if i.op != "draw"])
        use = users.get(node, [])
        number_alone = node.op == "const" and not node.shape
        alone = len(use) == 1 and use[0].place == node.place and not takes_twice(use[0]) and len(text) < _LONGEST
        if node not in roots and (number_alone or alone):
            names[node] = text
            continue
        if number_alone and node.kind == "f":
            text = f"tf.scalar({text})"
        names[node] = _name(node, use, taken)
        taken.add(names[node])
        if node.place != at and node.place is not None and node.place.text:
            lines.append(f"// {_comment(node.place.text)}")
        at = node.place
        lines.append(f"const {names[node]} = {text};")
    return lines


def _name(node: Node, use: list[Node], taken: set[str]) -> str:
    """The author's own, for what a line assigns at last; else one that counts."""
    own = authors_name(node, use)
    names = (
        itertools.chain([own], (f"{own}{k}" for k in itertools.count(2)))
        if own
        else (f"v{k}" for k in itertools.count(1))
    )
    return next(name for name in names if name not in taken)
