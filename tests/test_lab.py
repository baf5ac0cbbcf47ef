"""The lab's whole path, on the CPU: right results get a time, wrong and impossible ones none, and no death costs more than a case."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from gpulayers.bench.cases.case import Case, Other, Squares
from gpulayers.bench.measuring import harness, lab, records
from gpulayers.bench.measuring.device import Cpu
from gpulayers.kernels.numpy import softmax as kernels

from gpulayers import dispatch
from gpulayers.arrays import bfloat16, float32
from gpulayers.ops import linear, optim, softmax

ROOT = pathlib.Path(__file__).parents[1]
LIMITS = {"copy": 1e12, "read": 1e12, "float32": 1e14, "bfloat16": 1e14, "tf32": 1e14}


class Quick(Cpu):
    """Two calls a turn, no rest, and limits that nothing here reaches."""

    rounds = 1

    def __init__(self, **options):
        super().__init__(**{"turn": 0.0, "settle": 0.0, "large": 1 << 12} | options)

    def limits(self):
        return LIMITS

    def sets(self, nbytes, moved):
        return 2


def softmax_case(name="small", **changes):
    return Case(softmax.softmax, name, ((6, 7),), {}, _softmax)._replace(**changes)


def _softmax(x):
    return torch.softmax(x, -1)


def _adamw(params, grads, m, v):
    steps = [torch.zeros(()) for _ in params]
    rest = {"beta1": 0.9, "beta2": 0.999, "lr": 1e-3, "weight_decay": 1e-2, "eps": 1e-8, "maximize": False}
    torch.optim._functional.adamw(params, grads, m, v, [], steps, foreach=True, amsgrad=False, **rest)


CASES = [
    ("softmax", softmax_case(headline=True)),
    ("softmax", softmax_case("wider", shapes=((6, 9),))),
    ("linear", Case(linear.linear, "small", ((6, 5), (4, 5), (4,)), {}, F.linear, flops=2 * 6 * 5 * 4)),
    (
        "optim",
        Case(optim.adamw_update, "small", ([(3, 4), (5,)],) * 3 + ([Squares((3, 4)), Squares((5,))],), {}, _adamw),
    ),
]
NAMES = ("numpy", "definition", "torch")


def run(folder, cases=CASES, on=None, resume=True, dtypes=(bfloat16, float32), only=NAMES, **options):
    """(exit status, store)"""
    store = records.Store(folder, resume)
    tasks = lab.ordered(cases, dtypes)
    return lab.run(on or Quick(), store, tasks, only=only, progress=False, **options), store


def keys(store):
    return {(*records.job(r), r["direction"], r["status"]) for r in store.results["rows"]}


def one(store, **wanted):
    (row,) = [r for r in store.results["rows"] if all(r[k] == v for k, v in wanted.items())]
    return row


def test_the_whole_path(tmp_path):
    status, store = run(tmp_path)
    rows = store.results["rows"]
    assert status == lab.DONE and {r["status"] for r in rows} == {"ok", "refused"}
    assert all("only float32" in r["reason"] for r in rows if r["status"] == "refused")
    assert {r["provider"] for r in rows} == set(NAMES) and {r["dtype"] for r in rows} == {"bfloat16", "float32"}
    assert len(rows) == 2 * (3 * 3 * 3 + 3 * 1)  # dtypes × (cases × directions × providers, and an update)
    rows = [r for r in rows if r["us"] is not None]
    assert all(r["us"]["min"] <= r["us"]["p20"] <= r["us"]["p50"] <= r["us"]["p95"] <= r["us"]["max"] for r in rows)
    assert all(0 <= r["ulp"] < 100 and r["bound"] <= 100 and r["judge"] == "definition" for r in rows)
    assert all(r["share"] == pytest.approx(r["limit_us"] / r["us"]["p50"]) for r in rows)
    assert records.load(store.path) == store.results and not (tmp_path / "trying.json").exists()
    assert store.results["processes"][0]["limits"] == LIMITS


def test_the_next_cases_are_made_ready_before_they_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "AHEAD", 2)
    coming, measured = [], []

    def prepare(tasks):
        measured.append(len(records.load(tmp_path / "bench.json")["rows"]))
        coming.append([t.case.op.name for t in tasks])

    run(tmp_path, dtypes=[float32], prepare=prepare)
    assert [len(names) for names in coming] == [2] * (len(coming) - 1) + [len(coming[-1])]
    assert measured[0] == 0 and measured == sorted({*measured})
    before = len(coming)
    run(tmp_path, dtypes=[float32], prepare=prepare)
    assert len(coming) == before  # nothing is left


# --- what has no time ------------------------------------------------------------------------------------------------


def test_a_wrong_provider_gets_no_time(tmp_path):
    """Others a hundred times beyond our bound; the rest is measured all the same."""
    case = softmax_case(
        others={"twice": Other(lambda x: 2 * _softmax(x)), "near": Other(lambda x: _softmax(x) * (1 + 1e-6))}
    )
    status, store = run(tmp_path, [("softmax", case)], dtypes=[float32], only=("numpy", "torch", "twice", "near"))
    assert status == lab.FAILED
    row = one(store, provider="twice", direction="forward")
    assert row["status"] == "wrong" and row["us"] is None and "times the allowed error: y at" in row["reason"]
    assert {r["status"] for r in store.results["rows"] if r["provider"] != "twice"} == {"ok"}


@pytest.mark.parametrize("part, direction", [("softmax_forward", "forward"), ("softmax_backward", "backward")])
def test_ours_is_held_to_the_derived_bound(tmp_path, monkeypatch, part, direction):
    """A part in a million off is no rounding of float32; in either direction."""
    right = getattr(kernels, part)

    def off(*args, **options):
        found = right(*args, **options)
        return ((found[0][0] * 1.000002,), found[1]) if part == "softmax_forward" else (found[0] * 1.000002,)

    monkeypatch.setattr(kernels, part, off)
    dispatch._plans.clear()
    try:
        status, store = run(tmp_path, [("softmax", softmax_case())], dtypes=[float32])
    finally:
        dispatch._plans.clear()
    assert status == lab.FAILED and one(store, provider="numpy", direction=direction)["status"] == "wrong"
    assert all(r["us"] is None for r in store.results["rows"] if r["provider"] == "numpy")


def test_an_impossible_reading_gets_no_time(tmp_path):
    """A clock by which a call takes no time at all."""
    ticks = itertools.count()
    status, store = run(tmp_path, CASES[:1], on=Quick(clock=lambda: next(ticks) * 1e-12), dtypes=[float32])
    assert status == lab.FAILED and {r["status"] for r in store.results["rows"]} == {"impossible"}
    assert all(r["us"] is None and "the limit is" in r["reason"] for r in store.results["rows"])


def test_a_smarter_algorithm_is_possible():
    """Fewer flops by Winograd, less read by saving less: above the limit, and a time all the same."""
    m = harness.Measurement("", softmax_case(flops=10**9, saving=4.0), float32, Quick(), LIMITS)
    assert m.possible["forward"] == pytest.approx(m.limit["forward"] / 4)
    m = harness.Measurement("", softmax_case(), float32, Quick(), LIMITS)
    assert (
        m.possible["backward"] == pytest.approx(m.limit["backward"] * 2 / 3)
        and m.possible["forward"] == m.limit["forward"]
    )


def test_reading_and_writing_have_their_own_limits():
    """A copy takes what the copy's limit says, a sum what the sum's says."""
    limits = {"copy": 2.0, "read": 4.0, "float32": 1.0}
    assert harness.least_seconds(8, 8, 0, limits, "float32") == pytest.approx(16 / 2.0)
    assert harness.least_seconds(8, 0, 0, limits, "float32") == pytest.approx(8 / 4.0)
    assert harness.least_seconds(8, 0, 100, limits, "float32") == 100


def test_what_raises_is_noted(tmp_path):
    def broken(x):
        raise ZeroDivisionError("of theirs")

    case = softmax_case(others={"broken": Other(broken)})
    status, store = run(tmp_path, [("softmax", case)], only=("numpy", "broken"), dtypes=[float32])
    assert status == lab.DONE  # what others cannot do is no failure of ours
    assert one(store, provider="broken", direction="both")["reason"] == "ZeroDivisionError: of theirs"
    assert one(store, provider="numpy", direction="both")["status"] == "ok"


def test_a_refusal_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "softmax_refuses", lambda *a, **k: "not today", raising=False)
    dispatch._plans.clear()
    status, store = run(tmp_path, CASES[:1], only=("numpy", "torch"), dtypes=[float32])
    dispatch._plans.clear()
    assert status == lab.DONE and "not today" in one(store, provider="numpy", direction="forward")["reason"]
    assert one(store, provider="numpy", direction="forward")["status"] == "refused"


# --- order and time --------------------------------------------------------------------------------------------------


def test_the_most_valuable_comes_first():
    cases = [(f, softmax_case(f"{f}{i}", headline=i == 0)) for f in "ab" for i in range(2)]
    cases.append(("a", softmax_case("a-sweep", sweep="rows", size=4)))
    order = [(t.case.name, str(t.dtype)[:2], t.slow) for t in lab.ordered(cases, [bfloat16, float32])]
    assert order[:6] == [
        ("a0", "bf", False), ("b0", "bf", False), ("a0", "bf", True), ("b0", "bf", True), ("a1", "bf", False), ("b1", "bf", False),
    ]  # fmt: skip
    assert order[6:9] == [("a0", "fl", False), ("b0", "fl", False), ("a-sweep", "bf", False)]
    fast, slow = ([name for name, _, s in order if s == which] for which in (False, True))
    assert sorted(fast) == sorted(slow) and len(order) == len(set(order))


def test_the_time_limit_is_kept(tmp_path):
    """By a clock that every look moves on by ten seconds, each case takes ten: three fit into 65 seconds."""
    ticks = itertools.count(0, 10)
    status, store = run(tmp_path, dtypes=[float32], clock=lambda: next(ticks), until=65.0)
    assert status == lab.DONE and len({(r["op"], r["case"]) for r in store.results["rows"]}) == 3
    status, store = run(tmp_path, dtypes=[float32])
    assert len({(r["op"], r["case"]) for r in store.results["rows"]}) == 4 and len(store.results["processes"]) == 2
    assert {r["process"] for r in store.results["rows"]} == {0, 1}


def test_the_slow_take_turns_with_the_others(tmp_path, monkeypatch):
    """torch.compile comes last, and what was measured before is measured again beside it."""
    monkeypatch.setattr("gpulayers.bench.cases.providers._compiled", Other)  # getting ready is not what is tested
    _, store = run(tmp_path, CASES[:1], dtypes=[float32], only=("numpy",))
    before = one(store, provider="numpy", direction="both")["us"]
    _, store = run(tmp_path, CASES[:1], dtypes=[float32], only=("numpy", "torch.compile"))
    rows = [r for r in store.results["rows"] if r["direction"] == "both"]
    assert {(r["provider"], r["process"]) for r in rows} == {("numpy", 1), ("torch.compile", 1)}
    assert one(store, provider="numpy", direction="both")["us"] != before


def test_unknown_providers_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"providers: the rule is some of numpy, definition, torch, torch\.compile; got cudnn"
    ):
        run(tmp_path, CASES[:1], only=("numpy", "cudnn"))


# --- deaths ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What stands for SIGKILL: nothing of the process runs after it."""


@pytest.mark.parametrize("point", ["before", "within", "after"])
def test_a_death_at_any_write_costs_nothing_that_was_written(tmp_path, monkeypatch, point):
    """Killed at every write in turn, the run goes on to the same rows."""
    cases = [("softmax", softmax_case(name, needs=())) for name in "ab"]
    few = {"cases": cases, "dtypes": [float32], "only": ("numpy", "torch")}
    _, whole = run(tmp_path / "whole", **few)
    monkeypatch.setattr(records.Store, "rest", lambda self: None)
    write, whole_bytes, writes = records.write_json, pathlib.Path.write_bytes, itertools.count()

    def half(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise Killed

    def dying(at):
        def write_then_die(path, value):
            if point == "before" and next(writes) == at:
                raise Killed
            if point == "within" and next(writes) == at:
                monkeypatch.setattr(pathlib.Path, "write_bytes", half)
            write(path, value)
            if point == "after" and next(writes) == at:
                raise Killed

        return write_then_die

    for at in itertools.count():
        writes = itertools.count()
        folder = tmp_path / str(at)
        monkeypatch.setattr(records, "write_json", dying(at))
        try:
            run(folder, resume=False, **few)
            break  # there is no such write any more
        except Killed:
            pass
        there = records.load(folder / "bench.json")["rows"] if (folder / "bench.json").exists() else []
        monkeypatch.setattr(records, "write_json", write)
        monkeypatch.setattr(pathlib.Path, "write_bytes", whole_bytes)
        _, resumed = run(folder, **few)
        assert keys(resumed) == keys(whole) and all(r in resumed.results["rows"] for r in there)
    assert at == 1 + 2 * (2 * 2 + 1)  # a process's beginning; each case's providers twice, and its rows


def test_a_folder_holds_one_devices_results(tmp_path):
    """Times of two GPUs beside each other in one table would compare nothing."""
    run(tmp_path, CASES[:1], dtypes=[float32])
    on = Quick()
    on.about = lambda: {"device": "another"}
    with pytest.raises(
        ValueError, match=r"bench\.json holds what .* measured, and this is another: name another folder"
    ):
        run(tmp_path, CASES[:1], on=on, dtypes=[float32])
    run(tmp_path, CASES[:1], on=on, dtypes=[float32], resume=False)


def test_what_killed_two_processes_is_not_tried_again(tmp_path):
    deadly = records.Job("softmax", "softmax", "small", "float32", "numpy")
    for _ in range(records.DEATHS):
        records.Store(tmp_path, resume=True).trying(deadly)
    status, store = run(tmp_path, CASES[:1], dtypes=[float32])
    assert status == lab.FAILED and store.results["deaths"] == {str(deadly): records.DEATHS}
    assert one(store, provider="numpy", direction="both")["status"] == "crashed"
    assert one(store, provider="torch", direction="both")["status"] == "ok"


def test_a_dead_device_ends_the_process(tmp_path):
    """An error after which the device does not answer: what was measured is kept, the next process leaves that provider."""
    on = Quick()

    def broken(x):
        on.alive = lambda: False
        raise RuntimeError("an illegal memory access was encountered")

    case = softmax_case(others={"broken": Other(broken)})
    status, store = run(tmp_path, [("softmax", case)], on=on, only=("numpy", "broken"), dtypes=[float32])
    assert status == lab.DIED and "illegal" in one(store, provider="broken", direction="both")["reason"]
    status, store = run(tmp_path, [("softmax", case)], only=("numpy", "broken"), dtypes=[float32])
    assert status == lab.DONE and one(store, provider="numpy", direction="both")["status"] == "ok"


def test_directions_that_a_death_took_are_measured_later(tmp_path):
    """The device dies in the second direction: the first one's times are kept, the others come in the next process."""
    on, recorded = Quick(), itertools.count()

    def broken(x):
        if x.requires_grad and next(recorded) == 1:  # it was right when it was checked
            on.alive = lambda: False
            raise RuntimeError("an illegal memory access was encountered")
        return _softmax(x)

    cases = [("softmax", softmax_case(others={"broken": Other(broken)}))]
    status, store = run(tmp_path, cases, on=on, only=("numpy", "broken"), dtypes=[float32])
    assert status == lab.DIED and one(store, provider="numpy")["direction"] == "forward"
    status, store = run(tmp_path, cases, only=("numpy", "broken"), dtypes=[float32])
    assert status == lab.DONE
    assert {r["direction"] for r in store.results["rows"] if r["provider"] == "numpy"} == {
        "forward",
        "backward",
        "both",
    }
    assert one(store, provider="broken", direction="backward")["status"] == "raised"  # and it is not tried again


def test_no_memory_for_a_case_costs_that_case_alone(tmp_path):
    class Small(Quick):
        def sets(self, nbytes, moved):
            if nbytes > 400:
                raise MemoryError("too large")
            return 2

    _, store = run(tmp_path, CASES[:2], on=Small(), dtypes=[float32])
    assert {r["status"] for r in store.results["rows"] if r["case"] == "small"} == {"ok"}
    assert {r["reason"] for r in store.results["rows"] if r["case"] == "wider"} == {"MemoryError: too large"}


PROGRAM = """
import os, pathlib, signal, sys
sys.path.insert(0, {tests!r})
from test_lab import *
def asked(x):
    os.kill(os.getpid(), signal.{signal})
    return _softmax(x)
case = softmax_case(others={{"asked": Other(asked)}})
run(pathlib.Path({folder!r}), [("softmax", case)], dtypes=[float32], only=("numpy", "asked"))
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_real_signal(tmp_path, number):
    """SIGKILL is a death of who was being measured; who is asked to stop (SIGTERM) leaves nothing behind."""
    program = PROGRAM.format(tests=str(ROOT / "tests"), signal=number, folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == (-signal.SIGKILL if number == "SIGKILL" else 128 + signal.SIGTERM), done.stderr.decode()
    died = records.Store(tmp_path, resume=True).results["deaths"]
    assert died == ({"softmax | softmax | small | float32 | asked": 1} if number == "SIGKILL" else {})


# --- for who searches ------------------------------------------------------------------------------------------------


def test_timer(monkeypatch):
    timer, case = harness.Timer(Quick()), softmax_case()
    assert timer.check(case, float32, "numpy") is None
    assert timer.seconds(case, float32, "backward", "numpy") > 0 and timer.limit(case, float32, "backward") > 0
    right = kernels.softmax_forward
    monkeypatch.setattr(kernels, "softmax_forward", lambda *a, **k: ((right(*a, **k)[0][0] + 0.01,), right(*a, **k)[1]))
    dispatch._plans.clear()
    try:
        assert "times the allowed error: " in timer.check(case, float32, "numpy")
    finally:
        dispatch._plans.clear()
