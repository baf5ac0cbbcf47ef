"""Columns of windows that are rows of the image, by whole runs of 16 bytes."""

import pytest
from halves import check_op
from pooling_calls import draw

from gpulayers.ops.window import fold, unfold
from gpulayers.testing.interpreter import interpreting

WINDOWS = [
    ({"kernel_size": 3, "padding": 1}, "float16"),
    ({"kernel_size": (2, 3), "padding": (0, 1)}, "bfloat16"),
    ({"kernel_size": (3, 1), "padding": (1, 0)}, "float32"),
]
LEFT = [
    ({"kernel_size": 3, "padding": 1, "stride": 2}, "float16"),
    ({"kernel_size": 3}, "float16"),
    ({"kernel_size": 3, "padding": 1, "dilation": (2, 1)}, "float16"),
    ({"kernel_size": (2, 5), "padding": 1}, "float32"),
]


@pytest.mark.parametrize("window, runs", [*((w, "_runs") for w in WINDOWS), *((w, "") for w in LEFT)])
def test_rows(window, runs):
    """unfold's gradient is fold, whose gradient is unfold."""
    options, dtype = window
    how = {"backends": ("triton",), "dtypes": [dtype], "dys": ["dense"], **options}
    y, _ = unfold.record(draw(1, 2, 5, 16), **options)
    with interpreting() as session:
        check_op(unfold, draw(1, 2, 5, 16), **how)
        check_op(fold, draw(*y.shape), output_size=(5, 16), **how)
    assert {run.kernel for run in session.launches} == {f"_unfold{runs}_kernel", f"_fold{runs}_kernel"}


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_windows_side_by_side_are_a_copy(last):
    x = draw(2, 3, 4, 6)
    x = x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2) if last else x
    options = {"kernel_size": (4, 2), "stride": (4, 2)}
    how = {"backends": ("triton",), "dtypes": ["bfloat16"], **options}
    with interpreting() as session:
        check_op(unfold, x, dys=["dense", "strided"], **how)
        check_op(fold, draw(2, 24, 3), output_size=(4, 6), dys=["dense"], **how)
    assert {run.kernel for run in session.launches} == {"_shuffle_kernel"}
