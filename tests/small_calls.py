"""A small call of each op: what tests of all ops are about."""

import numpy as np

from gpulayers.ops.activation import gated, gelu, glu, prelu, rrelu, softplus
from gpulayers.ops.attention import attention, attention_decode
from gpulayers.ops.conv import conv, conv_transpose
from gpulayers.ops.distance import cosine_similarity, normalize, pairwise_distance, pdist
from gpulayers.ops.dropout import dropout
from gpulayers.ops.embedding import embedding, embedding_bag
from gpulayers.ops.linear import linear, linears, matmul
from gpulayers.ops.loss import (
    cross_entropy,
    ctc_loss,
    linear_cross_entropy,
    mse,
    multilabel_margin,
    nll_loss,
    pointwise_loss,
    row_loss,
)
from gpulayers.ops.norm import (
    add_layer_norm,
    add_rms_norm,
    batch_moments,
    batch_norm,
    conv_batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    rms_norm,
)
from gpulayers.ops.padding import pad
from gpulayers.ops.pooling import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    fractional_max_pool,
    lp_pool,
    max_pool,
    max_unpool,
)
from gpulayers.ops.recurrent import recurrent
from gpulayers.ops.resize import affine_grid, grid_sample, interpolate
from gpulayers.ops.rotary import rotary
from gpulayers.ops.softmax import log_softmax, softmax, softmin
from gpulayers.ops.window import channel_shuffle, fold, pixel_shuffle, pixel_unshuffle, unfold


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


ROWS, IMAGES, VOLUMES = draw(5, 24), draw(2, 4, 6, 8), draw(2, 4, 5, 4, 6)
SEED, LABELS = np.array([7, 0]), np.array([3, 0, 4, 1, 2])
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
"""What reads rows of dy, or of an image."""
FURTHER = {
    "gated": (gated, [ROWS, draw(5, 24)], {"activation": "silu"}),
    "softplus": (softplus, [IMAGES], {}),
    "attention_decode": (attention_decode, [draw(2, 2, 1, 16), draw(2, 1, 9, 16), draw(2, 1, 9, 16)], {}),
    "conv1d": (conv, [draw(2, 4, 9), draw(6, 2, 3)], {"padding": 1, "groups": 2}),
    "conv3d": (conv, [VOLUMES, draw(5, 4, 2, 2, 3)], {"stride": 2}),
    "conv2d of one tap": (conv, [IMAGES, draw(6, 4, 1, 1), draw(6)], {}),
    "conv_transpose": (conv_transpose, [IMAGES, draw(4, 6, 3, 3), draw(6)], {"stride": 2}),
    "embedding": (embedding, [ROWS, LABELS[:, None]], {}),
    "embedding_bag": (embedding_bag, [ROWS, LABELS.reshape(1, 5)], {"mode": "sum"}),
    "linears": (linears, [ROWS, draw(8, 24), draw(6, 24), None, draw(8)], {}),
    "ctc_loss": (ctc_loss, [draw(6, 2, 5), np.array([[1, 2], [3, 3]]), np.array([6, 5]), np.array([2, 2])], {}),
    "linear_cross_entropy": (
        linear_cross_entropy,
        [draw(5, 3, 24), draw(7, 24), LABELS[:, None] + np.array([0, 1, 2]), draw(7), np.abs(draw(7))],
        {},
    ),
    "multilabel_margin": (multilabel_margin, [draw(3, 5), np.array([[1, 2, -1, 0, 0]] * 3)], {}),
    "row_loss": (row_loss, [ROWS, draw(5, 24), draw(5, 24) + 1], {"loss": "triplet_margin", "margin": 1.0}),
    "cross_entropy": (cross_entropy, [draw(5, 7, 3), LABELS[:, None] + np.array([0, 1, 2])], {"reduction": "none"}),
    "nll_loss": (nll_loss, [draw(5, 7, 3), LABELS[:, None] + np.array([0, 1, 2])], {"reduction": "none"}),
    "batch_moments": (batch_moments, [IMAGES], {}),
    "conv_batch_norm": (conv_batch_norm, [IMAGES, draw(6, 4, 3, 3), None, draw(6), draw(6)], {"training": True}),
    "instance_norm": (instance_norm, [IMAGES, draw(4), draw(4)], {}),
    "add_layer_norm": (add_layer_norm, [ROWS, draw(5, 24), draw(24), draw(24)], {"normalized_shape": 24}),
    "add_rms_norm": (add_rms_norm, [ROWS, draw(5, 24), draw(24)], {"normalized_shape": 24}),
    "pad of volumes": (pad, [VOLUMES], {"padding": (1, 2, 0), "mode": "constant"}),
    "adaptive_max_pool": (adaptive_max_pool, [IMAGES], {"output_size": (4, 3)}),
    "adaptive_avg_pool to 1": (adaptive_avg_pool, [IMAGES], {"output_size": 1}),
    "fractional_max_pool": (fractional_max_pool, [IMAGES, SEED], {"kernel_size": 2, "output_size": (3, 4)}),
    "max_unpool": (
        max_unpool,
        [IMAGES, np.arange(48).reshape(6, 8) * 2 + np.zeros((2, 4, 1, 1), int)],
        {"output_size": (9, 11)},
    ),
    "max_pool of volumes": (max_pool, [VOLUMES], {"kernel_size": 2, "stride": 1, "return_indices": True}),
    "lp_pool": (lp_pool, [IMAGES], {"norm_type": 2, "kernel_size": 2}),
    "recurrent": (
        recurrent,
        [draw(3, 2, 12), draw(12, 4), draw(2, 4), None, draw(12), None, np.array([3, 1])],
        {"mode": "gru"},
    ),
    "affine_grid": (affine_grid, [draw(2, 2, 3)], {"size": (4, 5)}),
    "grid_sample": (grid_sample, [IMAGES, draw(2, 3, 5, 2) / 2], {}),
    "interpolate by the nearest": (interpolate, [IMAGES], {"size": (9, 12), "mode": "nearest"}),
    "fold": (fold, [draw(2, 16, 35)], {"output_size": (6, 8), "kernel_size": 2}),
    "pixel_unshuffle": (pixel_unshuffle, [IMAGES], {"downscale_factor": 2}),
    "channel_shuffle": (channel_shuffle, [IMAGES], {"groups": 2}),
}
