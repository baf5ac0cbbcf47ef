"""The page of an exported model, in a real browser: what a visitor draws and fills in is predicted, and can be taught."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from npm import linked, node, node_modules
from test_tfjs import Case, faults

import gpulayers as gl
from gpulayers import demo

HERE = pathlib.Path(__file__).parent
THREE = [
    [(0.3, 0.2), (0.5, 0.12), (0.68, 0.25), (0.62, 0.42), (0.45, 0.48)],
    [(0.45, 0.48), (0.66, 0.56), (0.7, 0.75), (0.5, 0.88), (0.28, 0.78)],
]


def visited(folder: pathlib.Path, *visits: dict) -> list[dict]:
    """What happens on each page: no complaint, and no request to anybody but this machine."""
    modules = node_modules("@tensorflow/tfjs", "playwright-core")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    for visit in visits:
        linked(pathlib.Path(visit["folder"]), modules)
    (folder / "plan.json").write_text(
        json.dumps({"modules": str(modules.parent), "chromium": chromium, "visits": visits})
    )
    found = json.loads(node(HERE / "node" / "page.mjs", folder / "plan.json"))
    for page in found:
        assert not page["complaints"] and page["requests"]
        assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in page["requests"])
    return found


def of_digits(folder: pathlib.Path) -> dict:
    """A model with a layer of one's own, trained; a three is drawn, and taught as a five."""
    x, y, *_ = demo.digits()
    model = gl.Sequential(
        gl.Conv2d(1, 8, 3, padding=1), demo.Swish(), gl.MaxPool2d(2), gl.Flatten(), gl.Dropout(0.2), gl.Linear(128, 10)
    )
    model.fit(x[:800], y[:800], epochs=6, optimizer=gl.AdamW(lr=1e-2), progress=False)
    model.export(folder / "digits")
    kept = pathlib.Path(os.environ.get("GPULAYERS_SCREENSHOTS", folder)) / "digits.png"
    return {"folder": str(folder / "digits"), "strokes": THREE, "label": 5, "screenshot": str(kept)}


def on_webgl(folder: pathlib.Path) -> Case:
    """A layer of one's own between two that TensorFlow.js has; few, as each operation is a shader that is compiled."""
    model = gl.Sequential(gl.Conv2d(2, 3, 3, padding=1), demo.Swish(), gl.Flatten(), gl.Linear(126, 4))
    return Case(folder / "webgl", model, (3, 2, 6, 7), training=True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """All visits, in one browser; the screenshot is kept in the folder GPULAYERS_SCREENSHOTS."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("pages")
    model, x = gl.Sequential(gl.Linear(4, 3), gl.SiLU()), np.float32([[1, -2.5, 0.25, 3]])
    y = model(x)
    model.export(folder / "form")
    drawing, case = of_digits(folder), on_webgl(folder)
    found = visited(folder, drawing, {"folder": str(folder / "form"), "numbers": x[0].tolist()}, case.asked())
    return {"drawing": drawing, "y": y, "case": case, "found": found}


def test_drawing(pages):
    drawn, screenshot = pages["found"][0], pathlib.Path(pages["drawing"]["screenshot"])
    assert drawn["answers"] == ["3", "5"] and drawn["learned"] == "right: 1 of 1, before: 0"
    assert abs(sum(drawn["shares"]) - 100) < 1 and len(drawn["shares"]) == 10
    assert screenshot.read_bytes().startswith(b"\x89PNG")


def test_form(pages):
    assert np.allclose(pages["found"][1]["output"], pages["y"][0], atol=1e-4)


def test_gradients_on_webgl(pages):
    found = pages["found"][2]["gradients"]
    if found is None:
        pytest.skip("needs a Chromium with WebGL (--use-angle=swiftshader)")
    assert not faults([pages["case"]], [found | {"leaked": 0}])
