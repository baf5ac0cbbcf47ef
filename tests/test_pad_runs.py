"""Row-major images padded by whole runs of 16 bytes."""

import pytest
from halves import check_op
from pooling_calls import draw

from gpulayers.ops.padding import pad
from gpulayers.testing.interpreter import interpreting

LINE, RUNS, ANY = "_pad_line_backward_kernel", "_pad_runs_backward_kernel", "_pad_backward_kernel"
CALLS = [
    ((2, 4, 4, 16), ((1, 0), (2, 3)), "reflect", "float16", RUNS),
    ((1, 2, 2, 8), ((0, 1), (1, 7)), "reflect", "bfloat16", LINE),  # more columns than a run has places for
    ((2, 2, 3, 8), ((2, -1), (1, 3)), "replicate", "bfloat16", RUNS),
    ((2, 2, 3, 12), ((3, 3), (3, 2)), "circular", "float16", RUNS),  # each row is shown three times
    ((2, 2, 3, 9), ((1, 1), (4, 3)), "circular", "float32", LINE),
    ((1, 2, 3, 10), ((1, 0), (-2, 3)), "constant", "bfloat16", LINE),
    ((1, 2, 4, 10), ((1, 1), (9, 9)), "reflect", "float16", LINE),  # and columns, too
    ((1, 2, 4, 3), ((1, 2), (0, 3)), "replicate", "float32", ANY),  # more places than are unrolled
    ((1, 2, 2, 3, 8), ((1, 0), (1, 1), (0, 2)), "reflect", "float16", RUNS),
    ((1, 1, 3, 2, 10), ((0, 2), (1, 0), (1, 1)), "circular", "bfloat16", LINE),
    ((1, 8, 24), ((3, 3),), "reflect", "bfloat16", RUNS),
]


@pytest.mark.parametrize("shape, padding, mode, dtype, backward", CALLS)
def test_columns(shape, padding, mode, dtype, backward):
    value = 1.5 if mode == "constant" else 0.0
    options = {"padding": padding, "mode": mode, "value": value}
    with interpreting() as session:
        check_op(pad, draw(*shape), backends=("triton",), dtypes=[dtype], dys=["dense"], **options)
    assert {run.kernel for run in session.launches} == {"_pad_line_forward_kernel", backward}
