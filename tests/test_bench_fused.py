"""The bench of what gl.fuse writes: its cases, who computes them, and what is said of the goals."""

import pytest

pytest.importorskip("torch")
import torch
from gpulayers.bench import fused
from gpulayers.bench.cases import uses
from gpulayers.bench.cases.case import every_case
from gpulayers.bench.measuring.lab import ordered
from gpulayers.bench.reporting import against
from test_bench import invented

from gpulayers import arrays, cli, dispatch
from gpulayers.testing.compiling import planning
from gpulayers.testing.interpreter import interpreting


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    """Short rows, and what was recorded of others forgotten."""
    monkeypatch.setattr(uses, "_cases", uses._cases.__wrapped__)
    monkeypatch.setenv("GPULAYERS_CACHE", str(tmp_path))
    monkeypatch.setattr(fused, "COLUMNS", (8, 64))
    monkeypatch.setattr(fused, "_ELEMENTS", 1 << 16)


def test_cases_are_measured_with_the_others():
    cases = [c for _, c in every_case(["fused"])]
    assert len({(c.op.name, c.name) for c in cases}) == len(cases) == 8
    assert all(c.op.name.startswith("fused_") and {"hand-written", "array code"} == c.others.keys() for c in cases)
    norm = cases[0]
    x, weight, bias = norm.specs()
    moved = norm.traffic()["forward"]
    assert moved.read == x.nbytes + weight.nbytes + bias.nbytes and moved.written == x.nbytes
    assert "fused" not in {family for family, _ in every_case(["softmax"])}
    tasks = ordered([("fused", norm._replace(headline=True)), *every_case(["softmax"])], [arrays.bfloat16])
    assert [t.family for t in tasks[:2]] == ["fused", "softmax"]  # each family's headline in turn


def test_kernels_are_compiled_before_they_are_measured():
    case = next(c for _, c in every_case(["fused"]))
    for use in uses.uses_of("fused", case, "bfloat16"):
        forward, backward = uses.directions(use)
        with planning(90) as session:
            _, saved = forward()
            if use.direction == "backward":
                backward(saved)
        assert all(p.kernel.startswith("fused_layer_norm") for p in session.planned) and session.planned


@pytest.mark.parametrize("name", fused.KINDS)
def test_all_compute_the_same(name):
    case = fused.case_of(name, 5, 8)
    inputs = case.draw_tensors(torch.Generator().manual_seed(0))
    dy = torch.linspace(-1, 1, 40).reshape(5, 8)
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = case.torch(*leaves)
    wanted = [y, *torch.autograd.grad(y, leaves, dy)]
    with interpreting() as session, dispatch.policy(simulate=("triton",)):
        for who in ("hand-written", "array code"):
            function = case.others[who].made(case)
            with function.entered():
                (got,), backward = function.record(inputs)
                for a, b in zip([got, *backward([dy], False)], wanted):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            assert bool(function.no_graph) == (who == "array code")
    assert session.launches and not any(launch.kernel.startswith("fused") for launch in session.launches)


def test_goals():
    times = {"triton": 10.0, "hand-written": 9.5, "array code": 25.0}
    (row,) = invented()["rows"][:1]
    rows = [
        row | {"family": "fused", "op": "fused_gelu", "provider": who, "us": row["us"] | {"p50": us}}
        for who, us in times.items()
    ]
    (cells,) = against.lines([row, *rows])
    assert cells[0] == "fused_gelu" and cells[3:] == ["1.05 (at most 1.15: kept)", "2.50 (at least 3: missed)"]
    assert against.lines(rows[:1])[0][3:] == ["–", "–"] and against.lines([row]) == []


def test_command_line(capsys):
    assert cli.main(["bench", "fuse", "--cpu"]) == 2 and "fused" in capsys.readouterr().err
    assert cli.main(["bench", "fused", "--cpu"]) == 2 and "check_fuse.py --audit" in capsys.readouterr().err
