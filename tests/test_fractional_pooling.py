"""Maxima under windows of random steps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op
from pooling_calls import draw, same, special

import gpulayers as gl
from gpulayers.definition import ArgumentError, KindError, RuleError, ShapeError
from gpulayers.ops.pooling import fractional_max_pool
from gpulayers.testing.check_layer import check_layer
from gpulayers.torch import functional

STEPS = [
    ((2, 3, 9, 8), {"kernel_size": 2, "output_size": (4, 5)}),
    ((1, 2, 6, 7), {"kernel_size": (3, 2), "output_size": (1, 6), "return_indices": True}),
    ((1, 2, 5, 6, 7), {"kernel_size": 2, "output_size": (3, 2, 4)}),
    ((2, 2, 9), {"kernel_size": 3, "output_size": 4}),
    ((0, 2, 4, 5), {"kernel_size": 2, "output_size": 3}),
]
SEED = np.array([3, 5])


def samples_for(shape):
    """Numbers that 16 bits hold."""
    return np.random.default_rng(1).integers(0, 64, (*shape[:2], len(shape) - 2)) / 64


@pytest.mark.parametrize("shape, options", STEPS)
def test_every_backend(shape, options):
    """By a seed, by samples (with NaN, ties and −∞), and by neither."""
    x = draw(*shape, last=shape[-1] % 2 == 1)
    served = check_op(fractional_max_pool, x, SEED, dtypes=["float32"], dys=["dense"], **options)
    assert served == ["definition", "numpy", "triton"]
    given = special(x), None, samples_for(shape)
    check_op(fractional_max_pool, *given, dtypes=["float16", "bfloat16"], dys=["dense"], **options)
    if shape == STEPS[0][0]:
        check_op(fractional_max_pool, x, dtypes=["float64"], numeric=True, dys=["dense"], **options)


@pytest.mark.parametrize("shape, options", STEPS[:3])
def test_it_is_torchs(shape, options):
    """Given its samples."""
    axes = len(shape) - 2
    rest = {"return_indices": True, **options}
    for x in (draw(*shape), special(draw(*shape))):
        samples = torch.rand(*shape[:2], axes, dtype=torch.float64)
        same(f"fractional_max_pool{axes}d", torch.from_numpy(x), **rest, _random_samples=samples)


def test_all_windows_are_gathered():
    """Of every size and step: each gradient comes back from each window."""
    for n in (1, 2, 3, 5, 8, 13, 32):
        for kernel in {1, 2, 3, n} & set(range(1, n + 1)):
            for out in {1, 2, n // 2, n - kernel + 1} & set(range(1, n - kernel + 2)):
                x = np.sort(draw(2, 3, n).astype(np.float32))[..., :: 1 if out % 2 else -1].copy()
                with gl.only("numpy"):
                    (_, indices), call = fractional_max_pool.record(
                        x, None, samples_for(x.shape).astype(np.float32), kernel_size=kernel, output_size=out,
                        return_indices=True,
                    )  # fmt: skip
                    (dx, *_) = call.backward(np.ones((2, 3, out), np.float32), None)
                counts = np.stack([np.bincount(row, minlength=n) for row in indices.reshape(6, -1)]).reshape(x.shape)
                np.testing.assert_array_equal(dx, counts)


def test_wide_windows_on_a_gpu():
    """Many laps: a pixel lies under more windows than one; one window is the whole image."""
    whole = {"kernel_size": (5, 6), "output_size": 1}
    check_op(fractional_max_pool, draw(2, 3, 5, 6), SEED, dtypes=["float32"], dys=["dense"], **whole)
    check_op(
        fractional_max_pool, draw(1, 2, 14, 11), None, samples_for((1, 2, 14, 11)), kernel_size=(6, 3), output_size=(9, 9),
        dtypes=["float32"], dys=["dense"], backends=("triton",),
    )  # fmt: skip


def test_steps_follow_torchs_seed():
    x = torch.randn(2, 3, 9, 8)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(functional.fractional_max_pool2d(x, 2, output_ratio=(0.5, 0.5)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == F.fractional_max_pool2d(x, 2, output_ratio=(0.5, 0.5)).shape
    assert functional.fractional_max_pool3d(torch.randn(2, 4, 4, 4), 2, 2).shape == (2, 2, 2, 2)
    for wrong in ({"output_size": 9}, {}):
        with pytest.raises((RuntimeError, ValueError)):
            functional.fractional_max_pool2d(x, 2, **wrong)


def test_layers():
    check_layer(
        gl.FractionalMaxPool2d(2, output_ratio=(0.6, 0.5), return_indices=True), (2, 2, 5, 6), dtypes=("float32",)
    )
    layer = gl.FractionalMaxPool3d(2, 3)
    assert layer.output_shape((None, 3, 5, 6, 7)) == (None, 3, 3, 3, 3)
    x = draw(2, 3, 5, 6, 7).astype(np.float32)
    assert not np.array_equal(layer.train()(x), layer(x)) and np.array_equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda x: fractional_max_pool(x, SEED, x[..., 0, :2], kernel_size=2, output_size=2),
            KindError,
            "seed or samples",
        ),
        (lambda x: fractional_max_pool(x, SEED[:1], kernel_size=2, output_size=2), KindError, "int64 [seed, offset]"),
        (
            lambda x: fractional_max_pool(x, None, x, kernel_size=2, output_size=2),
            ShapeError,
            "samples.shape = (N, C, axes) = [2, 3, 2]",
        ),
        (
            lambda x: fractional_max_pool(x, SEED, kernel_size=3, output_size=4),
            ShapeError,
            "OH + kernel_size − 1 ≤ H; got 4 + 3 − 1 with H = 4",
        ),
        (lambda x: gl.FractionalMaxPool2d(2), ArgumentError, "either output_size or output_ratio"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as raised:
        call(draw(2, 3, 4, 5))
    assert text in str(raised.value) and isinstance(raised.value, RuleError)
