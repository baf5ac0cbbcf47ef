"""Convolutions with what follows them in the same pass: y = f(scale · sum + bias + residual)."""

import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from gpulayers.kernels.triton import _configs, _conv_tiles, _epilogue, _tile  # noqa: E402
from gpulayers.kernels.triton._conv import Walk  # noqa: E402
from gpulayers.kernels.triton._epilogue import Epilogue  # noqa: E402
from halves import check_op  # noqa: E402

import gpulayers as gl  # noqa: E402
from gpulayers.arrays import Spec, bfloat16  # noqa: E402
from gpulayers.definition import ArgumentError, ShapeError  # noqa: E402
from gpulayers.ops.activation import ACTIVATIONS  # noqa: E402
from gpulayers.ops.conv import conv, conv_transpose  # noqa: E402
from gpulayers.testing.audit import audit  # noqa: E402
from gpulayers.testing.audit_op import judge, launched  # noqa: E402
from gpulayers.testing.check_layer import check_layer  # noqa: E402
from gpulayers.testing.interpreter import interpreting  # noqa: E402
from gpulayers.torch._epilogue import TWINS  # noqa: E402

CONVS = [F.conv1d, F.conv2d, F.conv3d]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def last(n, c, *sizes: int) -> np.ndarray:
    """Channels-last in memory."""
    return np.moveaxis(draw(n, *sizes, c), -1, 1)


CALLS = {
    # x, weight, options
    "a sequence": ((2, 3, 7), (4, 3, 3), {"padding": 1, "stride": 2}),
    "images": ((2, 4, 5, 4), (6, 2, 3, 2), {"padding": (2, 0), "groups": 2}),
    "volumes": ((1, 2, 3, 4, 3), (3, 2, 2, 1, 3), {"padding": (1, 0, 1), "dilation": (2, 1, 1)}),
    "depthwise": ((2, 3, 4, 4), (6, 1, 3, 3), {"padding": 1, "groups": 3}),
    "one tap": ((3, 5, 3, 2), (4, 5, 1, 1), {}),
}
EVERY = pytest.mark.parametrize("name", CALLS)


def with_epilogue(x: tuple, weight: tuple, options: dict, arrange=draw) -> list[np.ndarray]:
    """[x, weight, bias, scale, residual] of these shapes."""
    empty = [torch.empty(shape, device="meta") for shape in (x, weight)]
    y = CONVS[len(x) - 3](*empty, **options)
    return [arrange(*x), arrange(*weight), draw(weight[0]), draw(weight[0], 2)[:, 0], arrange(*y.shape) / 2]


def given(name: str, arrange=draw) -> tuple[list[np.ndarray], dict]:
    """([x, weight, bias, scale, residual], options)."""
    x, weight, options = CALLS[name]
    return with_epilogue(x, weight, options, arrange), options


@EVERY
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_definition_is_torchs(name, activation):
    arrays, options = given(name)
    y, call = conv.record(*arrays, **options, activation=activation)
    x, weight, bias, scale, residual = (torch.tensor(a, requires_grad=True) for a in arrays)
    shape = (-1, *(1,) * (x.ndim - 2))
    z = CONVS[x.ndim - 3](x, weight, **options) * scale.reshape(shape) + bias.reshape(shape) + residual
    theirs = z if activation is None else TWINS[activation](z)
    np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=1e-12, atol=1e-12)
    dy = draw(*y.shape)
    theirs.backward(torch.tensor(dy))
    found = call.backward(dy)
    assert found[3] is None
    for mine, t in zip(found, (x, weight, bias, None, residual)):
        if t is not None:
            np.testing.assert_allclose(mine, t.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    """In numbers; and that dz is computed from what is kept, whichever backend kept it."""
    x, weight, bias = draw(1, 2, 5), draw(3, 2, 2), draw(3)
    served = check_op(conv, x, weight, bias, dtypes=["float32"], dys=["dense"], activation=activation)
    assert served == ["aten", "definition", "numpy", "triton"]


@EVERY
@pytest.mark.parametrize("arrange", [draw, last])
def test_everything(name, arrange):
    """In each layout, and with another one for the residual."""
    arrays, options = given(name, arrange)
    check_op(conv, *arrays, dtypes=["float32"], dys=["dense"], activation="silu", **options)
    other = given(name, last if arrange is draw else draw)[0][4]
    check_op(conv, *arrays[:4], other, dtypes=["float16"], dys=["transposed"], activation="relu", **options)


@EVERY
def test_parts_of_an_epilogue(name):
    (x, weight, bias, scale, residual), options = given(name, last)
    short = {"dtypes": ["bfloat16"], "dys": ["expanded"], "backends": ["numpy", "triton"]} | options
    check_op(conv, x, weight, None, scale, None, **short)
    check_op(conv, x, weight, None, None, residual, **short)
    check_op(conv, x, weight, bias, None, residual, activation="gelu", **short)
    check_op(conv, x, weight, bias, scale, None, activation="tanh", **short)


def test_a_scale_and_a_bias_of_float32():
    """Beside 16-bit images, as a norm's are; the bias has a gradient of its dtype."""
    arrays, options = given("images")
    half = [a.astype("float16") for a in arrays]
    rows = [a.astype("float32") for a in arrays[2:4]]
    check_op(conv, *half[:2], *rows, half[4], dtypes=["float16"], dys=["dense"], activation="relu", **options)


@pytest.mark.parametrize(
    "change, options, error, text",
    [
        ({}, {"activation": "swish"}, ArgumentError, "activation ∈ {None, relu, "),
        ({"scale": (3,)}, {}, ShapeError, "scale: the rule is scale.shape = (O,) = [6]; got [3]"),
        ({"residual": (2, 6, 7)}, {}, ShapeError, "residual: the rule is residual.shape = y.shape = [2, 6, 7, 3]"),
        ({"scale": "float64"}, {}, ShapeError, "scale.dtype ∈ {x.dtype, float32}; got scale float64 with x float16"),
        ({"bias": "float32", "scale": None}, {}, ShapeError, "bias.dtype = x.dtype"),
        ({"residual": "float32"}, {}, ShapeError, "residual.dtype = x.dtype"),
    ],
)
def test_errors(change, options, error, text):
    arrays, more = given("images")
    named = dict(zip(conv.inputs, [a.astype("float16") for a in arrays]))
    for name, to in change.items():
        named[name] = (
            None if to is None else draw(*to).astype("float16") if isinstance(to, tuple) else named[name].astype(to)
        )
    with pytest.raises(error) as raised:
        conv(*named.values(), **more, **options)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    "name, arrange, activation, options",
    [
        ("a sequence", draw, "relu", {}),
        ("images", last, "mish", {"output_padding": (1, 0), "stride": 2}),
    ],
)
def test_transposed(name, arrange, activation, options):
    x, weight, more = CALLS[name]
    given = arrange(x[0], weight[0], *x[2:]), draw(*weight), draw(weight[1] * more.get("groups", 1))
    dtypes = ["float64", "float32", "bfloat16"]
    check_op(conv_transpose, *given, dtypes=dtypes, dys=["dense"], activation=activation, **more | options)


def test_winograd():
    """By tiles whose pixels and channels are in other places than y's."""
    options = {"padding": 1}
    for arrange in (draw, last):
        arrays = with_epilogue((3, 32, 7, 6), (36, 32, 3, 3), options, arrange)
        for activation in ("relu", "hardswish"):
            check_op(
                conv, *arrays, backends=["numpy"], dtypes=["float32"], dys=["dense"], activation=activation, **options
            )


def test_gradients_that_are_not_needed():
    """What only a residual or a bias asks for."""
    arrays, options = given("images", last)
    for needs in (["residual"], ["bias"], ["weight", "residual"]):
        check_op(
            conv, *arrays, needs=needs, dtypes=["float32"], dys=["dense"], activation="silu",
            backends=["numpy", "triton"], **options,
        )  # fmt: skip
    with pytest.raises(ValueError, match="no gradient for 'scale'"):
        conv.record(*arrays, needs=["scale"], **options)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (gl.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", activation="relu"), (1, 3, 4, 5)),
        (gl.ConvTranspose2d(2, 3, 2, stride=2, activation="silu"), (2, 2, 3, 2)),
    ],
    ids=str,
)
def test_layers(layer, shape):
    check_layer(layer, shape)


def test_a_layer_names_its_activation():
    with pytest.raises(ArgumentError, match="Conv2d: activation: the rule is activation ∈"):
        gl.Conv2d(3, 4, 3, activation="swish")(draw(1, 3, 4, 4))


# --- kernels on tiles of pixels --------------------------------------------------------------------------------------

TILES = {
    # x, weight, options
    "overhanging": ((2, 40, 5, 6), (72, 40, 3, 2), {"padding": 1}),
    "a stride": ((2, 32, 5, 6), (32, 32, 3, 3), {"padding": 1, "stride": 2}),
    "a product": ((3, 64, 5, 5), (136, 64, 1, 1), {}),
    "groups": ((1, 128, 3, 4), (128, 64, 1, 2), {"padding": (0, 1), "groups": 2}),
    "frames": ((1, 32, 3, 2, 3), (32, 32, 2, 1, 2), {"padding": (1, 0, 1)}),
    "windows": ((2, 3, 7, 7), (32, 3, 3, 5), {"padding": ((2, 1), (3, 2)), "stride": 2}),
}


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", TILES)
def test_tiles(name, activation):
    x, weight, options = TILES[name]
    half = ("bfloat16", "float16")[len(name) % 2]
    arrays = with_epilogue(x, weight, {} if name == "windows" else options, last)
    if name == "windows":
        arrays[4] = last(2, 32, 4, 4)
    with interpreting() as session:
        check_op(
            conv, *arrays, needs=["bias"], dtypes=[half], dys=["dense"], backends=["triton"], activation=activation,
            **options,
        )  # fmt: skip
    kernels = {launch.kernel for launch in session.launches}
    assert "_conv_tiles_kernel" in kernels and "_conv_kernel" not in kernels


@pytest.mark.parametrize("box", [(4, 2, 2), (1, 4, 4), (1, 1, 16)])
@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_box(box, parts):
    """Of images, of rows and of columns: each part is the same numbers in the same place."""
    n, h, w = (2 * side - 1 for side in box)  # the last box overhangs
    arrays = with_epilogue((n, 64, h, w), (72, 64, 1, 1), {}, last)
    x, weight, bias, scale, residual = (
        torch.tensor(a).bfloat16().unsqueeze(2) if a.ndim > 1 else torch.tensor(a).float() for a in arrays
    )
    tile = _configs.Tile(BM=16, BN=64, BK=64, warps=1, stages=2)
    walk, found = Walk((1, 1, 1), (0, 0, 0), (1, 1, 1), 1), []
    for sums in (32, 32 // parts):
        y, z = (torch.full_like(residual, torch.nan) for _ in range(2))
        end = Epilogue(bias, scale, residual, z, "silu")
        with interpreting(_tile.Device(90, 3, 232448)), pytest.MonkeyPatch.context() as patch:
            patch.setattr(_epilogue, "PART_SUMS", sums)
            patch.setattr(_conv_tiles, "box", lambda *_: box)
            with _configs.forced("conv_tiles.half", tile):
                _conv_tiles.forward(x, weight, end, y, walk, False)
        found.append((y, z))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=False)


@pytest.mark.parametrize("activation, entry", [("gelu", 2)])
def test_tiles_cost_no_spills(activation, entry):
    """Nor do the products wait for each other."""
    images = Spec((32, 128, 28, 28), bfloat16, (0, 2, 3, 1))
    row = Spec((128,), bfloat16)
    with _configs.forced("conv_tiles.half", _configs.CHOICES["conv_tiles.half"].entries(90)[entry]):
        inputs = [images, Spec((128, 128, 3, 3), bfloat16, (0, 2, 3, 1)), row, row, images]
        (planned,) = launched(conv, inputs, (), {"padding": 1, "activation": activation}, 90)
    report = audit(planned.compile())
    assert judge(planned, report, True) == [] and report.tensor_core == "HGMMA" and report.mix["UTMASTG"]


# --- what else came back to x ----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("arrange", [draw, last])
def test_a_gradient_that_is_added_to_dx(name, arrange):
    arrays, options = given(name, arrange)
    dtype, backends = ("float32", ["aten"]) if arrange is draw else ("float16", ["definition"])
    how = {"dtypes": [dtype], "dys": ["transposed"], "backends": [*backends, "numpy", "triton"]} | options
    check_op(conv, *arrays[:2], needs=["x", "weight"], joined=True, **how)


@pytest.mark.parametrize("arch", [90, 100])
def test_adding_costs_no_spills(arch):
    """Nor do the products wait for each other: of a ResNet's block."""
    inputs = [Spec(shape, bfloat16, (0, 2, 3, 1)) for shape in ((128, 256, 56, 56), (64, 256, 1, 1))]
    planned = launched(conv, inputs, ("x",), {}, arch, joined=True)[-1]
    assert judge(planned, audit(planned.compile()), True) == [] and planned.constexprs["PARTS"] > 1


@pytest.mark.parametrize(
    "x, weight, options, kernel",
    [
        ((3, 32, 3, 3), (16, 32, 1, 1), {}, "_conv_tiles_kernel"),
        ((3, 32, 3, 5), (24, 32, 3, 3), {"padding": 1}, "_conv_tiles_kernel"),
        ((2, 32, 4, 4), (16, 32, 3, 3), {"padding": 1, "stride": 2}, "_conv_kernel"),
        ((2, 32, 4, 4), (16, 32, 2, 2), {"stride": 2}, "_conv_kernel"),
    ],
)
def test_it_is_added_on_tiles(x, weight, options, kernel):
    """But where dx is written in steps."""
    arrays = last(*x), last(*weight) / 8
    with interpreting(_tile.Device(90, 2, 232448)) as session:
        check_op(
            conv, *arrays, needs=["x"], joined=True, backends=["triton"], dtypes=["bfloat16"], dys=["dense"], **options
        )
    assert kernel in {launch.kernel for launch in session.launches}
