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
    "playwright-core": "1.65.1",
}


def node_modules(*packages: str) -> pathlib.Path:
    """The folder node_modules that has these packages: in GPULAYERS_NPM, in the checkout or beside it."""
    if shutil.which("node") is None:
        pytest.skip("needs Node.js 20 or newer (node)")
    given = os.environ.get("GPULAYERS_NPM")
    for folder in [pathlib.Path(given)] if given else [ROOT, ROOT.parent]:
        if all((folder / "node_modules" / name).is_dir() for name in packages):
            return folder / "node_modules"
    wanted = " ".join(f"{name}@{VERSIONS[name]}" for name in packages)
    pytest.skip(f"needs npm install --prefix FOLDER {wanted}, and GPULAYERS_NPM=FOLDER")


def linked(folder: pathlib.Path, modules: pathlib.Path) -> pathlib.Path:
    """``folder`` with what ``npm install`` would put there."""
    (folder / "node_modules").symlink_to(modules)
    return folder


def installed(folder: pathlib.Path, modules: pathlib.Path) -> None:
    """``npm install`` in ``folder``. What it would fetch lies there before (the same files as in ``modules``, not copies),
    so that npm resolves package.json, finds all of it there, and asks nobody."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    shutil.copytree(modules, folder / "node_modules", symlinks=True, copy_function=_same)
    done = subprocess.run(
        ["npm", "install", "--offline", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def _same(source: str, target: str) -> None:
    if pathlib.Path(source).name.startswith("."):  # npm's own, which it writes into
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy2(source, target)


def node(*words: object, cwd: pathlib.Path | None = None) -> str:
    """What a script prints."""
    done = subprocess.run(["node", *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
