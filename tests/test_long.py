"""One image, column, volume, group or cache of more than 2^31 elements, of which the programs at the ends run."""

import numpy as np
import pytest
from gpulayers.kernels.triton import _tile
from test_huge import device_for, interpreted

from gpulayers import dispatch
from gpulayers.arrays import float16
from gpulayers.ops.activation import prelu
from gpulayers.ops.attention import attention_decode, kv_append
from gpulayers.ops.conv import conv
from gpulayers.ops.distance import cosine_similarity
from gpulayers.ops.loss import cross_entropy, nll_loss
from gpulayers.ops.norm import group_norm
from gpulayers.ops.padding import pad
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.ops.resize import affine_grid
from gpulayers.ops.window import channel_shuffle


@pytest.mark.parametrize("pages", [False, True])
def test_triton_appends_and_attends_at_the_end_of_a_cache(pages):
    """Places and pages of 32 bits, in a cache of more than 2^31 elements: one sequence's, or the pages of all."""
    shape = (2**18 + 2, 1, 256, 32) if pages else (1, 1, 2**26 + 32, 32)
    k, v = (np.zeros(shape, float16) for _ in range(2))
    q, *new = (np.random.default_rng(i).standard_normal((1, 1, 1, 32)).astype(float16) for i in range(3))
    place = 5 if pages else shape[2] - 1
    table = [np.array([[shape[0] - 1, 0]], np.int32)] if pages else []
    with interpreted(device_for(attention_decode)):
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
    with interpreted(device):
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
    with interpreted(device_for(conv, 80)):
        (y,), _ = dispatch.forward(conv, [x, weight], (), {"groups": groups})
    assert y[0, -1, 0, 0] == 6


@pytest.mark.parametrize("axis", [2, 3], ids=["tall", "wide"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_triton_weights_on_one_long_image(axis, last):
    """The interpreter holds against the arrays what the programs at the ends read and write."""
    shape = (1, 40, LONG, 1) if axis == 2 else (1, 40, 1, LONG)
    x, dy = long(shape, axis, 0, last), long(shape, axis, 9, last)
    for arch in (80, 90):
        with interpreted(_tile.Device(arch, 1 << 14, 232448)) as session:
            weight = np.ones((40, 40, 3, 3), float16)
            _, call = dispatch.forward(conv, [x, weight], ("weight",), {"padding": 1})
            call.backward(dy)
        assert any("weight" in each.kernel for each in session.launches)


def test_triton_group_norm_of_one_long_image():
    """Its statistics take all programs; the interpreter holds against the arrays what those at the ends read and write."""
    x = long((1, 40, 1, LONG), 3, 0, False)
    with interpreted(device_for(group_norm)) as session:
        dispatch.forward(group_norm, [x], (), {"num_groups": 40})
    ran = [run.kernel for run in session.launches]
    assert ran == [f"_group_norm_{name}_kernel" for name in ("moments", "apply")]


def test_triton_group_norm_of_one_long_group(monkeypatch):
    """Among more than 2^31 zeros the sums of the few others are nothing; programs that do not run leave zeros, too."""
    monkeypatch.setattr(np, "empty", np.zeros)
    x, dy = long((1, 40, 1, LONG), 3, 0, False), long((1, 40, 1, LONG), 3, 9, False)
    with interpreted(device_for(group_norm)):
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
    with interpreted(device):
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
    with interpreted(device):
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
    with interpreted():
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
    with interpreted():
        given = [x, np.zeros(count, np.uint8)]
        (y,), call = dispatch.forward(nll_loss, given, ("x",), {"reduction": "none"})
        dx, _, _ = call.backward(dy)
    assert y[[0, -1]].tolist() == [-1, -2] and dx[[0, -1], 0].tolist() == [-3, -4]


def test_triton_of_planes_of_coordinates():
    """The third number of a place, or a column, lies past the 2^31st."""
    size = (1, 2**15, 2**15 + 8)
    dys = (
        np.zeros((3, 1, *size), float16).transpose(1, 2, 3, 4, 0),
        np.zeros((size[2], 1, 1, size[1], 3), float16).transpose(1, 2, 3, 0, 4),
    )
    with interpreted(device_for(affine_grid)) as session:
        (grid,), call = dispatch.forward(affine_grid, [np.eye(3, 4, dtype=float16)[None]], ("theta",), {"size": size})
        for dy in dys:
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
    with interpreted(device_for(conv)):
        (y,), call = dispatch.forward(conv, [x, weight], ("x",), options)
        dx = call.backward(dy)[0]
    with dispatch.only("definition"):
        (true,), call = dispatch.forward(conv, [end[0], weight], ("x",), options)
        true_dx = call.backward(end[1])[0]
    for mine, theirs in ((y, true), (dx, true_dx)):
        np.testing.assert_allclose(mine[0, :, -1], theirs[0, :, -1], rtol=2e-2, atol=2e-3)
