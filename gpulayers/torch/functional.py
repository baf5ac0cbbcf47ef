"""``torch.nn.functional``'s functions over gpulayers' ops, with torch's names and arguments; and three that torch lacks:
add_layer_norm and add_rms_norm, the sum of a layer's result and its residual, and the norm of that; and attention, with
windows, caps, sinks and packed sequences. A name that is not here is torch's own function."""

import inspect
from typing import Any

import torch.fx
import torch.nn.functional as _F

from gpulayers.torch._fractional_pooling import fractional_max_pool2d, fractional_max_pool3d
from gpulayers.torch._other_names import (
    adaptive_max_pool1d_with_indices,
    adaptive_max_pool2d_with_indices,
    adaptive_max_pool3d_with_indices,
    celu_,
    conv_tbc,
    elu_,
    fractional_max_pool2d_with_indices,
    fractional_max_pool3d_with_indices,
    gumbel_softmax,
    hardtanh_,
    leaky_relu_,
    max_pool1d_with_indices,
    max_pool2d_with_indices,
    max_pool3d_with_indices,
    multi_head_attention_forward,
    native_channel_shuffle,
    relu_,
    rrelu_,
    selu_,
    threshold_,
    upsample_bilinear,
    upsample_nearest,
)
from gpulayers.torch._rare_pooling import (
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
)
from gpulayers.torch._unpooling import max_unpool1d, max_unpool2d, max_unpool3d
from gpulayers.torch.activation import (
    celu,
    elu,
    gated,
    geglu,
    gelu,
    glu,
    hardshrink,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    logsigmoid,
    mish,
    prelu,
    quick_gelu,
    reglu,
    relu,
    relu6,
    relu_squared,
    rrelu,
    selu,
    sigmoid,
    silu,
    softplus,
    softshrink,
    softsign,
    swiglu,
    tanh,
    tanhshrink,
    threshold,
)
from gpulayers.torch.attention import (
    attention,
    attention_decode,
    attention_with_kvcache,
    kv_append,
    rotary_append,
    scaled_dot_product_attention,
)
from gpulayers.torch.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from gpulayers.torch.distance import cosine_similarity, normalize, pairwise_distance, pdist
from gpulayers.torch.dropout import (
    alpha_dropout,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from gpulayers.torch.embedding import embedding, embedding_bag, one_hot
from gpulayers.torch.linear import addmm, baddbmm, bilinear, bmm, einsum, linear, linears, matmul
from gpulayers.torch.loss import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cosine_embedding_loss,
    cross_entropy,
    ctc_loss,
    gaussian_nll_loss,
    hinge_embedding_loss,
    huber_loss,
    kl_div,
    l1_loss,
    linear_cross_entropy,
    margin_ranking_loss,
    mse_loss,
    multi_margin_loss,
    multilabel_margin_loss,
    multilabel_soft_margin_loss,
    nll_loss,
    poisson_nll_loss,
    smooth_l1_loss,
    soft_margin_loss,
    triplet_margin_loss,
    triplet_margin_with_distance_loss,
)
from gpulayers.torch.norm import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    rms_norm,
)
from gpulayers.torch.padding import pad
from gpulayers.torch.pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)
from gpulayers.torch.resize import affine_grid, grid_sample, interpolate, upsample
from gpulayers.torch.rotary import apply_rotary_pos_emb, rotary
from gpulayers.torch.softmax import log_softmax, softmax, softmin
from gpulayers.torch.window import channel_shuffle, fold, pixel_shuffle, pixel_unshuffle, unfold

for _name in [name for name, value in globals().items() if inspect.isfunction(value)]:
    torch.fx.wrap(_name)  # symbolic tracing takes them as they are, as it does torch's


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not hasattr(_F, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has torch.nn.functional")
    return getattr(_F, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(n for n in dir(_F) if not n.startswith("_"))})
