"""Small arrays whose elements lie more than 2^31 apart, in memory that is reserved and hardly touched: an offset counted in
32 bits leaves them. All programs run, and all results are compared; test_huge.py has arrays of that many elements."""

import numpy as np
import pytest
from gpulayers.kernels.triton import _tile

from gpulayers import dispatch
from gpulayers.arrays import float16
from gpulayers.ops.activation import gelu, glu
from gpulayers.ops.attention import attention, attention_decode, kv_append
from gpulayers.ops.conv import conv
from gpulayers.ops.distance import cosine_similarity, normalize, pdist
from gpulayers.ops.linear import linear, matmul
from gpulayers.ops.loss import cross_entropy
from gpulayers.ops.norm import layer_norm, rms_norm
from gpulayers.ops.padding import pad
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.ops.resize import grid_sample, interpolate
from gpulayers.ops.rotary import rotary
from gpulayers.ops.softmax import log_softmax
from gpulayers.ops.window import fold, pixel_unshuffle, unfold
from gpulayers.testing.emulator import emulating
from gpulayers.testing.interpreter import interpreting

pytest.importorskip("triton")
IMAGE = (2, 3, 4, 5)


def far(x: np.ndarray, axis: int) -> np.ndarray:
    """x with the last place along the axis more than 2^31 elements after the first, and the others as they were."""
    if x.shape[axis] < 2:
        return x
    step = (2**31 // (x.shape[axis] - 1) // 16 + 4) * 16
    strides = [s * x.itemsize for s in np.cumprod([1, *x.shape[:0:-1]])[::-1]]
    strides[axis] = step * x.itemsize
    memory = np.zeros(sum((n - 1) * s for n, s in zip(x.shape, strides)) // x.itemsize + 1, x.dtype)
    view = np.lib.stride_tricks.as_strided(memory, x.shape, strides)
    view[...] = x
    return view


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(float16)


CALLS = {
    "gelu": (gelu, [draw(5, 40)], {}),
    "glu": (glu, [draw(5, 40)], {}),
    "log_softmax": (log_softmax, [draw(5, 40)], {}),
    "log_softmax of columns": (log_softmax, [draw(5, 40)], {"axis": 0}),
    "layer_norm": (layer_norm, [draw(5, 40), draw(40), draw(40)], {"normalized_shape": (40,)}),
    "layer_norm of long rows": (
        layer_norm, [draw(3, 17000), draw(17000), draw(17000)], {"normalized_shape": (17000,)},
    ),
    "rms_norm": (rms_norm, [draw(5, 40), draw(40)], {"normalized_shape": (40,)}),
    "attention": (attention, [draw(2, 4, 5, 16), draw(2, 2, 9, 16), draw(2, 2, 9, 16)], {"causal": True}),
    "cosine_similarity": (cosine_similarity, [draw(5, 40), draw(5, 40)], {}),
    "normalize": (normalize, [draw(*IMAGE)], {}),
    "pdist": (pdist, [draw(5, 40)], {}),
    "rotary": (rotary, [draw(2, 3, 4, 6), draw(4, 2), draw(4, 2), draw(2, 1, 4, 6)], {}),
    "cross_entropy": (cross_entropy, [draw(5, 40), np.arange(5)], {}),
    "matmul": (matmul, [draw(2, 5, 24), draw(2, 24, 18), None], {}),
    "linear": (linear, [draw(20, 24), draw(18, 24), draw(18)], {}),
    "depthwise conv2d": (conv, [draw(*IMAGE), draw(3, 1, 3, 3), draw(3)], {"padding": 1, "groups": 3}),
    "conv2d": (conv, [draw(*IMAGE), draw(4, 3, 3, 3), draw(4)], {"padding": 1, "stride": 2}),
    "volumes": (conv, [draw(1, 3, 2, 4, 3), draw(4, 3, 2, 2, 2), draw(4)], {"padding": 1, "stride": 2}),
    "depthwise volumes": (conv, [draw(1, 3, 2, 4, 3), draw(3, 1, 2, 2, 2), draw(3)], {"padding": 1, "groups": 3}),
    "max_pool": (max_pool, [draw(*IMAGE)], {"kernel_size": 2}),
    "avg_pool": (avg_pool, [draw(*IMAGE)], {"kernel_size": 3, "stride": 1, "padding": 1}),
    "adaptive_avg_pool": (adaptive_avg_pool, [draw(*IMAGE)], {"output_size": 3}),
    "adaptive_avg_pool to 1": (adaptive_avg_pool, [draw(*IMAGE)], {"output_size": 1}),
    "pad": (pad, [draw(*IMAGE)], {"padding": 1, "mode": "reflect"}),
    "interpolate": (interpolate, [draw(*IMAGE)], {"size": (6, 3), "mode": "linear"}),
    "grid_sample": (grid_sample, [draw(*IMAGE), draw(2, 3, 4, 2) / 2], {}),
    "unfold": (unfold, [draw(*IMAGE)], {"kernel_size": 2, "padding": 1}),
    "fold": (fold, [draw(2, 12, 12)], {"output_size": (4, 5), "kernel_size": 2}),
    "pixel_unshuffle": (pixel_unshuffle, [draw(2, 3, 4, 6)], {"downscale_factor": 2}),
}  # fmt: skip


ONE_PLACE = {"layer_norm of long rows": 0, "volumes": 2, "depthwise volumes": 2}
PLACES = [(name, a) for name, (_, xs, _) in CALLS.items() for a in range(xs[0].ndim) if ONE_PLACE.get(name, a) == a]


def held(name, axis, backend, simulator):
    """x, dy and a matrix to multiply by lie far apart; convolutions' weights are small and dense."""
    op, inputs, options = CALLS[name]
    needs = tuple(n for n, x in zip(op.inputs, inputs) if n in op.differentiable)
    if backend == "cuda":
        needs = ("x",)
    large = ("x", "q", "k", "v")
    apart = [far(x, axis) if n in large or (op is linear and x.ndim == 2) else x for n, x in zip(op.inputs, inputs)]
    with dispatch.only("definition"):
        true, call = dispatch.forward(op, inputs, needs, options)
        dys = [draw(*y.shape).astype(y.dtype) for y in true]
        wanted = [*true, *call.backward(*dys)]
    with dispatch.policy(simulate=(backend,), strict=True), dispatch.only(backend), simulator as session:
        outputs, call = dispatch.forward(op, apart, needs, options)
        got = [*outputs, *call.backward(*[far(dy, axis) if dy.ndim > axis else dy for dy in dys])]
    assert session.launches
    for mine, theirs in zip(got, wanted):
        if theirs is not None:
            np.testing.assert_allclose(mine, theirs, rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize("name, axis", PLACES)
def test_triton(name, axis):
    held(name, axis, "triton", interpreting(_tile.Device(90, 4, 232448), races=False))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("pages", [False, True])
def test_triton_on_caches(pages, axis):
    """Tokens are written there, and attended to."""
    q, k, v = draw(2, 4, 1, 16), draw(2, 2, 18, 16), draw(2, 2, 18, 16)
    new, places, table = draw(2, 2, 3, 16), np.array([3, 15]), np.array([[1], [0]]) if pages else None
    found = []
    for backend in ("definition", "triton"):
        caches = [far(x, axis) if backend == "triton" else x.copy() for x in (k, v)]
        simulator = interpreting(_tile.Device(90, 4, 232448), races=False)
        with dispatch.policy(simulate=("triton",), strict=True), dispatch.only(backend), simulator:
            kv_append(*caches, new, new, places, table)
            found.append(attention_decode(q, *caches, places + 3, table))
    for mine, theirs in zip(*found):
        np.testing.assert_allclose(mine, theirs, rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize("name, axis", [(name, a) for name, a in PLACES if "pool" in name])
def test_cuda(name, axis):
    held(name, axis, "cuda", emulating(races=False))
