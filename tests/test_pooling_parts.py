"""Maxima of so many parts, and norms."""

import numpy as np
import pytest
import torch
from halves import check_op
from pooling_calls import draw, same, special

import gpulayers as gl
from gpulayers import dispatch
from gpulayers.definition import KindError, ShapeError
from gpulayers.ops.pooling import adaptive_max_pool, lp_pool
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.interpreter import interpreting

HALVES = {"dtypes": ["float16", "bfloat16"], "dys": ["dense"]}
PARTS = [((2, 3, 7), 3), ((2, 3, 5, 6), (2, None)), ((2, 3, 4, 6), 1), ((1, 2, 3, 4, 5), (2, 1, 3)), ((0, 3, 4, 5), 2)]
NORMS = [
    ((2, 3, 9), {"norm_type": 2, "kernel_size": 3, "stride": 2}),
    ((1, 2, 7, 6), {"norm_type": 3, "kernel_size": 2, "ceil_mode": True}),
    ((1, 2, 5, 5), {"norm_type": 1, "kernel_size": 3, "stride": 1}),
    ((1, 2, 3, 4, 5), {"norm_type": 2, "kernel_size": 2, "ceil_mode": True}),
    ((1, 2, 3, 40), {"norm_type": 2, "kernel_size": (2, 35), "stride": 1}),  # more than one round of columns
]


@pytest.mark.parametrize("shape, size", PARTS)
def test_adaptive_max_pool(shape, size):
    x = draw(*shape, last=shape[-1] % 2 == 1)
    options = {"output_size": size, "return_indices": shape[-1] % 2 == 0}
    assert check_op(adaptive_max_pool, x, dtypes=["float32"], **options) == ["definition", "numpy", "triton"]
    if shape in (PARTS[1][0], PARTS[3][0]):
        check_op(adaptive_max_pool, special(x), **HALVES, **options)


@pytest.mark.parametrize("last", [False, True])
def test_one_part_of_a_large_image(last):
    """Programs share it, and the maximum of theirs is a second launch's: the first of equals with its sign, the last NaN."""
    from gpulayers.kernels.triton import _adaptive_max, _configs, _tile

    x = np.random.default_rng(0).integers(-3, 4, (2, 3, 16, 32)).astype("float32")
    x[0, 0], x[1, 0], x[1, 0, 2, 2:4] = -np.inf, -1, (-0.0, 0.0)
    x[0, 1, 3, 4] = x[0, 1, 9, 9] = np.nan
    x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1) if last else x
    with (
        _configs.forced(_adaptive_max.GLOBAL_FORWARD.name, _configs.Row(None, 64, 1)),
        dispatch.policy(simulate=("triton",), strict=True),
        dispatch.only("triton"),
        interpreting(_tile.Device(90, 132, 232448)) as session,
    ):
        mine, _ = dispatch.forward(adaptive_max_pool, [x], ("x",), {"output_size": 1, "return_indices": True})
    assert [run.kernel for run in session.launches] == ["_global_max_pool_kernel"] * 2
    with dispatch.only("definition"):
        true, _ = dispatch.forward(adaptive_max_pool, [x], (), {"output_size": 1, "return_indices": True})
    for a, b in zip(mine, true):
        np.testing.assert_array_equal(a, b)
    assert np.signbit(mine[0][1, 0]) and mine[1][0, 1] == 9 * 32 + 9


@pytest.mark.parametrize("shape, options", NORMS)
def test_lp_pool(shape, options):
    x = np.abs(draw(*shape, last=shape[-1] % 2 == 1)) + 0.1
    assert check_op(lp_pool, x, dtypes=["float32"], dys=["expanded"], **options) == ["definition", "numpy", "triton"]
    if shape in (NORMS[0][0], NORMS[1][0], NORMS[3][0]):
        check_op(lp_pool, x, **HALVES, **options)


def test_lp_pool_of_small_numbers():
    """What a norm is divided by, float16 does not hold."""
    x = 2e-6 * (np.abs(draw(1, 2, 3, 6)) + 0.5)
    check_op(lp_pool, x, dtypes=["float16"], dys=["dense"], norm_type=2, kernel_size=2, stride=1)


# --- against torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, size", PARTS[:-1])
def test_adaptive_max_pool_is_torchs(shape, size):
    name = f"adaptive_max_pool{len(shape) - 2}d"
    for x in (draw(*shape), special(draw(*shape))):
        same(name, torch.from_numpy(x), size, True)
        same(name, torch.from_numpy(x)[0], size)


@pytest.mark.parametrize("shape, options", NORMS)
def test_lp_pool_is_torchs(shape, options):
    """Of negative numbers, too, and of zeros."""
    name = f"lp_pool{len(shape) - 2}d"
    x = draw(*shape)
    for given in (x, np.where(np.random.default_rng(0).random(shape) < 0.7, 0, np.abs(x))):
        same(name, torch.from_numpy(given), **options)


# --- layers and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, shape",
    [
        (gl.AdaptiveMaxPool2d((2, 3), True), (2, 2, 4, 5)),
        (gl.AdaptiveMaxPool1d(3), (2, 2, 7)),
        (gl.AdaptiveMaxPool3d(2), (2, 1, 3, 2, 4)),
        (gl.LPPool2d(2, 2), (2, 2, 4, 5)),
    ],
    ids=str,
)
def test_layer(layer, shape):
    check_layer(layer, shape)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda x: adaptive_max_pool(x[:, :0], output_size=2), ShapeError, "C, H, W ≥ 1"),
        (lambda x: lp_pool(x, norm_type=0, kernel_size=2), ShapeError, "norm_type ≠ 0"),
        (lambda x: lp_pool(x, norm_type="2", kernel_size=2), KindError, "norm_type"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as raised:
        call(draw(2, 3, 4, 5))
    assert text in str(raised.value)
