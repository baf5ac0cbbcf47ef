"""Local response norm: its definition, its kernels in both memory orders, errors."""

import numpy as np
import pytest
from halves import check_op
from test_norm import against_torch, draw, last

from gpulayers.ops.norm import local_response_norm

torch = pytest.importorskip("torch")
F = torch.nn.functional
OPTIONS = {"alpha": 0.3, "beta": 0.6, "k": 0.7}


@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 4, 2, 3), (2, 3, 1, 2, 2), (0, 3, 2)])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_it_is_torchs(shape, size):
    """Odd and even sizes, and more than there are channels."""
    given = (draw(*shape),)
    against_torch(
        local_response_norm,
        given,
        lambda x: F.local_response_norm(x, size, **OPTIONS) + 0 * x,
        ("x",),
        size=size,
        **OPTIONS,
    )


def test_by_definition():
    check_op(local_response_norm, draw(2, 5, 3), size=4, **OPTIONS, numeric=True, backends=("definition",))


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 37, 9)])
@pytest.mark.parametrize("turn", [lambda x: x, last], ids=["row-major", "channels-last"])
def test_in_kernels(shape, turn):
    """Several tiles of channels; sizes that are even, odd and past the channels."""
    for size, options, half in ((5, {}, "float16"), (2, OPTIONS, "bfloat16"), (40, {"beta": 1.0}, "float16")):
        options = options | dict(size=size, dys=["transposed"], dtypes=["float32", half])
        ran = check_op(local_response_norm, turn(draw(*shape)), **options)
        assert {"numpy", "triton"} <= set(ran)


def test_strided_and_empty():
    check_op(local_response_norm, draw(4, 6, 5, 3)[::2, :, 1:], size=3, dtypes=["float32"])
    check_op(local_response_norm, draw(0, 6, 5), size=3, dtypes=["float32"])


X = draw(3, 4, 2)
WRONG = {
    "rank": ((X[0],), dict(size=2), ValueError, "with a spatial axis at least; got [4, 2]"),
    "size": ((X,), dict(size=0), RuntimeError, "size: the rule is size ≥ 1; got 0"),
    "kind": ((X,), dict(size=2.0), TypeError, "size: the rule is an integer; got 2.0"),
    "dtype": ((X.astype(int),), dict(size=2), NotImplementedError, "dtype ∈"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    inputs, options, error, text = WRONG[case]
    with pytest.raises(error) as raised:
        local_response_norm(*inputs, **options)
    assert text in str(raised.value)


def test_neighbours_of_infinity():
    """It makes 0 of its neighbours, and NaN of itself, as in torch."""
    x = np.ones((1, 5, 1), np.float32)
    x[0, 2] = np.inf
    with np.errstate(invalid="ignore"):
        y = local_response_norm(x, size=3)
    np.testing.assert_allclose(y, F.local_response_norm(torch.tensor(x), 3), rtol=1e-6)
