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
