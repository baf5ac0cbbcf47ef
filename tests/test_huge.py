"""Arrays of more than 2^31 elements, in memory that is reserved and hardly touched: only the programs at the corners of
each grid run. An offset counted in 32 bits leaves its array there, or reaches another place than the last."""

import numpy as np
import pytest
from gpulayers.kernels.cuda import _copy, _launch
from gpulayers.kernels.triton import _image, _tile

from gpulayers import dispatch
from gpulayers.arrays import float16
from gpulayers.ops.activation import gelu, glu, prelu, relu, rrelu
from gpulayers.ops.attention import attention, attention_decode, kv_append
from gpulayers.ops.conv import conv
from gpulayers.ops.distance import cosine_similarity
from gpulayers.ops.dropout import dropout
from gpulayers.ops.linear import linear
from gpulayers.ops.loss import cross_entropy, mse, nll_loss, pointwise_loss
from gpulayers.ops.norm import batch_norm, group_norm, layer_norm, local_response_norm, rms_norm
from gpulayers.ops.padding import pad
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.ops.resize import affine_grid, interpolate
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


def at_the_corners(backend, op, given, options, last=False):
    """Forward and backward with the kernels of one backend; the results' first and last entries are the definition's."""
    if backend == "triton":
        simulator = interpreting(device_for(op), races=False, corners=True)
    else:
        simulator = emulating(races=False, corners=True)
    inputs = [huge(x, i, last) if isinstance(x, tuple) else x for i, x in enumerate(given)]
    needs = () if op is batch_norm else op.differentiable[:1]  # the sums of its backward walk too far
    if op is attention:
        needs = ("q", "k", "v")
    if op is prelu and backend == "cuda":
        needs = ("x", "weight")
    with dispatch.policy(simulate=(backend,), strict=True), dispatch.only(backend), simulator as session:
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


@pytest.mark.parametrize("name", IMAGE_OPS)
def test_triton_in_channels_last(name):
    at_the_corners("triton", *CALLS[name], last=True)


@pytest.mark.parametrize("pages", [False, True])
def test_triton_appends_and_attends_at_the_end_of_a_cache(pages):
    """Places and pages of 32 bits, in a cache of more than 2^31 elements: one sequence's, or the pages of all."""
    shape = (2**18 + 2, 1, 256, 32) if pages else (1, 1, 2**26 + 32, 32)
    k, v = (np.zeros(shape, float16) for _ in range(2))
    q, *new = (np.random.default_rng(i).standard_normal((1, 1, 1, 32)).astype(float16) for i in range(3))
    place = 5 if pages else shape[2] - 1
    table = [np.array([[shape[0] - 1, 0]], np.int32)] if pages else []
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(device_for(attention_decode), races=False, corners=True),
    ):
        dispatch.forward(kv_append, [k, v, *new, np.array([place] if pages else [[place]], np.int32), *table], (), {})
        options = {"window": (0, 0)}  # of the last token alone
        (y, _), _ = dispatch.forward(attention_decode, [q, k, v, np.array([place + 1], np.int32), *table], (), options)
    for cache, x in zip((k, v), new):
        assert np.array_equal(cache[-1, 0, place], x[0, 0, 0])
    np.testing.assert_allclose(y, new[1], rtol=2e-3)


LONG = 2**31 // 39 // 16 * 16 + 16
"""Pixels of one image of 40 channels, whose last channel, row or column begins past the 2^31st element."""
ON_LONG_IMAGES = {
    "prelu": (prelu, [np.full(40, 0.25, float16)], {}),
    "max_pool": (max_pool, [], {"kernel_size": 1, "return_indices": True}),
    "avg_pool": (avg_pool, [], {"kernel_size": 3, "stride": 1, "padding": 1}),
    "adaptive_avg_pool": (adaptive_avg_pool, [], {"output_size": None}),  # by pairs of neighbours
    "pad": (pad, [], {"padding": 1, "mode": "replicate"}),
    "channel_shuffle": (channel_shuffle, [], {"groups": 5}),
    "conv2d": (conv, [np.ones((40, 40, 3, 3), float16) / 32], {"padding": 1}),
    "depthwise conv2d": (conv, [np.ones((40, 1, 3, 3), float16)], {"padding": 1, "groups": 40}),
}


def pairs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The output size at which each window has two neighbours along the long axis."""
    return tuple(max(1, n - 1) for n in shape[2:])


def long(shape: tuple[int, ...], axis: int, seed: int, last: bool) -> np.ndarray:
    """Zeros, of which the first and last four along the axis are random; ``last``: channels-last in memory."""
    x = np.zeros([shape[a] for a in ((0, 2, 3, 1) if last else (0, 1, 2, 3))], float16)
    x = x.transpose(0, 3, 1, 2) if last else x
    along, random = np.moveaxis(x, axis, 0), np.random.default_rng(seed)
    for part in (along[:4], along[-4:]):
        part[...] = random.standard_normal(part.shape)
    return x


@pytest.mark.parametrize("name", ON_LONG_IMAGES)
@pytest.mark.parametrize("axis", [2, 3], ids=["tall", "wide"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_triton_on_one_long_image(name, axis, last):
    """Its ends are those of the definition on the ends alone."""
    on_a_long_image(name, (1, 40, LONG, 1) if axis == 2 else (1, 40, 1, LONG), axis, last)


@pytest.mark.parametrize("name", ["avg_pool", "pad", "conv2d", "depthwise conv2d"])
def test_triton_on_long_rows(name):
    """Two rows hold as many elements as 32 bits count."""
    on_a_long_image(name, (1, 40, 4, LONG // 2 + 8), 3, True, 80)


def on_a_long_image(name, shape, axis, last, arch=90):
    op, given, options = ON_LONG_IMAGES[name]
    options = options | ({"output_size": pairs(shape)} if "output_size" in options else {})
    x = long(shape, axis, 0, last)
    device = device_for(op, arch)
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(device, races=False, corners=True),
    ):
        outputs, call = dispatch.forward(op, [x, *given], ("x",), options)
        dys = [long(y.shape, axis, 9, last) if y.dtype == float16 else None for y in outputs]
        (dx, *_) = call.backward(*dys)
    for at, end in ((0, slice(None, 8)), (-1, slice(-8, None))):

        def cut(a, end=end):
            return None if a is None else np.moveaxis(np.moveaxis(a, axis, 0)[end], 0, axis)

        with dispatch.only("definition"):
            if "output_size" in options:
                options["output_size"] = pairs(cut(x).shape)
            extra = outputs[0].shape[axis] - x.shape[axis]
            true, call = dispatch.forward(op, [cut(x), *given], ("x",), options)
            size = slice(8 + extra) if at == 0 else slice(-8 - extra, None)
            (true_dx, *_) = call.backward(*(cut(dy, size) for dy in dys))
        for mine, theirs in ((outputs[0], true[0]), (dx, true_dx)):
            np.testing.assert_allclose(mine[(at,) * 4], theirs[(at,) * 4], rtol=2e-2, atol=2e-3)
        if len(outputs) > 1:
            assert outputs[1][(at,) * 4] == (LONG - 1 if at else 0)


def test_triton_of_groups_of_many_weights():
    """The last group's begin past the 2^31st."""
    groups, o, c = 3, 2**15 + 64, 2**15
    x, weight = np.zeros((1, groups * c, 1, 1), float16), np.zeros((groups * o, c, 1, 1), float16)
    x[0, -c], weight[-1, 0] = 2, 3
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(device_for(conv, 80), races=False, corners=True),
    ):
        (y,), _ = dispatch.forward(conv, [x, weight], (), {"groups": groups})
    assert y[0, -1, 0, 0] == 6


@pytest.mark.parametrize("axis", [2, 3], ids=["tall", "wide"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_triton_weights_on_one_long_image(axis, last):
    """The interpreter holds against the arrays what the programs at the ends read and write."""
    shape = (1, 40, LONG, 1) if axis == 2 else (1, 40, 1, LONG)
    x, dy = long(shape, axis, 0, last), long(shape, axis, 9, last)
    for arch in (80, 90):
        with (
            dispatch.policy(simulate=("triton",), strict=True),
            dispatch.only("triton"),
            interpreting(_tile.Device(arch, 1 << 14, 232448), races=False, corners=True) as session,
        ):
            weight = np.ones((40, 40, 3, 3), float16)
            _, call = dispatch.forward(conv, [x, weight], ("weight",), {"padding": 1})
            call.backward(dy)
        assert any("weight" in each.kernel for each in session.launches)


def test_triton_group_norm_of_one_long_image():
    """Its statistics take all programs; the interpreter holds against the arrays what those at the ends read and write."""
    x = long((1, 40, 1, LONG), 3, 0, False)
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(device_for(group_norm), races=False, corners=True) as session,
    ):
        dispatch.forward(group_norm, [x], (), {"num_groups": 40})
    ran = [run.kernel for run in session.launches]
    assert ran == [f"_group_norm_{name}_kernel" for name in ("moments", "apply")]


def test_triton_group_norm_of_one_long_group(monkeypatch):
    """Among more than 2^31 zeros the sums of the few others are nothing; programs that do not run leave zeros, too."""
    monkeypatch.setattr(np, "empty", np.zeros)
    x, dy = long((1, 40, 1, LONG), 3, 0, False), long((1, 40, 1, LONG), 3, 9, False)
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(device_for(group_norm), races=False, corners=True),
    ):
        (y,), call = dispatch.forward(group_norm, [x], ("x",), {"num_groups": 1, "eps": 1.0})
        dx = call.backward(dy)[0]
    for at in (0, -1):
        corner = (at,) * 4
        assert abs(x[corner]) > 0.1 and abs(dy[corner]) > 0.1
        np.testing.assert_allclose((y[corner], dx[corner]), (x[corner], dy[corner]), rtol=2e-3)


@pytest.mark.parametrize("axis", [2, 3], ids=["tall", "wide"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_triton_strided_on_one_long_image(axis, last):
    """The ends of y and of dx are those of the ends alone, where each pixel has a window of its own."""
    size = [1, 1]
    size[axis - 2] = 2
    x = long((1, 40, LONG, 1) if axis == 2 else (1, 40, 1, LONG), axis, 0, last)
    weight, options = np.ones((40, 40, *size), float16) / 32, {"stride": tuple(size)}
    device = device_for(conv)
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(device, races=False, corners=True),
    ):
        (y,), call = dispatch.forward(conv, [x, weight], ("x",), options)
        dy = long(y.shape, axis, 9, last)
        dx = call.backward(dy)[0]
    for at, end in ((0, slice(None, 4)), (-1, slice(-4, None))):

        def cut(a, end=end):
            return np.moveaxis(np.moveaxis(a, axis, 0)[end], 0, axis)

        with dispatch.only("definition"):
            (true,), call = dispatch.forward(conv, [cut(x), weight], ("x",), options)
            ends = dy[(slice(None),) * axis + (slice(None, 2) if at == 0 else slice(-2, None),)]
            true_dx = call.backward(ends)[0]
        for mine, theirs in ((y, true), (dx, true_dx)):
            np.testing.assert_allclose(mine[(at,) * 4], theirs[(at,) * 4], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("op", [cross_entropy, nll_loss])
def test_triton_labels_of_one_long_image(op):
    """The last classes of 40 begin past the 2^31st element, and labels have 32 bits."""
    x = long((1, 40, LONG, 1), 2, 0, last=False)[..., 0]
    labels = np.full((1, LONG), 39, np.int32)
    device = _tile.Device(90, 1 << 16, 232448)
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(device, races=False, corners=True),
    ):
        (y,), call = dispatch.forward(op, [x, labels], ("x",), {"reduction": "none"})
        dx = call.backward(np.ones_like(y))[0]
    for at, end in ((0, slice(None, 4)), (-1, slice(-4, None))):
        with dispatch.only("definition"):
            few = [x[..., end], labels[..., end]]
            (true,), call = dispatch.forward(op, few, ("x",), {"reduction": "none"})
            true_dx = call.backward(np.ones_like(true))[0]
        np.testing.assert_allclose(y[0, at], true[0, at], rtol=2e-2, atol=2e-3)
        np.testing.assert_allclose(dx[0, at, at], true_dx[0, at, at], rtol=2e-2, atol=2e-3)


def test_triton_of_deep_columns():
    """20 rows of 2^27 columns and a few more: a column's last number lies past the 2^31st."""
    shape = (20, 2**27 + 16)
    ends = np.random.default_rng(0).standard_normal((2, 20, 2)).astype(float16)
    given = [np.zeros(shape, float16) for _ in range(2)]
    for x, end in zip(given, ends):
        x[:, [0, -1]] = end
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(races=False, corners=True),
    ):
        (y,), call = dispatch.forward(cosine_similarity, given, ("x1",), {"axis": 0})
        dx, _ = call.backward(np.ones(shape[1], float16))
    a, b = ends.astype(np.float64)
    n, m = np.sqrt((a * a).sum(0)), np.sqrt((b * b).sum(0))
    true = (a * b).sum(0) / (n * m)
    np.testing.assert_allclose(y[[0, -1]], true, rtol=2e-3)
    np.testing.assert_allclose(dx[:, [0, -1]], b / (n * m) - true * a / n**2, rtol=2e-2, atol=2e-3)


def test_triton_of_many_labels():
    """More than 2^31 samples of one class."""
    count = 2**31 + 8
    x, dy = np.zeros((count, 1), float16), np.zeros(count, float16)
    x[[0, -1], 0], dy[[0, -1]] = (1, 2), (3, 4)
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(races=False, corners=True),
    ):
        given = [x, np.zeros(count, np.uint8)]
        (y,), call = dispatch.forward(nll_loss, given, ("x",), {"reduction": "none"})
        dx, _, _ = call.backward(dy)
    assert y[[0, -1]].tolist() == [-1, -2] and dx[[0, -1], 0].tolist() == [-3, -4]


def test_triton_of_planes_of_coordinates():
    """The third number of a place lies past the 2^31st."""
    size = (1, 2**15, 2**15 + 8)
    dy = np.zeros((3, 1, *size), float16).transpose(1, 2, 3, 4, 0)
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(device_for(affine_grid), races=False, corners=True) as session,
    ):
        (grid,), call = dispatch.forward(affine_grid, [np.eye(3, 4, dtype=float16)[None]], ("theta",), {"size": size})
        call.backward(dy)
    assert "_affine_grid_backward_kernel" in {each.kernel for each in session.launches}
    np.testing.assert_allclose([grid[0, 0, 0, 0], grid[0, -1, -1, -1]], [[-1, -1, 0], [1, 1, 0]], atol=1e-3)


def test_triton_of_one_long_volume():
    """Its last plane lies past the 2^31st element, in what an activation keeps, too."""
    x = np.zeros((1, LONG, 1, 1, 40), float16).transpose(0, 4, 1, 2, 3)
    dy = np.zeros((1, LONG, 1, 1, 40), float16).transpose(0, 4, 1, 2, 3)
    end = np.random.default_rng(0).standard_normal((2, 1, 40, 4, 1, 1)).astype(float16)
    x[:, :, -4:], dy[:, :, -4:] = end
    weight, options = np.ones((40, 1, 3, 1, 1), float16), {"padding": (1, 0, 0), "groups": 40, "activation": "gelu"}
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(device_for(conv), races=False, corners=True),
    ):
        (y,), call = dispatch.forward(conv, [x, weight], ("x",), options)
        dx = call.backward(dy)[0]
    with dispatch.only("definition"):
        (true,), call = dispatch.forward(conv, [end[0], weight], ("x",), options)
        true_dx = call.backward(end[1])[0]
    for mine, theirs in ((y, true), (dx, true_dx)):
        np.testing.assert_allclose(mine[0, :, -1], theirs[0, :, -1], rtol=2e-2, atol=2e-3)


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


def test_cuda_of_many_planes(monkeypatch):
    """Of a pixel each: whole rounds of a grid, so that the last block has the last."""
    monkeypatch.setattr(_launch, "EMULATED_BLOCKS", 1 << 24)
    x = huge((65535 * 256 * 129, 1, 1, 1))
    with dispatch.policy(simulate=("cuda",), strict=True), dispatch.only("cuda"), emulating(races=False, corners=True):
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
    with (
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(_tile.Device(90, 1024, 232448), races=False, corners=True) as session,
    ):
        (y,), call = dispatch.forward(op, inputs, op.differentiable[: len(inputs)], options)
        call.backward(np.zeros(y.shape, y.dtype))
    assert "_norm_finalise_kernel" in {each.kernel for each in session.launches}
