"""Padding of sequences and volumes, and of tensors of any rank; of images in test_padding.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op

import gpulayers as gl
from gpulayers.definition import ShapeError
from gpulayers.ops.padding import MODES, pad
from gpulayers.testing.check_layer import check_layer
from gpulayers.torch import functional


def draw(*shape: int, last: bool = False) -> np.ndarray:
    """Random values; ``last``: channels-last in memory."""
    x = np.random.default_rng(list(shape)).standard_normal(shape)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1) if last else x


modes = pytest.mark.parametrize("mode", MODES)
PADDINGS = [
    ((2, 3, 7), ((2, 3),)),
    ((1, 2, 3, 4, 5), ((1, 2), (3, 0), (0, 4))),
]
CUT = [((2, 3, 7), ((-2, 3),)), ((1, 2, 4, 3, 5), ((-1, 2), (1, -1), (-2, -1)))]


def value(mode: str) -> dict:
    return {"mode": mode, "value": 1.5 if mode == "constant" else 0.0}


@modes
@pytest.mark.parametrize("shape, padding", PADDINGS + CUT)
def test_kernels(shape, padding, mode):
    x = draw(*shape, last=shape[2] % 2 == 1)
    for dtypes in (["float32"], ["float16", "bfloat16"])[: 1 + (padding[0][0] > 0)]:
        served = check_op(pad, x, padding=padding, dtypes=dtypes, dys=["dense"], **value(mode))
        assert served == ["definition", "numpy", "triton"]


# torch's circular padding reads its own output where a side is cut off, so there it is no judge.
JUDGED = [(*call, mode) for mode in MODES for call in PADDINGS + CUT * (mode != "circular")]


@pytest.mark.parametrize("shape, padding, mode", JUDGED)
def test_it_is_torchs(shape, padding, mode):
    x = draw(*shape)
    x.flat[[0, 7, -1]] = np.nan, np.inf, -np.inf
    y, record = pad.record(x, padding=padding, **value(mode))
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    sides = [side for pair in reversed(padding) for side in pair]
    expected = F.pad(tensor, sides, mode, **({"value": 1.5} if mode == "constant" else {}))
    np.testing.assert_array_equal(y, expected.detach().numpy())
    dy = draw(*y.shape)
    expected.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(record.backward(dy)[0], tensor.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shape, sides",
    [
        ((5,), (1, 2)),
        ((3, 4), (1, -1, 2, 0)),
        ((2, 3, 2, 4, 3), (1, 2)),  # several axes before
        ((2, 3, 2, 2, 4, 3), (0, 1, -1, 2)),
        ((2, 3, 4, 3), (1, 0, 0, 2, 1, 1)),  # the channels, too
        ((2, 3, 2, 3), (1, 0, 0, 2, 1, 1, -1, 2)),  # all
        ((2, 1, 2, 2, 2), (0, 1, 1, 0, 0, 0, 1, 1, 2, 0)),
    ],
)
def test_a_constant_around_any_axes(shape, sides):
    x = torch.from_numpy(draw(*shape)).requires_grad_()
    for constant in (None, 2.5):
        ours, theirs = functional.pad(x, sides, value=constant), F.pad(x, sides, value=constant)
        assert torch.equal(ours, theirs) and type(ours.grad_fn) is not type(theirs.grad_fn)
        dy = torch.randn_like(ours)
        assert torch.equal(*[torch.autograd.grad(y, x, dy)[0] for y in (ours, theirs)])


def test_what_torch_refuses():
    x = torch.zeros(2, 3, 4, 4)
    for arguments in [
        ((1,), "constant"),
        ((1, 1), "reflect"),
        ((9, 0, 0, 0), "reflect"),
        ((1,) * 10, "constant"),
        ((1, 1), "no"),
    ]:
        errors = []
        for function in (functional.pad, F.pad):
            with pytest.raises(Exception) as raised:
                function(x, *arguments)
            errors.append(raised.type)
        assert issubclass(*errors)


@pytest.mark.parametrize(
    "name, arguments, shape",
    [
        ("ReflectionPad1d", (2,), (2, 2, 4)),
        ("ReplicationPad3d", ((1, 2, 0, 1, 3, 0),), (2, 2, 2, 3, 2)),
        ("CircularPad3d", (1,), (2, 2, 2, 3, 2)),
        ("ConstantPad1d", ((1, -2), 3.5), (2, 2, 4)),
        ("ZeroPad3d", (1,), (2, 1, 2, 3, 2)),
    ],
)
def test_layer(name, arguments, shape):
    layer = getattr(gl, name)(*arguments)
    check_layer(layer, shape)
    x = draw(*shape).astype(np.float32)
    np.testing.assert_array_equal(layer(x), getattr(torch.nn, name)(*arguments)(torch.from_numpy(x)).numpy())
    assert layer.output_shape((None, *shape[1:])) == (None, *layer(x).shape[1:])
    with pytest.raises(ShapeError, match=rf"{name}.*x: the rule is x.shape = "):
        layer(draw(2, 3, 4, 4))


def test_layer_errors():
    with pytest.raises(ShapeError, match=r"an integer or \(left, right, top, bottom, front, back\)"):
        gl.ZeroPad3d((1, 2))
