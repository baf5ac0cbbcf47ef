import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op

import gpulayers as gl
from gpulayers.arrays import Spec, float32
from gpulayers.definition import KindError, ShapeError, UnsupportedTypeError
from gpulayers.ops.padding import MODES, pad
from gpulayers.testing.check_layer import check_layer


def draw(*shape: int, last: bool = False) -> np.ndarray:
    """Random values; ``last``: channels-last in memory."""
    x = np.random.default_rng(list(shape)).standard_normal(shape)
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if last else x


NARROW = ("float32", "float16", "bfloat16")
modes = pytest.mark.parametrize("mode", MODES)
PADDINGS = [
    ((2, 3, 4, 5), ((1, 2), (3, 0))),
    ((2, 3, 4, 5), ((3, 3), (4, 4))),  # as much as reflection allows
    ((1, 2, 6, 5), ((-1, 2), (1, -2))),  # a part is cut off
    ((1, 2, 5, 6), ((-2, -1), (0, 0))),
    ((0, 3, 4, 5), 1),
]


def value(mode: str) -> dict:
    return {"mode": mode, "value": 1.5 if mode == "constant" else 0.0}


@modes
@pytest.mark.parametrize("shape, padding", PADDINGS)
def test_definition(shape, padding, mode):
    check_op(pad, draw(*shape), padding=padding, numeric=True, backends=("definition",), **value(mode))
    check_op(pad, draw(*shape, last=True), padding=padding, backends=("definition",), **value(mode))


@modes
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape, padding", PADDINGS)
def test_kernels(shape, padding, mode, last):
    x = draw(*shape, last=last)
    served = check_op(pad, x, padding=padding, dtypes=NARROW, dys=["dense", "expanded"], **value(mode))
    assert served == ["definition", "numpy", "triton"]


@modes
def test_any_strides_and_several_tiles(mode):
    options = {"padding": ((2, 1), (1, 2)), "dtypes": NARROW, "dys": ["transposed"], **value(mode)}
    check_op(pad, draw(3, 5, 9, 24)[:, ::2, 1:, ::3], **options)
    check_op(pad, draw(2, 3, 5, 4).transpose(0, 1, 3, 2), **options)
    check_op(pad, draw(1, 70, 5, 6, last=True), **options)
    check_op(pad, draw(1, 2, 30, 40), **options)


def test_one_pixel_and_what_exceeds_the_image():
    few = {"dtypes": ["float32"], "dys": ["dense"]}
    check_op(pad, draw(1, 2, 1, 1), mode="replicate", padding=((2, 3), (0, 4)), **few)
    check_op(pad, draw(1, 2, 1, 3), mode="circular", padding=((1, 1), (3, 3)), **few)
    check_op(pad, draw(1, 2, 2, 3), mode="replicate", padding=((-3, 4), (5, -4)), **few)
    check_op(pad, draw(2, 3, 0, 5), mode="constant", padding=1, value=np.inf, **few)
    check_op(pad, draw(2, 0, 3, 5), mode="circular", padding=1, **few)
    check_op(pad, draw(2, 3, 4, 5), mode="constant", padding=((-2, -2), (0, 1)), **few)


def test_numpy_blocks(monkeypatch):
    from gpulayers.kernels.numpy import _blocks

    monkeypatch.setattr(_blocks, "BYTES", 1 << 9)
    for mode in MODES:
        for last in (False, True):
            check_op(pad, draw(7, 3, 9, 8, last=last), padding=2, backends=("numpy",), dtypes=NARROW, **value(mode))


# --- against torch ---------------------------------------------------------------------------------------------------


def torchs(x, padding, mode, **value):
    (top, bottom), (left, right) = padding if isinstance(padding, tuple) else ((padding, padding),) * 2
    return F.pad(x, (left, right, top, bottom), mode, **value)


@modes
@pytest.mark.parametrize("shape, padding", PADDINGS)
def test_it_is_torchs(shape, padding, mode):
    """torch's circular padding reads its own output where a side is cut off, so there it is no judge."""
    if mode == "circular" and isinstance(padding, tuple) and min(map(min, padding)) < 0 < max(map(max, padding)):
        (top, _), (_, right) = padding
        cut = draw(*shape)[:, :, max(0, -top) :, : shape[3] + min(0, right)]
        rest = tuple((max(0, a), max(0, b)) for a, b in padding)
        np.testing.assert_array_equal(pad(draw(*shape), padding=padding, mode=mode), pad(cut, padding=rest, mode=mode))
        return
    x = draw(*shape)
    if x.size:
        x.flat[[0, 7, -1]] = np.nan, np.inf, -np.inf
    y, record = pad.record(x, padding=padding, **value(mode))
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    expected = torchs(tensor, padding, mode, **({"value": 1.5} if mode == "constant" else {}))
    np.testing.assert_array_equal(y, expected.detach().numpy())
    dy = draw(*y.shape)
    expected.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(record.backward(dy)[0], tensor.grad.numpy(), rtol=1e-12, atol=1e-12)


def test_every_small_padding_is_torchs():
    """Which pixel stands where, and which padding is refused, along one axis."""
    for size in (1, 2, 5):
        x = draw(1, 1, 1, size)
        for mode in MODES:
            for left in range(-3, 6):
                for right in range(-3, 6):
                    if mode == "circular" and (min(left, right) < 0 or 0 in (size + left, size + right)):
                        continue
                    options = {"padding": ((0, 0), (left, right)), "mode": mode}
                    try:
                        expected = torchs(torch.from_numpy(x), **options).numpy()
                    except RuntimeError:
                        with pytest.raises(ShapeError):
                            pad(x, **options)
                        continue
                    for backend in ("definition", "numpy"):
                        with gl.only(backend):
                            kind = np.float32 if backend == "numpy" else np.float64
                            np.testing.assert_array_equal(pad(x.astype(kind), **options), expected.astype(kind))


X = (2, 3, 4, 5)


@pytest.mark.parametrize(
    "shape, options, error, text",
    [
        (X, {"padding": ((0, 0), (5, 0)), "mode": "reflect"}, ShapeError, "padding < W where it reflects"),
        (X, {"padding": ((5, 0), (0, 0)), "mode": "circular"}, ShapeError, "padding ≤ H where it is circular"),
        (X, {"padding": ((-3, -2), (0, 0))}, ShapeError, "no more is cut off than is there"),
        (X, {"padding": ((-3, -2), (0, 0)), "mode": "replicate"}, ShapeError, "(-3, -2) with H = 4"),
        ((2, 0, 4, 5), {"padding": 1, "mode": "reflect"}, ShapeError, "C, H, W ≥ 1 (N may be 0) for reflect padding"),
        ((2, 3, 0, 5), {"padding": 1, "mode": "replicate"}, ShapeError, "C, H, W ≥ 1"),
        ((2, 3, 0, 5), {"padding": 1, "mode": "circular"}, ShapeError, "padding ≤ H"),
        (X, {"padding": 1, "mode": "mirror"}, UnsupportedTypeError, "one of constant, reflect, replicate, circular"),
        (X, {"padding": 1, "mode": "reflect", "value": 2.0}, ShapeError, 'value = 0 (not used) where mode is not "co'),
    ],
)
def test_errors(shape, options, error, text):
    with pytest.raises(error) as raised:
        pad(draw(*shape), **options)
    assert text in str(raised.value) and str(raised.value).startswith("pad: ")
    with pytest.raises(NotImplementedError if error is UnsupportedTypeError else RuntimeError):
        torchs(torch.from_numpy(draw(*shape)), **({"mode": "constant"} | options))


def test_other_errors():
    for padding, error in ((1.5, KindError), ((True, 1), KindError), ((1, 2, 3), ShapeError), ("same", KindError)):
        with pytest.raises(error, match="padding"):
            pad(draw(*X), padding=padding)
    with pytest.raises(KindError, match="value: the rule is a number"):
        pad(draw(*X), padding=1, value="0")
    with pytest.raises(ShapeError, match=r"x\.shape = \(N, C, \*sizes\)"):
        pad(draw(4, 5), padding=1)
    with pytest.raises(UnsupportedTypeError):
        pad(np.ones(X, np.int64), padding=1)
    rule = pad.rule(Spec((None, 3, None, 8), float32), padding=((1, 2), (3, 4)))
    assert rule.outputs["y"].shape == (None, 3, None, 15)


# --- layers ----------------------------------------------------------------------------------------------------------

LAYERS = [
    ("ReflectionPad2d", (2,)),
    ("ReplicationPad2d", ((1, 2, 3, 0),)),
    ("CircularPad2d", ([1, 2, 3, 0],)),
    ("ConstantPad2d", ((1, -2, 0, 3), 3.5)),
    ("ZeroPad2d", (1,)),
]


@pytest.mark.parametrize("name, arguments", LAYERS, ids=lambda v: v if isinstance(v, str) else "")
def test_layer(name, arguments):
    layer = getattr(gl, name)(*arguments)
    check_layer(layer, (2, 2, 4, 5))
    x = draw(2, 3, 4, 5).astype(np.float32)
    theirs = getattr(torch.nn, name)(*(tuple(a) if isinstance(a, list) else a for a in arguments))
    np.testing.assert_array_equal(layer(x), theirs(torch.from_numpy(x)).numpy())
    assert layer.output_shape((None, 3, 4, 5)) == (None, *layer(x).shape[1:])


def test_layer_errors():
    with pytest.raises(ShapeError, match="left, right, top, bottom"):
        gl.ZeroPad2d((1, 2))
    with pytest.raises(ShapeError, match=r"ReflectionPad2d.*padding < H"):
        gl.ReflectionPad2d((0, 0, 4, 0))(draw(2, 3, 4, 5))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "shape, padding, calls",
    [
        ((2, 3, 7), (2, 1), 1),
        ((3, 7), (1, 2), 1),
        ((0, 3, 5), (1, 1), 1),
        ((2, 3, 4, 5, 6), (1, 2, 0, 3, 2, 1), 1),
        ((3, 4, 5, 6), (1, 2, 0, 3, 2, 1), 1),
        ((2, 3, 4, 5, 6), (1, 1, 1, 1, 9, 0), 1),  # replicate alone repeats so often
        ((2, 3, 5), (9, 1), 1),
        ((2, 3, 4, 5), (1, 1), 0),
    ],
)
def test_sequences_and_volumes_are_padded_by_one_call(monkeypatch, shape, padding, calls, mode):
    from gpulayers.torch import padding as ours

    run, pad = [], ours._pad
    monkeypatch.setattr(ours, "_pad", lambda *args: run.append(args) or pad(*args))

    def outcome(pad):
        x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).requires_grad_()
        try:
            y = pad(x, padding, mode)
        except Exception as error:
            return type(error)
        return y.detach(), torch.autograd.grad((y * y).sum(), x)[0]

    theirs, mine = outcome(F.pad), outcome(ours.pad)
    assert len(run) == calls
    if isinstance(theirs, type):
        assert mine is theirs
    else:
        torch.testing.assert_close(mine, theirs)
