"""Images of any size made of any other: row-major ones whose rows a program holds, channels-last ones by 16 bytes of channels."""

import pytest
from halves import check_op
from pooling_calls import draw

from gpulayers.ops.resize import interpolate
from gpulayers.testing.interpreter import interpreting

ROWS, LAST, ANY = {"_resample_rows_kernel"}, {"_resample_last_kernel"}, {"_resample_kernel"}
CALLS = [
    ((1, 2, 5, 16), {"size": (9, 36), "mode": "linear"}, "float16", ROWS),
    ((1, 3, 7, 5), {"size": (4, 9), "mode": "linear", "align_corners": True}, "bfloat16", ROWS),
    ((1, 1, 2, 40), {"size": (3, 300), "mode": "nearest-exact"}, "float32", ROWS),
    ((1, 2, 9, 12), {"size": (4, 5), "mode": "area"}, "bfloat16", ROWS),
    ((1, 1, 4, 6), {"size": (9, 14), "mode": "cubic"}, "float16", ROWS),
    ((1, 1, 11, 30), {"size": (6, 12), "mode": "linear", "antialias": True, "scales": (0.5, 0.4)}, "float16", ROWS),
    (
        (1, 1, 2, 3),
        {"size": (2, 60), "mode": "linear"},
        "float32",
        ROWS | ANY,
    ),  # a pixel shows in more than are unrolled
    ((1, 1, 1, 700), {"size": (1, 1100), "mode": "nearest"}, "float16", ROWS | ANY),
]
OF_CHANNELS = [
    ((1, 32, 3, 5), {"size": (5, 7), "mode": "linear"}, "bfloat16", LAST),
    ((2, 6, 5, 4), {"size": (3, 9), "mode": "linear", "align_corners": True}, "float16", LAST),
    ((1, 136, 2, 3), {"size": (3, 2), "mode": "nearest"}, "float32", LAST),
    ((1, 64, 4, 3), {"size": (9, 7), "mode": "cubic"}, "float16", LAST),
    ((1, 3, 9, 11), {"size": (3, 4), "mode": "linear", "antialias": True}, "bfloat16", LAST),
    ((1, 2, 2, 2), {"size": (3, 40), "mode": "linear"}, "float32", LAST | ANY),
]


@pytest.mark.parametrize(
    "shape, options, dtype, kernels, last", [*((*c, False) for c in CALLS), *((*c, True) for c in OF_CHANNELS)]
)
def test_kernels(shape, options, dtype, kernels, last):
    x = draw(*shape)
    if last:
        x = x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    with interpreting() as session:
        check_op(interpolate, x, backends=("triton",), dtypes=[dtype], dys=["dense"], **options)
    assert {run.kernel for run in session.launches} == kernels
