"""Neural-network layers whose forward and backward passes are hand-written GPU kernels, each with a NumPy definition."""

import importlib
import importlib.machinery
import importlib.util
import pathlib
import sys

__version__ = "0.1.0"


def _serve_from_checkout(name: str) -> None:
    """Register ``../<name>`` as ``gpulayers.<name>`` in a bare checkout, where no installer has put it there."""
    folder = pathlib.Path(__file__).parents[1] / name
    installed = pathlib.Path(__file__).parent / name
    if installed.is_dir() or not (folder / "__init__.py").is_file():
        return
    full = f"{__name__}.{name}"
    spec = importlib.util.spec_from_file_location(
        full, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    globals()[name] = module


_serve_from_checkout("kernels")
_serve_from_checkout("bench")

# After the rooms above are in place.
from gpulayers import arrays, layers, ops, random  # noqa: E402
from gpulayers.dispatch import Refused, batch_invariant, only, sms, strict  # noqa: E402
from gpulayers.export import ExportError  # noqa: E402
from gpulayers.fusing import FusionError, explain, fuse  # noqa: E402
from gpulayers.layers._config import register  # noqa: E402
from gpulayers.layers._files import load, save  # noqa: E402
from gpulayers.layers._frames import no_grad  # noqa: E402
from gpulayers.layers._layer import Layer, OpLayer  # noqa: E402
from gpulayers.layers._regularizer import L1, L2, MaxNorm, NonNegative  # noqa: E402
from gpulayers.layers._weight import Weight  # noqa: E402
from gpulayers.layers.activation import (  # noqa: E402
    CELU,
    ELU,
    GEGLU,
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
    QuickGELU,
    ReGLU,
    ReLU,
    ReLU6,
    ReLUSquared,
    RReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Softshrink,
    Softsign,
    SwiGLU,
    Tanh,
    Tanhshrink,
    Threshold,
)
from gpulayers.layers.attention import KVCache, MultiHeadAttention, PagedKVCache  # noqa: E402
from gpulayers.layers.container import Flatten, Parallel, Reshape, Residual, Sequential  # noqa: E402
from gpulayers.layers.conv import (  # noqa: E402
    Conv1d,
    Conv2d,
    Conv3d,
    Convolutional,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from gpulayers.layers.distance import CosineSimilarity, Normalize, PairwiseDistance  # noqa: E402
from gpulayers.layers.dropout import (  # noqa: E402
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    FeatureAlphaDropout,
)
from gpulayers.layers.embedding import Embedding, EmbeddingBag  # noqa: E402
from gpulayers.layers.linear import FullyConnected, Linear  # noqa: E402
from gpulayers.layers.loss import (  # noqa: E402
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
    PoissonNLLLoss,
    SmoothL1Loss,
    SoftMarginLoss,
    TripletMarginLoss,
)
from gpulayers.layers.norm import (  # noqa: E402
    AddLayerNorm,
    AddRMSNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LocalResponseNorm,
    RMSNorm,
)
from gpulayers.layers.padding import (  # noqa: E402
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
from gpulayers.layers.pooling import (  # noqa: E402
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    FractionalMaxPool2d,
    FractionalMaxPool3d,
    GlobalAvgPool2d,
    LPPool1d,
    LPPool2d,
    LPPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
    Pooling,
)
from gpulayers.layers.recurrent import GRU, LSTM, RNN, Recurrent  # noqa: E402
from gpulayers.layers.resize import Upsample, UpsamplingBilinear2d, UpsamplingNearest2d  # noqa: E402
from gpulayers.layers.rotary import RotaryEmbedding  # noqa: E402
from gpulayers.layers.softmax import LogSoftmax, Softmax, Softmax2d, Softmin  # noqa: E402
from gpulayers.layers.window import ChannelShuffle, Fold, PixelShuffle, PixelUnshuffle, Unfold  # noqa: E402
from gpulayers.ops._own import op  # noqa: E402
from gpulayers.train import (  # noqa: E402
    LAMB,
    LARS,
    SGD,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Callback,
    Checkpoint,
    EarlyStopping,
    History,
    Lion,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
