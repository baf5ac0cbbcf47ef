"""Arrays of more than 2^31 elements, in memory that is reserved and hardly touched: only the programs at the corners of
each grid run. An offset counted in 32 bits leaves its array there, or reaches another place than the last."""

import numpy as np
import pytest
from gpulayers.kernels.cuda import _launch
from gpulayers.kernels.triton import _tile

from gpulayers import dispatch
from gpulayers.arrays import float16
from gpulayers.ops.activation import gelu, glu, prelu, relu, rrelu
from gpulayers.ops.conv import conv2d
from gpulayers.ops.dropout import dropout
from gpulayers.ops.linear import linear
from gpulayers.ops.loss import mse
from gpulayers.ops.norm import batch_norm, layer_norm, rms_norm
from gpulayers.ops.padding import pad2d
from gpulayers.ops.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from gpulayers.ops.softmax import log_softmax, softmax
from gpulayers.testing.emulator import emulating
from gpulayers.testing.interpreter import interpreting

ROWS = (2**31 // 4096 + 4, 4096)  # whole rounds for a grid of CUDA blocks, so that the last one has the last elements
IMAGES = (2 * 65535, 40, 16, 32)  # and more than a grid's second and third axis may have
SEED = np.array([7, 0])


def huge(shape: tuple[int, ...], seed: int = 0, last: bool = False) -> np.ndarray:
    """Zeros, of which the first and the last entry along the first axis are random; ``last``: channels-last in memory."""
    order = (0, *range(2, len(shape)), 1) if last else tuple(range(len(shape)))
    x = np.zeros([shape[a] for a in order], float16).transpose(np.argsort(order))
    random = np.random.default_rng(seed)
    for at in (0, -1):
        x[at] = random.standard_normal(shape[1:])
    return x


CALLS = {
    "softmax": (softmax, [ROWS], {}),
    "log_softmax along columns": (log_softmax, [(2**31 // 4096 + 4, 8, 512)], {"axis": 1}),
    "gelu": (gelu, [ROWS], {}),
    "relu": (relu, [ROWS], {}),
    "prelu": (prelu, [IMAGES, np.full(40, 0.25, float16)], {}),
    "rrelu": (rrelu, [ROWS, SEED], {"training": True}),
    "glu": (glu, [ROWS], {}),
    "dropout": (dropout, [ROWS, SEED], {"p": 0.5}),
    "layer_norm": (layer_norm, [ROWS], {"normalized_shape": (4096,)}),
    "rms_norm": (rms_norm, [ROWS], {"normalized_shape": (4096,)}),
    "batch_norm": (batch_norm, [IMAGES, None, None, *np.ones((2, 40), float16)], {"training": False}),
    "max_pool2d": (max_pool2d, [IMAGES], {"kernel_size": 1, "return_indices": True}),
    "avg_pool2d": (avg_pool2d, [IMAGES], {"kernel_size": 3, "stride": 1, "padding": 1}),
    "adaptive_avg_pool2d": (adaptive_avg_pool2d, [IMAGES], {"output_size": (15, 30)}),
    "adaptive_avg_pool2d to 1": (adaptive_avg_pool2d, [IMAGES], {"output_size": 1}),
    "pad2d": (pad2d, [IMAGES], {"padding": 1, "mode": "reflect"}),
    "conv2d": (conv2d, [IMAGES, np.ones((40, 40, 3, 3), float16) / 32], {"padding": 1}),
    "depthwise conv2d": (conv2d, [IMAGES, np.ones((40, 1, 3, 3), float16)], {"padding": 1, "groups": 40}),
    "linear": (linear, [(2**31 // 64 + 3, 64), np.ones((64, 64), float16) / 8], {}),
    "mse": (mse, [ROWS, ROWS], {"reduction": "none"}),
}
IMAGE_OPS = [name for name, (op, given, _) in CALLS.items() if given[0] == IMAGES and op is not batch_norm]


def at_the_corners(backend, op, given, options, last=False):
    """Forward and backward with the kernels of one backend; the results' first and last entries are the definition's."""
    if backend == "triton":
        simulator = interpreting(_tile.Device(90, 1 << 16, 232448), races=False, corners=True)
    else:
        simulator = emulating(races=False, corners=True)
    inputs = [huge(x, i, last) if isinstance(x, tuple) else x for i, x in enumerate(given)]
    needs = () if op is batch_norm else ("x",)  # the sums of its backward walk too far
    with dispatch.policy(simulate=(backend,), strict=True), dispatch.only(backend), simulator as session:
        got, call = dispatch.forward(op, inputs, needs, options)
        if needs:
            dys = [huge(y.shape, 9, last) if y.dtype == float16 else None for y in got]
            got = [*got, call.backward(*dys)[0]]
    assert session.launches
    few = [x[[0, -1]] if isinstance(old, tuple) else x for x, old in zip(inputs, given)]
    with dispatch.only("definition"):
        expected, call = dispatch.forward(op, few, needs, options)
        if needs:
            expected = [*expected, call.backward(*(dy if dy is None else dy[[0, -1]] for dy in dys))[0]]
    for mine, true in zip(got, expected):
        for at in (0,) if op in (dropout, rrelu) else (0, -1):  # what is drawn depends on the place
            corner = (at,) * mine.ndim
            np.testing.assert_allclose(mine[corner], true[corner], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", CALLS)
def test_triton(name):
    at_the_corners("triton", *CALLS[name])


@pytest.mark.parametrize("name", IMAGE_OPS)
def test_triton_in_channels_last(name):
    at_the_corners("triton", *CALLS[name], last=True)


CUDA = [
    "gelu",
    "relu",
    "prelu",
    "rrelu",
    "glu",
    "layer_norm",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool2d to 1",
]


@pytest.mark.parametrize("name", CUDA)
def test_cuda(name, monkeypatch):
    monkeypatch.setattr(_launch, "EMULATED_BLOCKS", 1 << 24)
    at_the_corners("cuda", *CALLS[name])
