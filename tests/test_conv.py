import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided

import gpulayers as gl
from gpulayers import dispatch
from gpulayers.arrays import Spec, float32
from gpulayers.definition import KindError, ShapeError, UnsupportedTypeError
from gpulayers.layers._frames import as_data
from gpulayers.ops.conv import conv
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.interpreter import interpreting


@pytest.fixture(autouse=True)
def _views_stay_inside(monkeypatch):
    """No view that a NumPy kernel makes reaches out of its array: nothing else would tell."""
    from gpulayers.kernels.numpy import _conv, _conv_images, _conv_volumes

    def inside(x, shape, strides):
        view, whole = as_strided(x, shape, strides), x
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        if view.size:
            (low, high), (first, last) = byte_bounds(view), byte_bounds(whole)
            assert first <= low and high <= last, f"{high - last} bytes too far"
        return view

    for module in (_conv, _conv_volumes, _conv_images):
        monkeypatch.setattr(module, "as_strided", inside)


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
    check_op(conv, *call(*sizes, groups=groups), numeric=True, backends=backends, **options)
    check_op(conv, *call(*sizes, groups=groups, bias=False, last=True), backends=backends, **options)


@pytest.mark.parametrize("sizes, options", CALLS)
def test_definition_is_torchs(sizes, options):
    given = call(*sizes, groups=options.get("groups", 1))
    y, record = conv.record(*given, **options)
    tensors = [torch.from_numpy(a).requires_grad_() for a in given]
    expected = F.conv2d(*tensors, **options)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    dy = draw(*y.shape)
    expected.backward(torch.from_numpy(dy))
    for g, t in zip(record.backward(dy), tensors):
        np.testing.assert_allclose(g, t.grad.numpy(), rtol=1e-12, atol=1e-12)


# --- kernels ---------------------------------------------------------------------------------------------------------

NARROW = ("float32", "float16", "bfloat16")
HALF = "float16", "bfloat16"
"""By memory order: channels first and last."""


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("sizes, options", CALLS)
def test_few_channels(sizes, options, last):
    """Taps and channels as one inner axis; every option; depthwise."""
    given = call(*sizes, groups=options.get("groups", 1), last=last)
    served = check_op(conv, *given, dtypes=["float32", HALF[last]], dys=["dense", "expanded"], **options)
    assert served == ["aten", "definition", "numpy", "triton"]


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "sizes, options",
    [
        ((2, 40, 5, 6, 24, 3), {"padding": 1}),  # several blocks of channels, a part of one
        ((1, 80, 5, 6, 36, (2, 3)), {"padding": 1, "stride": (3, 2), "dilation": (2, 2), "groups": 2}),  # phases
        ((2, 18, 4, 5, 70, 1), {"stride": 2}),  # phases without a tap
        ((2, 32, 4, 8, 20, 1), {}),  # plain, images of 16 pixels
        ((2, 17, 3, 5, 20, 1), {}),  # plain, others
        ((2, 16, 4, 1, 17, 1), {}),
        ((2, 16, 1, 1, 17, 1), {}),
    ],
)
def test_many_channels(sizes, options, last):
    given = call(*sizes, groups=options.get("groups", 1), last=last)
    assert "triton" in check_op(conv, *given, dtypes=[HALF[last]], dys=["dense", "strided"], **options)


def test_pixels_are_split_over_programs():
    """dweight and dbias from several partial sums."""
    with interpreting() as session:
        check_op(conv, *call(9, 16, 8, 8, 17, 1), backends=("triton",), dtypes=["float16", "bfloat16"], dys=["dense"])
    splits = {run.kernel: run.grid for run in session.launches}
    assert splits["_conv_weight_kernel"][1] > 1
    check_op(conv, *call(3, 1, 24, 24, 4, 3), backends=("triton",), dtypes=["float32"], dys=["dense"])


@pytest.mark.parametrize(
    "sizes, groups, padding",
    [
        ((2, 3, 5, 6, 4, 3), 1, ((0, 2), (0, 1))),
        ((2, 3, 5, 6, 4, 3), 1, ((2, 0), (1, 0))),
        ((1, 20, 5, 6, 18, 3), 1, ((0, 2), (0, 1))),
        ((1, 20, 5, 6, 18, 3), 1, ((0, 1), (2, 0))),
        ((2, 4, 5, 6, 4, 3), 4, ((0, 2), (0, 1))),
        ((2, 4, 5, 6, 4, 3), 4, ((2, 0), (1, 0))),
    ],
)
def test_padding_on_some_sides(sizes, groups, padding):
    """Windows hang over some of the edges, and start or end exactly at the others."""
    options = {"dtypes": NARROW, "dys": ["dense"], "groups": groups, "padding": padding}
    assert "triton" in check_op(conv, *call(*sizes, groups=groups), **options)


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((2, 3, 9, 12, 10, (3, 4)), {"stride": (2, 4), "padding": ((1, 0), (0, 0))}),  # rows may overlap
        ((1, 2, 5, 11, 9, 2), {"stride": 3}),  # columns that no window sees
        ((1, 5, 4, 9, 17, (1, 3)), {"stride": (1, 3), "dilation": (2, 1)}),
        ((1, 4, 2, 7, 9, (1, 3)), {"stride": (1, 3)}),  # one column more than windows
        ((1, 4, 2, 5, 9, (1, 2)), {"stride": (1, 2), "padding": ((0, 0), (0, 1))}),  # one column less
    ],
)
def test_windows_that_share_no_column(sizes, options):
    """One column of several columns' channels; of NCHW's gradient each by itself."""
    for last in (False, True):
        with interpreting() as session:
            check_op(
                conv,
                *call(*sizes, last=last),
                backends=("triton",),
                dtypes=["float32", HALF[last]],
                dys=["dense"],
                **options,
            )
        kernels = [run.constexprs.get("UNIT_C") for run in session.launches if run.kernel == "_conv_kernel"]
        assert max(kernels) == {12: 4, 11: 4, 9: 1, 7: 4, 5: 4}[sizes[3]]


def test_strided_bias():
    x, weight, bias = call(2, 3, 5, 5, 4, 3)
    check_op(conv, x, weight, bias.repeat(2)[::2], dtypes=["float32"])


@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": (1, 3), "dilation": 2, "padding": 2}, {"stride": 2}])
def test_depthwise(many, options):
    for last in (False, True):
        given = call(2, 6, 7, 8, 6 * many, (3, 2), groups=6, last=last, bias=many == 1)
        check_op(conv, *given, groups=6, dtypes=["float16", "bfloat16"], dys=["dense", "transposed"], **options)


def test_large_depthwise():
    """Several tiles of pixels, several rounds of taps."""
    given = call(2, 3, 40, 24, 3, 5, groups=3)
    check_op(conv, *given, groups=3, backends=("triton",), dtypes=["float32"], dys=["dense"], padding=2)


@pytest.mark.parametrize("sizes", [(0, 32, 4, 8, 20, 1), (0, 3, 4, 8, 20, 3), (0, 4, 4, 8, 4, 3)])
def test_empty_batch(sizes):
    groups = 4 if sizes[1] == 4 else 1
    assert len(check_op(conv, *call(*sizes, groups=groups), groups=groups, dtypes=NARROW)) == 3


def test_any_strides():
    x, weight, bias = call(4, 17, 12, 8, 9, 3)
    options = {"dtypes": ["float16", "bfloat16"], "dys": ["transposed"], "padding": 1}
    check_op(conv, x[::2, :, ::2, 1:], weight, bias, **options)
    check_op(conv, x[:2].transpose(0, 1, 3, 2), weight, bias, **options)
    last = np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    check_op(conv, x[:2], last, bias, **options)
    check_op(conv, x[:2].transpose(0, 1, 3, 2), weight[..., :1, :1], bias, dtypes=["float32"], dys=["dense"])
    check_op(conv, x[:2, :4, ::2], weight[:4, :1], bias[:4], groups=4, **options)


def test_numpy_blocks(monkeypatch):
    """Images and rows in several blocks."""
    from gpulayers.kernels.numpy import _blocks, _conv

    monkeypatch.setattr(_conv, "COLUMN_BYTES", 1 << 12)
    monkeypatch.setattr(_blocks, "BYTES", 1 << 9)
    for options in ({"padding": 1}, {"padding": ((2, 0), (1, 3)), "stride": 2}):
        check_op(conv, *call(5, 4, 20, 21, 6, 3), backends=("numpy",), dtypes=NARROW, **options)
        check_op(conv, *call(5, 4, 20, 21, 4, 3, groups=4), groups=4, backends=("numpy",), dtypes=NARROW, **options)
    check_op(conv, *call(40, 20, 7, 7, 6, 3), backends=("numpy",), dtypes=NARROW, padding=1)


@pytest.mark.parametrize(
    "sizes, padding",
    [
        ((2, 32, 6, 8, 40), 1),
        ((3, 64, 7, 7, 32), 1),  # tiles reach over the edge
        ((1, 33, 9, 5, 32), ((2, 0), (1, 2))),
        ((9, 32, 5, 12, 32), 0),
        ((1, 128, 8, 8, 96), 1),  # many terms
        ((0, 32, 6, 6, 32), 1),
    ],
)
def test_numpy_winograd(monkeypatch, sizes, padding):
    """Images and rows of tiles in several blocks."""
    from gpulayers.kernels.numpy import _winograd

    monkeypatch.setattr(_winograd, "BYTES", 1 << 18)
    monkeypatch.setattr(_winograd, "RUN", 12)
    dtypes = NARROW if sizes[1] < 40 else ["float32"]
    for last in (False, True):
        check_op(conv, *call(*sizes, 3, last=last), backends=("numpy",), dtypes=dtypes, padding=padding)


# --- rules and layers ------------------------------------------------------------------------------------------------


def test_padding_by_side():
    x, weight, bias = call(2, 3, 5, 6, 4, 3)
    padded = np.pad(x, ((0, 0), (0, 0), (2, 0), (1, 3)))
    got = conv(x, weight, bias, padding=((2, 0), (1, 3)))
    np.testing.assert_allclose(got, conv(padded, weight, bias), rtol=1e-12)
    check_op(conv, x, weight, bias, padding=((2, 0), (1, 3)), backends=("definition",), numeric=True)


def test_memory_order_and_empty_batch():
    x, weight, bias = call(2, 3, 5, 6, 4, 3, last=True)
    assert conv(x, weight, bias).transpose(0, 2, 3, 1).flags.c_contiguous
    assert conv(x[:, :, ::2], weight, bias).flags.c_contiguous
    y, record = conv.record(x[:0], weight, bias, padding=1)
    assert y.shape == (0, 4, 5, 6)
    dx, dweight, dbias = record.backward(y)[:3]
    assert dx.shape == (0, 3, 5, 6) and not dweight.any() and not dbias.any()


def test_sizes_not_known_yet():
    rule = conv.rule(Spec((None, 3, None, 8), float32), Spec((4, 3, 3, 3), float32), stride=2)
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
        (
            {"x": (4, 5, 5)},
            {},
            ShapeError,
            "x.shape = (N, C, H, W) where weight.shape = (O, C / groups, kh, kw); got [4, 5, 5]",
        ),
        (
            {"weight": (6, 4, 3)},
            {},
            ShapeError,
            "x.shape = (N, C, L) where weight.shape = (O, C / groups, k); got [2, 4, 5, 5]",
        ),
        ({"weight": (6, 4)}, {}, ShapeError, "weight.shape = (O, C / groups, kh, kw), none of them 0; got [6, 4]"),
        ({"weight": (5, 2, 3, 3)}, {"groups": 2}, ShapeError, "a multiple of groups = 2"),
        ({"bias": (5,)}, {}, ShapeError, "bias.shape = (O,) = [6]; got [5]"),
    ],
)
def test_errors(change, options, error, text):
    shapes = {"x": (2, 4, 5, 5), "weight": (6, 4, 3, 3), "bias": (6,)} | change
    with pytest.raises(error) as raised:
        conv(*(draw(*s) for s in shapes.values()), **options)
    assert text in str(raised.value) and str(raised.value).startswith("conv: ")
    expected = TypeError if error is KindError else RuntimeError
    assert isinstance(raised.value, expected)
    if shapes["x"] != (4, 5, 5):  # torch takes one image without its batch
        with pytest.raises(expected):
            F.conv2d(*(torch.from_numpy(draw(*s)) for s in shapes.values()), **options)


def test_dtype_errors():
    x, weight, bias = call(2, 4, 5, 5, 6, 3)
    with pytest.raises(ShapeError, match=r"weight\.dtype = x\.dtype"):
        conv(x.astype(np.float32), weight, bias)
    with pytest.raises(UnsupportedTypeError):
        conv(x.astype(np.int64), weight, bias)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (gl.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 5)),
        (gl.Conv2d(4, 8, (3, 2), stride=2, groups=4, bias=False), (2, 4, 6, 5)),
        (gl.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 6, 5)),
    ],
    ids=str,
)
def test_layer(layer, shape):
    check_layer(layer, shape)


def test_layer_is_torchs():
    ours, theirs = gl.Conv2d(4, 6, (3, 2), 2, 1, groups=2), torch.nn.Conv2d(4, 6, (3, 2), 2, 1, groups=2)
    state = theirs.state_dict()
    assert {n: w.shape for n, w in ours.named_weights().items()} == {n: tuple(t.shape) for n, t in state.items()}
    bound = (2 * 6) ** -0.5
    for weight in ours.weights:
        assert abs(weight.data).max() <= bound and abs(weight.data).max() > bound / 2
    ours.load_state_dict(state)
    x = draw(2, 4, 7, 8).astype(np.float32)
    np.testing.assert_allclose(ours(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert ours.output_shape((None, 4, 7, 8)) == (None, *ours(x).shape[1:])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options",
    [{"padding": (2, 1), "stride": 2}, {"padding": "same", "dilation": (1, 2)}, {"padding": "valid"}],
    ids=lambda o: str(o["padding"]),
)
def test_padding_modes_are_torchs(options, mode):
    """An even kernel: "same" pads one more at the bottom and the right."""
    ours, theirs = (nn.Conv2d(3, 4, (2, 4), padding_mode=mode, **options) for nn in (gl, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    x, tensor = draw(2, 3, 7, 8).astype(np.float32), torch.from_numpy(draw(2, 3, 7, 8).astype(np.float32))
    expected = theirs(tensor.requires_grad_())
    y = ours(x)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert ours.output_shape((None, 3, 7, 8)) == (None, *y.shape[1:])
    dy = draw(*y.shape).astype(np.float32)
    expected.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(ours.backward(dy), tensor.grad.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.weight.grad, theirs.weight.grad.numpy(), rtol=1e-4, atol=1e-4)


def test_padding_mode_without_the_input_gradient():
    layer = gl.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    x = draw(2, 3, 5, 5).astype(np.float32)
    with as_data(x):
        y = layer(x)
    assert layer.backward(y) is None and layer.weight.has_grad
    with pytest.raises(ShapeError, match="Conv2d: padding: the rule is padding < H where it reflects"):
        gl.Conv2d(3, 4, 3, padding=5, padding_mode="reflect")(draw(2, 3, 5, 9).astype(np.float32))


@pytest.mark.parametrize(
    "arguments, text",
    [
        (
            {"padding_mode": "mirror"},
            "padding_mode: the rule is one of zeros, reflect, replicate, circular; got 'mirror'",
        ),
        ({"groups": 2}, "in_channels: the rule is a multiple of groups = 2; got 3"),
        ({"padding": "same", "stride": 2}, 'stride = 1 where padding = "same"'),
    ],
)
def test_layer_errors(arguments, text):
    with pytest.raises(ValueError, match=text.replace("(", "\\(")):
        gl.Conv2d(3, 4, 3, **arguments)


@pytest.mark.parametrize(
    "channels, groups, out, stride", [(3, 3, 3, 1), (3, 3, 6, 2), (3, 1, 4, 2), (32, 1, 32, 1), (96, 1, 32, 1)]
)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_numpy_with_infinite_pixels(channels, groups, out, stride, where):
    """An infinite pixel reaches what depends on it, as in the definition, and nothing else."""
    x, weight = draw(2, channels, 7, 6).astype(float32), draw(out, channels // groups, 3, 3).astype(float32)
    dy = draw(*conv(x, weight, None, stride=stride, padding=1, groups=groups).shape).astype(float32)
    hit = {"x": x, "dy": dy}[where]
    hit[0, 0, 0, 0], hit[-1, -1, 2, 1], hit[1, 2, -1, -1] = np.inf, -np.inf, np.nan
    found = {}
    for backend in ("numpy", "definition"):
        with dispatch.only(backend), np.errstate(all="ignore"):
            y, call = conv.record(x, weight, None, stride=stride, padding=1, groups=groups)
            found[backend] = y, *call.backward(dy)[:2]
    for mine, true in zip(*found.values()):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-4)
