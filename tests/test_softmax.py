import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpulayers.kernels.triton import _configs
from gpulayers.kernels.triton import softmax as _launchers  # noqa: F401  (declares the choices)
from halves import check_op

import gpulayers as gl
from gpulayers.ops.softmax import log_softmax, softmax, softmin
from gpulayers.testing.arena import arena
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.interpreter import interpreting

OPS = pytest.mark.parametrize("op", [softmax, softmin, log_softmax], ids=lambda op: op.name)


def draw(*shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(list(shape)).standard_normal(shape) * 3)


@OPS
@pytest.mark.parametrize("shape, axis", [((3, 5), -1), ((2, 3, 4), 0), ((), -1), ((4,), 0), ((0, 3), 1), ((3, 0), 1)])
def test_definition(op, shape, axis):
    check_op(op, draw(*shape), axis=axis, numeric=True)


@OPS
def test_rows_in_registers(op):
    """Several short rows a program, and one long row a program; strided input."""
    assert "triton" in check_op(op, draw(7, 130))
    check_op(op, draw(2, 2500))
    check_op(op, draw(6, 80)[::2, :60])


@OPS
def test_walked_rows_and_columns(op, monkeypatch):
    """Rows longer than the registers hold, and axes that are not the last."""
    check_op(op, draw(3, 37, 5), axis=1)
    check_op(op, draw(40, 70), axis=0)
    check_op(op, draw(2, 40000), dys=["dense"], dtypes=["float32", "float16", "bfloat16"])


@OPS
@pytest.mark.parametrize(
    "backend, fused", [("definition", False), ("numpy", False), ("triton", False), ("triton", True)]
)
def test_a_row_of_one_is_exact(op, backend, fused):
    """fused: as products go unrounded into sums on a GPU."""
    x, dy = (draw(5, 1) + 4096.3).astype(np.float32), draw(5, 1).astype(np.float32)
    with interpreting(fused=fused) if fused else contextlib.nullcontext(), arena(backend) as room:
        y, call = op.record(room.put(x))
        (dx,) = call.backward(room.put(dy))
        assert (y == (op is not log_softmax)).all() and not dx.any()


@pytest.fixture
def short_blocks():
    """Every row counts as long, and is walked 32 elements at a time."""
    with contextlib.ExitStack() as stack:
        for direction in ("softmax_forward", "softmax_backward"):
            stack.enter_context(_configs.forced(direction, None))
            for way, elements in (("walked", 32), ("across", 256)):
                stack.enter_context(_configs.forced(f"{direction}.{way}", _configs.Row(None, elements, 4)))
        yield


@OPS
def test_blocks_of_infinity(op, short_blocks):
    """A running maximum that starts with blocks of −∞ (∞ for softmin), ends with them, or meets nothing else."""
    x = draw(4, 100)
    x[0, :70], x[1, 40:], x[2, :64], x[3] = -np.inf, -np.inf, -np.inf, -np.inf
    x = -x if op is softmin else x
    with np.errstate(all="ignore"), interpreting() as session:
        check_op(op, x, axis=1, dys=["dense"], backends=("triton",), dtypes=["float32", "float16", "bfloat16"])
        check_op(op, x.T.copy(), axis=0, dys=["dense"], backends=("triton",), dtypes=["float32"])
    assert {run.kernel for run in session.launches} == {
        "_softmax_forward_looped_kernel",
        "_softmax_backward_looped_kernel",
    }


@pytest.mark.parametrize("op, theirs", [(softmax, F.softmax), (softmin, F.softmin), (log_softmax, F.log_softmax)])
def test_definition_is_torch(op, theirs):
    """Values and gradients in float64, with NaN, ±Inf and rows of −Inf or Inf alone."""
    x, inf = draw(6, 7), np.inf
    x[1, 2], x[2, 3], x[3, 4], x[4], x[5] = np.nan, inf, -inf, -inf, inf
    t, dy = torch.tensor(x, requires_grad=True), draw(7, 6).T
    y = theirs(t, dim=1)
    y.backward(torch.tensor(dy))
    with np.errstate(all="ignore"):
        mine, call = op.record(x, axis=1)
        (dx,) = call.backward(dy)
        check_op(op, x, axis=1, dys=["dense"])
    np.testing.assert_allclose(mine, y.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(dx, t.grad.numpy(), rtol=1e-12, atol=1e-14)


def test_layers():
    """As torch.nn's, over the given axis, and over the channels of images."""
    x = draw(2, 3, 4, 5)
    pairs = [(gl.Softmin(1), torch.nn.Softmin(1)), (gl.Softmax2d(), torch.nn.Softmax2d())]
    with gl.no_grad():
        for layer, theirs in pairs:
            for v in (x, x[0]):
                np.testing.assert_allclose(layer(v), theirs(torch.tensor(v)).numpy(), rtol=1e-12)
    check_layer(gl.Softmin(), (None, 4))
    check_layer(gl.Softmax2d(), (None, 3, 2, 2))
    with pytest.raises(ValueError, match=r"Softmax2d: x: the rule is a 3-dim or 4-dim array; got \[2, 3\]"):
        gl.Softmax2d()(x[0, 0, :2, :3])
