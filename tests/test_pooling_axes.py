"""Pooling over sequences and volumes; over images in test_pooling.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op
from pooling_calls import compare_with_torch, draw, special

import gpulayers as gl
from gpulayers.definition import ShapeError
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.emulator import emulating
from gpulayers.testing.interpreter import interpreting

WINDOWS = [
    ((2, 3, 9), {"kernel_size": 2}),
    ((2, 3, 9), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    ((1, 2, 50), {"kernel_size": 40, "stride": 3, "padding": 20}),
    ((2, 3, 4, 6, 5), {"kernel_size": 2}),
    ((1, 2, 5, 4, 7), {"kernel_size": (3, 2, 3), "stride": (2, 1, 2), "padding": (1, 0, 1), "ceil_mode": True}),
]
DILATED = [
    ((2, 3, 12), {"kernel_size": 3, "stride": 2, "dilation": 3, "padding": 1}),
    ((1, 2, 6, 5, 7), {"kernel_size": (2, 3, 2), "stride": 1, "dilation": (3, 2, 4), "padding": 1}),
]
AVERAGED = [{}, {"count_include_pad": False}, {"divisor_override": 5}]
PARTS = [
    ((2, 3, 7), 3),
    ((2, 3, 6), 2),
    ((2, 3, 6), 1),
    ((2, 3, 4, 5, 6), (2, None, 3)),
    ((2, 3, 4, 6, 4), 2),
    ((3, 2, 4, 5, 3), 1),
    ((1, 2, 2, 3, 2), (3, 2, 5)),
]
FEW = {"dtypes": ["float16", "bfloat16"], "dys": ["dense"]}


def served(shape: tuple, *more: str) -> list[str]:
    """Who serves sequences, and volumes, which CUDA's kernels refuse."""
    return sorted([*more, "definition", "numpy", "triton", *(["cuda"] if len(shape) == 3 else [])])


@pytest.mark.parametrize("shape, options", WINDOWS + DILATED)
def test_max_pool(shape, options):
    last = shape[-1] % 2 == 1
    x = draw(*shape, last=last)
    by_torch = ["aten"] * (not options.get("ceil_mode") and options.get("dilation", 1) == 1)
    options = options | {"return_indices": last}
    assert check_op(max_pool, x, dtypes=["float32"], dys=["expanded"], **options) == served(shape, *by_torch)
    check_op(max_pool, special(x), **FEW, **options, backends=("triton", "numpy"))


@pytest.mark.parametrize("shape, options", WINDOWS)
def test_avg_pool(shape, options):
    for more in AVERAGED[: 1 if len(shape) == 3 else 3]:
        x = draw(*shape, last=bool(more))
        assert check_op(avg_pool, x, dtypes=["float16"], dys=["dense"], **options, **more) == served(shape)


@pytest.mark.parametrize("shape, size", PARTS)
def test_adaptive_avg_pool(shape, size):
    x = draw(*shape, last=shape[-1] % 2 == 1)
    assert check_op(adaptive_avg_pool, x, dtypes=["bfloat16"], dys=["dense"], output_size=size) == served(shape)


def test_any_strides_and_packs():
    """Strided and transposed volumes; a channels-last sequence of 16 bytes of channels; a mean over gaps."""
    x = draw(2, 5, 5, 9, 16)[:, ::2, 1:, ::2, ::3]
    for op, options in [
        (max_pool, {"kernel_size": 2, "stride": 1}),
        (avg_pool, {"kernel_size": 2, "stride": 1}),
        (adaptive_avg_pool, {"output_size": 1}),
        (adaptive_avg_pool, {"output_size": (3, 4, 2)}),
    ]:
        check_op(op, x, dtypes=["float32"], dys=["transposed"], **options)
    with emulating() as session:
        check_op(max_pool, draw(2, 16, 9, last=True), backends=("cuda",), dtypes=["float16"], kernel_size=3)
    assert {run.kernel for run in session.launches} > {"max_pool_forward_float16_int8_packs"}


def test_wide_windows_are_unrolled_in_parts():
    """As narrow ones are in one; and sizes of 2^31 elements an image take 64 bits."""
    from gpulayers.kernels.triton import _windows

    assert [_windows.unrolled(n) for n in (_windows.WIDEST, 33)] == [_windows.WIDEST, _windows.AT_A_TIME]
    with interpreting() as session:
        check_op(max_pool, draw(1, 1, 90), backends=("triton",), dtypes=["float32"], kernel_size=45, stride=1)
        check_op(avg_pool, draw(1, 1, 90), backends=("triton",), dtypes=["float32"], kernel_size=45, stride=1)
    assert len({run.kernel for run in session.launches}) == 4


# --- against torch ---------------------------------------------------------------------------------------------------


def torchs(op, shape):
    return getattr(F, f"{op.name}{len(shape) - 2}d")


@pytest.mark.parametrize("shape, options", WINDOWS + DILATED)
def test_max_pool_is_torchs(shape, options):
    x = draw(*shape)
    for given in (x, special(x)):
        compare_with_torch(max_pool, torchs(max_pool, shape), given, **options)
    indices = torchs(max_pool, shape)(torch.from_numpy(special(x)), return_indices=True, **options)[1].numpy()
    for backend in ("definition", "numpy"):
        with gl.only(backend):
            np.testing.assert_array_equal(max_pool(special(x), return_indices=True, **options)[1], indices)


@pytest.mark.parametrize("shape, options", WINDOWS)
def test_avg_pool_is_torchs(shape, options):
    for more in AVERAGED[: 2 if len(shape) == 3 else 3]:
        compare_with_torch(avg_pool, torchs(avg_pool, shape), draw(*shape), **options, **more)


@pytest.mark.parametrize("shape, size", PARTS)
def test_adaptive_avg_pool_is_torchs(shape, size):
    compare_with_torch(adaptive_avg_pool, torchs(adaptive_avg_pool, shape), draw(*shape), output_size=size)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, shape",
    [
        (gl.MaxPool1d(3, 2, 1), (2, 3, 7)),
        (gl.MaxPool3d(2, 1, return_indices=True), (2, 2, 3, 2, 4)),
        (gl.AvgPool1d(3, 2, 1, False, False), (2, 3, 7)),
        (gl.AdaptiveAvgPool1d(4), (2, 3, 7)),
        (gl.AdaptiveAvgPool3d((2, None, 1)), (2, 2, 3, 2, 4)),
    ],
    ids=str,
)
def test_layer(layer, shape):
    """It is right, and torch's of the same name."""
    check_layer(layer, shape)
    args, kwargs = layer._config_arguments()
    theirs = getattr(torch.nn, type(layer).__name__)(*args, **kwargs)
    x = draw(*shape).astype(np.float32)
    ours, expected = layer(x), theirs(torch.from_numpy(x))
    first = ours[0] if isinstance(ours, tuple) else ours
    expected = expected[0] if isinstance(expected, tuple) else expected
    np.testing.assert_allclose(first, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_rank_errors():
    for layer, shape, rule in [
        (gl.MaxPool1d(2), (2, 3, 4, 4), "(N, C, L)"),
        (gl.AvgPool3d(2), (2, 3, 4, 4), "(N, C, D, H, W)"),
    ]:
        with pytest.raises(
            ShapeError, match=rf"{type(layer).__name__}.*x: the rule is x.shape = .*; got \[2, 3, 4, 4\]"
        ) as e:
            layer(draw(*shape))
        assert rule in str(e.value)
    with pytest.raises(ShapeError, match=r"D, H, W ≥ 1 where output_size is not 1"):
        adaptive_avg_pool(draw(2, 3, 0, 4, 4), output_size=2)
