"""The road as a new user goes it, command by command: a layer of one's own, from nothing to Node.js."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from npm import installed, node, node_modules

RIPPLE = '''
import numpy as np

import gpulayers as gl


@gl.register
class Ripple(gl.Layer):
    """y = x + a sin x, a learned for each feature: (N, C) → (N, C)."""

    def build(self, input_shape):
        self.a = self.add_weight("a", (input_shape[1],), init=0.5)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        self.save(x)
        return x + self.a * np.sin(x)

    def backward(self, dy):
        (x,) = self.saved
        self.a.grad += (dy * np.sin(x)).sum(0)
        return dy * (1 + self.a * np.cos(x))
'''

TRAIN = """
import json
import gpulayers as gl
from gpulayers.demo import digits
from ripple import Ripple

x, y, test_x, test_y = digits()
model = gl.Sequential(gl.Conv2d(1, 4, 3), gl.BatchNorm2d(4), gl.Flatten(), gl.Linear(144, 64), Ripple(), gl.Linear(64, 10))
model.fit(x, y, epochs=2, progress=False)
gl.save(model, "digits-model")
json.dump(test_x.tolist(), open("input.json", "w"))
json.dump(model.predict(test_x).tolist(), open("output.json", "w"))
json.dump(test_y.tolist(), open("labels.json", "w"))
"""


def test_from_nothing_to_node(tmp_path):
    pytest.importorskip("sklearn")
    modules = node_modules("@tensorflow/tfjs")

    def python(*words: str) -> str:
        env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python("-m", "gpulayers", "new", "Ripple")
    assert "class Ripple(gl.Layer)" in (tmp_path / "ripple.py").read_text("utf-8")
    (tmp_path / "ripple.py").write_text(RIPPLE, "utf-8")
    assert "Ripple passes" in python("-m", "gpulayers", "check", "ripple.py:Ripple", "--input-shape", "4,6")
    (tmp_path / "train.py").write_text(TRAIN)
    python("train.py")
    python("-m", "gpulayers", "export", "digits-model", "--layers", "ripple.py", "--out", "digits-app")

    installed(tmp_path / "digits-app", modules)
    y = np.array(json.loads(node("predict.mjs", "../input.json", cwd=tmp_path / "digits-app")))
    want, labels = (np.array(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("output", "labels"))
    assert y.shape == (359, 10) and (abs(y - want) / np.maximum(1, abs(want))).max() < 1e-5
    assert (y.argmax(1) == labels).mean() > 0.85
