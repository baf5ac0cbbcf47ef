"""Attention: its definition against torch's, its kernels under every mask and option."""

import numpy as np
import pytest
from halves import check_op

import gpulayers as gl
from gpulayers.ops.attention import attention
from gpulayers.testing.check_layer import check_layer

torch = pytest.importorskip("torch")
F = torch.nn.functional


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def shapes(heads: int = 2, groups: int = 1, rows: int = 5, keys: int = 7, width: int = 3, values: int = 2, n: int = 1):
    return draw(n, heads, rows, width), draw(n, groups, keys, width), draw(n, groups, keys, values)


SMALL = shapes(n=2)
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "causal from the end": {"causal": True, "corner": "bottom_right"},
    "window": {"window": (1, 1)},
    "capped": {"softcap": 1.5, "scale": 0.7},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_by_definition(name):
    """Its gradients against finite differences; lse's are among them."""
    check_op(attention, *SMALL, numeric=True, backends=("definition",), dys=["dense"], **OPTIONS[name])


def test_by_definition_with_all_inputs():
    more = draw(2, 1, 7), draw(2), np.array([3, 4])
    check_op(attention, *SMALL, *more, p=0.3, causal=True, numeric=True, backends=("definition",), dys=["dense"])


def torchs(q, k, v, mask=None, **options):
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    y = F.scaled_dot_product_attention(
        *tensors, None if mask is None else torch.tensor(mask), enable_gqa=True, **options
    )
    dy = torch.tensor(draw(*y.shape))
    return [y.detach().numpy(), *(g.numpy() for g in torch.autograd.grad(y, tensors, dy))]


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_it_is_torchs(mask):
    """A query without a key gives zeros, no gradient, and no NaN."""
    given = {"bool": draw(2, 1, 5, 7) > 0, "float": draw(5, 7)}.get(mask)
    if mask == "bool":
        given[1, 0, 2] = False
    with np.errstate(all="raise"):
        (y, lse), call = attention.record(*SMALL, given, causal=mask == "causal", needs=("q", "k", "v"))
        grads = call.backward(draw(*y.shape), None)
    for mine, theirs in zip([y, *grads], torchs(*SMALL, given, is_causal=mask == "causal")):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)
    assert (lse == -np.inf).any() == (mask == "bool")


@pytest.mark.parametrize("length", [1, 17, 128])
def test_lengths(length):
    """Blocks that a diagonal cuts, whole ones, and less than one."""
    dtypes = ["float32", "bfloat16"] if length < 128 else ["float16"]
    q, k, v = shapes(2, 1, length, length, 16, 16)
    served = check_op(attention, q, k, v, causal=True, dys=["dense"], dtypes=dtypes)
    assert {"numpy", "triton"} <= set(served)


@pytest.mark.parametrize("name", OPTIONS)
def test_kernels(name):
    check_op(attention, *shapes(2, 1, 17, 37, 24, 8), dys=["dense"], dtypes=["float32"], **OPTIONS[name])


def test_layer():
    check_layer(gl.MultiHeadAttention(6, 3, causal=True), (2, 5, 6))
    check_layer(gl.MultiHeadAttention(8, 4, 2, dropout=0.3, bias=False), (2, 3, 8))
