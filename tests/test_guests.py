"""NumPy kernels on torch's tensors: torch multiplies, on the same memory, and leaves NumPy's arrays to NumPy."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gpulayers as gl  # noqa: E402
import gpulayers.torch as gt  # noqa: E402
from gpulayers import transfer  # noqa: E402
from gpulayers.arrays import guests  # noqa: E402
from gpulayers.ops.linear import linear  # noqa: E402


@pytest.fixture
def products(monkeypatch):
    """Torch's products, as they are asked for."""
    found, torchs = [], torch.matmul

    def matmul(a, b, out=None):
        found.append((tuple(a.shape), tuple(b.shape)))
        return torchs(a, b, out=out)

    monkeypatch.setattr(torch, "matmul", matmul)
    return found


def test_products_of_tensors_are_torchs(products):
    layer, x = gt.Linear(64, 48), torch.randn(33, 64, requires_grad=True)
    with gl.only("numpy"):
        layer(x).sum().backward()
    assert products == [((33, 64), (64, 48)), ((33, 48), (48, 64)), ((48, 33), (33, 64))]
    products.clear()
    a, w = np.ones((33, 64), np.float32), np.ones((48, 64), np.float32)
    _, call = linear.record(a, w)
    call.backward(np.ones((33, 48), np.float32))
    assert products == []


def test_small_products_are_not_worth_the_way(products):
    with gl.only("numpy"):
        gt.Linear(8, 8)(torch.randn(4, 8))
    assert products == []


def test_guests_leave_nothing_behind():
    before = guests.matmul, guests.cores
    with pytest.raises(ZeroDivisionError), transfer._Guest(), transfer._Guest():
        assert guests.matmul is not before[0] and guests.cores == 1
        raise ZeroDivisionError
    assert (guests.matmul, guests.cores) == before


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("turn", [lambda a: a, lambda a: np.asfortranarray(a), lambda a: a[..., ::-1]])
def test_products_are_numpys(turn, out):
    """Of any strides, read-only, in batches, into a view, and where torch would round them to 16 bits."""
    random = np.random.default_rng(0)
    for shape in ((70, 40), (3, 70, 40)):
        a = turn(random.standard_normal(shape).astype("f4"))
        b = random.standard_normal((*shape[:-2], 40, 60)).astype("f4")
        a.flags.writeable = False
        into = np.empty((*shape[:-1], 120), np.float32)[..., ::2] if out else None
        with torch.autocast("cpu", torch.bfloat16):
            found = transfer._torchs_matmul(a, b, out=into)
        assert found.dtype == np.float32 and (into is None or found is into)
        np.testing.assert_allclose(found, a.astype(float) @ b.astype(float), atol=1e-4)
