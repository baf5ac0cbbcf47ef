import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpulayers.ops._op import KindError, ShapeError, UnsupportedTypeError
from gpulayers.ops.pooling import avg_pool2d, global_avg_pool2d, max_pool2d
from gpulayers.testing.check_op import check_op


def draw(*shape: int, last: bool = False) -> np.ndarray:
    """Random values; ``last``: channels-last in memory."""
    x = np.random.default_rng(list(shape)).standard_normal(shape)
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if last else x


WINDOWS = [
    ((2, 3, 6, 6), {"kernel_size": 2}),
    ((2, 3, 7, 6), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 2, 7, 9), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "ceil_mode": True}),
    ((1, 2, 5, 5), {"kernel_size": 2, "stride": 3, "ceil_mode": True}),
    ((1, 2, 5, 7), {"kernel_size": 3, "stride": 3, "padding": 1, "ceil_mode": True}),
]
DILATED = [((1, 2, 8, 9), {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (2, 3), "padding": 1})]
AVERAGED = [{}, {"count_include_pad": False}, {"divisor_override": 5}]


@pytest.mark.parametrize("shape, options", WINDOWS + DILATED)
def test_max_pool2d_definition(shape, options):
    check_op(max_pool2d, draw(*shape), numeric=True, backends=("definition",), **options)
    check_op(max_pool2d, draw(*shape, last=True), backends=("definition",), **options)


@pytest.mark.parametrize("more", AVERAGED)
@pytest.mark.parametrize("shape, options", WINDOWS)
def test_avg_pool2d_definition(shape, options, more):
    check_op(avg_pool2d, draw(*shape), numeric=True, backends=("definition",), **options, **more)
    check_op(avg_pool2d, draw(*shape, last=True), backends=("definition",), **options, **more)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 4, 5), (2, 0, 4, 5), (1, 1, 1, 1)])
def test_global_avg_pool2d_definition(shape):
    check_op(global_avg_pool2d, draw(*shape), numeric=True, backends=("definition",))
    check_op(global_avg_pool2d, draw(*shape, last=True), backends=("definition",))


def compare_with_torch(op, function, x, **options):
    y, record = op.record(x, **options)
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    expected = function(tensor, **options)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12)
    dy = draw(*y.shape)
    expected.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(record.backward(dy)[0], tensor.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape, options", WINDOWS + DILATED)
def test_max_pool2d_is_torchs(shape, options):
    x = draw(*shape)
    compare_with_torch(max_pool2d, F.max_pool2d, x, **options)
    compare_with_torch(max_pool2d, F.max_pool2d, np.round(x), **options)  # ties
    x[np.random.default_rng(0).random(shape) < 0.3] = np.nan
    x[np.random.default_rng(1).random(shape) < 0.5] = -np.inf
    compare_with_torch(max_pool2d, F.max_pool2d, x, **options)


@pytest.mark.parametrize("more", AVERAGED)
@pytest.mark.parametrize("shape, options", WINDOWS)
def test_avg_pool2d_is_torchs(shape, options, more):
    compare_with_torch(avg_pool2d, F.avg_pool2d, draw(*shape), **options, **more)


def test_global_avg_pool2d_is_torchs():
    compare_with_torch(global_avg_pool2d, lambda x: F.adaptive_avg_pool2d(x, 1), draw(2, 3, 4, 5))


def test_a_window_without_a_pixel():
    """A dilated window may step over the whole image: −∞, and no gradient (torch writes out of bounds there)."""
    y, record = max_pool2d.record(draw(1, 1, 2, 2), kernel_size=2, dilation=3, padding=1, stride=1)
    assert y.shape == (1, 1, 1, 1) and y.item() == -np.inf
    assert not record.backward(np.ones_like(y))[0].any()


@pytest.mark.parametrize(
    "op, shape, options, error, text",
    [
        (max_pool2d, (2, 4, 5, 5), {"kernel_size": 3, "padding": 2}, ShapeError, "padding ≤ kernel_size / 2"),
        (max_pool2d, (2, 4, 5, 5), {"kernel_size": 7}, ShapeError, "OH = ⌊(H + 2 · 0 − 1 · (7 − 1) − 1) / 7⌋ + 1 ≥ 1"),
        (max_pool2d, (2, 4, 5, 5), {"kernel_size": 0}, ShapeError, "kernel_size = (height, width), both ≥ 1; got 0"),
        (max_pool2d, (2, 4, 5, 5), {"kernel_size": 2.5}, KindError, "an integer or a pair of integers; got 2.5"),
        (max_pool2d, (2, 4, 5, 5), {"kernel_size": 2, "stride": 0}, ShapeError, "stride"),
        (max_pool2d, (2, 4, 5, 5), {"kernel_size": 2, "dilation": 0}, ShapeError, "dilation"),
        (max_pool2d, (2, 4, 5, 5), {"kernel_size": 2, "padding": -1}, ShapeError, "padding"),
        (max_pool2d, (5, 5), {"kernel_size": 2}, ShapeError, "x.shape = (N, C, H, W)"),
        (max_pool2d, (2, 0, 5, 5), {"kernel_size": 2}, ShapeError, "C, H, W ≥ 1"),
        (avg_pool2d, (2, 4, 5, 5), {"kernel_size": 2, "padding": 2}, ShapeError, "padding ≤ kernel_size / 2"),
        (avg_pool2d, (2, 4, 5, 5), {"kernel_size": 2, "divisor_override": 0}, ShapeError, "divisor_override ≠ 0"),
        (avg_pool2d, (2, 4, 5, 5), {"kernel_size": 7}, ShapeError, "OH = "),
    ],
)
def test_errors(op, shape, options, error, text):
    with pytest.raises(error) as raised:
        op(draw(*shape), **options)
    assert text in str(raised.value) and str(raised.value).startswith(f"{op.name}: ")
    expected = TypeError if error is KindError else RuntimeError
    assert isinstance(raised.value, expected)
    with pytest.raises(expected):
        getattr(F, op.name)(torch.from_numpy(draw(*shape)), **options)


def test_other_errors():
    with pytest.raises(ShapeError, match="H, W ≥ 1"):
        global_avg_pool2d(draw(2, 3, 0, 4))
    with pytest.raises(ShapeError, match=r"x\.shape = \(N, C, H, W\)"):
        global_avg_pool2d(draw(3, 4))
    for op, options in [(max_pool2d, {"kernel_size": 2}), (avg_pool2d, {"kernel_size": 2}), (global_avg_pool2d, {})]:
        with pytest.raises(UnsupportedTypeError):
            op(np.ones((1, 1, 2, 2), np.int64), **options)
