"""DDP, FSDP2 and tensor parallelism over two processes train what one process trains; so do ops of DTensors and chains."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

pytest.importorskip("torch.distributed")

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "tests/two_processes.py"


def test_two_processes_are_one(tmp_path):
    """Within the bound that the example derives; strict mode says that nothing was left to torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GPULAYERS_STRICT": "1"}
    # As torchrun sets them, at less expense.
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path / "store")], cwd=tmp_path, env=env | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)
    for name in ("DDP", "FSDP2"):
        assert re.search(rf"^{name}: 2 processes, <17 replaced, 0 left, 0 bypassed>; largest", printed[0], re.M)
    chains = ("conv2 → bn2 → add → relu", "norm → act", "conv1 → bn1 → relu")
    assert all(any(f"{chain}'" in line for line in printed[0].splitlines()) for chain in chains), printed[0]
    assert "GPT: the losses are one process's" in printed[0], printed[0]


def test_a_compiler_gives_dtensors_to_torchs_own_function(tmp_path):
    """On one process: DTensor has no rule for a custom op."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import gpulayers.torch as gt

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, w = (distribute_tensor(torch.randn(4, 6), mesh, [Shard(0)]) for _ in range(2))
        compiled = torch.compile(gt.functional.layer_norm, backend="eager", fullgraph=True)
        y = compiled(x, (6,), w[0], None)
        assert y.placements == x.placements
        torch.testing.assert_close(y.full_tensor(), torch.layer_norm(x.full_tensor(), (6,), w.full_tensor()[0]))
    finally:
        torch._dynamo.reset()
        dist.destroy_process_group()
