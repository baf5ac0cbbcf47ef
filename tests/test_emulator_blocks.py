"""Blocks that wait for one another, emulated: what is ordered passes, seeded faults are found."""

import shutil

import numpy as np
import pytest
from gpulayers.kernels.cuda import _launch

from gpulayers.testing import emulator
from gpulayers.testing.emulator import KernelBarrierError, KernelRaceError, emulating

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

SOURCE = r"""
#include "_common.cuh"
#include "_blocks.cuh"

// Each block writes its part and reads its neighbour's. kind: 0 right, 1 without the barrier, 2 without the last block in it,
// 3 without one thread.
extern "C" __global__ void around(float* x, float* y, unsigned* arrived, int kind) {
    unsigned phase = 0;
    int last = gridDim.x - 1;
    for (int round = 0; round < 3; ++round) {
        x[blockIdx.x * blockDim.x + threadIdx.x] = 10 * round + blockIdx.x;
        if (kind != 1 && !(kind == 2 && blockIdx.x == last) && !(kind == 3 && threadIdx.x == 5)) grid_barrier(arrived, phase);
        y[blockIdx.x * blockDim.x + threadIdx.x] = x[(blockIdx.x + 1) % gridDim.x * blockDim.x + threadIdx.x];
        if (kind == 0) grid_barrier(arrived, phase);
    }
}
// One thread writes, fences and raises a flag, with no barrier of its block; one of another block waits and reads.
// kind: 0 right, 1 no fence, 2 the flag first, 3 nobody raises it, 4 another thread of the writer's block wrote.
extern "C" __global__ void flagged(float* x, float* y, volatile int* flag, int kind) {
    if (blockIdx.x == 0 && threadIdx.x < 2) {
        if (threadIdx.x == (kind == 4)) x[0] = 7;
        if (threadIdx.x == 0) {
            if (kind != 1 && kind != 2) __threadfence();
            if (kind != 3) *flag = 1;
            if (kind == 2) __threadfence();
        }
    }
    if (blockIdx.x == 1 && threadIdx.x == 3) {
        while (*flag == 0) {}
        __threadfence();
        y[0] = x[0];
    }
}
// A lock that is tried again and again. kind: 0 right, 1 let go without a fence.
extern "C" __global__ void locked(float* x, int* lock, int kind) {
    if (threadIdx.x) return;
    while (atomicCAS(lock, 0, 1)) {}
    __threadfence();
    x[0] += 1 + blockIdx.x;
    if (kind != 1) __threadfence();
    atomicExch(lock, 0);
}
"""


@pytest.fixture(autouse=True)
def family(monkeypatch):
    text = _launch._whole(SOURCE)
    monkeypatch.setattr(_launch, "source", lambda family: text)
    monkeypatch.setattr(emulator, "proven", set())


def launch(name, *args, grid=3, block=64, cooperative=True):
    with emulating():
        _launch.launch("toy", name, (grid,), (block,), args, cooperative=cooperative)


def around(kind, **options):
    x, y = np.zeros(192, np.float32), np.zeros(192, np.float32)
    launch("around", x, y, np.zeros(1, np.uint32), np.int32(kind), **options)
    return y


def test_a_barrier_of_all_blocks():
    assert np.unique(around(0)).tolist() == [20, 21, 22]


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_broken_barrier(kind):
    with pytest.raises((KernelRaceError, KernelBarrierError)):
        around(kind)


def test_what_is_not_cooperative_waits_in_vain():
    with pytest.raises(KernelBarrierError, match="poll memory for what no block that runs will write"):
        around(0, cooperative=False)


def test_all_blocks_must_fit():
    """The emulated GPU has three multiprocessors."""
    with pytest.raises(ValueError, match="99 blocks must run at once; here it is 96"):
        launch("around", *[np.zeros(8, np.float32)] * 2, np.zeros(1, np.uint32), np.int32(0), grid=99)


def flagged(kind):
    x, y = np.zeros(1, np.float32), np.zeros(1, np.float32)
    launch("flagged", x, y, np.zeros(1, np.int32), np.int32(kind), grid=2)
    return y[0]


def test_a_flag_of_one_thread():
    """Spins on volatile memory let the others run, and a thread's own writes need no barrier before its fence."""
    assert flagged(0) == 7


@pytest.mark.parametrize("kind", [1, 2, 4])
def test_a_flag_that_orders_nothing(kind):
    with pytest.raises(KernelRaceError, match="read-after-write"):
        flagged(kind)


def test_a_flag_that_nobody_raises():
    with pytest.raises(KernelBarrierError, match="poll memory"):
        flagged(3)


def locked(kind):
    x = np.zeros(1, np.float32)
    launch("locked", x, np.zeros(1, np.int32), np.int32(kind))
    return x[0]


def test_a_lock():
    assert locked(0) == 6
    with pytest.raises(KernelRaceError):
        locked(1)
