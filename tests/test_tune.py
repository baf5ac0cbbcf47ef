"""The tuner, on a stand-in whose seconds are a known function of what launches choose."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest

pytest.importorskip("triton")

from gpulayers.bench import conv
from gpulayers.bench.cases.case import every_case
from gpulayers.bench.cases.uses import Use, chosen, declare, directions, uses
from gpulayers.bench.measuring import lab, pool, warm
from gpulayers.bench.measuring.device import Cpu
from gpulayers.bench.tuning import screen, search, tune
from gpulayers.bench.tuning.search import Screened
from gpulayers.kernels.numpy import softmax as numpy_softmax
from gpulayers.kernels.triton import _configs, _tables, _tile
from gpulayers.kernels.triton._tables import Row, Tile

from gpulayers import arrays, cli, dispatch
from gpulayers.testing import _launches
from gpulayers.testing.compiling import driving, one

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


# --- what is tried ---------------------------------------------------------------------------------------------------


def test_uses_are_the_declared_shapes_that_ask():
    found = uses(["softmax", "linear"], H100)
    assert {u.direction for u in found[SOFTMAX]} == {"forward"} and {u.dtype for u in found[SOFTMAX]} == {"bfloat16"}
    assert all(key == (H100, u.case.shapes[0][-1]) for u, (key,) in found[SOFTMAX].items())
    assert {u.dtype for u in found["matmul.tf32"]} == {"tf32"} and {u.dtype for u in found["matmul.single"]} == {
        "float32"
    }
    assert {len(keys) for u, keys in found["matmul.tf32"].items() if u.direction == "backward"} >= {2}
    assert "conv2d.half" not in found
    with pytest.raises(ValueError, match=r"family: the rule is one of activation, .*; got 'soft'"):
        uses(["soft"], H100)


def test_uses_lie_in_memory_as_their_cases_say():
    """A channels-last convolution turns nothing; of its row-major twin, x is turned."""
    found = uses(["conv"], H100)["nhwc"]
    last = [c.name.removesuffix(", channels last") for c in conv.cases() if c.name.endswith(", channels last")]
    names = {use.case.name for use in found if use.direction == "forward"}
    assert last and not [name for name in names if name.endswith("channels last")] and names & set(last)


def test_a_sample_has_the_smallest_the_largest_and_no_two_alike():
    asked = {n: ((H100, n // 2),) for n in range(40)}
    found = search.sample(asked, lambda use: -use, 5)
    assert list(found) == [38, 28, 18, 10, 0] and all(found[n] == asked[n] for n in found)
    assert search.sample({3: ("a",)}, lambda use: use, 5) == {3: ("a",)} and not search.sample({}, lambda use: use, 5)


def test_candidates_start_with_the_present_ones():
    for name in (SOFTMAX, "matmul.half", "conv2d.single"):
        choice = _configs.find(name)
        present = choice.entries(90)
        every = search.candidates(choice, present)
        assert every[: len(present)] == [search.bare(e) for e in present] and len(set(every)) == len(every) > 12
        for candidate in every:
            _tables.check(name, (candidate,))


def test_candidates_that_launches_cannot_tell_apart_are_one():
    """For rows of 8192 only warps differ; what does not fit a GPU's shared memory is none."""
    softmax = _configs.find(SOFTMAX)
    every = search.candidates(softmax, softmax.entries(90))
    found = search.distinct(softmax, every, [(H100, 8192)])
    assert sorted(search.taken(softmax, c, [(H100, 8192)])[0] for c in found if c.elements <= 8192) == [
        (1, 8192, w) for w in (2, 4, 8, 16)
    ]
    matmul, small = _configs.find("matmul.half"), _tile.Device(86, 84, 101376)
    every = search.candidates(matmul, matmul.entries(80))
    found = search.distinct(matmul, every, [(small, 4096, 4096, 2, True)])
    assert 0 < len(found) < len(every) and all(c.shared(2) <= small.shared for c in found)


def test_the_shortlist_leaves_out_what_spills_and_keeps_what_is():
    choice = _configs.find(SOFTMAX)
    present = (Row(64, 2048, 4),)
    every = {
        Row(None, 2048, 4): Screened(None, 0.1, False),
        Row(None, 4096, 4): Screened("spills", 0.9, True),
        Row(None, 2048, 8): Screened(None, 0.5, True),
        Row(None, 2048, 16): Screened(None, 0.9, True),
        Row(None, 16384, 16): Screened(None, 0.9, True),
        Row(None, 1024, 1): Screened(None, 0.9, False),
    }
    found = search.shortlist(choice, every, present, 2)
    assert found == [Row(None, 2048, 4), Row(None, 2048, 8), Row(None, 2048, 16)]


def test_the_shortlist_of_tiles_has_every_shape_before_a_second_of_one():
    choice = _configs.find("matmul.half_tma")
    every = {c: Screened(None, 0.25, True) for c in search.candidates(choice, ())}
    found = search.shortlist(choice, every, (), len(search.SHAPES) + 1)
    assert {(c.BM, c.BN) for c in found} == set(search.SHAPES) and len(found) == len(search.SHAPES) + 1


@pytest.mark.parametrize("candidate, fault", [(Row(None, 2048, 16), None), (Row(None, 2048, 4), "spills: ")])
def test_screening_reads_the_machine_code(candidate, fault):
    """Rows of 32768 in 16 warps' registers are well, and those in 4 warps' spill."""
    use = next(u for u, (key,) in uses(["softmax"], H100)[SOFTMAX].items() if key[1] == 32768)
    found = screen.screen((use, SOFTMAX, candidate), 90)
    assert (found.fault is None) == (fault is None) and (fault or "") in (found.fault or "") and found.wide


def test_what_does_not_compile_speaks_against_its_candidate_alone():
    use = next(iter(uses(["linear"], H100)["matmul.half_tma"]))
    found = screen.screen((use, "matmul.half_tma", Tile(256, 256, 256, 8, 8)), 90)
    assert "ValueError: matmul.half_tma: none of its configurations fits" in found.fault


class Crash:
    """Ends the process that unpickles it, as a compiler may that runs into a signal."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_compiler_that_takes_its_process_with_it_speaks_against_its_candidate_alone():
    use, crash, large = next(iter(uses(["linear"], H100)["matmul.half_tma"])), Crash(), Tile(256, 256, 256, 8, 8)
    found = dict(screen.screened([(use, "matmul.half_tma", c) for c in (crash, large)], 90))
    assert found[use, "matmul.half_tma", crash].fault == "the compiler's process died of it"
    assert "none of its configurations fits" in found[use, "matmul.half_tma", large].fault


def test_compilers_wait_for_the_next_choice():
    """Their start costs seconds; a death, and who stops listening, end them."""
    use, large = next(iter(uses(["linear"], H100)["matmul.half_tma"])), Tile(256, 256, 256, 8, 8)
    jobs = [(use, "matmul.half_tma", large)]
    assert len(list(screen.screened(jobs, 90))) == 1
    resting = pool._resting[os.cpu_count()]
    first = {*resting._processes}
    assert len(list(screen.screened(jobs, 90))) == 1
    assert pool._resting[os.cpu_count()] is resting and first <= {*resting._processes}
    processes = [*resting._processes.values()]
    next(found := screen.screened(jobs * 2, 90))
    found.close()
    for process in processes:
        process.join(20)
    assert os.cpu_count() not in pool._resting and not any(p.is_alive() for p in processes)


def test_what_the_next_cases_launch_is_compiled_before_they_are_measured(tmp_path, monkeypatch):
    """By other processes; a launch of this one finds it in Triton's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warm, "FEWEST", 2)
    monkeypatch.setattr(pool, "_resting", {})  # they have an environment of their own
    (task, *_) = (t for t in lab.ordered(every_case(["softmax"]), [arrays.dtype("bfloat16")]) if not t.slow)
    warm.warm([task, task._replace(slow=True)], 90, until=time.monotonic() + 300)
    for resting in pool._resting.values():
        resting.shutdown()
    compiled = {p.name for p in tmp_path.iterdir()}
    assert compiled

    def launch(run, kernel, grid, args, kwargs):
        with driving(90):
            run(kernel, *args, grid=grid, warmup=True, **kwargs)

    cases = [case.name for _, case in every_case(["softmax"])]
    use = Use("softmax", cases.index(task.case.name), "bfloat16", "backward")
    monkeypatch.setattr(_tile, "pretend", one(90))
    with _launches.catching("meta", launch):
        forward, backward = directions(use)
        backward(forward()[1])
    assert {p.name for p in tmp_path.iterdir()} == compiled


def test_compiling_ahead_keeps_the_time_limit(monkeypatch):
    monkeypatch.setattr(warm, "FEWEST", 1)
    tasks = [t for t in lab.ordered(every_case(["linear"]), [arrays.dtype("bfloat16")]) if not t.slow]
    begin = time.monotonic()
    warm.warm(tasks, 90, until=begin)
    assert os.cpu_count() not in pool._resting and time.monotonic() - begin < 60


# --- what the measured make ------------------------------------------------------------------------------------------


def measured(seconds, lengths, candidates):
    """(uses, ratios) of a rows choice whose present table takes one second."""
    asked = {Use("softmax", i, "bfloat16", "forward"): ((H100, n),) for i, n in enumerate(lengths)}
    return asked, {u: {c: seconds(c, n) for c in candidates} for (u, ((_, n),)) in asked.items()}


CANDIDATES = [Row(None, 2048, w) for w in (1, 4, 8, 16)]


def test_rows_merge_where_neighbours_agree():
    """Up to the power of two that the last of them fills; what was not measured stays as it is."""
    choice = _configs.find(SOFTMAX)
    best = {64: 1, 100: 1, 1000: 8, 3000: 8, 8192: 16}
    asked, ratios = measured(lambda c, n: 0.5 if c.warps == best[n] else 1.0, best, CANDIDATES)
    found = search.table(choice, choice.entries(90), asked, ratios)
    assert found == (Row(128, 2048, 1), Row(4096, 2048, 8), Row(32768, 2048, 16))


def test_rows_of_any_length_end_with_any_length():
    choice = _configs.find("dropout")
    asked, ratios = measured(lambda c, n: 0.5 if c.warps == (1 if n < 99 else 8) else 1.0, [64, 9000], CANDIDATES)
    assert search.table(choice, choice.entries(90), asked, ratios) == (Row(64, 2048, 1), Row(None, 2048, 8))


def test_an_entry_that_gains_no_more_than_noise_is_not_worth_it():
    choice = _configs.find("dropout")
    asked, ratios = measured(
        lambda c, n: {1: 0.5, 4: 0.499 if n > 99 else 0.6}.get(c.warps, 1.0), [64, 9000], CANDIDATES
    )
    assert search.table(choice, choice.entries(90), asked, ratios) == (Row(None, 2048, 1),)
    asked, ratios = measured(lambda c, n: 0.995, [64, 9000], CANDIDATES)
    assert search.table(choice, choice.entries(90), asked, ratios) == choice.entries(90)


def test_a_table_of_rows_stays_short():
    choice = _configs.find("dropout")
    lengths = [2**i for i in range(5, 20)]
    wanted = {n: CANDIDATES[i % 4] for i, n in enumerate(lengths)}
    asked, ratios = measured(lambda c, n: 0.5 if c == wanted[n] else 1.0, lengths, CANDIDATES)
    assert len(search.table(choice, choice.entries(90), asked, ratios)) == search.MOST_ROWS


def test_tiles_are_the_best_list_under_the_launchers_rule():
    """A large tile is best on large products, a small one on small; the rule gives each its own."""
    choice = _configs.find("matmul.half_tma")
    large, middle, small = Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)
    keys = [(H100, 8192, 8192, 2, True), (H100, 192, 64, 2, True), (H100, 64, 64, 2, True)]
    asked = {Use("linear", i, "bfloat16", "forward"): (key,) for i, key in enumerate(keys)}
    table = [{large: 0.5, middle: 0.6, small: 2.0}, {large: 2.0, middle: 1.5, small: 0.7}, {large: 3.0, small: 0.9}]
    ratios = dict(zip(asked, table))
    found = search.table(choice, choice.entries(90), asked, ratios)
    assert found == (large, small)
    assert search.estimate(choice, found, asked, ratios) == pytest.approx((0.5 * 0.7 * 0.9) ** (1 / 3))
    assert search.estimate(choice, (middle,), asked, ratios) == math.inf  # not measured on the last
    no_gain = {use: dict.fromkeys(found, 1.0) for use, found in ratios.items()}
    assert search.table(choice, choice.entries(90), asked, no_gain) == choice.entries(90)


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
    assert cli.main(["tune", "softmax", "--arch", "sm_80"]) == 1
    said = capsys.readouterr()
    assert "gpulayers tune times kernels on a GPU, and torch sees none here" in said.err
    assert "sm_80 chooses from" in said.out and "sm_80.json" in said.out and "by reasoning, not measured" in said.out


def test_an_unknown_architecture_is_refused(capsys):
    assert cli.main(["tune", "--arch", "sm_70"]) == 1
    assert (
        "--arch: the rule is one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120; got 'sm_70'" in capsys.readouterr().err
    )


def test_the_target_is_the_projects_table_unless_out_is_given(tmp_path):
    assert tune.target(90, tmp_path) == tmp_path / "sm_90.json"
    assert tune.target(90, None) == _tables.SHIPPED / "sm_90.json"
