"""Images made twice or half as wide by whole runs of 16 bytes."""

import pytest
from halves import check_op
from pooling_calls import draw

from gpulayers.ops.resize import interpolate
from gpulayers.testing.interpreter import interpreting

WIDE, HALF = (1, 2, 3, 16), (1, 2, 4, 32)
CALLS = [
    (WIDE, {"size": (6, 32), "mode": "nearest"}, "float16"),
    (WIDE, {"size": (6, 32), "mode": "linear"}, "bfloat16"),
    ((1, 1, 4, 12), {"size": (7, 24), "mode": "linear", "scales": (0.0, 2.0)}, "float32"),
    (HALF, {"size": (2, 16), "mode": "area"}, "bfloat16"),
    (HALF, {"size": (4, 16), "mode": "linear"}, "float16"),
]
LEFT = [
    (WIDE, {"size": (6, 32), "mode": "linear", "align_corners": True}, "float16"),
    (WIDE, {"size": (6, 32), "mode": "nearest", "scales": (2.0, 1.99)}, "float16"),
    (HALF, {"size": (4, 16), "mode": "linear", "antialias": True}, "float16"),
    ((1, 1, 2, 17), {"size": (2, 34), "mode": "nearest"}, "float16"),
]


@pytest.mark.parametrize(
    "call, kernel", [*((c, "_resample_runs_kernel") for c in CALLS), *((c, "_resample_rows_kernel") for c in LEFT)]
)
def test_columns(call, kernel):
    shape, options, dtype = call
    with interpreting() as session:
        check_op(interpolate, draw(*shape), backends=("triton",), dtypes=[dtype], dys=["dense"], **options)
    assert {run.kernel for run in session.launches} == {kernel}
