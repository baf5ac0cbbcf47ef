"""The packages of npm that some tests need, and scripts that run on them in Node.js."""

import os
import pathlib
import shutil
import subprocess

import pytest

CHECKOUT = pathlib.Path(__file__).parents[2]


def packages() -> pathlib.Path:
    """The folder that has node_modules: GPULAYERS_NPM, the checkout, or the folder beside it. Skips where there is none."""
    given = os.environ.get("GPULAYERS_NPM")
    places = [pathlib.Path(given)] if given else [CHECKOUT, CHECKOUT.parent]
    for place in places:
        if (place / "node_modules/@tensorflow/tfjs/package.json").is_file() and shutil.which("node"):
            return place
    how = "npm install --prefix .. @tensorflow/tfjs@4.22.0 @tensorflow/tfjs-backend-wasm@4.22.0"
    pytest.skip(f"it needs Node.js 20 and @tensorflow/tfjs: {how}, or GPULAYERS_NPM=the folder with node_modules")


def node(script: pathlib.Path, *arguments: object) -> str:
    """What a script prints; packages are found by NODE_PATH (require)."""
    env = os.environ | {"NODE_PATH": str(packages() / "node_modules")}
    done = subprocess.run(["node", script, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
