"""``gpulayers bench --models``: whole models, tiny and on the CPU, and what becomes of one that fails."""

import functools
import importlib.util
import json
import re
import sys
import types

import pytest

torch = pytest.importorskip("torch")

from gpulayers.bench import report  # noqa: E402
from gpulayers.bench.measuring import whole, zoo  # noqa: E402
from gpulayers.bench.measuring.device import Cpu  # noqa: E402
from gpulayers.bench.measuring.whole import Job  # noqa: E402
from gpulayers.bench.models import gpt, resnet  # noqa: E402
from gpulayers.bench.models import zoo as models  # noqa: E402
from gpulayers.bench.models.kind import Kind, installed, tokens  # noqa: E402
from gpulayers.bench.reporting import models as reporting  # noqa: E402

from gpulayers.cli import main  # noqa: E402

PARAMETERS = {  # as published, or as the packages that have them count them
    "ResNet-50": 25_557_032, "GPT-2": 124_439_808, "ConvNeXt-T": 28_589_128, "U-Net": 664_455_684, "ViT-S": 22_050_664,
    "EfficientNet-B0": 5_288_548, "Llama-1B": 1_235_814_400,
}  # fmt: skip
ABOUT = {"device": "NVIDIA X100 1GB", "arch": "sm_90"}


@pytest.fixture
def quick(monkeypatch):
    """One step where there are many."""
    for name, steps in (("CHECKED", 2), ("TIMED", 1), ("TURNS", 1), ("PROFILED", 1)):
        monkeypatch.setattr(whole, name, steps)


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes(name):
    with torch.device("meta"):
        net = models.kinds("full")[name].net()
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


def test_the_same_model_and_batch_each_time():
    for kind in models.kinds("tiny").values():
        (a, xs), (b, ys) = kind.made(), kind.made()
        torch.testing.assert_close([*a.state_dict().values(), *xs], [*b.state_dict().values(), *ys], rtol=0, atol=0)
        assert all(x.is_contiguous(memory_format=kind.memory_format) for x in xs if x.dim() == 4)


def test_the_command_line(tmp_path, capsys, quick):
    """All models trained and run, plain and patched: right, a row each, a table and a plot; and it goes on with that."""
    words = ["bench", "--models", "--cpu", "--out", str(tmp_path), "--providers", "plain", "patched"]
    assert main(words) == 0
    found = json.loads((tmp_path / "models.json").read_text())
    rows = found["rows"]
    assert {(r["model"], r["mode"], r["way"]) for r in rows} == {
        (m, d, w) for m in PARAMETERS for d in whole.MODES for w in ("plain", "patched")
    }
    assert {(r["status"], r["precision"]) for r in rows} == {("ok", "float32")} and found["trying"] == []
    assert all(r["home"].startswith("gpulayers.bench.models.") for r in rows)
    assert all(0 < r["error"] <= 1 and r["ms"] > 0 and r["copies"] is not None for r in rows)
    losses = {(r["model"], r["mode"], r["way"]): r["losses"] for r in rows}
    for (model, mode, way), values in losses.items():
        # Of the first steps: then roundings grow, as between any two orders of summation.
        assert values[:2] == pytest.approx(losses[model, mode, "plain"][:2], rel=1e-4)
        assert mode == "inference" or values[-1] < values[0], (model, way)
    out = capsys.readouterr().out
    assert "training, float32: tiny sizes, " in out and "28 rows in" in out
    assert (tmp_path / "models.png").exists() and "| ViT-S | patched | " in (tmp_path / "models.md").read_text()
    assert main([*words, "--resume", "--models", "ViT-S", "--no-plots"]) == 0
    assert json.loads((tmp_path / "models.json").read_text())["rows"] == rows


def test_what_the_command_line_refuses(tmp_path, capsys):
    for words, rule in (
        (["--models", "VGG"], "models: the rule is some of ResNet-50, GPT-2, .*; got VGG"),
        (["--models", "--providers", "triton"], "--providers: the rule is some of plain, patched, .*; got triton"),
        (["--models", "--dtypes", "float16"], "--dtypes: the rule is some of bfloat16, float32; got float16"),
    ):
        assert main(["bench", *words, "--cpu", "--out", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert re.search(rule, message), message
    assert not [*tmp_path.iterdir()]


def run(folder, kinds, jobs, resume=False, **more):
    store = zoo.Store(folder, ABOUT, "tiny", resume)
    return zoo.run(Cpu(), store, kinds, jobs, progress=False, **more), store.rows


def test_compiled(tmp_path, quick, monkeypatch):
    """As torch.compile traces it; the compiler's code has its own tests."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    job = Job("GPT-2", "training", "patched+compiled", "bfloat16")
    one = gpt.TINY._replace(net=lambda: gpt.GPT(96, 32, 2, 1, 16, 0.0))
    status, (row,) = run(tmp_path, {"GPT-2": one}, [job])
    assert status == 0 and row["status"] == "ok" and 0 < row["error"] <= 1


def jobs(*names, way="plain"):
    return [Job(name, "training", way, "float32") for name in names]


def test_one_that_fails_is_a_row(tmp_path, quick, monkeypatch):
    """Without memory, without a package, too slow, wrong: the rest goes on."""

    def without_memory():
        raise torch.OutOfMemoryError("no memory")

    def too_slow():
        while True:
            pass

    def missing():
        import nowhere  # noqa: F401

    monkeypatch.setattr(zoo, "LIMIT", 1.5)
    fine, batch = gpt.TINY, tokens(2, 4, 8)
    kinds = {
        "memory": Kind(without_memory, batch),
        "slow": Kind(too_slow, batch),
        "package": Kind(missing, batch),
        "fine": fine,
    }
    status, rows = run(tmp_path, kinds, jobs(*kinds))
    assert status == 0 and [r["status"] for r in rows] == ["raised", "raised", "raised", "ok"]
    for row, reason in zip(
        rows, ("OutOfMemoryError: no memory", "TimeoutError: more than", "No module named 'nowhere'")
    ):
        assert reason in row["reason"]
    assert run(tmp_path, kinds, jobs("package", way="patched"))[0] == zoo.FAILED
    whole_run = {"rows": rows, "size": "tiny", "about": ABOUT, "machine": {"date": "2026-01-02", "commit": "abc1234"}}
    assert "| slow | training | plain | float32 | raised | TimeoutError: more than 2 s |" in reporting.markdown(
        whole_run
    )
    assert reporting.draw(whole_run, tmp_path / "none.png") is None


def test_wrong_results_get_no_time(tmp_path, quick, monkeypatch, capsys):
    """A patched model whose steps go elsewhere."""
    import gpulayers.torch as gt

    class Broken(gt.optim.SGD):
        def step(self):
            super().step()
            with torch.no_grad():
                self.param_groups[0]["params"][-1][0] += 1e-3

    monkeypatch.setattr(gt.optim, "SGD", Broken)
    asked = []

    def prepare(*how):
        asked.append(how[:2])
        raise ValueError("no compiler")

    todo = jobs("ResNet-50") + jobs("ResNet-50", way="patched")
    status, rows = run(tmp_path, {"ResNet-50": resnet.TINY}, todo, prepare=prepare)
    assert asked == [(resnet.TINY, False)] and "not compiled ahead: ValueError: no compiler" in capsys.readouterr().out
    assert status == zoo.FAILED and [r["status"] for r in rows] == ["ok", "wrong"]
    assert rows[1]["ms"] is None and "times the allowed error after 2 steps" in rows[1]["reason"]


def test_a_death_is_a_row(tmp_path, quick):
    """What was at work when a process died is known to the next, which goes on with the others."""
    store = zoo.Store(tmp_path, ABOUT, "tiny", False)
    store.trying(*jobs("GPT-2", way="patched"))
    status, rows = run(tmp_path, {"GPT-2": gpt.TINY}, jobs("GPT-2") + jobs("GPT-2", way="patched"), resume=True)
    assert status == zoo.FAILED and [(r["way"], r["status"]) for r in rows] == [("patched", "crashed"), ("plain", "ok")]
    with pytest.raises(ValueError, match="holds tiny models on NVIDIA X100 1GB: name another folder"):
        zoo.Store(tmp_path, ABOUT, "full", True)
    assert not zoo.Store(tmp_path, ABOUT, "tiny", False).rows
    assert run(tmp_path, {"GPT-2": gpt.TINY}, jobs("GPT-2"), until=0.0) == (0, [])


def test_the_most_telling_first():
    found = zoo.ordered(["a", "b"], whole.WAYS, ["bfloat16", "float32"])
    assert len(found) == len(set(found)) == 2 * 2 * 4 * 2
    told = [(j.model, j.mode, j.way) for j in found[:8]]
    assert told[:4] == [("a", "training", way) for way in whole.WAYS]
    assert told[4:6] == [("b", "training", "plain"), ("b", "training", "patched")]
    assert all(j.precision == "float32" for j in found[16:])


def test_copies_into_another_layout_are_counted():
    x = torch.randn(2, 8, 4, 4)
    last = x.to(memory_format=torch.channels_last)
    for call, copies in (
        (lambda: x.contiguous(memory_format=torch.channels_last), 1),
        (lambda: last.permute(0, 3, 1, 2).contiguous(), 1),
        (lambda: (x.clone(), last.clone(), last.bfloat16(), x[:1].expand(2, -1, -1, -1).clone()), 0),
    ):
        assert whole._profiled(call, "cpu")["copies"] == copies


def test_others_have_their_own(monkeypatch):
    """torchvision's model where it is installed; ours where not."""
    theirs = types.ModuleType("torchvision.models")
    theirs.resnet50 = lambda: torch.nn.Linear(1, 1)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", theirs)
    assert type(resnet.FULL.net()) is torch.nn.Linear
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert installed("torchvision.models", "resnet50") is None
    with torch.device("meta"):
        assert type(resnet.FULL.net()) is resnet.ResNet


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="it draws")
def test_a_runs_models_are_taken_in(tmp_path):
    base = {"mode": "training", "precision": "bfloat16", "status": "ok", "reason": ""} | zoo.EMPTY
    rows = [
        base | {"model": "ResNet-50", "way": way, "ms": ms, "least_ms": ms, "most_ms": ms, "losses": [7.0, 6.5]}
        | {"ready_s": 9.0, "peak_bytes": 1 << 30, "launches": 161.0, "busy_ms": ms - 1, "host_ms": 3.0, "copies": 0.0}
        for way, ms in (("plain", 30.0), ("patched", 20.0))
    ]  # fmt: skip
    whole_run = {
        "schema": 1,
        "machine": {"date": "2026-01-02T03:04:05", "commit": "abc1234"},
        "about": ABOUT,
        "size": "full",
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run/models.json").write_text(json.dumps(whole_run | {"trying": [], "rows": rows}))
    target = report.add(tmp_path / "run", tmp_path / "results")
    assert target.name == "x100-1gb" and {p.name for p in target.iterdir()} == {"models.json", "models.png"}
    text = report.gpu_markdown(tmp_path / "results")
    assert "### NVIDIA X100 1GB\n\nWhole models, 2026-01-02 at abc1234." in text
    line = "| ResNet-50 | patched | 20.0 | 20.0–20.0 | 0.67 | 19.0 | 3.0 | 161 | 0 | 1.0 GiB | 6.50000 | not compared | 9.0 |"
    assert line in text and "![models](../bench/results/x100-1gb/models.png)" in text
