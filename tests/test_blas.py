"""NumPy's BLAS, whose threads are taken by what calls it from several."""

import pytest
from gpulayers.kernels.numpy import _blas


def test_alone():
    """In the calling thread, until the last of those who asked for it is done."""
    if (functions := _blas._functions()) is None:
        pytest.skip("NumPy's BLAS does not say how many threads it takes")
    before = functions[0]()
    with _blas.alone() as had, _blas.alone() as again:
        assert had and again and functions[0]() == 1
    assert functions[0]() == before
