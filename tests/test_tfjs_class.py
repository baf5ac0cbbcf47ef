"""The JavaScript classes of recorded layers, in the real TensorFlow.js: values, gradients, a step of fit, no leaks."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from npm import linked, node, node_modules
from recorded.array_layers import CASES, DTYPES, Same
from recorded.expressions import RECORDED, SHAPE, Computes
from recorded.reference import reference

import gpulayers as gl
from gpulayers.export.recording import Unrecordable
from gpulayers.export.tfjs._class import class_text, weight_names

SCRIPT = pathlib.Path(__file__).parent / "recorded/tfjs_layers.cjs"
PACKAGES = ("@tensorflow/tfjs", "@tensorflow/tfjs-backend-wasm")
TOLERANCE = 1e-5

BY_DEFINITION = {
    "Maxima": (gl.MaxPool2d(3, 2, 1), [(None, 2, 5, 6)]),
    "Places": (gl.MaxPool2d(2, return_indices=True), [(None, 2, 4, 5)]),
    "Batches": (gl.BatchNorm2d(2), [(None, 2, 3, 3)]),
    "GroupedConv": (gl.Conv2d(2, 4, 2, stride=2, padding=1, groups=2, padding_mode="reflect"), [(None, 2, 4, 3)]),
    "Sequences": (gl.Conv1d(2, 3, 2, padding=1, padding_mode="circular"), [(None, 2, 4)]),
    "Volumes": (gl.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=1), [(None, 2, 2, 3, 2)]),
    "Transposed": (gl.ConvTranspose2d(2, 4, 2, 3, 1, 1, 2), [(None, 2, 2, 3)]),
    "Stack": (gl.Sequential(gl.RMSNorm(6), gl.Residual(gl.Linear(6, 6), gl.Mish()), gl.GLU()), [(None, 6)]),
}
CHANCE = {"Masks": (gl.Dropout(0.3), 1.0), "Slopes": (gl.RReLU(), -(1 / 8 + 1 / 3) / 2)}
"""Layers that draw, and the mean of what they give of ones (of minus ones)."""


def packed(a):
    """For JSON; None stays."""
    if a is None:
        return None
    dtype = {"i": "int32", "b": "bool"}.get(a.dtype.kind, "float32")
    numbers = np.asarray(a, float).reshape(-1).tolist()
    words = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    return {"shape": list(a.shape), "data": [words.get(str(v), v) for v in numbers], "dtype": dtype}


def case(name, layer, shapes, batch, training, integers=0):
    r = reference(layer, shapes, batch, training, integers)
    arrays = {"x": r.xs, "w": r.weights.values(), "y": r.ys, "dy": r.dys, "dx": r.dxs}
    arrays |= {"dw": r.gradients.values(), "after": r.after.values()}
    listed = {key: [packed(a) for a in values] for key, values in arrays.items()}
    return listed | {"name": name, "names": list(r.weights), "training": training}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """layers.js and cases.json for all of them."""
    modules = node_modules(*PACKAGES)
    layers = {**CASES, **BY_DEFINITION} | {name: (Computes(fs), [SHAPE]) for name, fs in RECORDED.items()}
    texts, cases = [], []
    for name, (layer, shapes) in layers.items():
        dtypes = DTYPES.get(name, ())
        texts.append(class_text(layer, name, shapes, dtypes=dtypes))
        for batch, training in ((6, True), (1, True), (5, False)):
            if batch > 1 or name not in ("Batches", "arrays"):  # which have a variance of one, or take two rows
                with np.errstate(all="ignore"):
                    cases.append(case(name, layer, shapes, batch, training, layer.n if dtypes else 0))
    for name, (layer, mean) in CHANCE.items():
        texts.append(class_text(layer, name, [(None, 40)]))
        cases.append(case(name, layer, [(None, 40)], 5, False))
        cases.append({"name": name, "x": [packed(np.full((50, 40), np.sign(mean)))], "mean": mean})
    folder = linked(tmp_path_factory.mktemp("classes"), modules)
    shutil.copy(SCRIPT, folder)
    known = ", ".join([*layers, *CHANCE])
    text = "module.exports = (tf) => {\n" + "\n".join(texts) + f"\nreturn {{{known}}};\n}};\n"
    (folder / "layers.js").write_text(text)
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder


@pytest.mark.parametrize("backend", ["cpu", "wasm"])
def test_in_tensorflow_js(folder, backend):
    """Values, gradients of inputs and weights, states, a step of SGD, in both modes, and no tensor left behind."""
    found = json.loads(node(folder / SCRIPT.name, folder, backend))
    assert len(found) > 2 * len({**CASES, **BY_DEFINITION, **RECORDED, **CHANCE})
    wrong = {}
    for done in found:
        errors = done.get("errors", {"raised": done.get("raised")})
        bad = {what: e for what, e in errors.items() if not (isinstance(e, int | float) and e < TOLERANCE)}
        if bad:
            wrong[done["name"]] = bad
    assert not wrong


def test_the_authors_lines_stand_above_what_they_became():
    text = class_text(CASES["Swish"][0], "Swish", [(None, 5)])
    assert re.search(
        r"// s = 1 / \(1 \+ np.exp\(-self.beta \* x\)\)\n +const s = tf.div\(1, tf.add\(1, tf.exp\(tf.mul\(tf.neg\(beta\), x\)\)\)\);",
        text,
    )
    assert "static className = 'Swish';" in text and text.endswith("tf.serialization.registerClass(Swish);\n")
    assert "if (kwargs.training)" not in text  # both modes are the same
    assert "if (kwargs.training)" in class_text(CASES["BatchCenter"][0], "B", [(None, 4)])


def test_weights_have_names_that_javascript_takes():
    class Named(Same):
        def __init__(self):
            self.part = gl.Linear(2, 2)
            for name in ("delete", "x", "1", "größe", "part_weight", "N"):
                self.add_weight(name, ())

    names = weight_names(Named())
    assert list(names) == list(Named().named_weights())
    assert len(set(names.values())) == len(names)
    assert all(re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) for name in names.values())
    assert not {"delete", "x", "N"} & set(names.values())


def test_a_comment_ends_where_its_line_does(tmp_path):
    class Odd(Same):
        def __repr__(self):
            return "Odd(\n*/ `${x}`)"

        def forward(self, x):
            return x * len("  */ ${x} `")

        def backward(self, dy):
            return dy * 10

    text = class_text(Odd(), "Odd", [SHAPE])
    assert "\u2028" not in text and 'len("  */ ${x} `")' in text
    assert text.startswith("// Odd( */ `${x}`), recorded")


def test_what_tensorflow_js_lacks_is_refused():
    class Big(Same):
        def forward(self, x):
            return x * (np.array([2**40, 1, 2, 3]) // 2 * x.astype(np.int64)).astype(x.dtype)

        def backward(self, dy):
            return dy

    with pytest.raises(Unrecordable, match=r"test_tfjs_class.py:\d+: .*2\*\*40.* beyond int32"):
        class_text(Big(), "Big", [SHAPE])
