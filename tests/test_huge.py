"""Arrays of more than 2^31 elements, in memory that is reserved and hardly touched: only the programs at the corners of
each grid run. An offset counted in 32 bits leaves its array there, or reaches another place than the last."""

import contextlib
import ctypes

import numpy as np
import pytest
from gpulayers.kernels.cuda import _copy, _launch
from gpulayers.kernels.triton import _image, _tile

from gpulayers import dispatch
from gpulayers.arrays import float16
from gpulayers.ops.activation import gelu, glu, prelu, relu, rrelu
from gpulayers.ops.attention import attention, attention_decode
from gpulayers.ops.conv import conv
from gpulayers.ops.dropout import dropout
from gpulayers.ops.linear import linear
from gpulayers.ops.loss import mse, pointwise_loss
from gpulayers.ops.norm import batch_norm, group_norm, layer_norm, local_response_norm, rms_norm
from gpulayers.ops.padding import pad
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.ops.resize import interpolate
from gpulayers.ops.softmax import log_softmax, softmax
from gpulayers.ops.window import channel_shuffle, pixel_shuffle, unfold
from gpulayers.testing.emulator import emulating
from gpulayers.testing.interpreter import interpreting

ROWS = (2**31 // 4096 + 4, 4096)  # whole rounds for a grid of CUDA blocks, so that the last one has the last elements
IMAGES = (2 * 65535, 40, 16, 32)  # and more than a grid's second and third axis may have
PIXELS = (2**31 // 32 + 2, 1, 4, 8)  # more than 2^31 of them
SEED = np.array([7, 0])
HEADS = (2**19 + 2, 2, 64, 32)  # a block of rows a head: what one needs of others, programs at no corner would make
CACHE = (2**18 + 2, 1, 256, 32)


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
    "glu": (glu, [(2 * ROWS[0], ROWS[1])], {}),
    "dropout": (dropout, [ROWS, SEED], {"p": 0.5}),
    "layer_norm": (layer_norm, [ROWS], {"normalized_shape": (4096,)}),
    "rms_norm": (rms_norm, [ROWS], {"normalized_shape": (4096,)}),
    "batch_norm": (batch_norm, [IMAGES, None, None, *np.ones((2, 40), float16)], {"training": False}),
    "group_norm": (group_norm, [IMAGES], {"num_groups": 40}),
    "local_response_norm": (local_response_norm, [IMAGES], {"size": 3}),
    "max_pool": (max_pool, [IMAGES], {"kernel_size": 1, "return_indices": True}),
    "avg_pool": (avg_pool, [IMAGES], {"kernel_size": 3, "stride": 1, "padding": 1}),
    "adaptive_avg_pool": (adaptive_avg_pool, [IMAGES], {"output_size": (15, 30)}),
    "adaptive_avg_pool to 1": (adaptive_avg_pool, [IMAGES], {"output_size": 1}),
    "pad": (pad, [IMAGES], {"padding": 1, "mode": "reflect"}),
    "interpolate": (interpolate, [IMAGES], {"size": (15, 31), "mode": "linear"}),
    "unfold": (unfold, [(2 * 65535, 5, 16, 32)], {"kernel_size": 2, "padding": 1}),
    "pixel_shuffle": (pixel_shuffle, [IMAGES], {"upscale_factor": 2}),
    "channel_shuffle": (channel_shuffle, [IMAGES], {"groups": 5}),
    "conv2d": (conv, [IMAGES, np.ones((40, 40, 3, 3), float16) / 32], {"padding": 1}),
    "depthwise conv2d": (conv, [IMAGES, np.ones((40, 1, 3, 3), float16)], {"padding": 1, "groups": 40}),
    "max_pool of one channel": (max_pool, [PIXELS], {"kernel_size": 1}),
    "avg_pool of one channel": (avg_pool, [PIXELS], {"kernel_size": (2, 1)}),
    "adaptive_avg_pool of one channel": (adaptive_avg_pool, [PIXELS], {"output_size": 1}),
    "crop of one channel": (pad, [PIXELS], {"padding": (-1, 0)}),
    "interpolate of one channel": (interpolate, [PIXELS], {"size": (4, 4), "mode": "linear"}),
    "unfold of one channel": (unfold, [PIXELS], {"kernel_size": (1, 2), "stride": 2}),
    "attention": (attention, [HEADS, HEADS, HEADS], {"causal": True}),
    "attention_decode": (attention_decode, [(CACHE[0], 2, 1, 32), CACHE, CACHE], {}),
    "linear": (linear, [(2**31 // 64 + 3, 64), np.ones((64, 64), float16) / 8], {}),
    "mse": (mse, [ROWS, ROWS], {"reduction": "none"}),
    "pointwise_loss": (pointwise_loss, [ROWS, ROWS], {"loss": "l1", "reduction": "none"}),
}
IMAGE_OPS = [
    name for name, (op, given, _) in CALLS.items() if given[0] == IMAGES and op not in (batch_norm, group_norm)
]


def device_for(op, arch=90):
    """Of convolutions' tiles each program has one, so that the last has the last."""
    return _tile.Device(arch, 1 << (30 if op is conv else 16), 232448)


@contextlib.contextmanager
def alone(backend, simulator):
    """The kernels of one backend compute, simulated."""
    with dispatch.policy(simulate=(backend,), strict=True), dispatch.only(backend), simulator as session:
        yield session


def interpreted(device=None):
    """Triton's alone compute, in the programs at the corners of their grids."""
    return alone("triton", interpreting(device, races=False, corners=True))


def emulated():
    """CUDA's, in the blocks at the corners."""
    return alone("cuda", emulating(races=False, corners=True))


def at_the_corners(backend, op, given, options, last=False, arch=90):
    """Forward and backward with the kernels of one backend; the results' first and last entries are the definition's."""
    inputs = [huge(x, i, last) if isinstance(x, tuple) else x for i, x in enumerate(given)]
    needs = () if op is batch_norm else op.differentiable[:1]  # the sums of its backward walk too far
    if op is attention:
        needs = ("q", "k", "v")
    if op is prelu and backend == "cuda":
        needs = ("x", "weight")
    with interpreted(device_for(op, arch)) if backend == "triton" else emulated() as session:
        got, call = dispatch.forward(op, inputs, needs, options)
        if needs:
            dys = [huge(y.shape, 9, last) if y.dtype == float16 else None for y in got]
            got = [*got, *call.backward(*dys)[: 3 if op is attention else 1]]
    assert session.launches
    few = [x[[0, -1]] if x is not None and len(x) > 1 << 16 else x for x in inputs]
    with dispatch.only("definition"):
        expected, call = dispatch.forward(op, few, needs, options)
        if needs:
            few = call.backward(*(dy if dy is None else dy[[0, -1]] for dy in dys))
            expected = [*expected, *few[: 3 if op is attention else 1]]
    for mine, true in zip(got, expected):
        for at in (0,) if op in (dropout, rrelu) else (0, -1):  # what is drawn depends on the place
            corner = (at,) * mine.ndim
            np.testing.assert_allclose(mine[corner], true[corner], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", CALLS)
def test_triton(name):
    at_the_corners("triton", *CALLS[name])


@pytest.mark.parametrize("name", ["attention", "linear", "conv2d"])
def test_triton_by_addresses(name):
    """Before sm_90 no descriptor counts."""
    at_the_corners("triton", *CALLS[name], arch=80)


@pytest.mark.parametrize("name", IMAGE_OPS)
def test_triton_in_channels_last(name):
    at_the_corners("triton", *CALLS[name], last=True)


def test_triton_sums_of_long_shares():
    """The shares of a weight's gradient, each of 2^28 elements."""
    torch = pytest.importorskip("torch")
    partial, y = np.zeros((9, 16640, 1, 16640), np.float32), np.zeros((16640, 16640, 1, 1), np.float32)
    partial[:, 0, 0, 0], partial[:, -1, 0, -1] = 1, 2
    with interpreting(races=False, corners=True):
        _image.finish(torch.from_numpy(partial), torch.from_numpy(y))
    assert y[0, 0, 0, 0] == 9 and y[-1, -1, 0, 0] == 18


def test_cuda_copies():
    x = np.zeros((2**30 + 512, 2), np.uint8).T
    x[0, 0], x[-1, -1] = 5, 7
    with emulating(races=False, corners=True):
        y = _copy.dense(x, None, lambda shape, dtype, order=None: np.zeros(shape, dtype))
    assert y.flags.c_contiguous and (y[0, 0], y[-1, -1]) == (5, 7)


PR_SET_THP_DISABLE = 41  # of <linux/prctl.h>


@contextlib.contextmanager
def small_pages():
    """A page that is touched is 4 KB: thousands of them lie far apart."""
    control = ctypes.CDLL(None).prctl
    control(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        control(PR_SET_THP_DISABLE, 0, 0, 0, 0)


@small_pages()
def test_cuda_of_many_planes(monkeypatch):
    """Of a pixel each: whole rounds of a grid, so that the last block has the last."""
    monkeypatch.setattr(_launch, "EMULATED_BLOCKS", 1 << 24)
    x = huge((65535 * 256 * 129, 1, 1, 1))
    with emulated():
        (y, *_), _ = dispatch.forward(max_pool, [x], (), {"kernel_size": 1})
    assert (y[0], y[-1]) == (x[0], x[-1])


def test_cuda_element_by_element(monkeypatch):
    """An array that begins within 16 bytes: threads take single elements, and there are more than 2^31 threads."""
    from gpulayers.kernels.cuda import activation

    monkeypatch.setattr(activation, "PACKS_A_THREAD", 1)
    whole = huge((ROWS[0] * ROWS[1] // 8 + 1, 8)).reshape(-1)[1:]
    x = whole[: ROWS[0] * ROWS[1]].reshape(ROWS)
    x[[0, -1]] = huge((2, ROWS[1]), 3)
    at_the_corners("cuda", relu, [x], {})


CUDA = [
    "gelu",
    "relu",
    "prelu",
    "rrelu",
    "glu",
    "layer_norm",
    "max_pool",
    "avg_pool",
    "adaptive_avg_pool",
    "adaptive_avg_pool to 1",
]


@pytest.mark.parametrize("name", CUDA)
def test_cuda(name, monkeypatch):
    monkeypatch.setattr(_launch, "EMULATED_BLOCKS", 1 << 24)
    at_the_corners("cuda", *CALLS[name])


ON_ROWS = {
    "layer_norm": (layer_norm, [ROWS, *np.ones((2, 4096), float16)], {"normalized_shape": (4096,)}),
    "rms_norm": (rms_norm, [ROWS, np.ones(4096, float16)], {"normalized_shape": (4096,)}),
}


@pytest.mark.parametrize("name", ON_ROWS)
def test_triton_sums_over_rows(name):
    """The gradients of weights: the interpreter holds each address to its array; the ends have no sum of their own."""
    op, (shape, *given), options = ON_ROWS[name]
    inputs = [np.zeros(shape, float16), *given]
    with interpreted(_tile.Device(90, 1024, 232448)) as session:
        (y,), call = dispatch.forward(op, inputs, op.differentiable[: len(inputs)], options)
        call.backward(np.zeros(y.shape, y.dtype))
    assert "_norm_finalise_kernel" in {each.kernel for each in session.launches}
