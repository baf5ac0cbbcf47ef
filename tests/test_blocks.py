"""How many threads the NumPy kernels take, and what each of them does."""

import threading

import pytest
from gpulayers.kernels.numpy import _blocks


@pytest.mark.parametrize("total", [0, 1, 4, 5, 9, 10, 31])
@pytest.mark.parametrize("threads", [2, 3])
def test_each_block_is_worked_on_once_and_in_order(monkeypatch, total, threads):
    monkeypatch.setattr(_blocks, "threads", lambda: threads)
    blocks = [(lo, min(lo + 4, total)) for lo in range(0, total, 4)]
    assert _blocks.over(total, 4, lambda lo, hi: (lo, hi)) == blocks


def test_what_a_thread_does_inside_its_work_it_does_by_itself(monkeypatch):
    """Of work cut in two, both halves are busy: neither hands over half of its half."""
    monkeypatch.setattr(_blocks, "threads", lambda: 2)

    def work(lo, hi):
        return {threading.get_ident(), *_blocks.over(8, 4, lambda lo, hi: threading.get_ident())}

    assert [len(threads) for threads in _blocks.over(8, 4, work)] == [1, 1]
    assert not _blocks._single()


@pytest.mark.parametrize(
    "text, threads",
    [("4", 4), ("4,2", 4), (" 3 , 2", 3), ("+2", 2), ("99", 6), ("", 6), (" ", 6), ("0", 6), ("-1", 6), ("two", 6)],
)
def test_omp_num_threads_is_a_list_by_nesting_level(monkeypatch, text, threads):
    """Whatever says nothing leaves the cores that there are, as OpenMP does."""
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    monkeypatch.setattr(_blocks.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert _blocks._cores.__wrapped__() == threads
