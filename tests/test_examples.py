"""Every example runs (tests/test_torch_distributed.py runs those that want two processes)."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DISTRIBUTED = {ROOT / "examples/distributed.py", ROOT / "examples/train_gpt.py"}


@pytest.mark.parametrize("path", sorted(set((ROOT / "examples").glob("*.py")) - DISTRIBUTED), ids=lambda p: p.name)
def test_example(path, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
