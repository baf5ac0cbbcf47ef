"""Benchmarks: the harness works, and the README shows what was measured."""

import json
import pathlib
import time

import pytest
import torch
from gpulayers.bench import _cpu, _host, report

import gpulayers.torch as gt
from gpulayers import dispatch

ROOT = pathlib.Path(__file__).parents[1]


def test_readme_shows_what_was_measured():
    results = json.loads((ROOT / "bench/results/cpu/cpu.json").read_text())
    assert report.between((ROOT / "README.md").read_text(), "cpu") == report.cpu_markdown(results)


def test_providers_take_turns():
    """Each gets its samples, the first call of a turn is not one, and the slower one is slower."""
    called = []

    def call(name, seconds):
        called.append(name)
        time.sleep(seconds)

    found = _cpu.interleaved({"a": lambda: call("a", 0.001), "b": lambda: call("b", 0.01)}, 0.02)
    assert found["a"][0] < found["b"][0] and found["a"][1] <= found["a"][0] <= found["a"][2]
    turns = [name for i, name in enumerate(called) if i == 0 or called[i - 1] != name]
    assert turns[:4] == ["a", "b", "a", "b"]  # b, a in the second turn: b goes on


@pytest.mark.parametrize("family", ["softmax", "optim"])
def test_cases_are_measured_against_torch(family):
    rows = _cpu.against_torch([family], 0.0, progress=False)
    assert rows and all(row["ratio"] > 0 and row["ms"] > 0 for row in rows)


def test_bytes_follow_from_the_rule():
    case = next(c for _, c in _cpu.cases(["softmax"]))
    forward, backward = case.bytes()
    assert forward == 2 * case.specs()[0].nbytes and backward == 3 * case.specs()[0].nbytes


def test_host_cost_is_measured_above_a_stub():
    """The stub computes nothing, and nothing of it stays."""
    before = dict(dispatch._plans)
    make, shape = _host._layers()["ReLU"]
    found = _host._measure(make, shape)
    assert dispatch._plans == before and all(v > 0 for v in found.values())
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(make(gt)(x), torch.tensor([0.0, 2.0]))
