import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op

import gpulayers as gl
from gpulayers.arrays import Spec, float32
from gpulayers.definition import KindError, ShapeError, UnsupportedTypeError
from gpulayers.ops.window import channel_shuffle, fold, pixel_shuffle, pixel_unshuffle, unfold
from gpulayers.testing.check_layer import check_layer


def draw(*shape: int, last: bool = False) -> np.ndarray:
    """Random values; ``last``: channels-last in memory."""
    x = np.random.default_rng(list(shape)).standard_normal(shape)
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, -1, *range(1, x.ndim - 1)) if last else x


layouts = pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
WINDOWS = [
    ((2, 3, 7, 6), {"kernel_size": 2}),
    ((2, 3, 7, 6), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    ((1, 2, 5, 8), {"kernel_size": (1, 3), "stride": (3, 4), "padding": (2, 3)}),  # windows with gaps, beside the image
    ((2, 1, 9, 4), {"kernel_size": 4, "stride": (2, 4), "padding": (0, 2), "dilation": (2, 1)}),
    ((2, 3, 1, 1), {"kernel_size": 1}),
    ((0, 3, 4, 5), {"kernel_size": 2}),
]


@pytest.mark.parametrize("shape, options, last", [(*call, i % 2 == 1) for i, call in enumerate(WINDOWS)])
def test_unfold(shape, options, last):
    """Channels-first and channels-last in turn."""
    numeric = not last and 0 < np.prod(shape) < 100
    served = check_op(unfold, draw(*shape, last=last), numeric=numeric, **options)
    assert served == ["definition", "numpy", "triton"]


@pytest.mark.parametrize("shape, options", WINDOWS)
def test_fold(shape, options):
    """Of any columns, and as unfold's backward word for word."""
    y, record = unfold.record(draw(*shape), **options)
    dy = draw(*y.shape)
    served = check_op(fold, dy, output_size=shape[2:], dys=["dense", "strided"], **options)
    assert served == ["definition", "numpy", "triton"]
    np.testing.assert_array_equal(fold(dy, output_size=shape[2:], **options), record.backward(dy)[0])


def test_several_tiles():
    options = {"dtypes": ["float32", "bfloat16", "float16"], "dys": ["dense", "transposed"]}
    check_op(unfold, draw(1, 35, 30, 40)[:, ::2, 1:, ::3], kernel_size=3, padding=1, **options)
    check_op(unfold, draw(1, 70, 9, 12, last=True), kernel_size=(2, 3), stride=2, **options)
    check_op(
        fold, draw(1, 8, 1500).transpose(0, 1, 2)[..., ::-1][..., :1131], output_size=(30, 40), kernel_size=2, **options
    )


SHUFFLES = [
    (pixel_shuffle, (2, 8, 3, 5), {"upscale_factor": 2}),
    (pixel_shuffle, (1, 18, 4, 2), {"upscale_factor": 3}),
    (pixel_shuffle, (1, 4, 2, 600), {"upscale_factor": 2}),
    (pixel_shuffle, (1, 32, 2, 3), {"upscale_factor": 4}),
    (pixel_shuffle, (2, 3, 2, 2), {"upscale_factor": 1}),
    (pixel_shuffle, (0, 4, 3, 2), {"upscale_factor": 2}),
    (pixel_unshuffle, (2, 3, 6, 4), {"downscale_factor": 2}),
    (pixel_unshuffle, (1, 2, 6, 3), {"downscale_factor": 3}),
    (channel_shuffle, (2, 6, 3, 5), {"groups": 3}),
    (channel_shuffle, (2, 4, 7), {"groups": 2}),
    (channel_shuffle, (2, 6, 2, 3, 2), {"groups": 2}),
    (channel_shuffle, (2, 3, 4), {"groups": 1}),
]


@pytest.mark.parametrize("op, shape, options, last", [(*call, i % 2 == 1) for i, call in enumerate(SHUFFLES)])
def test_shuffles(op, shape, options, last):
    """Channels-first and channels-last in turn."""
    assert check_op(op, draw(*shape, last=last), **options) == ["definition", "triton"]


@layouts
def test_shuffles_of_several_tiles(last):
    few = {"dtypes": ["float32", "bfloat16", "float16"], "dys": ["dense", "transposed"]}
    check_op(pixel_shuffle, draw(1, 36, 17, 70, last=last), upscale_factor=2, **few)
    check_op(channel_shuffle, draw(2, 90, 11, 13, last=last)[:, :, :, 1:], groups=9, **few)


def test_numpy_blocks(monkeypatch):
    from gpulayers.kernels.numpy import _blocks

    monkeypatch.setattr(_blocks, "BYTES", 1 << 9)
    for last in (False, True):
        x = draw(5, 3, 9, 8, last=last)
        check_op(unfold, x, kernel_size=3, padding=1, stride=2, backends=("numpy",), dtypes=["float32", "float16"])


# --- against torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, shape, options", [(unfold, *w) for w in WINDOWS] + SHUFFLES)
def test_it_is_torchs(op, shape, options):
    x = draw(*shape)
    if x.size > 9:
        x.flat[[0, 7, -1]] = np.nan, np.inf, -np.inf
    y, record = op.record(x, **options)
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    expected = getattr(F, op.name)(tensor, **options)
    np.testing.assert_array_equal(y, expected.detach().numpy())
    if not x.size and op is not unfold:
        return  # torch's own gradient of nothing has a wrong shape, and raises
    dy = draw(*y.shape)
    expected.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(record.backward(dy)[0], tensor.grad.numpy(), rtol=1e-12, atol=1e-12)


X = (2, 3, 4, 5)


@pytest.mark.parametrize(
    "op, shape, options, error, text",
    [
        (unfold, X, {"kernel_size": 6}, ShapeError, "⌊(H + 2 · 0 − 1 · (6 − 1) − 1) / 1⌋ + 1 ≥ 1 windows"),
        (unfold, X, {"kernel_size": 2, "dilation": (1, 5)}, ShapeError, "W = 5"),
        (unfold, X, {"kernel_size": 0}, ShapeError, "kernel_size = (height, width), both ≥ 1"),
        (unfold, X, {"kernel_size": 2, "padding": -1}, ShapeError, "padding = (height, width), both ≥ 0"),
        (unfold, (2, 0, 4, 5), {"kernel_size": 1}, ShapeError, "C, H, W ≥ 1 (N may be 0)"),
        (fold, (2, 7, 12), {"output_size": (4, 5), "kernel_size": 2}, ShapeError, "multiple of kh · kw = 4"),
        (fold, (2, 8, 13), {"output_size": (4, 5), "kernel_size": 2}, ShapeError, "3 · 4 windows in [4, 5]"),
        (fold, (2, 8, 12), {"output_size": (1, 5), "kernel_size": 2}, ShapeError, "H = 1"),
        (pixel_shuffle, X, {"upscale_factor": 2}, ShapeError, "C is a multiple of upscale_factor² = 4"),
        (pixel_shuffle, X, {"upscale_factor": 0}, ShapeError, "upscale_factor ≥ 1"),
        (pixel_unshuffle, X, {"downscale_factor": 2}, ShapeError, "W is a multiple of downscale_factor = 2"),
        (channel_shuffle, X, {"groups": 2}, ShapeError, "multiple of groups = 2"),
        (channel_shuffle, (2, 4), {"groups": 2}, ShapeError, "at least one size"),
    ],
)
def test_errors(op, shape, options, error, text):
    with pytest.raises(error) as raised:
        op(draw(*shape), **options)
    assert text in str(raised.value) and str(raised.value).startswith(f"{op.name}: ")
    with pytest.raises(RuntimeError):
        getattr(F, op.name)(torch.from_numpy(draw(*shape)), **options)


def test_other_errors():
    with pytest.raises(KindError, match="groups: the rule is an integer"):
        channel_shuffle(draw(*X), groups=1.5)
    with pytest.raises(UnsupportedTypeError):
        unfold(np.ones(X, np.int64), kernel_size=1)
    rule = unfold.rule(Spec((None, 3, None, 8), float32), kernel_size=2)
    assert rule.outputs["y"].shape == (None, 12, None)
    rule = pixel_shuffle.rule(Spec((None, 8, None, 8), float32), upscale_factor=2)
    assert rule.outputs["y"].shape == (None, 2, None, 16)


LAYERS = [
    ("Unfold", ((2, 3), 1, 1, 2), (2, 3, 4, 5)),
    ("Fold", ((4, 5), 2), (2, 8, 12)),
    ("PixelShuffle", (2,), (2, 8, 3, 2)),
    ("PixelUnshuffle", (2,), (2, 2, 4, 2)),
    ("ChannelShuffle", (2,), (2, 6, 3)),
]


@pytest.mark.parametrize("name, arguments, shape", LAYERS, ids=lambda v: v if isinstance(v, str) else "")
def test_layer(name, arguments, shape):
    layer = getattr(gl, name)(*arguments)
    check_layer(layer, shape)
    x = draw(*shape).astype(np.float32)
    np.testing.assert_array_equal(layer(x), getattr(torch.nn, name)(*arguments)(torch.from_numpy(x)).numpy())
    assert layer.output_shape((None, *shape[1:])) == (None, *layer(x).shape[1:])
