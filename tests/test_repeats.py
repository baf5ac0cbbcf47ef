"""A launch that comes again with the same bytes is remembered; one that could do anything else is run."""

import numpy as np
import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from own_kernels import double_too_far_kernel

from gpulayers.testing import interpreter
from gpulayers.testing._repeats import remembered
from gpulayers.testing.interpreter import interpreting
from gpulayers.testing.memory import KernelMemoryError, Memory

ONES = np.ones(8, np.float32)


@triton.jit
def added_kernel(x, y, by, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i) + tl.load(y + i) + 1 / by)


@triton.jit
def aligned_kernel(x, y, by, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(tl.multiple_of(x, 1) + i))


@triton.jit
def address_kernel(x, y, by, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, (x.to(tl.int64) - x.to(tl.int64)).to(tl.float32))


@pytest.fixture
def runs(monkeypatch):
    """What each store of a program wrote; these toys prove nothing."""
    monkeypatch.setattr(interpreter, "proven", set())
    written, store = [], Memory.store
    monkeypatch.setattr(Memory, "store", lambda *args: (written.append(args[2]), store(*args))[1])
    with interpreting():
        yield written


def launch(kernel=added_kernel, x=ONES, y=ONES, by=2.0, grid=(1,)):
    out = y.copy()
    kernel[grid](x, out, by, SIZE=8)
    return out


def test_the_same_launch_runs_once(runs):
    with remembered():
        assert all((launch() == 2.5).all() for _ in range(3)) and len(runs) == 1
    launch(), launch()
    assert len(runs) == 3


OTHERS = {
    "x": {"x": 2 * ONES},
    "what y held": {"y": 2 * ONES},
    "a number": {"by": 4.0},
    "its sign": {"by": -0.0},
    "dtype": {"y": ONES.view(np.int32)},
    "strides": {"x": ONES.reshape(4, 2).T},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_launch_is_run(runs, other):
    with remembered():
        launch(by=0.0), launch(**{"by": 0.0} | other)
    assert len(runs) == 2


def test_where_tensors_share_memory_counts(runs):
    with remembered():
        for start in (0, 1, 8):
            memory = np.ones(16, np.float32)
            added_kernel[(1,)](memory[:8], memory[start : start + 8], 1.0, SIZE=8)
            assert (memory[start : start + 8] == 3).all()
    assert len(runs) == 3


@pytest.mark.parametrize("kernel", [aligned_kernel, address_kernel])
def test_what_hangs_on_addresses_is_run(runs, kernel):
    with remembered():
        launch(kernel), launch(kernel)
    assert len(runs) == 2


def test_settings_count(runs):
    with remembered():
        launch()
        with interpreting(fused=True):
            launch()
    assert len(runs) == 2


def test_a_launch_that_failed_fails_again(runs):
    with remembered():
        for _ in range(2):
            with pytest.raises(KernelMemoryError, match="out of bounds"):
                double_too_far_kernel[(1,)](ONES, ONES.copy(), 8, BLOCK=16)
