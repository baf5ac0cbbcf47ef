"""Where the packages from npm are that a test needs; without them it is skipped, and says how to get them."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
VERSIONS = {
    "@tensorflow/tfjs": "4.22.0",
    "@tensorflow/tfjs-backend-wasm": "4.22.0",
    "onnxruntime-web": "1.30.0",
    "playwright-core": "",
}


def node_modules(*packages: str) -> pathlib.Path:
    """The folder node_modules that has these packages: in GPULAYERS_NPM, in the checkout or beside it."""
    if shutil.which("node") is None:
        pytest.skip("needs Node.js 20 or newer (node)")
    given = os.environ.get("GPULAYERS_NPM")
    for folder in [pathlib.Path(given)] if given else [ROOT, ROOT.parent]:
        if all((folder / "node_modules" / name).is_dir() for name in packages):
            return folder / "node_modules"
    wanted = " ".join(f"{name}@{VERSIONS[name]}".rstrip("@") for name in packages)
    pytest.skip(f"needs npm install --prefix FOLDER {wanted}, and GPULAYERS_NPM=FOLDER")


def linked(folder: pathlib.Path, modules: pathlib.Path) -> pathlib.Path:
    """``folder`` with what ``npm install`` would put there."""
    (folder / "node_modules").symlink_to(modules)
    return folder


def node(*words: object, cwd: pathlib.Path | None = None) -> str:
    """What a script prints."""
    done = subprocess.run(["node", *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
