"""Places that an affine map gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpulayers.kernels.triton import _tile
from halves import check_op
from pooling_calls import same

import gpulayers.torch as gt
from gpulayers.definition import KindError, ShapeError
from gpulayers.ops.resize import affine_grid
from gpulayers.testing.arena import arena
from gpulayers.testing.interpreter import interpreting

CALLS = [((2, 2, 3), (3, 4), True), ((1, 2, 3), (1, 5), False), ((2, 3, 4), (2, 3, 4), False), ((0, 2, 3), 2, False)]


def draw(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape)


@pytest.mark.parametrize("shape, size, align", CALLS)
def test_every_backend(shape, size, align):
    served = check_op(affine_grid, draw(*shape), size=size, align_corners=align, numeric=shape[0] == 1)
    assert served == ["definition", "triton"]


def test_parts_of_an_image():
    """As for a large GPU: sums of parts, which come together in their order."""
    theta, dy = draw(1, 2, 3).astype(np.float32), draw(1, 90, 100, 2).astype(np.float32)
    with interpreting(_tile.Device(90, 132, 232448), races=False) as session, arena("triton"):
        _, call = affine_grid.record(theta, size=(90, 100))
        (found,) = call.backward(dy)
    assert session.launches[1].grid[:2] == (2, 4)
    _, call = affine_grid.record(theta.astype(float), size=(90, 100))
    np.testing.assert_allclose(found, call.backward(dy.astype(float))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(
    "shape, size", [((2, 2, 3), (2, 5, 3, 4)), ((1, 2, 3), (1, 1, 1, 2)), ((2, 3, 4), (2, 1, 2, 1, 3))]
)
def test_it_is_torchs(shape, size, align):
    same("affine_grid", torch.from_numpy(draw(*shape)), size, align)


def test_torchs_ways():
    theta = torch.eye(2, 3)[None]
    with pytest.warns(UserWarning, match="align_corners=False"):
        gt.functional.affine_grid(theta, (1, 1, 2, 2))
    for wrong in (
        (theta, (1, 1, 2)),
        (theta, (1, 1, 0, 2)),
        (theta[0], (1, 1, 2, 2)),
        (theta, (2, 1, 2, 2)),
        (theta.int(), (1, 1, 2, 2)),
    ):
        with pytest.raises(Exception) as theirs:
            F.affine_grid(*wrong, align_corners=False)
        with pytest.raises(theirs.type):
            gt.functional.affine_grid(*wrong, align_corners=False)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: affine_grid(draw(2, 3, 3), size=4), ShapeError, "theta.shape = (N, 2, 3) or (N, 3, 4)"),
        (lambda: affine_grid(draw(2, 2, 3), size=(4, 4, 4)), ShapeError, "size = (height, width)"),
        (lambda: affine_grid(draw(2, 2, 3), size=4, align_corners=1), KindError, "True or False"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as raised:
        call()
    assert text in str(raised.value)
