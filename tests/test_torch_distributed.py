"""DDP and FSDP2 over two processes train what one process trains."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch.distributed")

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/distributed.py"


def test_two_processes_are_one(tmp_path):
    """Within the bound that the example derives; strict mode says that nothing was left to torch."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GPULAYERS_STRICT": "1"}
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run([*launch, str(EXAMPLE)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("DDP", "FSDP2"):
        assert re.search(rf"^{name}: 2 processes, <16 replaced, 1 left, 0 bypassed>; largest", done.stdout, re.M)
