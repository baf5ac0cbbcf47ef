"""The judge: what the truth of a case is, and that results are held to it, ours and others', large and random ones too."""

import pytest
import torch
import torch.nn.functional as F
from gpulayers.bench.cases import providers
from gpulayers.bench.cases.case import Case, Labels, Other, Places, Seeds, every_case
from gpulayers.bench.judging import judge, predicted_images, predicted_rows
from gpulayers.bench.measuring import harness
from gpulayers.bench.measuring.device import Cpu
from gpulayers.kernels.numpy import linear as linear_kernels

from gpulayers import dispatch
from gpulayers.arrays import Spec, bfloat16, float32
from gpulayers.ops import activation, dropout, linear, softmax
from gpulayers.sweep._calls import Call

LIMITS = {"copy": 1e12, "read": 1e12, "float32": 1e14, "bfloat16": 1e14}


def _softmax(x):
    return torch.softmax(x, -1)


SOFTMAX = Case(softmax.softmax, "small", ((6, 7),), {}, _softmax)
LINEAR = Case(linear.linear, "small", ((6, 5), (4, 5), (4,)), {}, F.linear, flops=2 * 6 * 5 * 4)


@pytest.fixture
def in_pieces(monkeypatch):
    """Large cases' ways, on small ones: torch judges, the first rows alone are drawn, pieces of a few elements."""
    monkeypatch.setattr(judge, "MOST_ELEMENTS", 20)
    monkeypatch.setattr(judge, "_CHUNK", 16)


def errors(case, other=None, dtype=float32):
    """(judge, error of each direction) of ours, or of another function."""
    m = harness.Measurement("", case, dtype, Cpu(), LIMITS)
    inputs, dys = m.draw()
    true = judge.truth(case, dtype, inputs, dys)
    chosen = providers.providers(
        case._replace(others={"other": Other(other)} if other else {}), m.on, ["other" if other else "numpy"]
    )
    function = chosen[0].function()
    with function.entered():
        found = judge.results(case, function, inputs, dys)
    return true, judge.judge(true, function, found, ours=not other)


def test_large_cases_are_judged_by_torch(in_pieces):
    true, found = errors(SOFTMAX)
    assert true.by == "torch" and all(e.times <= 1 for e in found.values())

    def last(x):
        y = _softmax(x)
        return torch.cat([y[:-1], y[-1:] * 1.1])

    _, found = errors(SOFTMAX, last)
    assert found["forward"].times > 100 and "y at (5, " in found["forward"].where


FIRST_AXIS = "grid", "residual", "k", "v", "k_cache", "v_cache", "b"
"""Inputs that have as many rows as the first."""


def _cut(case):
    """The same call on two rows."""
    shapes = case.shapes
    if isinstance(shapes[0], list) or case.op.name == "ctc_loss":  # whose batch is the second axis
        return case

    def few(name, s):
        if isinstance(s, Labels | Places):
            cut = s._replace(shape=(2, *s.shape[1:]))
            return cut._replace(high=2) if case.op.family == "embedding" else cut
        if isinstance(s, Spec):
            return s._replace(shape=(2, *s.shape[1:])) if name in FIRST_AXIS else s
        return (2, *s[1:]) if s is not None and (s == shapes[0] or name in FIRST_AXIS) else s

    return case._replace(shapes=tuple(map(few, case.op.inputs, shapes)))


def _smallest():
    """A case for each op and its options, where a small one can be had and torch's function gives all that ours does."""
    found = {}
    for case in map(_cut, (c for _, c in every_case())):
        size, key = case.traffic()["both"].total, (case.op.name, str(case.options))
        whole = case.op.name != "attention_decode"  # torch's gives no log-sum-exp
        if whole and size < 1 << 22 and (key not in found or size < found[key].traffic()["both"].total):
            found[key] = case
    return found.values()


@pytest.mark.parametrize("case", _smallest(), ids=lambda c: f"{c.op.name}-{c.name}")
def test_torchs_functions_compute_the_same(case):
    """A comparison of speeds is one of the same function, with the same options."""
    true, found = errors(case, case.torch)
    assert true.by == "definition" and all(e.times <= 20 for e in found.values()), found


def test_the_forward_that_records_is_judged_too(monkeypatch):
    """Wrong only where gradients are wanted: its outputs differ from the other forward's."""
    right = linear_kernels.linear_forward

    def off(*args, needs, **options):
        (y,), saved = right(*args, needs=needs, **options)
        return (y * 1.001 if needs else y,), saved

    monkeypatch.setattr(linear_kernels, "linear_forward", off)
    dispatch._plans.clear()
    _, found = errors(LINEAR)
    dispatch._plans.clear()
    assert found["forward"].times <= 1 and found["backward"].times <= 1 and found["both"].times > 100


DROPOUT = Case(dropout.dropout, "small", ((64, 5), Seeds()), {"p": 0.5}, lambda x, s: F.dropout(x, 0.5), needs=("x",))
DROPOUT = DROPOUT._replace(nearest=lambda got, of, x: torch.where(got.abs() < of.abs(), 0.0, 2 * of))


def test_random_results_are_judged_on_the_first_rows(in_pieces):
    true, found = errors(DROPOUT)
    assert (true.by, true.rows) == ("definition", 4) and all(e.times <= 1 for e in found.values())


@pytest.mark.parametrize("rows", ["all", "first"])
def test_others_draw_their_own_numbers(rows, request):
    if rows == "first":
        request.getfixturevalue("in_pieces")
    _, found = errors(DROPOUT, lambda x, seed: F.dropout(x, 0.5))
    assert all(e.times <= 1 for e in found.values())
    _, found = errors(DROPOUT, lambda x, seed: F.dropout(x, 0.5) * 1.5)
    assert all(found[d].times > 100 for d in ("forward", "backward", "both"))


def test_rrelu_of_others_is_judged():
    from gpulayers.bench.activation import cases

    case = next(c for c in cases() if c.op is activation.rrelu)._replace(shapes=((8, 5), Seeds()))
    _, found = errors(case, lambda x, seed: F.rrelu(x, training=True))
    assert all(e.times <= 1 for e in found.values())
    _, found = errors(case, lambda x, seed: F.rrelu(x, 0.5, 0.6, training=True))
    assert found["forward"].times > 100 and found["backward"].times > 100


def test_what_rows_should_take():
    """Reckoned from machine code: rows on their way beforehand leave the backward to its bytes, and a second stage to add up."""
    (case,) = [c for _, c in every_case(["norm"]) if c.op.name == "rms_norm" and c.name == "Llama-3 8B 8192×4096"]
    backward = [launch for launch in Call(case, bfloat16).launched(90) if "forward" not in launch.kernel]
    what, launches, megabytes, registers, *_, share = predicted_rows.line(case, "backward", backward)
    assert what.endswith("backward") and (launches, megabytes) == (2, "201") and registers <= 128
    assert 0.85 <= float(share) < 1


def test_what_images_should_take():
    """A lane's whole runs leave a row-major maximum to its bytes; where it moves single pixels, a kernel is bound by what it
    issues."""
    (name, op, shape, options), *_ = predicted_images.CALLS["pooling"]
    for width, kernel, enough in (
        (112, "max_pool_runs_forward_kernel", True),
        (113, "max_pool_blocks_forward_kernel", False),
    ):
        case = Case(op, name, ((*shape[:2], 112, width),), options)
        line = predicted_images.line(case, "forward", Call(case, bfloat16).launched(90)[:1])
        assert line[2] == kernel and (float(line[-1]) >= 0.85) == enough
