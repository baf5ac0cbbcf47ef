"""Pooling of rows that are whole runs of 16 bytes, and of what nearly is."""

import numpy as np
import pytest
from halves import check_op
from pooling_calls import draw, special

from gpulayers.ops.pooling import avg_pool, max_pool
from gpulayers.testing.interpreter import interpreting

WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (1, 2), "stride": 1, "ceil_mode": True},  # 31 to a row: no whole runs
    {"kernel_size": (2, 3), "stride": (3, 2), "ceil_mode": True},  # hangs over the end
    {"kernel_size": (4, 1), "stride": (1, 2), "padding": (2, 0)},
]
AVERAGED = [
    *((window, {}) for window in WINDOWS[:4]),
    *((window, {"count_include_pad": False}) for window in (WINDOWS[1], WINDOWS[2], WINDOWS[4], WINDOWS[5])),
    (WINDOWS[4], {"divisor_override": 5}),
]
HALVES = ("float16", "bfloat16")


def ran(op, x, dtype, **options):
    """The kernels of a check."""
    with interpreting() as session:
        check_op(op, x, backends=("triton",), dtypes=[dtype], dys=["dense"], **options)
    return {run.kernel for run in session.launches}


def of_runs(kind, options):
    """A row of 31 windows is no whole runs."""
    runs = "blocks_" if options["kernel_size"] == (1, 2) else "runs_"
    return {f"_{kind}_pool_{runs}{way}_kernel" for way in ("forward", "backward")}


@pytest.mark.parametrize("i, options", [*enumerate(WINDOWS)])
def test_max_pool(i, options):
    x = special(draw(2, 1, 5, 32))
    assert ran(max_pool, x, HALVES[i % 2], **options) == of_runs("max", options)


def test_windows_of_minus_infinity():
    """The first pixel of a window gets its gradient, where none is greater."""
    x = draw(2, 1, 6, 32)
    x[..., :5], x[:, :, :2], x[..., -3:] = -np.inf, -np.inf, -np.inf
    for stride in (1, 2):
        assert ran(max_pool, x, "bfloat16", kernel_size=3, stride=stride, padding=1) == of_runs("max", WINDOWS[2])


@pytest.mark.parametrize("i, case", [*enumerate(AVERAGED)])
def test_avg_pool(i, case):
    options, more = case
    assert ran(avg_pool, draw(2, 1, 5, 32), HALVES[i % 2], **options, **more) == of_runs("avg", options)


def test_halves_of_runs():
    """Rows of 4 numbers of 16 bits, and of 2 in float32: 8 bytes at a time."""
    for op, kind in ((max_pool, "max"), (avg_pool, "avg")):
        options = {"kernel_size": 3, "stride": 1, "padding": 1}
        assert ran(op, draw(1, 2, 3, 12), "bfloat16", **options) == of_runs(kind, options)
        assert ran(op, draw(1, 2, 3, 6), "float32", **options) == of_runs(kind, options)
    assert ran(avg_pool, draw(1, 2, 3, 6), "float32", count_include_pad=False, **options) == of_runs("avg", options)


def test_what_is_left():
    """Arrays that are not contiguous, dilated windows, wider ones, and indices: a lane moves pixels one by one."""
    for kernel, x, options in (
        ("_max_pool_forward_kernel", draw(1, 2, 4, 32)[:, :, ::2], {"kernel_size": 2}),
        ("_max_pool_forward_kernel", draw(1, 1, 4, 32), {"kernel_size": 2, "dilation": 2, "padding": 1, "stride": 1}),
        ("_max_pool_blocks_forward_kernel", draw(1, 1, 4, 32), {"kernel_size": (2, 4)}),
        ("_max_pool_blocks_forward_kernel", draw(1, 1, 4, 32), {"kernel_size": 2, "return_indices": True}),
    ):
        assert kernel in ran(max_pool, x, "bfloat16", **options)
