"""The GPU suite, with a CPU and stand-in steps in place of a GPU: order, limits, restarts, resumption, its tests' record."""

import ast
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

pytest.importorskip("torch")

from gpulayers.bench.measuring.records import load
from gpulayers.bench.suite import device_tests, suite
from gpulayers.bench.suite.suite import Step, Suite

ROOT = pathlib.Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("checkout")


def step(name, code, share=0.5):
    return Step(name, share, lambda asked, seconds: [sys.executable, "-c", code.replace("OUT", repr(str(asked.out)))])


def statuses(out, run=-1):
    steps = json.loads((out / "suite.json").read_text())["runs"][run]["steps"]
    return {s["name"]: s["status"] for s in steps}


def test_steps_run_in_turn_and_a_failure_costs_the_others_nothing(tmp_path):
    steps = [
        step("a", "print('from a')"),
        step("b", "raise SystemExit(5)"),
        Step("c", 0.5, lambda asked, seconds: "nothing to do"),
        step("d", "open(OUT + '/d', 'w')"),
    ]
    assert suite.run(Suite(tmp_path, 1.0), steps, grace=1) == 1
    assert statuses(tmp_path) == {"a": "done", "b": "failed, exit status 5", "c": "nothing to do", "d": "done"}
    assert (tmp_path / "d").exists() and "from a" in (tmp_path / "log.txt").read_text()
    assert suite.run(Suite(tmp_path, 1.0), steps[:1], grace=1) == 0


def test_a_step_out_of_time_is_stopped_with_all_it_started(tmp_path):
    """It ignores the interrupt, and so does its child; what follows still has its time."""
    ignore = "import signal, time, os; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    slow = ignore + "os.fork(); open(OUT + f'/{os.getpid()}.pid', 'w'); time.sleep(60)"
    steps = [step("slow", slow), step("quick", "open(OUT + '/quick', 'w')")]
    begin = time.monotonic()
    assert suite.run(Suite(tmp_path, 0.1), steps, grace=0.5) == 0
    assert time.monotonic() - begin <= 6.0
    assert statuses(tmp_path) == {"slow": "out of time", "quick": "done"}
    processes = [int(p.stem) for p in tmp_path.glob("*.pid")]
    assert len(processes) == 2 and not any(map(_runs, processes))


def _runs(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_time_nothing_is_begun(tmp_path):
    assert suite.run(Suite(tmp_path, 0.01), [step("a", "open(OUT + '/a', 'w')")], grace=1) == 0
    assert statuses(tmp_path) == {"a": "out of time"} and not (tmp_path / "a").exists()


def test_a_step_whose_gpu_died_goes_on_in_a_new_process(tmp_path):
    dies = "import os; n = len(os.listdir(OUT)); open(OUT + f'/{n}.try', 'w'); raise SystemExit(3 if n < 4 else 0)"
    assert suite.run(Suite(tmp_path, 1.0), [step("a", dies)], grace=1) == 0
    assert statuses(tmp_path) == {"a": "done"} and len(list(tmp_path.glob("*.try"))) == 3


def started(out, **steps):
    """A process that runs a suite of these steps, name → code."""
    code = (
        "import pathlib; from gpulayers.bench.suite import suite; from tests.test_suite import step;"
        f"steps = [step(name, code) for name, code in {steps!r}.items()];"
        f"suite.run(suite.Suite(pathlib.Path({str(out)!r}), 1.0), steps, grace=1)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)


def test_a_suite_that_was_killed_goes_on(tmp_path):
    """After the kill, the journal is whole and says where it was; the next run adds to it."""
    process = started(tmp_path, a="pass", b="import time; time.sleep(30)")
    while not (tmp_path / "suite.json").exists() or statuses(tmp_path).get("b") != "running":
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert statuses(tmp_path) == {"a": "done", "b": "running"}
    suite.run(Suite(tmp_path, 1.0), [step("b", "pass")], grace=1)
    assert statuses(tmp_path, 0)["b"] == "running" and statuses(tmp_path, 1) == {"b": "done"}


def test_a_suite_that_is_asked_to_stop_leaves_nothing_running(tmp_path):
    """``timeout`` sends SIGTERM: the step's process ends with it. In its session, a shell that ends all ends it, too."""
    process = started(tmp_path, a=SLEEPS)
    while not (found := list(tmp_path.glob("*.pid"))):
        assert process.poll() is None
        time.sleep(0.05)
    child = int(found[0].stem)
    assert os.getsid(child) == os.getsid(process.pid)
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM and not _runs(child)


SLEEPS = "import os, time; open(OUT + f'/{os.getpid()}.pid', 'w'); time.sleep(60)"


def test_a_step_that_a_signal_ended_goes_on(tmp_path):
    """A compiler or a driver may take the process with it; the lab knows what it was at."""
    dies = "import os; n = len(os.listdir(OUT)); open(OUT + f'/{n}.try', 'w'); n > 3 or os.abort()"
    assert suite.run(Suite(tmp_path, 1.0), [step("a", dies)], grace=1) == 0
    assert statuses(tmp_path) == {"a": "done"} and len(list(tmp_path.glob("*.try"))) == 3


def test_a_step_that_always_dies_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "RESTARTS", 2)
    assert suite.run(Suite(tmp_path, 1.0), [step("a", "import os; os.abort()")], grace=1) == 1
    assert statuses(tmp_path) == {"a": f"failed, exit status {-signal.SIGABRT}"}


def test_a_check_waits_for_its_tests_and_its_time_and_runs_once(tmp_path, monkeypatch):
    """In ten minutes it would be stopped each time, and never say anything."""
    check = step("check", "pass")._replace(least=3.0, after="tests", once=True)
    cut = step("tests", f"raise SystemExit({device_tests.OUT_OF_TIME})")
    assert suite.run(Suite(tmp_path, 1.0), [cut, check], grace=1) == 0
    assert statuses(tmp_path) == {"tests": "out of time", "check": "out of time: tests first"}
    steps = [step("tests", "pass"), check]
    suite.run(Suite(tmp_path, 0.1), steps, grace=0.1)
    assert statuses(tmp_path)["check"] == "out of time"
    monkeypatch.setattr(suite, "machine", lambda: {"commit": "abc1234"})
    for status in ("done", "done before", "done before"):
        suite.run(Suite(tmp_path, 1.0), steps, grace=0.1)
        assert statuses(tmp_path)["check"] == status
    monkeypatch.setattr(suite, "machine", lambda: {"commit": "def5678"})
    suite.run(Suite(tmp_path, 1.0), steps, grace=0.1)
    assert statuses(tmp_path)["check"] == "done"


def test_half_a_file_of_a_killed_process_does_not_stay(tmp_path):
    for name in (".bench.json.123", ".tests.jsonl.123"):
        (tmp_path / name).write_text("{")
    suite.run(Suite(tmp_path, 1.0), [], grace=1)
    assert {p.name for p in tmp_path.iterdir()} <= {"suite.json"}


def test_it_runs_from_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="a checkout with its tests"):
        suite.run(Suite(tmp_path / "out"), [])


def test_the_log_keeps_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "LOG_BYTES", 1000)
    suite.run(Suite(tmp_path, 1.0), [step("a", "print('x' * 5000); print('the end')")], grace=1)
    log = (tmp_path / "log.txt").read_text()
    assert len(log) == 1000 and log.endswith("the end\n")


def test_the_whole_path_with_the_cpu_in_place_of_a_gpu(tmp_path):
    """Tests, small benchmarks, and what needs a GPU said so; twice, as if the first had been cut off."""
    out, tests = tmp_path / "out", tmp_path / "test_small.py"
    tests.write_text("def test_small(): pass")
    small = "import pathlib; from tests.test_lab import run; raise SystemExit(run(pathlib.Path(OUT))[0])"
    steps = [step("bench", small, 0.7) if s.name == "bench" else s for s in suite.STEPS]
    asked = Suite(out, 2.0, ("softmax",), "cpu", (str(tests),))
    for _ in range(2):
        assert suite.run(asked, steps, grace=0.5) == 0
        rows = load(out / "bench.json")["rows"]
        assert {r["status"] for r in rows} == {"ok", "refused"}
        found = statuses(out)
        assert found["tests"] == found["bench"] == "done" and found["tune"] == "tuning needs a GPU"
        assert found["models"] == "models of their real size need a GPU"
    assert {p.name for p in out.iterdir()} == {"suite.json", "log.txt", "tests.jsonl", "tests.json", "bench.json"}
    assert [i.rpartition("/")[2] for i in device_tests.read(out / "tests.jsonl")] == ["test_small.py::test_small"]


def test_the_benchmarks_go_on_within_their_time(tmp_path):
    command = next(s.command for s in suite.STEPS if s.name == "bench")
    words = command(Suite(tmp_path, family=("norm",), device="cpu"), 90.0)
    assert words[3:] == [
        "norm",
        "--gpu",
        "--resume",
        "--no-plots",
        "--minutes=1.5",
        f"--out={tmp_path}",
        "--device",
        "cpu",
    ]
    assert words[2].endswith("bench/run.py")


def test_the_furthest_from_its_limit_is_tuned_first(tmp_path, monkeypatch):
    rows = [("norm", 0.5), ("norm", 0.9), ("conv", 0.2), ("softmax", 0.99), ("loss", None)]
    found = [{"family": f, "ours": True, "share": s} for f, s in rows] + [{"family": "a", "ours": False, "share": 0.1}]
    (tmp_path / "bench.json").touch()
    monkeypatch.setattr(suite, "load", lambda path: {"rows": found})
    assert suite.furthest(tmp_path / "bench.json") == ["conv", "norm", "softmax"]
    assert suite.furthest(tmp_path / "none.json") == []
    command = next(s.command for s in suite.STEPS if s.name == "tune")
    assert command(Suite(tmp_path), 60)[3:8] == ["gpulayers.cli", "tune", "conv", "norm", "softmax"]


TESTS = """
import os, signal, time, pytest

@pytest.mark.parametrize("i", range(5))
def test_passes(i): pass

def test_fails(): assert 1 == 2, "one is not two"

def test_is_skipped(): pytest.skip("why not")

def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)

def test_hangs(): time.sleep(FOREVER)

def test_after_them(): pass

def test_machine_code(): assert False, "not chosen on a device"
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "test_toy.py"
    path.write_text(TESTS.replace("FOREVER", "60"))
    return path


def test_every_test_has_an_outcome_whatever_becomes_of_its_process(tmp_path, toy, capfd):
    assert device_tests.run(tmp_path, 60, 2, [toy], silence=2) == device_tests.FAILED
    found = device_tests.read(tmp_path / "tests.jsonl")
    assert Counter(o.outcome for o in found.values()) == {"passed": 6, "failed": 1, "skipped": 1, "started": 2}
    assert "one is not two" in next(o.text for o in found.values() if o.outcome == "failed")
    out = capfd.readouterr().out
    assert "6 passed" in out and "2 crashed" in out
    assert "CRASHED" in out and "::test_hangs" in out and "::test_crashes" in out and "FAILED" in out

    toy.write_text(TESTS.replace("FOREVER", "0").replace("1 == 2", "True").replace("os.kill", "print"))  # mended
    with open(tmp_path / "tests.jsonl", "a") as file:
        file.write('{"id": "cut o')
    assert device_tests.run(tmp_path, 60, 2, [toy]) == device_tests.PASSED
    again = device_tests.read(tmp_path / "tests.jsonl")
    assert Counter(o.outcome for o in again.values()) == {"passed": 9, "skipped": 1}


def test_tests_keep_their_time(tmp_path, toy):
    begin = time.monotonic()
    assert device_tests.run(tmp_path, 2, 1, [toy]) != device_tests.PASSED
    assert time.monotonic() - begin < 30  # the rest is Python's start; test_hangs alone takes 60


def test_no_tests_are_no_success(tmp_path):
    (tmp_path / "test_none.py").write_text("")
    assert device_tests.run(tmp_path, 60, 1, [tmp_path / "test_none.py"]) == device_tests.FAILED


def outcomes_until(name, record, path):
    """The exit status of the run that had time enough to come to this test; a slow machine's first ones have not."""
    for seconds in (2.5, 5.0, 10.0, 20.0, 40.0):
        status = device_tests.run(record.parent, seconds, 1, [path])
        if any(i.endswith(f"::{name}") for i in device_tests.read(record)):
            break
    return status


def test_a_test_that_was_cut_off_did_not_fail(tmp_path):
    """It was at work when the time was over; the next call runs it in its turn."""
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\ndef test_passes(): pass\ndef test_lasts(): time.sleep(60)\ndef test_after(): pass\n")
    record = tmp_path / "tests.jsonl"
    assert outcomes_until("test_lasts", record, slow) == device_tests.OUT_OF_TIME
    found = {i.rpartition("::")[2]: o.outcome for i, o in device_tests.read(record).items()}
    assert found == {"test_passes": "passed", "test_lasts": "cut off"}
    slow.write_text(slow.read_text().replace("60", "0"))
    assert device_tests.run(tmp_path, 60, 1, [slow]) == device_tests.PASSED
    assert [i.rpartition("::")[2] for i in device_tests.read(record)] == ["test_passes", "test_lasts", "test_after"]


def test_what_hangs_again_costs_the_others_nothing(tmp_path):
    """A process is heard alone, and what did not pass before has its turn after the others."""
    hangs = tmp_path / "test_hangs.py"
    hangs.write_text("import time\ndef test_hangs(): time.sleep(60)\ndef test_after(): pass\n")
    record = tmp_path / "tests.jsonl"
    assert device_tests.run(tmp_path, 120, 1, [hangs], silence=2) == device_tests.FAILED
    assert [o.outcome for o in device_tests.read(record).values()] == ["started", "passed"]
    record.write_text(record.read_text().partition("\n")[0] + "\n")  # as if all after it had been cut off
    assert outcomes_until("test_after", record, hangs) == device_tests.FAILED
    found = {i.rpartition("::")[2]: o.outcome for i, o in device_tests.read(record).items()}
    assert found == {"test_hangs": "again", "test_after": "passed"}


def test_a_file_that_cannot_be_read_costs_its_own_tests(tmp_path):
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "test_fine.py").write_text("def test_fine(): pass")
    files = [tmp_path / "test_broken.py", tmp_path / "test_fine.py"]
    assert device_tests.run(tmp_path, 60, 1, files) == device_tests.FAILED
    found = {i.rpartition("/")[2]: o for i, o in device_tests.read(tmp_path / "tests.jsonl").items()}
    assert found["test_fine.py::test_fine"].outcome == "passed"
    assert "nothing_of_this_name" in found["test_broken.py"].text


def test_the_most_valuable_files_come_first():
    names = [p.stem for p in device_tests.files()]
    assert (
        names[: len(device_tests.FIRST)] == list(device_tests.FIRST)
        and "test_house" not in names
        and "test_torch_modules" in names
    )


@pytest.mark.parametrize("path", device_tests.files(ROOT), ids=lambda p: p.stem)
def test_what_is_simulated_is_simulated_beside_a_gpu_too(path):
    """There an arena is the GPU's, which takes no arrays of the CPU: what it is to take comes through its ``put``, or
    ``interpreting()`` or ``emulating()`` is entered before it."""
    for node in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.With)):
        entered = [n for inner in ast.walk(node) if isinstance(inner, ast.With) for n in _called(inner)]
        if "arena" in entered:
            assert SIMULATING.isdisjoint(entered[entered.index("arena") :])
        own = _called(node)
        if "arena" in own and path.stem != "test_gpu":  # whose arrays lie on the GPU
            puts = node.items[own.index("arena")].optional_vars is not None
            assert puts or SIMULATING & {*own[: own.index("arena")]}, f"{path}:{node.lineno}"


SIMULATING = {"interpreting", "emulating"}


def _called(node):
    """The names of what a ``with`` enters."""
    calls = [item.context_expr for item in node.items]
    return [c.func.id if isinstance(c, ast.Call) and isinstance(c.func, ast.Name) else "" for c in calls]


def test_sanitizers(tmp_path, monkeypatch):
    command = next(s.command for s in suite.STEPS if s.name == "memcheck")
    monkeypatch.setattr(suite, "_SANITIZERS", (None, "/nowhere/compute-sanitizer"))
    assert command(Suite(tmp_path), 60) == "compute-sanitizer is not installed"
    monkeypatch.setattr(suite, "_SANITIZERS", (None, sys.executable))
    words = command(Suite(tmp_path), 60)
    assert words[:5] == ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sys.executable, "--tool", "memcheck"]
    assert isinstance(command(Suite(tmp_path, device="cpu"), 60), str)
