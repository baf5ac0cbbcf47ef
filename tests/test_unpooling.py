"""Maxima put back where they were."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op
from pooling_calls import draw, same

import gpulayers as gl
from gpulayers.definition import ShapeError
from gpulayers.ops.pooling import max_pool, max_unpool
from gpulayers.testing.check_layer import check_layer

CALLS = [((2, 3, 5), 9, True), ((2, 3, 3, 7), (5, 9), False), ((1, 2, 2, 3, 2), (3, 4, 5), True), ((0, 2, 3), 4, False)]


def places(shape, size):
    """Some of them twice."""
    return np.random.default_rng(0).integers(0, np.prod(size), shape)


@pytest.mark.parametrize("shape, size, last", CALLS)
def test_every_backend(shape, size, last):
    served = check_op(max_unpool, draw(*shape, last=last), places(shape, size), output_size=size, dys=["dense"])
    assert served == ["definition", "numpy", "triton"]


def test_several_programs():
    """Images in parts, blocks of maxima that lie in none of a part's, and several of one place in a block and in two."""
    shape, size = (1, 3, 10, 30), (20, 32)
    at = np.sort(places(shape, size).reshape(3, -1)).reshape(shape)
    at[0, 1, 3, :20], at[0, 2, 1], at[0, 2, 7] = 300, 500, 500
    last = np.ascontiguousarray(np.moveaxis(at, 1, -1)).transpose(0, 3, 1, 2)
    check_op(max_unpool, draw(*shape, last=True), last, dtypes=["float32"], dys=["transposed"], output_size=size)
    apart = np.arange(3 * 600).reshape(3, 1, 20, 30) % 600 // 2 + 900 * np.arange(3).reshape(3, 1, 1, 1)
    check_op(max_unpool, draw(*apart.shape), apart, dtypes=["float32"], dys=["dense"], output_size=(35, 60))
    x = draw(*shape)[..., ::2]
    check_op(max_unpool, x, at[..., ::2], dtypes=["bfloat16"], dys=["strided"], output_size=size)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 6, 8), (1, 2, 4, 6, 4)])
def test_it_is_torchs(shape):
    axes = len(shape) - 2
    x = torch.from_numpy(draw(*shape))
    for batch in (x, x[0]):
        y, indices = getattr(F, f"max_pool{axes}d")(batch, 2, return_indices=True)
        for size in (None, [n + 1 for n in batch.shape[-axes:]]):
            same(f"max_unpool{axes}d", y, indices, 2, output_size=size)
    found = max_pool(x.numpy(), kernel_size=1, return_indices=True)
    assert np.array_equal(max_unpool(*found, output_size=shape[2:]), x)


def test_of_several_the_last_stays():
    """As torch's on a CPU."""
    shape, size = (2, 2, 5, 6), (5, 6)
    x, at = torch.from_numpy(draw(*shape)).float(), torch.from_numpy(places(shape, size))
    same("max_unpool2d", x, at, 1, output_size=size)
    with gl.only("numpy"):
        assert np.array_equal(
            max_unpool(x.numpy(), at.numpy(), output_size=size), F.max_unpool2d(x, at, 1, None, 0, size)
        )


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_layer(axes):
    shape = (2, 2, 3, 2, 2)[: axes + 2]
    layer = getattr(gl, f"MaxUnpool{axes}d")(3, 2, 1)
    x, indices = draw(*shape), np.arange(np.prod(shape[2:])).reshape(shape[2:]) * 2 + np.zeros(shape, np.int64)
    assert layer.output_shape(shape, shape) == (2, 2, *[2 * n - 1 for n in shape[2:]])
    check_layer(layer, x, indices, dtypes=("bfloat16",))
    theirs = getattr(torch.nn, f"MaxUnpool{axes}d")(3, 2, 1)
    np.testing.assert_array_equal(layer(x, indices), theirs(torch.from_numpy(x), torch.from_numpy(indices)))


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda x: max_unpool(x, np.full(x.shape, 99), output_size=(4, 5)), "0 ≤ indices < 20; got 99 to 99"),
        (lambda x: max_unpool(x, np.zeros((1, 1, 1, 1), int), output_size=4), "indices.shape = x.shape"),
        (lambda x: max_unpool(x, np.zeros(x.shape), output_size=4), "dtype = int64"),
        (lambda x: max_unpool(x[:, :0], np.zeros((2, 0, 4, 5), int), output_size=4), "C, H, W ≥ 1"),
        (lambda x: gl.MaxUnpool2d(0)(x, np.zeros(x.shape, int)), "kernel_size"),
        (lambda x: gl.MaxUnpool1d(2)(x, np.zeros(x.shape, int)), "x.shape = (N, C, L)"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ShapeError) as raised:
        call(draw(2, 3, 4, 5))
    assert text in str(raised.value)


def test_places_outside_are_left_out_on_a_gpu():
    """Where nobody looks at the data: definition and kernel, launched as for a large one, agree."""
    from gpulayers.kernels.triton import _tile
    from gpulayers.kernels.triton import pooling as kernels

    from gpulayers.arrays import spec
    from gpulayers.ops._unpooling import max_unpool_backward, max_unpool_forward
    from gpulayers.testing.interpreter import interpreting

    x, at = draw(2, 2, 3, 4).astype(np.float32), places((2, 2, 3, 4), 12)
    at[0, 0, 0, :2], at[1, 1, 2, 3] = (-5, 12), 2**40
    ((y,), saved), dy = max_unpool_forward(x, at, needs=("x",), output_size=(3, 4)), draw(2, 2, 3, 4)
    dx = max_unpool_backward((dy,), saved, inputs=(spec(x),), needs=("x",), output_size=(3, 4))[0]

    def empty(shape, dtype, order=None):
        assert order is None
        return torch.full(tuple(shape), 7, dtype=getattr(torch, str(dtype).removeprefix("torch.")))

    with interpreting(_tile.Device(90, 132, 232448), races=False):
        tx, ta, tdy = (torch.from_numpy(a) for a in (x, at, dy))
        ((ty,), saved) = kernels.max_unpool_forward(tx, ta, needs=("x",), output_size=(3, 4), empty=empty)
        inputs = (spec(tx),)
        tdx = kernels.max_unpool_backward(
            (tdy.float(),), saved, inputs=inputs, needs=("x",), output_size=(3, 4), empty=empty
        )
    np.testing.assert_array_equal(ty, y)
    np.testing.assert_array_equal(tdx[0], dx.astype(np.float32))
