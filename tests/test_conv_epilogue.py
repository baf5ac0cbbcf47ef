"""Convolutions with what follows them in the same pass: y = f(scale · sum + bias + residual)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op

from gpulayers.ops.activation import ACTIVATIONS
from gpulayers.ops.conv import conv
from gpulayers.torch._epilogue import TWINS

CONVS = [F.conv1d, F.conv2d, F.conv3d]
TRANSPOSED = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def last(n, c, *sizes: int) -> np.ndarray:
    """Channels-last in memory."""
    return np.moveaxis(draw(n, *sizes, c), -1, 1)


CALLS = {
    # x, weight, options
    "a sequence": ((2, 3, 9), (4, 3, 3), {"padding": 1, "stride": 2}),
    "images": ((2, 4, 5, 6), (6, 2, 3, 2), {"padding": (2, 0), "groups": 2}),
    "volumes": ((1, 2, 3, 4, 4), (3, 2, 2, 1, 3), {"padding": (1, 0, 1), "dilation": (2, 1, 1)}),
    "depthwise": ((2, 3, 5, 4), (6, 1, 3, 3), {"padding": 1, "groups": 3}),
    "one tap": ((3, 5, 3, 4), (4, 5, 1, 1), {}),
}
EVERY = pytest.mark.parametrize("name", CALLS)


def given(name: str, arrange=draw) -> tuple[list, dict]:
    """(x, weight, bias, scale, residual), options."""
    x, weight, options = CALLS[name]
    axes = len(x) - 2
    with torch.no_grad():
        y = CONVS[axes - 1](torch.empty(x), torch.empty(weight), **options)
    return [arrange(*x), draw(*weight), draw(weight[0]), draw(weight[0], 2)[:, 0], arrange(*y.shape) / 2], options


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
    (x, weight, bias, *_), options = given("a sequence")
    served = check_op(
        conv, x, weight, bias, dtypes=["float64", "float32"], dys=["dense"], activation=activation, **options
    )
    assert {"definition", "numpy", "triton"} <= set(served)


@EVERY
@pytest.mark.parametrize("arrange", [draw, last])
def test_everything(name, arrange):
    """In each layout, and with another for the residual."""
    arrays, options = given(name, arrange)
    other = given(name, last if arrange is draw else draw)[0][4]
    check_op(conv, *arrays, dys=["dense"], activation="silu", numeric=arrange is draw and len(name) < 9, **options)
    check_op(conv, *arrays[:4], other, dtypes=["float16"], dys=["expanded", "transposed"], activation="relu", **options)


@EVERY
def test_parts_of_an_epilogue(name):
    (x, weight, bias, scale, residual), options = given(name, last)
    short = {"dtypes": ["bfloat16"], "dys": ["dense"]} | options
    check_op(conv, x, weight, None, scale, None, **short)
    check_op(conv, x, weight, None, None, residual, **short)
    check_op(conv, x, weight, bias, None, residual, activation="gelu", **short)
    check_op(conv, x, weight, bias, scale, None, activation="tanh", **short)
