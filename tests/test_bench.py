"""Benchmarks: what a CPU can measure, what is drawn and printed, and that the documentation shows what was measured."""

import itertools
import json
import pathlib
import re
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from gpulayers.bench import report
from gpulayers.bench.cases import providers
from gpulayers.bench.cases.case import Case, Other, every_case, sweep
from gpulayers.bench.cases.providers import Provider, Theirs
from gpulayers.bench.judging.judge import Error
from gpulayers.bench.measuring import cpu, host, records, timing
from gpulayers.bench.measuring.device import Cpu
from gpulayers.bench.measuring.harness import Measurement
from gpulayers.bench.measuring.timing import quantiles, take_turns
from gpulayers.bench.reporting import plots, tables
from gpulayers.bench.suite import device_tests
from gpulayers.bench.suite.outcomes import Outcome

import gpulayers.torch as gt
from gpulayers import cli, dispatch, inventory
from gpulayers.arrays import bfloat16, float32
from gpulayers.ops import softmax

ROOT = pathlib.Path(__file__).parents[1]


def test_the_page_shows_what_was_measured():
    text = (ROOT / "docs/performance.md").read_text()
    for mark, block in report.blocks(ROOT / "bench/results").items():
        assert report.between(text, mark) == block, f"docs/performance.md: python bench/report.py writes {mark}"


# --- the CPU ---------------------------------------------------------------------------------------------------------


def test_providers_take_turns():
    """Reversed each round; the first round is not kept; each goes on until it has its seconds."""
    called = []

    def replay(name, seconds):
        called.append(name)
        return [seconds, seconds]

    found = take_turns({"a": lambda: replay("a", 1.0), "b": lambda: replay("b", 2.0)}, rounds=2)
    assert called == ["a", "b", "b", "a", "a", "b"] and found == {"a": [1.0] * 4, "b": [2.0] * 4}
    found = take_turns({"a": lambda: replay("a", 1.0), "b": lambda: replay("b", 2.0)}, rounds=1, seconds=7.0)
    assert len(found["a"]) == 8


def test_the_cpu_is_timed_by_its_clock():
    """The slower call is slower, and a replay's first call is not a sample."""
    calls = {"a": lambda: time.sleep(0.001), "b": lambda: time.sleep(0.01)}
    found = cpu.interleaved(calls, Cpu(turn=0.01, settle=0.0), 0.0)
    assert found["a"]["p50"] < found["b"]["p50"] and found["a"]["min"] <= found["a"]["p20"] <= found["a"]["p50"]
    ticks = iter(range(100))
    on = Cpu(turn=0.0, settle=0.0, clock=lambda: next(ticks))
    called = []
    assert on.capture(called.append, ["x", "y"]).replay() == [1, 1] and called == ["x", "y", "x", "y"]


def test_quantiles():
    found = quantiles(float(n) for n in range(101))
    assert found == {"min": 0, "p5": 5, "p20": 20, "p50": 50, "p80": 80, "p95": 95, "max": 100}


@pytest.mark.parametrize("family", ["softmax", "optim"])
def test_cases_are_measured_against_torch(family, monkeypatch):
    few = [(f, c) for f, c in every_case([family]) if c.traffic()["forward"].total < 1 << 22]
    monkeypatch.setattr(cpu, "every_case", lambda only: few)
    rows = cpu.against_torch([family], 0.0, progress=False, on=Cpu(turn=0.0, settle=0.0))
    assert rows and all(row["ratio"] > 0 and row["ms"] > 0 for row in rows)


def test_bytes_follow_from_the_rule():
    case = next(c for _, c in every_case(["softmax"]))
    size = case.specs()[0].nbytes
    traffic = case.traffic()
    assert traffic["forward"] == (size, size, 0) and traffic["backward"] == (size, size, size)
    assert traffic["both"] == (2 * size, 2 * size, size)
    loss = next(c for _, c in every_case(["loss"]) if c.op.name == "nll_loss")
    assert loss.traffic()["forward"].read < loss.specs()[0].nbytes / 100  # of x it reads one number a row


def test_cases_are_distinct_and_every_family_has_a_headline():
    cases = list(every_case())
    names = [(f, c.op.name, c.name) for f, c in cases]
    assert len(names) == len(set(names)), [n for n in names if names.count(n) > 1]
    assert {f for f, c in cases if c.headline} == set(inventory.families())
    assert all(c.torch is not None for _, c in cases)


def test_squares_are_not_negative():
    case = next(c for _, c in every_case(["optim"]) if c.op.name == "adamw_update")
    drawn = case.draw(np.random.default_rng(0))[3], case.draw_tensors(torch.Generator().manual_seed(0))[3]
    assert all(float(x.min()) >= 0 for xs in drawn for x in xs)


def test_host_cost_is_measured_above_a_stub(monkeypatch):
    """The stub computes nothing, and nothing of it stays."""
    monkeypatch.setattr(timing, "ROUNDS", 10)
    before = dict(dispatch._plans)
    make, shape = host._layers()["ReLU"]
    found = host._measure(make, shape)
    assert dispatch._plans == before and all(v > 0 for v in found.values())
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(make(gt)(x), torch.tensor([0.0, 2.0]))


def test_yardstick(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 10)
    found = host.yardstick()
    assert 0 < found["call_us"] < found["relu_us"]


# --- results ---------------------------------------------------------------------------------------------------------


def invented(changes=()):
    """Results of a GPU that does not exist: softmax of four lengths and a small one, ours twice as fast as torch."""
    limits = {"copy": 1e12, "read": 1e12, "bfloat16": 1e14, "float32": 1e13, "tf32": 1e13}
    lengths = [(n, Case(softmax.softmax, "", ((4096, n),), {})) for n in (1024, 4096, 16384, 65536)]
    cases = [*sweep("row length", lengths), Case(softmax.softmax, "small", ((64, 10),), {})]
    rows = []
    for dtype in (bfloat16, float32):
        for case in cases:
            m = Measurement("softmax", case, dtype, Cpu(), limits)
            for direction in case.directions():
                for name, share in (("triton", 0.8), ("torch", 0.4), ("torch.compile", 0.6)):
                    row = m.row(
                        Provider(name, None, case.directions(), ours=name == "triton"),
                        direction,
                        "ok",
                        "",
                        Error(1e-3, 0.5, 0.2),
                    )
                    share *= 1.0 if case.sweep else 0.1
                    us = m.limit[direction] * 1e6 / share
                    row["us"] = {q: us * f for q, f in zip(quantiles([1.0]), (0.9, 0.92, 0.95, 1.0, 1.05, 1.1, 1.2))}
                    row["share"] = share
                    rows.append(row | dict(changes))
    about = {"device": "NVIDIA X100 1GB", "driver": "1.2", "sm_mhz_max": 1000.0}
    process = records.Process(started="2026-01-02T03:04:05+00:00", commit="abc1234", about=about, limits=limits)
    machine = records.machine()
    return records.Results(schema=records.SCHEMA, machine=machine, processes=[process], rows=rows, deaths={})


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda r: r["rows"][0].update(us="fast"), r"rows\[0\].us: the rule is"),
        (lambda r: r["rows"][1]["us"].update(p50=None), r"rows\[1\].us.p50: the rule is float; got None"),
        (lambda r: r["rows"][0].update(status="fine"), r"rows\[0\].status: the rule is one of ok, wrong"),
        (lambda r: r["rows"][0].pop("ulp"), r"rows\[0\]: the rule is the fields of Row; got a difference in \['ulp'\]"),
        (lambda r: r["rows"][0].update(process=7), r"rows\[0\].process: the rule is an index of processes; got 7"),
        (lambda r: r["rows"][0].update(status="wrong"), r"rows\[0\].us: the rule is a time where status is ok"),
        (lambda r: r["processes"][0]["limits"].update(copy="1"), r"processes\[0\].limits.copy: the rule is float"),
        (lambda r: r.update(schema=0), "schema: the rule is 1; got 0"),
    ],
)
def test_a_broken_file_is_named(tmp_path, break_it, message):
    path, broken = tmp_path / "bench.json", invented()
    records.write_json(path, broken)
    assert records.load(path) == broken
    break_it(broken)
    records.write_json(path, broken)
    with pytest.raises(ValueError, match=f"bench.json: {message}"):
        records.load(path)


def test_a_copy_without_git_says_what_its_files_are(tmp_path, monkeypatch):
    """A rented machine may have a copy of the files alone, and no git."""
    if (ROOT / ".git").exists():
        here = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        monkeypatch.setattr(records, "ROOT", ROOT)
        assert records.commit() == here.stdout.strip()
    monkeypatch.setattr(records, "ROOT", tmp_path)
    named = records.commit()
    assert re.fullmatch("source-[0-9a-f]{8}", named)
    monkeypatch.setattr(records, "ROOT", ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.commit() == named


def test_half_a_file_is_named(tmp_path):
    (tmp_path / "bench.json").write_text('{"schema": 1, "rows": [')
    with pytest.raises(ValueError, match=r"bench\.json: the rule is JSON"):
        records.Store(tmp_path, resume=True)


def test_plots(tmp_path):
    """Written, with something on them, every axis with its name, every provider with its own colour."""
    results = invented()
    records.validate(results)
    written = plots.write(results, tmp_path)
    assert [p.name for p in written] == ["share.png", "sweep-softmax.png"]
    from matplotlib.image import imread

    for path in written:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 250 and len(np.unique(pixels.reshape(-1, 4)[::97], axis=0)) > 5
    rows = results["rows"]
    assert {r["dtype"] for r in rows} == {"bfloat16", "float32"}
    figure = plots._sweep(plots._sweeps(rows)["softmax"], "X100")
    forward, backward = figure.axes
    assert forward.get_xlabel() == "row length" and forward.get_ylabel() == "µs"
    assert [a.get_title() for a in (forward, backward)] == ["forward", "backward"]
    lines = {line.get_color() for line in forward.lines}
    assert {plots.colour(p) for p in ("triton", "torch", "torch.compile")} < lines and len(lines) == 4
    assert all(len(set(line.get_xdata())) == len(line.get_xdata()) == 4 for line in forward.lines)
    assert {t.get_text() for t in forward.texts} == {"triton", "torch", "torch.compile", "limit"}
    assert [t.get_text() for t in forward.get_xticklabels()] == ["1K", "4K", "16K", "64K"]
    figure = plots._shares([r for r in rows if r["dtype"] == "bfloat16"], "Share", "X100")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["softmax"]
    assert [t.get_text() for t in figure.axes[0].texts] == ["80", "60"]  # the small case is bound by its launch


def test_labels_are_pushed_apart():
    places = plots.apart([0.0, 0.1, 0.15, 5.0], 1.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in itertools.pairwise(places)) and places[3] == 5.0
    assert sum(places[:3]) == pytest.approx(0.25)


def test_report_of_a_gpu(tmp_path):
    """Taken in under the GPU's name; errors beside speeds, date and commit, slow kernels with their reason."""
    results = invented()
    for r in results["rows"]:
        if r["provider"] == "triton" and r["case"] == "row length: 65536" and r["direction"] == "backward":
            r["share"] = 0.5
    records.write_json(tmp_path / "run/bench.json", results)
    ran = {"t.py::f": Outcome("t.py::f", "passed", reached=("triton _softmax_forward_kernel float16",))}
    records.write_json(
        tmp_path / "run/tests.json", device_tests.summary(ran | {"t.py::g": Outcome("t.py::g", "started")})
    )
    target = report.add(tmp_path / "run", tmp_path / "results")
    assert target.name == "x100-1gb" and (target / "share.png").exists()
    (target / "reasons.json").write_text('{"softmax": "rows spill"}')
    text = report.gpu_markdown(tmp_path / "results")
    assert "### NVIDIA X100 1GB\n\nMeasured 2026-01-02 at abc1234 (driver 1.2, clock 1000 MHz, " in text
    assert "| softmax | 5 | 80% | 71% | 2.00 | 1.33 | 1.33 | 0.5 |" in text
    assert "| softmax | row length: 65536 | backward | 50% | rows spill |" in text
    assert ": 1 passed, 1 crashed. Kernels, each dtype counted: 1 ran; never: triton " in text
    assert "triton _softmax_forward_kernel (float32, bfloat16), triton " in text
    assert "![share](../bench/results/x100-1gb/share.png)" in text and "No speed is given" not in text


def test_report_names_the_commits_that_were_measured(tmp_path):
    """A run that went on at another commit keeps the rows of the one before; a process without rows measured nothing."""
    results = invented()
    results["processes"] += [results["processes"][0] | {"commit": c} for c in ("def5678", "fff0000")]
    results["rows"][-1]["process"] = 1
    records.write_json(tmp_path / "x100/bench.json", results)
    assert "Measured 2026-01-02 at abc1234, def5678 (driver" in report.gpu_markdown(tmp_path)


def test_report_names_what_failed(tmp_path):
    results = invented()
    results["rows"][0] |= {"status": "wrong", "us": None, "share": None}
    records.write_json(tmp_path / "x100/bench.json", results)
    text = report.gpu_markdown(tmp_path)
    assert "No speed is given for what failed: softmax (row length: 1024, bfloat16, forward) by triton: wrong." in text


def test_blocks_are_replaced():
    text = "a\n<!-- x -->\n<!-- /x -->\nb\n<!-- y -->\nold\n<!-- /y -->\nc old\n"
    text = report.replaced(text, {"x": "one", "y": "two"})
    assert text == "a\n<!-- x -->\none\n<!-- /x -->\nb\n<!-- y -->\ntwo\n<!-- /y -->\nc old\n"
    assert report.between(text, "y") == "two" and report.replaced(text, {"x": "one"}) == text


def test_without_a_gpu_the_report_says_so(tmp_path):
    assert report.gpu_markdown(tmp_path) == "No GPU figures exist yet: `gpulayers bench --gpu` makes them."


def test_a_broken_run_is_not_taken_in(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(invented() | {"schema": 0}))
    with pytest.raises(ValueError, match=r"bench\.json: schema: the rule is 1; got 0"):
        report.add(tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_report_says_what_is_wrong_with_a_folder(tmp_path, monkeypatch, capsys):
    for folder, message in ((tmp_path / "nowhere", "No such file"), (tmp_path, "bench.json: nothing was measured")):
        records.write_json(tmp_path / "bench.json", invented() | {"rows": [], "processes": []})
        monkeypatch.setattr(sys, "argv", ["report.py", "--add", str(folder)])
        assert report.main() == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize("rich", [True, False])
def test_tables(capsys, monkeypatch, rich):
    """With and without rich: a line for each time, and why the others have none."""
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    results = invented()
    results["rows"] = results["rows"][:9]
    results["rows"][0] |= {"status": "wrong", "us": None, "share": None, "reason": "7 times [the] allowed error"}
    tables.show_results(results)
    out = capsys.readouterr().out
    assert "0.75" in out and "7 times [the] allowed error" in out and out.count("torch.compile") == 3


def test_command_line(tmp_path, capsys, monkeypatch):
    """`gpulayers bench --device cpu`, from arguments to files; and what it says of wrong ones."""
    small = Case(softmax.softmax, "small", ((4, 8),), {}, lambda x: torch.softmax(x, -1))
    monkeypatch.setattr("gpulayers.bench.softmax.cases", lambda: [*sweep("n", [(8, small)]), small])
    monkeypatch.setattr("gpulayers.bench.measuring.device._SQUARE", 64)
    monkeypatch.setattr("gpulayers.bench.run.device", lambda name: Cpu(turn=0.0, settle=0.0, large=1 << 16))
    options = ["--device", "cpu", "--dtypes", "float32", "--providers", "numpy", "torch", "--out", str(tmp_path)]
    assert cli.main(["bench", "softmax", *options]) == 0
    out = capsys.readouterr().out
    assert f"6 rows in {tmp_path}/bench.json" in out and "share.png" not in out  # bound by its launch
    assert {r["case"] for r in records.load(tmp_path / "bench.json")["rows"]} == {"small"}  # a sweep is a GPU's
    wrong = small._replace(name="wrong", others={"twice": Other(lambda x: 2 * torch.softmax(x, -1))})
    monkeypatch.setattr("gpulayers.bench.softmax.cases", lambda: [small, wrong])
    options[options.index("torch")] = "twice"
    assert cli.main(["bench", "softmax", "--resume", *options]) == 1  # what is there stays
    out = capsys.readouterr().out
    assert f"12 rows in {tmp_path}/bench.json; 3 FAILED" in out and "times the allowed error: y at" in out
    assert cli.main(["bench", "softmaxx", *options]) == 2
    assert "bench: no family 'softmaxx'; there are activation, " in capsys.readouterr().err
    assert cli.main(["bench", "softmax", "--device", "cpu", "--dtypes", "float32", "float64"]) == 2
    assert "--dtypes: the rule is some of bfloat16, float16, float32; got float64" in capsys.readouterr().err


def test_torchs_update_makes_its_steps_in_one_launch():
    """One for each parameter would be a tenth of its time on a GPU."""
    from gpulayers.bench import optim
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(str(func))
            return func(*args, **(kwargs or {}))

    case = next(c for c in optim.cases() if c.op.name == "adamw_update")
    inputs = case.draw_tensors(torch.Generator().manual_seed(0))
    with Listening():
        case.torch(*inputs)
    assert made.count("aten.zeros.default") == 1 and len(inputs[0]) > 1


def _one_of_each():
    """The smallest case of each function of torch's."""
    found = {}
    for _, case in sorted(every_case(), key=lambda f: f[1].traffic()["forward"].total):
        found.setdefault((case.op.name, *sorted(case.options)), case)
    return [c for c in found.values() if c.torch is not None and c.traffic()["forward"].total < 1 << 22]


@pytest.mark.parametrize("case", _one_of_each(), ids=lambda c: f"{c.op.name}-{c.name}")
def test_torch_compiles_every_case(case, monkeypatch):
    """In one graph, up to where Inductor would begin: what cannot be compiled so has no torch.compile beside it."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled(f, backend="aot_eager", **how))
    function = Theirs(case, providers._compiled(case.torch))
    inputs = case.draw_tensors(torch.Generator().manual_seed(0))
    with function.entered():
        if case.wanted():
            function.record(inputs)
        else:
            function.forward(inputs)


def test_torchs_updates_are_compiled_on_a_gpu_too(monkeypatch):
    """Torch's compiler does not look into the fused kernel that is the fastest otherwise."""
    from gpulayers.bench import optim

    params = [types.SimpleNamespace(is_cuda=True)]
    assert optim._way(params) == {"foreach": False, "fused": True}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert optim._way(params) == {"foreach": True, "fused": False}


def test_training_steps_of_a_model_patched_and_not(monkeypatch):
    pytest.importorskip("torch")
    from gpulayers.bench.measuring import steps
    from gpulayers.bench.models.gpt import GPT
    from gpulayers.bench.models.kind import Kind, NextToken, images, tokens
    from gpulayers.bench.models.resnet import ResNet

    text = Kind(lambda: GPT(7, 8, 2, 1, 4), tokens(2, 4, 7), NextToken)
    pictures = Kind(lambda: ResNet((1,), 4, 3), images(2, 8, 3), optimizer="SGD")
    monkeypatch.setattr(steps, "KINDS", {"tokens": text, "images": pictures})
    monkeypatch.setattr(steps, "MOST", {k: v for k, v in steps.MOST.items() if k != "compiled"})
    monkeypatch.setattr(steps.os, "cpu_count", lambda: 1)  # two threads would wait for the tests beside
    rows = steps.against_torch(0.0, progress=False)
    assert {(r["model"], r["mode"]) for r in rows} == {(m, d) for m in ("tokens", "images") for d in steps.MOST}
    assert all(r["ms"] > 0 and r["ratio"] == pytest.approx(r["ms"] / r["torch_ms"]) for r in rows)
