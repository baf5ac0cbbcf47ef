"""Drop-ins for ``torch.nn``: each class is a subclass of torch's own of the same name, over gpulayers' ops.

What has nothing to compute (``Module``, ``Sequential``, ``Parameter``, ``init``, …) is torch.nn's own object, so that this
module can stand in for torch.nn in an import line; ``coverage()`` says which name is which.
"""

from typing import Any

import torch.nn as _nn

from gpulayers.torch import functional
from gpulayers.torch._caches import KVCache, PagedKVCache
from gpulayers.torch._fractional_pooling import FractionalMaxPool2d, FractionalMaxPool3d
from gpulayers.torch._multihead import MultiheadAttention
from gpulayers.torch._rare_pooling import (
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    LPPool1d,
    LPPool2d,
    LPPool3d,
)
from gpulayers.torch._sync_batch_norm import SyncBatchNorm
from gpulayers.torch._transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from gpulayers.torch._unpooling import MaxUnpool1d, MaxUnpool2d, MaxUnpool3d
from gpulayers.torch.activation import (
    CELU,
    ELU,
    GELU,
    GLU,
    SELU,
    Hardshrink,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    Mish,
    PReLU,
    ReLU,
    ReLU6,
    RReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Softshrink,
    Softsign,
    Tanh,
    Tanhshrink,
    Threshold,
)
from gpulayers.torch.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyConvTranspose3d,
)
from gpulayers.torch.distance import CosineSimilarity, PairwiseDistance
from gpulayers.torch.dropout import AlphaDropout, Dropout, Dropout1d, Dropout2d, Dropout3d, FeatureAlphaDropout
from gpulayers.torch.embedding import Embedding, EmbeddingBag
from gpulayers.torch.linear import Bilinear, Flatten, LazyLinear, Linear
from gpulayers.torch.loss import (
    AdaptiveLogSoftmaxWithLoss,
    BCELoss,
    BCEWithLogitsLoss,
    CosineEmbeddingLoss,
    CrossEntropyLoss,
    CTCLoss,
    GaussianNLLLoss,
    HingeEmbeddingLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    LinearCrossEntropyLoss,
    MarginRankingLoss,
    MSELoss,
    MultiLabelMarginLoss,
    MultiLabelSoftMarginLoss,
    MultiMarginLoss,
    NLLLoss,
    NLLLoss2d,
    PoissonNLLLoss,
    SmoothL1Loss,
    SoftMarginLoss,
    TripletMarginLoss,
    TripletMarginWithDistanceLoss,
)
from gpulayers.torch.norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
    LocalResponseNorm,
    RMSNorm,
)
from gpulayers.torch.padding import (
    CircularPad1d,
    CircularPad2d,
    CircularPad3d,
    ConstantPad1d,
    ConstantPad2d,
    ConstantPad3d,
    ReflectionPad1d,
    ReflectionPad2d,
    ReflectionPad3d,
    ReplicationPad1d,
    ReplicationPad2d,
    ReplicationPad3d,
    ZeroPad1d,
    ZeroPad2d,
    ZeroPad3d,
)
from gpulayers.torch.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)
from gpulayers.torch.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from gpulayers.torch.resize import Upsample, UpsamplingBilinear2d, UpsamplingNearest2d
from gpulayers.torch.softmax import LogSoftmax, Softmax, Softmax2d, Softmin
from gpulayers.torch.window import ChannelShuffle, Fold, PixelShuffle, PixelUnshuffle, Unfold

# After the drop-ins: what is made of them.
from gpulayers.torch import optim  # isort: skip
from gpulayers.torch._coverage import coverage  # isort: skip
from gpulayers.torch._fuse import source  # isort: skip
from gpulayers.torch._patch import Report, make_known, patch, unpatch  # isort: skip
from gpulayers.torch._transformers_attention import register_attention  # isort: skip
from gpulayers.torch._wrap import wrap  # isort: skip

make_known()


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not hasattr(_nn, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has torch.nn")
    return getattr(_nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(n for n in dir(_nn) if not n.startswith("_"))})
