"""The kernel that launchers copy by, where an array does not lie in memory as they take it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpulayers.kernels.triton import _tile  # noqa: E402

from gpulayers.ops.activation import prelu  # noqa: E402
from gpulayers.testing import _multiprocessors  # noqa: E402
from gpulayers.testing.arena import arena  # noqa: E402
from gpulayers.testing.interpreter import interpreting  # noqa: E402

LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1),
    "sliced": lambda x: x[..., 1:-1],
    "every second": lambda x: x[::2, ..., ::2],
    "expanded": lambda x: x[:1].expand(40, *x.shape[1:]),
    "from one number": lambda x: x.flatten()[3].expand(5, 7),
    "rolled axes": lambda x: x.permute(*range(1, x.ndim), 0),
    "a row": lambda x: x.flatten()[::3],
    "0-dim": lambda x: x.flatten()[3],
}


def array(shape, dtype):
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(33, 70), (3, 4, 5, 6), (2, 3, 2, 3, 4)], ids=str)
def test_copies(shape, layout):
    """Every element, once (the interpreter counts), from any strides to any strides."""
    x = LAYOUTS[layout](array(shape, torch.float32))
    with interpreting() as session:
        for axes in (None, tuple(range(x.ndim))[::-1]):
            into = torch.full([x.shape[a] for a in axes or range(x.ndim)], -1.0)
            y = into if axes is None else into.permute(axes)
            _tile.copy(x, y)
            assert torch.equal(x, y)
        gaps = torch.full((*x.shape, 2), -1.0)[..., 0]
        _tile.copy(x, gaps)
        assert torch.equal(x, gaps)
    assert {run.kernel for run in session.launches} == {"_copy_kernel"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_dtypes(dtype):
    x = array((9, 20), dtype).t()
    with interpreting():
        y = _tile.dense(x, lambda shape, dtype, order: torch.empty(shape, dtype=dtype))
    assert y.is_contiguous() and torch.equal(x, y)


def test_nothing_to_copy():
    x = torch.empty(4, 0)
    with interpreting() as session:
        assert _tile.dense(x, None) is x
        _tile.copy(x.t(), torch.empty(0, 4))
    assert not session.launches


def test_long_rows_are_read_along_their_neighbours():
    """A transposition goes by square tiles; what lies in rows by long ones."""
    with interpreting() as session:
        _tile.copy(array((70, 80), torch.float32).t(), torch.empty(80, 70))
        _tile.copy(array((4, 3000), torch.float32)[:, 8:], torch.empty(4, 2992))
    tiles = [(run.constexprs["BF"], run.constexprs["BL"]) for run in session.launches]
    assert tiles == [(32, 32), (1, 1024)]


def test_a_launcher_that_fills_a_large_gpu_copies_as_ever():
    x, weight, dy = (np.random.default_rng(0).standard_normal(s).astype("f4") for s in ((6, 5), (5,), (5, 6)))
    with interpreting(_tile.Device(90, 132, 232448)), arena("triton"):
        _, call = prelu.record(x, weight)
        dx, dweight, *_ = call.backward(dy.T)
    np.testing.assert_allclose(dx, np.where(x > 0, dy.T, dy.T * weight), rtol=1e-6)
    np.testing.assert_allclose(dweight, np.where(x > 0, 0, dy.T * x).sum(0), rtol=1e-5)
    assert ("_copy_kernel", 132) in _multiprocessors.launched
