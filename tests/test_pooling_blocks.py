"""Pooling of images whose channels are neighbours: a lane has the channels of several pixels."""

import pytest
from gpulayers.kernels.triton import _configs, _pooling_blocks, pooling
from halves import check_op
from pooling_calls import draw, special

from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.testing.interpreter import interpreting

WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "ceil_mode": True},  # hangs over the end
    {"kernel_size": (4, 1), "stride": (3, 1), "padding": (2, 0)},
    {"kernel_size": 5, "stride": 1, "padding": 2},
]
AVERAGED = [
    *((window, {}) for window in WINDOWS[:5]),
    *((window, {"count_include_pad": False}) for window in (WINDOWS[1], WINDOWS[2], WINDOWS[3])),
    (WINDOWS[3], {"divisor_override": 5}),
]
HALVES = ("float16", "bfloat16")


def ran(op, x, dtype, **options):
    """The kernels of a check."""
    with interpreting() as session:
        check_op(op, x, backends=("triton",), dtypes=[dtype], dys=["dense"], **options)
    return {run.kernel for run in session.launches}


def of_blocks(kind):
    return {f"_{kind}_pool_blocks_{way}_kernel" for way in ("forward", "backward")}


@pytest.mark.parametrize("i, options", [*enumerate(WINDOWS)])
def test_max_pool(i, options):
    x = special(draw(2, 9, 7, 6, last=True))  # two images, and lanes past the last row, column and channel
    assert ran(max_pool, x, HALVES[i % 2], return_indices=i % 3 == 1, **options) == of_blocks("max")


@pytest.mark.parametrize("i, case", [*enumerate(AVERAGED)])
def test_avg_pool(i, case):
    options, more = case
    assert ran(avg_pool, draw(2, 9, 7, 6, last=True), HALVES[i % 2], **options, **more) == of_blocks("avg")


@pytest.mark.parametrize("i", range(len(WINDOWS)))
def test_planes(i):
    """Of row-major images, whose rows are no whole runs: several planes to a program, and lanes past the last."""
    x = special(draw(2, 3, 7, 9))
    assert ran(max_pool, x, HALVES[i % 2], return_indices=i % 3 == 1, **WINDOWS[i]) == of_blocks("max")
    more = {"count_include_pad": i == 1}
    assert ran(avg_pool, draw(2, 3, 7, 9), HALVES[i % 2], **WINDOWS[i], **more) == of_blocks("avg")


def test_tiles():
    """Several tiles along each axis, of parts of the channels: of few idle lanes."""
    assert [_pooling_blocks._channels(c) for c in (8, 72, 96, 192, 100)] == [8, 8, 32, 64, 8]
    found = [_pooling_blocks._high(16, *sizes) for sizes in ((56, 56), (14, 14), (4, 4), (1, 500), (9, 2))]
    assert found == [4, 14, 4, 1, 5]
    row = _configs.Row(None, 64, 1)
    x = draw(1, 24, 7, 9, last=True)
    for op, choices in (
        (max_pool, (pooling.MAX_FORWARD, pooling.MAX_BACKWARD)),
        (avg_pool, (pooling.AVG_FORWARD, pooling.AVG_BACKWARD)),
    ):
        with _configs.forced(choices[0].name, row), _configs.forced(choices[1].name, row):
            assert "blocks" in "".join(ran(op, x, "float32", kernel_size=3, stride=1, padding=1))


def test_what_is_left():
    """Few channels, dilated and large windows, windows with pixels between them, and of one pixel."""
    for shape, options in (
        ((1, 5, 6, 5), {"kernel_size": 2}),
        ((1, 8, 7, 6), {"kernel_size": 2, "dilation": 2, "padding": 1, "stride": 1}),
        ((1, 8, 6, 7), {"kernel_size": (1, 6)}),
        ((1, 8, 5, 5), {"kernel_size": (1, 2), "stride": (2, 1)}),
        ((1, 8, 5, 5), {"kernel_size": 1}),
    ):
        assert "_max_pool_forward_kernel" in ran(max_pool, draw(*shape, last=True), "bfloat16", **options)


@pytest.mark.parametrize(
    "shape, last", [((3, 5, 5, 5), False), ((2, 3, 7, 15), False), ((2, 3, 1, 3), False), ((2, 9, 7, 7), True)]
)
def test_means_of_few_pixels(shape, last):
    """In planes whose first pixel lies anywhere, and by 16 bytes of channels."""
    kernels = ran(adaptive_avg_pool, draw(*shape, last=last), "bfloat16", output_size=1)
    assert kernels == {"_mean_of_few_kernel", f"_mean_to_{'pixels' if last else 'planes'}_kernel"}
