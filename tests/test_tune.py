"""The tuner, on a stand-in whose seconds are a known function of what launches choose."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from gpulayers.bench.cases.uses import Use, chosen, declare, uses
from gpulayers.bench.measuring.device import Cpu
from gpulayers.bench.tuning import search, tune
from gpulayers.bench.tuning.search import Screened
from gpulayers.kernels.numpy import softmax as numpy_softmax
from gpulayers.kernels.triton import _configs, _tables, _tile
from gpulayers.kernels.triton._tables import Row

from gpulayers import cli, dispatch

declare()
H100 = _tile.Device(90, 132, 232448)
ABOUT = {"gpu": "stand-in", "driver": "1", "triton": "2"}
SOFTMAX = "softmax_forward"


class Model(tune.Lab):
    """Seconds follow from the entries that a use's launches choose; results are wrong where an entry is in ``wrong``."""

    def __init__(self, seconds, wrong=(), stop_after=math.inf, dies_of=()):
        self.seconds, self.wrong, self.stop_after, self.dies_of = seconds, wrong, stop_after, dies_of
        self.captured = []
        self.answers = True

    def about(self):
        return ABOUT

    def entries(self, use):
        found = chosen(use, H100)
        return {a.choice: (_configs.find(a.choice)(*a.key), a.key) for a in found}

    def check(self, use):
        entries = self.entries(use)
        return next((f"{e} is wrong" for e, _ in entries.values() if e in self.wrong), None)

    def capture(self, use):
        entries = self.entries(use)
        self.answers = not any(e in self.dies_of for e, _ in entries.values())
        if not self.answers:
            raise RuntimeError("an illegal access")
        if len(self.captured) >= self.stop_after:
            raise KeyboardInterrupt
        seconds = sum(self.seconds(name, entry, key) for name, (entry, key) in entries.items())
        self.captured.append((use, entries))
        return lambda: seconds

    def alive(self):
        return self.answers


def sound(jobs, arch):
    """Every candidate compiles."""
    return [(job, Screened(None, 0.5, True)) for job in jobs]


def tuner(tmp_path, lab, **options) -> tune.Tuner:
    return tune.Tuner(
        lab, H100, tmp_path, tmp_path / "sm_90.json", **({"screening": sound, "progress": False} | options)
    )


def by_warps(best):
    """Seconds that grow with the distance from ``best(n)`` warps, of the choice ``SOFTMAX`` alone."""

    def seconds(name, entry, key):
        return 1.0 + (abs(math.log2(entry[-1] / best(key[1]))) if name == SOFTMAX and entry else 0.0)

    return seconds


def one_or_sixteen(n):
    return 1 if n <= 128 else 16 if n > 4096 else 8


# --- the run ---------------------------------------------------------------------------------------------------------


def test_it_finds_the_table_that_is_best(tmp_path, capsys):
    found = tuner(tmp_path, Model(by_warps(one_or_sixteen)))
    assert found.run(["softmax"]) == tune.DONE
    result = found.results()[SOFTMAX]
    lengths = {key[1] for (key,) in uses(["softmax"], H100)[SOFTMAX].values()}
    with _configs.listed(SOFTMAX, result.after):
        assert all(_configs.find(SOFTMAX)(H100, n)[-1] == one_or_sixteen(n) for n in lengths)
    assert len(result.after) == 3 and result.gain > 1.2
    written = _tables.read(tmp_path / "sm_90.json")
    assert written.entries[SOFTMAX] == result.after and written.arch == 90
    assert written.measured[SOFTMAX] == ABOUT | {
        "date": found.known.of(SOFTMAX)["result"]["date"], "gain": round(result.gain, 3)
    }  # fmt: skip
    untouched = _tables.read(_tables.find(90)).entries
    assert {n: e for n, e in written.entries.items() if n != SOFTMAX} == {
        n: e for n, e in untouched.items() if n != SOFTMAX
    }
    assert written.measured["softmax_backward"]["gain"] == 1.0 and "linear" not in written.measured
    tune.show_summary(found.results(), found.known)
    shown = capsys.readouterr().out
    assert "softmax_forward" in shown and "≤128: " in shown and "stays" in shown
    assert _tables.text(written) == (tmp_path / "sm_90.json").read_text()


def test_a_folder_holds_results_of_other_families(tmp_path):
    """Whose launchers a fresh process has not loaded yet."""
    tuner(tmp_path, Model(by_warps(one_or_sixteen))).run(["dropout"])
    code = f"""
import pathlib
from gpulayers.bench.tuning import tune
from gpulayers.kernels.triton import _tile
lab = type("Idle", (tune.Lab,), {{"about": lambda self: {ABOUT}}})()
folder = pathlib.Path({str(tmp_path)!r})
print(sorted(tune.Tuner(lab, _tile.Device(*{tuple(H100)}), folder, folder / "sm_90.json").results()))
"""
    root = str(pathlib.Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "['dropout']", done.stderr


def test_launches_choose_from_what_it_wrote(tmp_path, monkeypatch):
    tuner(tmp_path, Model(by_warps(one_or_sixteen))).run(["softmax"])
    monkeypatch.setenv("GPULAYERS_CONFIGS", str(tmp_path))
    _configs.reload()
    try:
        assert [_configs.find(SOFTMAX)(H100, n)[-1] for n in (10, 2000, 32000)] == [1, 8, 16]
    finally:
        monkeypatch.undo()
        _configs.reload()


def test_a_wrong_candidate_is_dropped(tmp_path, capsys):
    """It would be the fastest on rows of 32768; why it is not taken is kept."""
    lab = Model(by_warps(lambda n: 8), wrong={(1, 32768, 8)})
    found = tuner(tmp_path, lab)
    found.run(["softmax"])
    dropped = found.known.of(SOFTMAX)["dropped"]
    assert dropped and all("(1, 32768, 8) is wrong" in why for why in dropped.values())
    assert all(
        search.taken(_configs.find(SOFTMAX), Row(None, *map(int, c.split()[1:])), [(H100, 32768)]) == ((1, 32768, 8),)
        for c in dropped
    )
    assert found.results()[SOFTMAX].after[-1].warps == 16
    tune.show_summary(found.results(), found.known)
    assert "dropped  softmax_forward" in capsys.readouterr().out


def test_a_wrong_present_table_is_said_and_decides_nothing(tmp_path):
    found = tuner(tmp_path, Model(by_warps(one_or_sixteen), wrong={(1, 32768, 16)}))
    found.run(["softmax"])
    unusable = found.known.of(SOFTMAX)["unusable"]
    assert unusable and all(
        why.startswith("with the present table: ") and "is wrong" in why for why in unusable.values()
    )


def test_a_table_that_gains_nothing_as_a_whole_is_not_written(tmp_path):
    """Each candidate seemed faster alone; together, measured again, they are not."""

    class Fooled(Model):
        def capture(self, use):
            replay = super().capture(use)
            return (lambda: 9.0) if SOFTMAX in _configs._replaced and len(_configs._replaced[SOFTMAX]) > 1 else replay

    found = tuner(tmp_path, Fooled(by_warps(one_or_sixteen)))
    found.run(["softmax"])
    result = found.results()[SOFTMAX]
    assert result.after == result.before == _configs.find(SOFTMAX).entries(90) and result.gain == 1.0
    assert _tables.read(tmp_path / "sm_90.json").entries[SOFTMAX] == result.before


def test_the_time_limit_is_kept(tmp_path):
    """It stops between two candidates, says so with exit status 0, and what is known is on disk."""
    now = [0.0]

    class Slow(Model):
        def capture(self, use):
            now[0] += 1.0
            return super().capture(use)

    lab = Slow(by_warps(one_or_sixteen))
    found = tuner(tmp_path, lab, until=7.5, clock=lambda: now[0])
    assert found.run(["softmax"]) == tune.STOPPED
    assert now[0] <= 7.5 + 2  # a candidate, and the present table beside it
    known = json.loads((tmp_path / "tune.json").read_text())["choices"][SOFTMAX]
    assert sum(map(len, known["ratios"].values())) >= 3 and not known["result"]
    assert not (tmp_path / "sm_90.json").exists()


def decided(folder):
    return {name: c["result"] for name, c in json.loads((folder / "tune.json").read_text())["choices"].items()}


@pytest.mark.parametrize("family, captures", [("dropout", 4), ("softmax", 30)])
def test_a_run_that_was_killed_goes_on_to_the_same_result(family, captures, tmp_path):
    """Wherever it was killed: after so many captures, again and again in the same folder."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    lab = Model(by_warps(one_or_sixteen))
    tuner(whole, lab).run([family])
    repeated = -len(lab.captured)
    for run in range(100):  # noqa: B007
        again = Model(by_warps(one_or_sixteen), stop_after=captures)
        try:
            assert tuner(killed, again).run([family]) == tune.DONE
            break
        except KeyboardInterrupt:
            repeated += len(again.captured)
    assert run > 2 and repeated + len(again.captured) <= 2 * run  # the present table, and what was being tried
    assert decided(killed) == decided(whole)
    assert (killed / "sm_90.json").read_text() == (whole / "sm_90.json").read_text()


def test_a_candidate_that_processes_die_of_is_dropped(tmp_path):
    """After two of them: the first may have been stopped from outside."""
    bad = (1, 32768, 8)
    statuses = []
    for _ in range(9):
        statuses.append(tuner(tmp_path, Model(by_warps(lambda n: 8), dies_of={bad})).run(["softmax"]))
        if statuses[-1] == tune.DONE:
            break
    assert statuses[:2] == [tune.DIED, tune.DIED] and statuses[-1] == tune.DONE
    dropped = json.loads((tmp_path / "tune.json").read_text())["choices"][SOFTMAX]["dropped"]
    assert dropped and all(why.startswith("the process died of it, on softmax: vocabulary") for why in dropped.values())


def test_a_folder_of_another_gpu_is_refused(tmp_path):
    tuner(tmp_path, Model(by_warps(one_or_sixteen))).run(["dropout"])

    class Other(Model):
        def about(self):
            return ABOUT | {"gpu": "another"}

    with pytest.raises(ValueError, match=r"tune\.json holds what .*stand-in.* measured, and this is .*another"):
        tuner(tmp_path, Other(by_warps(one_or_sixteen)))


def test_the_harness_checks_and_times_by_the_choices_that_hold(monkeypatch):
    """On this CPU, whose NumPy kernel stands in for Triton's; a wrong one is told, with where it is wrong."""
    harness = tune.Harness(Cpu(turn=0.0, settle=0.0, large=1 << 12), "numpy")
    assert set(harness.about()) == set(ABOUT)
    for direction in ("forward", "backward"):
        use = Use("softmax", 0, "float32", direction)
        assert harness.check(use) is None and harness.capture(use)() > 0 and harness.alive()
    monkeypatch.setattr(numpy_softmax, "softmax_backward", lambda dys, saved, **options: (dys[0],))
    dispatch._plans.clear()
    assert "times the allowed error: gradient of x at" in harness.check(use)
    monkeypatch.undo()
    dispatch._plans.clear()


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_what_is_in_use(capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["tune", "softmax", "--arch", "sm_80"]) == 2
    said = capsys.readouterr()
    assert "gpulayers tune times kernels on a GPU, and torch sees none here" in said.err
    assert "sm_80 chooses from" in said.out and "sm_80.json" in said.out and "by reasoning, not measured" in said.out


def test_an_unknown_architecture_is_refused(capsys):
    assert cli.main(["tune", "--arch", "sm_70"]) == 2
    assert (
        "--arch: the rule is one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120; got 'sm_70'" in capsys.readouterr().err
    )


def test_the_target_is_the_projects_table_unless_out_is_given(tmp_path):
    assert tune.target(90, tmp_path) == tmp_path / "sm_90.json"
    assert tune.target(90, None) == _tables.SHIPPED / "sm_90.json"
