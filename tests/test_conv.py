import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpulayers.arrays import Spec, float32
from gpulayers.ops._op import KindError, ShapeError, UnsupportedTypeError
from gpulayers.ops.conv import conv2d
from gpulayers.testing.check_op import check_op


def draw(*shape: int, last: bool = False) -> np.ndarray:
    """Random values; ``last``: channels-last in memory."""
    x = np.random.default_rng(list(shape)).standard_normal(shape)
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if last else x


def call(n, c, h, w, o, kernel, *, groups=1, bias=True, last=False) -> list:
    """x, weight and bias of one call."""
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    return [draw(n, c, h, w, last=last), draw(o, c // groups, *kernel), draw(o) if bias else None]


CALLS = [
    # (n, c, h, w, o, kernel), options
    ((2, 3, 6, 7, 4, 3), {"padding": 1}),
    ((1, 2, 7, 8, 3, (3, 2)), {"stride": (2, 3), "padding": (2, 1), "dilation": (2, 1)}),
    ((2, 4, 6, 5, 6, 3), {"groups": 2, "padding": "same"}),
    ((1, 3, 6, 5, 6, (2, 4)), {"groups": 3, "padding": "same", "dilation": (1, 2)}),
    ((2, 4, 5, 5, 4, 1), {}),
    ((2, 4, 5, 5, 4, 1), {"stride": 2}),
    ((1, 2, 9, 9, 2, 3), {"stride": 4, "dilation": 2, "padding": "valid"}),
]


@pytest.mark.parametrize("sizes, options", CALLS)
def test_definition(sizes, options):
    backends = ("definition",)
    groups = options.get("groups", 1)
    check_op(conv2d, *call(*sizes, groups=groups), numeric=True, backends=backends, **options)
    check_op(conv2d, *call(*sizes, groups=groups, bias=False, last=True), backends=backends, **options)


@pytest.mark.parametrize("sizes, options", CALLS)
def test_definition_is_torchs(sizes, options):
    given = call(*sizes, groups=options.get("groups", 1))
    y, record = conv2d.record(*given, **options)
    tensors = [torch.from_numpy(a).requires_grad_() for a in given]
    expected = F.conv2d(*tensors, **options)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    dy = draw(*y.shape)
    expected.backward(torch.from_numpy(dy))
    for g, t in zip(record.backward(dy), tensors):
        np.testing.assert_allclose(g, t.grad.numpy(), rtol=1e-12, atol=1e-12)


def test_padding_by_side():
    x, weight, bias = call(2, 3, 5, 6, 4, 3)
    padded = np.pad(x, ((0, 0), (0, 0), (2, 0), (1, 3)))
    got = conv2d(x, weight, bias, padding=((2, 0), (1, 3)))
    np.testing.assert_allclose(got, conv2d(padded, weight, bias), rtol=1e-12)
    check_op(conv2d, x, weight, bias, padding=((2, 0), (1, 3)), backends=("definition",), numeric=True)


def test_memory_order_and_empty_batch():
    x, weight, bias = call(2, 3, 5, 6, 4, 3, last=True)
    assert conv2d(x, weight, bias).transpose(0, 2, 3, 1).flags.c_contiguous
    assert conv2d(x[:, :, ::2], weight, bias).flags.c_contiguous
    y, record = conv2d.record(x[:0], weight, bias, padding=1)
    assert y.shape == (0, 4, 5, 6)
    dx, dweight, dbias = record.backward(y)
    assert dx.shape == (0, 3, 5, 6) and not dweight.any() and not dbias.any()


def test_sizes_not_known_yet():
    rule = conv2d.rule(Spec((None, 3, None, 8), float32), Spec((4, 3, 3, 3), float32), stride=2)
    assert rule.outputs["y"].shape == (None, 4, None, 3)


@pytest.mark.parametrize(
    "change, options, error, text",
    [
        ({}, {"stride": 0}, ShapeError, "stride: the rule is stride = (height, width), both ≥ 1; got 0"),
        ({}, {"stride": 1.5}, KindError, "stride: the rule is an integer or a pair of integers; got 1.5"),
        ({}, {"dilation": (1, 2, 3)}, ShapeError, "dilation"),
        ({}, {"padding": -1}, ShapeError, "padding = (height, width), both ≥ 0"),
        ({}, {"padding": "full"}, ShapeError, "'full'"),
        ({}, {"padding": "same", "stride": 2}, ShapeError, 'stride = 1 where padding = "same"'),
        ({}, {"groups": 0}, ShapeError, "groups ≥ 1"),
        ({}, {"groups": 2}, ShapeError, "C = groups · weight.shape[1] = 2 · 4; got C = 4"),
        ({}, {"dilation": 3}, ShapeError, "OH = ⌊(H + 0 + 0 − 3 · (3 − 1) − 1) / 1⌋ + 1 ≥ 1; got H = 5"),
        ({"x": (4, 5, 5)}, {}, ShapeError, "x.shape = (N, C, H, W); got [4, 5, 5]"),
        ({"weight": (6, 4, 3)}, {}, ShapeError, "weight.shape = (O, C / groups, kh, kw)"),
        ({"weight": (5, 2, 3, 3)}, {"groups": 2}, ShapeError, "a multiple of groups = 2"),
        ({"bias": (5,)}, {}, ShapeError, "bias.shape = (O,) = [6]; got [5]"),
    ],
)
def test_errors(change, options, error, text):
    shapes = {"x": (2, 4, 5, 5), "weight": (6, 4, 3, 3), "bias": (6,)} | change
    with pytest.raises(error) as raised:
        conv2d(*(draw(*s) for s in shapes.values()), **options)
    assert text in str(raised.value) and str(raised.value).startswith("conv2d: ")
    expected = TypeError if error is KindError else RuntimeError
    assert isinstance(raised.value, expected)
    if shapes["x"] != (4, 5, 5):  # torch takes one image without its batch
        with pytest.raises(expected):
            F.conv2d(*(torch.from_numpy(draw(*s)) for s in shapes.values()), **options)


def test_dtype_errors():
    x, weight, bias = call(2, 4, 5, 5, 6, 3)
    with pytest.raises(ShapeError, match=r"weight\.dtype = x\.dtype"):
        conv2d(x.astype(np.float32), weight, bias)
    with pytest.raises(UnsupportedTypeError):
        conv2d(x.astype(np.int64), weight, bias)
