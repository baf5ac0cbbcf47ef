"""``gpulayers bench --host``: what it counts, what it says, and its exit status."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpulayers.bench.measuring import launching  # noqa: E402

from gpulayers.cli import main  # noqa: E402
from gpulayers.inventory import ops  # noqa: E402
from gpulayers.testing.null_driver import null_driver  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")


def test_every_op_of_the_table_is_measured():
    """Those with a step of training; optimizers have tests of their own."""
    measured = {subject.op for subject in launching.subjects()}
    assert measured >= {op.name for op in ops() if op.backward is not None}


def test_what_is_counted():
    """Numbers that do not vary from run to run."""
    chosen = {s.op: s for s in launching.subjects()}
    with null_driver(compiled=False) as driver:
        rows = {
            name: launching.measure(chosen[name], driver, turns=1) for name in ("relu", "layer_norm", "cross_entropy")
        }
    counted = {name: (row["launches"], row["allocations"]) for name, row in rows.items()}
    assert counted == {"relu": (2, 2), "layer_norm": (3, 8), "cross_entropy": (3, 7)}
    row = rows["relu"]
    assert row["torch_python_calls"] < row["python_calls"] < row["torch_python_calls"] + 16
    assert all(row[f"{name}_us"] > 0 for name in ("call", "torch_call", "step", "torch_step"))


def test_a_call_that_is_not_taped_is_an_error(monkeypatch):
    from gpulayers.launch import _settings

    monkeypatch.setattr(_settings, "enabled", False)
    with null_driver(compiled=False) as driver, pytest.raises(RuntimeError, match="relu: its calls are not taped"):
        launching.measure(next(s for s in launching.subjects() if s.op == "relu"), driver, turns=1)


@pytest.mark.parametrize(
    "ratio, status, last", [(1.2, 0, "all 1 limits are kept"), (1.4, 1, "over their limit: 20 × linear")]
)
def test_command_line(tmp_path, capsys, monkeypatch, ratio, status, last):
    names = ("call", "torch_call", "step", "torch_step")
    row = {"op": "linear", "launches": 5, "allocations": 5} | {f"{n}_us": 1.0 for n in names}
    row |= dict.fromkeys(("python_calls", "c_calls", "torch_python_calls", "torch_c_calls"), 3)
    limits = [{"what": "20 × linear", "ratio": ratio, "most": 1.3}]
    yardsticks = dict.fromkeys(("relu_us", "tape_us", "adamw_us", "torch_adamw_us"), 1.0)
    monkeypatch.setattr(launching, "measured", lambda: {"yardsticks": yardsticks, "ops": [row], "limits": limits})
    assert main(["bench", "--host", "--out", str(tmp_path)]) == status
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert json.loads((tmp_path / "host.json").read_text())["limits"] == limits


def test_what_is_held_to_a_limit(monkeypatch):
    """One launch, AdamW, and a chain of each kind of layer."""
    monkeypatch.setattr(launching, "CHAIN", 1)
    monkeypatch.setattr(launching, "ADAMW_TENSORS", 2)
    found = launching.measured(turns=4, only=["linear"])
    assert [r["most"] for r in found["limits"]] == [1.3, 1.5, 0.45] and all(r["ratio"] > 0 for r in found["limits"])
    assert {s.limit for s in launching.subjects()} == {"", "linear", "conv", "norm", "element-wise"}


@pytest.mark.parametrize("name", launching.MODELS)
def test_whole_models_are_taped(name, driver):
    """Their steps are measured, and every one of their calls is replayed."""
    from gpulayers import dispatch

    steps = launching.training_steps(launching.MODELS[name], turns=1)
    assert set(steps) == {"patched", "fused"} and min(steps.values()) > 0
    taped = [run.state() for p in dispatch._plans.values() for run in (p.run_forward, p.run_backward)]
    assert taped.count("taped") > 12 and not [state for state in taped if state.startswith("not taped: ")]
