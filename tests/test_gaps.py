"""dy whose rows lie apart in memory: what reads rows in place must take their step from dy, not from its shape."""

import numpy as np
import pytest

from gpulayers.ops.activation import gelu, glu, prelu, rrelu
from gpulayers.ops.attention import attention
from gpulayers.ops.conv import conv
from gpulayers.ops.distance import cosine_similarity, normalize, pairwise_distance, pdist
from gpulayers.ops.dropout import dropout
from gpulayers.ops.linear import linear, matmul
from gpulayers.ops.loss import mse, pointwise_loss
from gpulayers.ops.norm import batch_norm, group_norm, layer_norm, local_response_norm, rms_norm
from gpulayers.ops.padding import pad
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.ops.resize import interpolate
from gpulayers.ops.rotary import rotary
from gpulayers.ops.softmax import log_softmax, softmax, softmin
from gpulayers.ops.window import pixel_shuffle, unfold
from gpulayers.testing.check_op import check_op


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


ROWS, IMAGES, SEED = draw(5, 24), draw(2, 4, 6, 8), np.array([7, 0])
CALLS = {
    "softmax": (softmax, [ROWS], {}),
    "softmin": (softmin, [ROWS], {}),
    "log_softmax": (log_softmax, [ROWS], {}),
    "log_softmax of columns": (log_softmax, [ROWS], {"axis": 0}),
    "softmax of long rows": (softmax, [draw(2, 3000)], {}),
    "gelu": (gelu, [ROWS], {}),
    "prelu": (prelu, [ROWS, draw(24)], {}),
    "prelu of images": (prelu, [IMAGES, draw(4)], {}),
    "rrelu": (rrelu, [ROWS, SEED], {"training": True}),
    "glu": (glu, [ROWS], {}),
    "dropout": (dropout, [ROWS, SEED], {"p": 0.5}),
    "layer_norm": (layer_norm, [ROWS, draw(24), draw(24)], {"normalized_shape": 24}),
    "rms_norm": (rms_norm, [ROWS, draw(24)], {"normalized_shape": 24}),
    "rms_norm of long rows": (rms_norm, [draw(2, 3000), draw(3000)], {"normalized_shape": 3000}),
    "batch_norm": (batch_norm, [ROWS, draw(24), draw(24)], {"training": True}),
    "batch_norm of images": (batch_norm, [IMAGES, draw(4), draw(4)], {"training": True}),
    "group_norm": (group_norm, [IMAGES, draw(4), draw(4)], {"num_groups": 2}),
    "local_response_norm": (local_response_norm, [IMAGES], {"size": 3}),
    "attention": (attention, [draw(1, 2, 5, 16), draw(1, 1, 9, 16), draw(1, 1, 9, 16)], {"causal": True}),
    "pairwise_distance": (pairwise_distance, [ROWS, draw(5, 24)], {}),
    "cosine_similarity": (cosine_similarity, [ROWS, draw(5, 24)], {}),
    "normalize": (normalize, [IMAGES], {}),
    "pdist": (pdist, [ROWS], {}),
    "rotary": (rotary, [draw(2, 3, 4, 6), draw(4, 2), draw(4, 2), draw(2, 1, 4, 6)], {}),
    "matmul": (matmul, [draw(2, 5, 24), draw(2, 24, 8), None], {}),
    "linear": (linear, [ROWS, draw(8, 24), draw(8)], {"activation": "gelu"}),
    "mse": (mse, [ROWS, draw(5, 24) + 1], {"reduction": "none"}),
    "pointwise_loss": (pointwise_loss, [ROWS, draw(5, 24), None, draw(24)], {"loss": "smooth_l1", "reduction": "none"}),
    "max_pool": (max_pool, [IMAGES], {"kernel_size": 2}),
    "avg_pool": (avg_pool, [IMAGES], {"kernel_size": 3, "stride": 2}),
    "adaptive_avg_pool": (adaptive_avg_pool, [IMAGES], {"output_size": (4, 3)}),
    "pad": (pad, [IMAGES], {"padding": 1, "mode": "reflect"}),
    "interpolate": (interpolate, [IMAGES], {"size": (4, 9), "mode": "linear"}),
    "unfold": (unfold, [IMAGES], {"kernel_size": 3, "padding": 1}),
    "pixel_shuffle": (pixel_shuffle, [IMAGES], {"upscale_factor": 2}),
    "conv2d": (conv, [IMAGES, draw(6, 4, 3, 3), draw(6)], {"padding": 1}),
    "depthwise conv2d": (conv, [IMAGES, draw(4, 1, 3, 3), draw(4)], {"padding": 1, "groups": 4}),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    op, given, options = CALLS[name]
    served = check_op(op, *given, dtypes=["float32", "bfloat16"], dys=["gapped"], **options)
    assert {"definition", "triton"} <= set(served)
