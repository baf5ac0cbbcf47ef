"""What the tuner tries, what screening says of it, and the short table that measured candidates make."""

import math
import multiprocessing.connection
import os
import time

import pytest

pytest.importorskip("triton")

from gpulayers.bench import conv
from gpulayers.bench.cases.case import every_case
from gpulayers.bench.cases.uses import Use, declare, directions, uses
from gpulayers.bench.measuring import lab, pool, warm
from gpulayers.bench.tuning import screen, search
from gpulayers.bench.tuning.search import Screened
from gpulayers.kernels.triton import _configs, _tables, _tile
from gpulayers.kernels.triton._tables import Row, Tile

from gpulayers import arrays
from gpulayers.testing import _launches
from gpulayers.testing.compiling import driving, one

declare()
H100 = _tile.Device(90, 132, 232448)
SOFTMAX = "softmax_forward"


# --- what is tried ---------------------------------------------------------------------------------------------------


def test_uses_are_the_declared_shapes_that_ask():
    found = uses(["softmax", "linear"], H100)
    assert {u.direction for u in found[SOFTMAX]} == {"forward"} and {u.dtype for u in found[SOFTMAX]} == {"bfloat16"}
    assert all(key == (H100, u.case.shapes[0][-1]) for u, (key,) in found[SOFTMAX].items())
    assert {u.dtype for u in found["matmul.tf32"]} == {"tf32"} and {u.dtype for u in found["matmul.single"]} == {
        "float32"
    }
    assert {len(keys) for u, keys in found["matmul.tf32"].items() if u.direction == "backward"} >= {2}
    assert "conv.half" not in found
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
    for name in (SOFTMAX, "matmul.half", "conv.single"):
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
    found = search.distinct(matmul, every, [(small, 4096, 4096, 4096, 2, True, False)])
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
    for process in processes:  # not join(): the executor's own thread may have asked first
        assert multiprocessing.connection.wait([process.sentinel], 20)
    assert os.cpu_count() not in pool._resting


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
    keys = [(H100, *sizes, 2, True, True) for sizes in ((8192, 8192, 8192), (192, 64, 64), (64, 64, 64))]
    asked = {Use("linear", i, "bfloat16", "forward"): (key,) for i, key in enumerate(keys)}
    table = [{large: 0.5, middle: 0.6, small: 2.0}, {large: 2.0, middle: 1.5, small: 0.7}, {large: 3.0, small: 0.9}]
    ratios = dict(zip(asked, table))
    found = search.table(choice, choice.entries(90), asked, ratios)
    assert found == (large, small)
    assert search.estimate(choice, found, asked, ratios) == pytest.approx((0.5 * 0.7 * 0.9) ** (1 / 3))
    assert search.estimate(choice, (middle,), asked, ratios) == math.inf  # not measured on the last
    no_gain = {use: dict.fromkeys(found, 1.0) for use, found in ratios.items()}
    assert search.table(choice, choice.entries(90), asked, no_gain) == choice.entries(90)
