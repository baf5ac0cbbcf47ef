"""The page of an exported model, in a real browser: what a visitor draws and fills in is predicted, and can be taught."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from npm import linked, node, node_modules

import gpulayers as gl
from gpulayers import demo

HERE = pathlib.Path(__file__).parent
THREE = [
    [(0.3, 0.2), (0.5, 0.12), (0.68, 0.25), (0.62, 0.42), (0.45, 0.48)],
    [(0.45, 0.48), (0.66, 0.56), (0.7, 0.75), (0.5, 0.88), (0.28, 0.78)],
]


def visit(folder: pathlib.Path, **plan) -> dict:
    """What happens on the page of the model in ``folder``: no complaint, and no request to anybody but this machine."""
    modules = node_modules("@tensorflow/tfjs", "playwright-core")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    linked(folder, modules)
    plan |= {"folder": str(folder), "modules": str(modules.parent), "chromium": chromium, "query": "?backend=cpu"}
    (folder / "plan.json").write_text(json.dumps(plan))
    found = json.loads(node(HERE / "node" / "page.mjs", folder / "plan.json"))
    assert not found["complaints"] and found["requests"]
    assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in found["requests"])
    return found


def test_digits_are_drawn_and_taught(tmp_path):
    """… with a layer of one's own in the model; the screenshot is kept in GPULAYERS_SCREENSHOTS."""
    pytest.importorskip("sklearn")
    x, y, *_ = demo.digits()
    model = gl.Sequential(
        gl.Conv2d(1, 8, 3, padding=1), demo.Swish(), gl.MaxPool2d(2), gl.Flatten(), gl.Dropout(0.2), gl.Linear(128, 10)
    )
    model.fit(x, y, epochs=6, optimizer=gl.AdamW(lr=1e-2), progress=False)
    model.export(tmp_path / "digits")
    kept = pathlib.Path(os.environ.get("GPULAYERS_SCREENSHOTS", tmp_path))
    found = visit(tmp_path / "digits", strokes=THREE, label=5, screenshot=str(kept / "digits.png"))
    assert found["answers"] == ["3", "5"]  # when it was taught that this is a five
    assert abs(sum(found["shares"]) - 100) < 1 and len(found["shares"]) == 10
    assert found["learned"] == "right: 1 of 1, before: 0"
    assert (kept / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_filled_in(tmp_path):
    model = gl.Sequential(gl.Linear(4, 3), gl.SiLU())
    x = np.float32([[1, -2.5, 0.25, 3]])
    y = model(x)
    model.export(tmp_path / "form")
    assert np.allclose(visit(tmp_path / "form", numbers=x[0].tolist())["output"], y[0], atol=1e-5)
