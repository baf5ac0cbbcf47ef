"""Long sums of equal numbers in 16-bit types: a bfloat16 accumulator stops at 256 of them, and a float16 one drops the same
digits at each step."""

import numpy as np
import pytest

from gpulayers.ops.activation import prelu
from gpulayers.ops.conv import conv
from gpulayers.ops.linear import linear
from gpulayers.ops.loss import cross_entropy, mse, nll_loss, pointwise_loss
from gpulayers.ops.norm import batch_norm, group_norm, layer_norm, rms_norm
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool
from gpulayers.ops.softmax import log_softmax, softmax
from gpulayers.testing.check_op import check_op

MANY = 600


def full(*shape: int, value: float = 1.077) -> np.ndarray:
    return np.full(shape, value)


def signs(*shape: int) -> np.ndarray:
    """1 and −1 in turns."""
    return 1.0 - 2.0 * (np.arange(np.prod(shape)).reshape(shape) % 2)


CALLS = {
    "softmax": (softmax, [full(2, 5000)], {}),
    "log_softmax": (log_softmax, [full(2, 5000)], {}),
    "softmax of columns": (softmax, [full(MANY, 2)], {"axis": 0}),
    "layer_norm of long rows": (layer_norm, [signs(2, MANY), full(MANY)], {"normalized_shape": MANY}),
    "layer_norm of many rows": (layer_norm, [signs(MANY, 4), full(4), full(4)], {"normalized_shape": 4}),
    "rms_norm": (rms_norm, [full(2, MANY), full(MANY)], {"normalized_shape": MANY}),
    "batch_norm": (batch_norm, [signs(MANY, 2), full(2), full(2)], {"training": True}),
    "batch_norm of images": (batch_norm, [signs(2, 1, MANY), full(1), full(1)], {"training": True}),
    "group_norm": (group_norm, [signs(2, 2, MANY), full(2), full(2)], {"num_groups": 1}),
    "linear": (linear, [full(2, MANY), full(3, MANY), full(3)], {}),
    "linear in large tiles": (linear, [full(64, MANY), full(64, MANY), None], {}),
    "linear of many rows": (linear, [full(MANY, 3), full(2, 3), full(2)], {}),
    "conv2d of channels": (conv, [full(1, MANY, 1, 2), full(2, MANY, 1, 1), full(2)], {}),
    "conv2d of pixels": (conv, [full(1, 2, 30, 20), full(2, 2, 1, 1), full(2)], {}),
    "depthwise conv2d": (conv, [full(1, 2, 30, 20), full(2, 1, 3, 3), full(2)], {"groups": 2}),
    "avg_pool": (avg_pool, [full(1, 1, MANY, 1)], {"kernel_size": (MANY, 1)}),
    "adaptive_avg_pool": (adaptive_avg_pool, [full(1, 2, 30, 20)], {"output_size": 1}),
    "prelu": (prelu, [full(MANY, 2, value=-1.0), full(2)], {}),
    "mse": (mse, [full(MANY), full(MANY, value=0.0)], {}),
    "pointwise_loss": (pointwise_loss, [full(MANY), full(MANY, value=0.0)], {"loss": "l1"}),
    "cross_entropy": (cross_entropy, [full(MANY, 3), np.zeros(MANY, np.int64)], {"reduction": "sum"}),
    "cross_entropy of many classes": (cross_entropy, [full(2, MANY), np.zeros(2, np.int64)], {"label_smoothing": 0.5}),
    "nll_loss": (nll_loss, [full(MANY, 3), np.zeros(MANY, np.int64)], {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_accumulators_are_wide(name):
    op, given, options = CALLS[name]
    served = check_op(op, *given, dtypes=["float16", "bfloat16"], dys=["expanded"], **options)
    assert "triton" in served
