"""The JavaScript classes of recorded layers, in the real TensorFlow.js: values, gradients, a step of fit, no leaks."""

import json

import numpy as np
from recorded import npm
from recorded.array_layers import CASES, DTYPES
from recorded.reference import reference

from gpulayers.export.tfjs._class import class_text

SCRIPT = npm.CHECKOUT / "tests/recorded/tfjs_layers.cjs"
TOLERANCE = 1e-5


def packed(a):
    """For JSON; None stays."""
    if a is None:
        return None
    dtype = {"i": "int32", "b": "bool"}.get(a.dtype.kind, "float32")
    return {"shape": list(a.shape), "data": np.asarray(a, float).reshape(-1).tolist(), "dtype": dtype}


def case(name, layer, shapes, batch, training, integers=0):
    r = reference(layer, shapes, batch, training, integers)
    arrays = {"x": r.xs, "w": r.weights.values(), "y": r.ys, "dy": r.dys, "dx": r.dxs}
    arrays |= {"dw": r.gradients.values(), "after": r.after.values()}
    listed = {key: [packed(a) for a in values] for key, values in arrays.items()}
    return listed | {"name": name, "names": list(r.weights), "training": training}


def held_in_node(folder, layers):
    """{name: errors of each case} for {name: (layer, input shapes, dtypes)}."""
    texts, cases = [], []
    for name, (layer, shapes, dtypes) in layers.items():
        texts.append(class_text(layer, name, shapes, dtypes=dtypes))
        for batch, training in ((6, True), (1, True), (5, False)):
            cases.append(case(name, layer, shapes, batch, training, getattr(layer, "n", 0) if dtypes else 0))
    (folder / "layers.js").write_text(
        "module.exports = (tf) => {\n" + "\n".join(texts) + f"\nreturn {{{', '.join(layers)}}};\n}};\n"
    )
    (folder / "cases.json").write_text(json.dumps(cases))
    found = {}
    for done in json.loads(npm.node(SCRIPT, folder)):
        found.setdefault(done["name"], []).append(done)
    return found


def check(found):
    wrong = {}
    for name, cases in found.items():
        for done in cases:
            errors = done.get("errors", {"raised": done.get("raised")})
            bad = {what: e for what, e in errors.items() if not (isinstance(e, int | float) and e < TOLERANCE)}
            if bad:
                wrong[name] = bad
    assert not wrong


def test_array_layers(tmp_path):
    """Values, gradients of inputs and weights, states, a step of SGD, in both modes, and no tensor left behind."""
    npm.packages()
    found = held_in_node(tmp_path, {n: (layer, shapes, DTYPES.get(n, ())) for n, (layer, shapes) in CASES.items()})
    assert found.keys() == CASES.keys()
    check(found)
