"""How many threads the NumPy kernels take."""

import pytest
from gpulayers.kernels.numpy import _blocks


@pytest.mark.parametrize(
    "text, threads",
    [("4", 4), ("4,2", 4), (" 3 , 2", 3), ("+2", 2), ("99", 6), ("", 6), (" ", 6), ("0", 6), ("-1", 6), ("two", 6)],
)
def test_omp_num_threads_is_a_list_by_nesting_level(monkeypatch, text, threads):
    """Whatever says nothing leaves the cores that there are, as OpenMP does."""
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    monkeypatch.setattr(_blocks.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert _blocks.threads.__wrapped__() == threads
