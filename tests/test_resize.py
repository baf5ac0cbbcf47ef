import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op

import gpulayers as gl
from gpulayers._taps import taps, transposed
from gpulayers.arrays import Spec, float32
from gpulayers.definition import ArgumentError, KindError, RuleError, ShapeError, UnsupportedTypeError
from gpulayers.ops.resize import MODES, interpolate
from gpulayers.testing.check_layer import check_layer


def draw(*shape: int, last: bool = False) -> np.ndarray:
    """Random values; ``last``: channels-last in memory."""
    x = np.random.default_rng(list(shape)).standard_normal(shape)
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, -1, *range(1, x.ndim - 1)) if last else x


layouts = pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
PLAIN = [
    {"mode": "nearest"},
    {"mode": "nearest-exact"},
    {"mode": "area"},
    {"mode": "linear"},
    {"mode": "linear", "align_corners": True},
]
IMAGES = [
    {"mode": "cubic"},
    {"mode": "cubic", "align_corners": True},
    {"mode": "linear", "antialias": True},
    {"mode": "cubic", "antialias": True},
    {"mode": "lanczos", "antialias": True},
]
CALLS = [
    ((2, 3, 5), {"size": 8, **PLAIN[4]}),
    ((2, 3, 9), {"size": 4, "scales": (0.47,), **PLAIN[3]}),
    ((2, 3, 5, 7), {"size": (10, 3), **PLAIN[0]}),
    ((2, 3, 5, 7), {"size": (6, 4), "scales": (1.3, 0.6), **PLAIN[1]}),
    ((2, 3, 5, 7), {"size": (3, 9), **PLAIN[2]}),
    ((2, 3, 5, 7), {"size": (9, 3), **PLAIN[3]}),
    ((1, 2, 3, 4), {"size": (5, 6), **IMAGES[0]}),
    ((1, 2, 3, 4), {"size": (4, 2), **IMAGES[1]}),
    ((1, 2, 9, 6), {"size": (3, 7), **IMAGES[2]}),
    ((1, 2, 9, 6), {"size": (2, 4), "scales": (0.3, 0.7), **IMAGES[3]}),
    ((1, 2, 11, 8), {"size": 3, **IMAGES[4]}),
    ((1, 2, 3, 2, 4), {"size": (2, 5, 7), **PLAIN[3]}),
    ((0, 2, 3, 2, 4), {"size": (2, 5, 7), **PLAIN[2]}),
    ((2, 3, 1, 1), {"size": (1, 4), **PLAIN[4]}),
]


@pytest.mark.parametrize("shape, options, last", [(*call, i % 2 == 1) for i, call in enumerate(CALLS)])
def test_every_backend(shape, options, last):
    """Channels-first and channels-last in turn."""
    numeric = not last and 0 < np.prod(shape) < 40
    served = check_op(interpolate, draw(*shape, last=last), numeric=numeric, dys=["dense", "strided"], **options)
    assert served == ["definition", "numpy", "triton"]


@layouts
def test_several_tiles(last):
    few = {"dtypes": ["float32", "bfloat16", "float16"], "dys": ["dense", "transposed"]}
    check_op(interpolate, draw(1, 66, 5, 4, last=last), size=(4, 8), mode="linear", **few)
    check_op(interpolate, draw(1, 9, 21, 30, last=last)[:, ::2, :, ::2], size=(33, 7), mode="nearest", **few)


def test_numpy_blocks(monkeypatch):
    from gpulayers.kernels.numpy import _blocks

    monkeypatch.setattr(_blocks, "BYTES", 1 << 9)
    for last, mode in itertools.product((False, True), ("nearest", "linear")):
        x = draw(5, 3, 9, 8, last=last)
        check_op(interpolate, x, size=(4, 13), mode=mode, backends=("numpy",), dtypes=["float32", "float16"])
    check_op(interpolate, draw(2, 3, 4, 5).transpose(0, 1, 3, 2), size=7, backends=("numpy",), dtypes=["float32"])


# --- against torch ---------------------------------------------------------------------------------------------------

SIZES = [  # of the last so many axes: from, to, or by
    ((5, 7, 6), (9, 3, 11), None),
    ((7, 4, 5), (7, 4, 5), None),
    ((1, 6, 3), (4, 1, 1), None),
    ((4, 4, 4), (8, 8, 8), None),
    ((13, 12, 9), (3, 2, 4), None),
    ((7, 6, 5), None, (1.7, 1.7, 1.7)),
    ((9, 7, 11), None, (0.37, 0.61, 2.3)),
    ((6, 5, 9), None, (2.0, 2.0, 2.0)),
]
THEIRS = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}


def torchs(x, axes, mode, align_corners=False, antialias=False, **sizes):
    name = THEIRS.get((mode, axes), mode)
    corners = {"align_corners": align_corners} if mode in ("linear", "cubic") else {}
    return F.interpolate(x, mode=name, antialias=antialias, **corners, **sizes)


@pytest.mark.filterwarnings("ignore:The default behavior for interpolate")
@pytest.mark.parametrize("kind, close", [(np.float64, 1e-12), (np.float32, 2e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_it_is_torchs(axes, kind, close):
    """Where each pixel lies and what it weighs, for every mode, size and scale; float32 tables as torch rounds them."""
    aligned = [{"mode": m, "align_corners": True, "antialias": True} for m in ("linear", "cubic")]
    for options, (sizes, out, scale) in itertools.product(PLAIN + (IMAGES + aligned if axes == 2 else []), SIZES):
        if options["mode"] == "area" and scale:
            continue  # torch makes a size of it
        x = draw(2, 2, *sizes[-axes:]).astype(kind)
        tensor = torch.from_numpy(x.copy()).requires_grad_()
        how = {"scale_factor": scale[-axes:]} if scale else {"size": out[-axes:]}
        expected = torchs(tensor, axes, **options, **how)
        scales = scale[-axes:] if scale else ()
        with gl.only("definition"):
            y, record = interpolate.record(x, size=tuple(expected.shape[2:]), scales=scales, **options)
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=close, atol=close, err_msg=str((options, how)))
        dy = draw(*y.shape).astype(kind)
        expected.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(record.backward(dy)[0], tensor.grad.numpy(), rtol=close, atol=close)


@pytest.mark.parametrize("options", PLAIN + IMAGES, ids=lambda o: "-".join(map(str, o.values())))
def test_infinities_and_nan(options):
    """They go as far as torch's own taps, of weight 0 too, and no further."""
    x = draw(3, 2, 6, 7).astype(np.float32)
    x[0, 0, 2, 3], x[1, 0, 0, 0], x[2, 1, 5, 6] = np.nan, np.inf, -np.inf
    for size in ((9, 4), (6, 7), (3, 14)):
        expected = torchs(torch.from_numpy(x), 2, size=size, **options).numpy()
        for backend in ("definition", "numpy"):
            with gl.only(backend), np.errstate(invalid="ignore"):
                y = interpolate(x, size=size, **options)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5, err_msg=f"{backend} {size}")


def test_a_table_and_the_one_turned_around_are_one_matrix():
    for mode, align, smooth, size, out in itertools.product(
        MODES, (False, True), (False, True), (1, 2, 5, 8), (1, 3, 8, 13)
    ):
        if (align and mode not in ("linear", "cubic")) or (smooth and mode not in ("linear", "cubic", "lanczos")):
            continue
        how = size, out, mode, align, smooth or mode == "lanczos"
        matrix = np.zeros((2, out, size))
        for m, (index, weight), turn in ((matrix[0], taps(*how), False), (matrix[1].T, transposed(*how), True)):
            for row, (at, by) in enumerate(zip(index, weight)):
                np.add.at(m[row], at[at >= 0], by[at >= 0])
                assert turn or abs(by.sum() - 1) < 1e-12
        np.testing.assert_allclose(matrix[0], matrix[1], atol=1e-15)


# --- errors and layers -----------------------------------------------------------------------------------------------

X = (2, 3, 4, 5)


@pytest.mark.parametrize(
    "shape, options, error, text",
    [
        (X, {"size": 0}, ShapeError, "size = (height, width), both ≥ 1"),
        (X, {"size": (2, 3, 4)}, ShapeError, "size = (height, width)"),
        (X, {"size": 2.5}, KindError, "size: the rule is an integer"),
        ((2, 3), {"size": 2}, ShapeError, "x.shape = (N, C, *sizes)"),
        ((2, 0, 4, 5), {"size": 2}, ShapeError, "C and sizes ≥ 1 (N may be 0)"),
        (X, {"size": 2, "mode": "bilinear"}, UnsupportedTypeError, "one of nearest, nearest-exact, linear"),
        (X, {"size": 2, "align_corners": True}, ArgumentError, "False where mode is not linear or cubic"),
        (X, {"size": 2, "antialias": True}, ArgumentError, "False where mode is not linear, cubic or lanczos"),
        (X, {"size": 2, "mode": "lanczos"}, ArgumentError, "True where mode is lanczos"),
        (X, {"size": 2, "mode": "linear", "align_corners": 1}, KindError, "True or False"),
        ((2, 3, 4), {"size": 2, "mode": "cubic"}, UnsupportedTypeError, "(N, C, H, W) for cubic and antialiased"),
        (X, {"size": 2, "scales": (1.0,)}, ShapeError, "a number for each of 2 axes"),
    ],
)
def test_errors(shape, options, error, text):
    with pytest.raises(error) as raised:
        interpolate(draw(*shape), **options)
    assert text in str(raised.value) and str(raised.value).startswith("interpolate: ")


LAYERS = [
    ("Upsample", {"size": (3, 7), "mode": "bicubic"}, X),
    ("Upsample", {"scale_factor": 1.7, "mode": "linear"}, (2, 3, 5)),
    ("Upsample", {"scale_factor": (0.6, 2.2), "mode": "bilinear", "recompute_scale_factor": True}, X),
    ("Upsample", {"scale_factor": 0.7, "mode": "area"}, (1, 2, 3, 4, 2)),
    ("UpsamplingNearest2d", {"scale_factor": 2}, X),
    ("UpsamplingBilinear2d", {"size": 6}, X),
]


@pytest.mark.parametrize("name, arguments, shape", LAYERS, ids=lambda v: v if isinstance(v, str) else "")
def test_layer(name, arguments, shape):
    layer = getattr(gl, name)(**arguments)
    check_layer(layer, shape)
    x = draw(*shape).astype(np.float32)
    theirs = getattr(torch.nn, name)(**arguments)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(layer(x), theirs, rtol=1e-5, atol=1e-5)
    assert layer.output_shape((None, *shape[1:])) == (None, *theirs.shape[1:])


def test_layer_errors():
    for arguments in ({}, {"size": 2, "scale_factor": 2}, {"size": 2, "recompute_scale_factor": True}):
        with pytest.raises(ArgumentError):
            gl.Upsample(**arguments)
    with pytest.raises(ArgumentError, match="None where mode is not one of linear"):
        gl.Upsample(size=2, align_corners=True)
    with pytest.raises(RuleError, match=r"Upsample.*one for 2 sizes"):
        gl.Upsample(size=2, mode="linear")(draw(*X))
    with pytest.raises(ArgumentError, match="for each of 2 sizes"):
        gl.Upsample(scale_factor=(2, 2, 2))(draw(*X))
    assert interpolate.rule(Spec((None, 3, 4, 5), float32), size=2).outputs["y"].shape == (None, 3, 2, 2)
