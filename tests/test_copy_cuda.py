"""The CUDA C++ kernel that launchers copy by, where an array does not lie in memory as they take it."""

import ml_dtypes
import numpy as np
import pytest
from gpulayers.kernels.cuda import _copy

from gpulayers.testing.emulator import emulating

LAYOUTS = {
    "transposed": lambda x: x.T,
    "sliced": lambda x: x[..., 1:-1],
    "every second, backwards": lambda x: x[::-2, ..., ::2],
    "expanded": lambda x: np.broadcast_to(x[:1], (7, *x.shape[1:])),
    "a row": lambda x: x.reshape(-1)[::3],
    "0-dim": lambda x: x.reshape(-1)[3, ...],
}


def empty(shape, dtype, order=None):
    return np.full(shape, 101, dtype) if order is None else np.full(shape, 101, dtype).T.copy().T


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(9, 20), (3, 4, 5, 6)], ids=str)
def test_copies(shape, layout):
    x = LAYOUTS[layout](np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    with emulating() as session:
        y = _copy.dense(x, None, empty)
        gaps = np.full((*x.shape, 2), -1, np.float32)[..., 0]
        _copy.copy(x, gaps)
    assert y.flags.c_contiguous and np.array_equal(x, y) and np.array_equal(x, gaps) and session.launches


@pytest.mark.parametrize(
    "dtype", ["float16", ml_dtypes.bfloat16, "float64", "int64", "int32", "uint8", "bool", "int16"]
)
def test_dtypes(dtype):
    x = np.arange(24).reshape(4, 6).astype(dtype).T
    with emulating():
        y = _copy.dense(x, None, empty)
    assert y.dtype == x.dtype and y.flags.c_contiguous and np.array_equal(x, y)


def test_more_axes_than_the_kernel_has():
    x = np.arange(3**8, dtype=np.float32).reshape((3,) * 8)[::2, :2, ::2, :2, ::2, :2, ::2, :2]
    with emulating():
        assert np.array_equal(_copy.dense(x, None, empty), x)
