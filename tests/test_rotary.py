import math

import numpy as np
import pytest
import torch
from halves import check_op

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import dispatch
from gpulayers.definition import ArgumentError, KindError, LabelError, ShapeError
from gpulayers.ops.rotary import frequencies, rotary, tables
from gpulayers.testing.interpreter import interpreting
from gpulayers.torch.rotary import _rotary


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def heads_last(*shape: int) -> np.ndarray:
    """(N, H, L, D) as a projection gives it: all heads of a token are neighbours."""
    n, h, l, d = shape
    return draw(n, l, h, d).transpose(0, 2, 1, 3)


COS, SIN = tables(frequencies(8)[0], 12)
PLACES = np.array([[3, 0, 11, 5], [1, 1, 2, 7]])
CALLS = {
    "halves": ([heads_last(2, 3, 4, 8), COS, SIN, heads_last(2, 1, 4, 8)], {}),
    "interleaved": ([draw(1, 3, 5, 8), draw(7, 4), draw(7, 4), draw(1, 2, 5, 8)], {"interleaved": True}),
    "part": ([draw(2, 1, 4, 11), draw(12, 3), draw(12, 3), None, PLACES], {}),
    "part, interleaved": (
        [draw(2, 2, 4, 11)[:, ::-1], draw(12, 3), draw(12, 3), None, PLACES[:1]],
        {"interleaved": True},
    ),
    "each token's own": ([draw(2, 2, 3, 8)[..., ::2], draw(2, 3, 2), draw(2, 3, 4)[..., ::2], draw(2, 1, 3, 4)], {}),
    "for all": ([np.asfortranarray(draw(2, 2, 3, 4)), draw(1, 3, 2), draw(1, 3, 2)], {}),
    "nothing": ([draw(0, 2, 3, 4), COS[:, :2], SIN[:, :2]], {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_backend(name):
    inputs, options = CALLS[name]
    numeric = name in ("part", "part, interleaved", "for all")
    assert check_op(rotary, *inputs, numeric=numeric, dys=["dense", "strided"], **options) == [
        "definition", "numpy", "triton",
    ]  # fmt: skip


def test_gradients_of_one_of_the_two():
    """What nobody asks for is not written; a result that nobody used gives zeros."""
    q, k = (torch.from_numpy(draw(1, h, 3, 8)).float() for h in (2, 1))
    tables = [torch.from_numpy(t) for t in (COS, SIN)]
    with interpreting(), dispatch.policy(simulate=("triton",)), gl.only("triton"):
        for needs in (("q",), ("k",), ("q", "k")):
            (y, z), call = rotary.record(q, *tables, k, needs=needs)
            grads = call.backward(None, torch.ones_like(z))
            assert [g is not None for g in grads] == [n in needs for n in rotary.inputs]
            assert grads[0] is None or not grads[0].any()
            assert grads[3] is None or torch.allclose(rotary(grads[3], *tables), torch.ones_like(z), atol=1e-6)
        y = rotary(q, *tables, None, torch.tensor([[0, 12, -1]]))
    assert torch.isnan(y[..., 1:, :]).all() and not torch.isnan(y[..., 0, :]).any()


WRONG = [
    ((draw(2, 3, 4), COS, SIN), {}, ShapeError, "q.shape = (N, H, L, D)"),
    ((draw(1, 1, 4, 8), COS[:3], SIN[:3]), {}, ShapeError, "cos: the rule is cos.shape = (positions ≥ L, pairs)"),
    ((draw(1, 1, 4, 6), COS, SIN), {}, ShapeError, "with 2 pairs ≤ D = 6"),
    ((draw(1, 1, 4, 8), COS, SIN[:, :3]), {}, ShapeError, "sin.shape, dtype = cos.shape, dtype"),
    ((draw(1, 1, 4, 8), COS.astype("float16"), SIN), {}, ShapeError, "cos.dtype = q.dtype or float32"),
    ((draw(1, 1, 4, 8), COS, SIN, draw(1, 1, 3, 8)), {}, ShapeError, "k.shape = (N, Hk, L, D) = [1, 'Hk', 4, 8]"),
    ((draw(1, 1, 4, 8), COS, SIN, None, np.ones((1, 4))), {}, ShapeError, "positions: the rule is an integer dtype"),
    ((draw(1, 1, 4, 8), COS, SIN, None, PLACES), {}, ShapeError, "positions.shape = (N or 1, L) = [1, 4]"),
    ((draw(2, 1, 4, 8), COS, SIN, None, PLACES + 1), {}, LabelError, "0 ≤ position < cos.shape[0] = 12; got 12"),
    ((draw(1, 1, 4, 8), COS, SIN), {"interleaved": 1}, KindError, "True or False; got 1"),
]


@pytest.mark.parametrize("inputs, options, error, text", WRONG)
def test_errors(inputs, options, error, text):
    with pytest.raises(error) as raised:
        rotary(*inputs, **options)
    assert text in str(raised.value) and str(raised.value).startswith("rotary: ")


# --- how fast each pair turns ----------------------------------------------------------------------------------------


def plain(dim: int, theta: float = 10000.0) -> np.ndarray:
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def test_rules_that_stretch():
    """Each by what its paper says of the fastest and the slowest pairs, and by numbers worked out by hand."""
    np.testing.assert_allclose(frequencies(8)[0], plain(8))
    np.testing.assert_allclose(frequencies(8, 500.0, {"rope_type": "linear", "factor": 4.0})[0], plain(8, 500.0) / 4)
    dynamic = {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 100}
    np.testing.assert_allclose(frequencies(8, 1e4, dynamic, 100)[0], plain(8))
    np.testing.assert_allclose(frequencies(8, 1e4, dynamic, 300)[0], plain(8, 1e4 * 5 ** (8 / 6)))
    llama = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    found, turns = frequencies(128, 5e5, llama | {"rope_type": "llama3"})[0], 8192 * plain(128, 5e5) / (2 * np.pi)
    np.testing.assert_allclose(found[turns >= 4], plain(128, 5e5)[turns >= 4])
    np.testing.assert_allclose(found[turns <= 1], plain(128, 5e5)[turns <= 1] / 8)
    (between,) = np.flatnonzero((turns > 1) & (turns < 4))[:1]
    share = (turns[between] - 1) / 3
    assert found[between] == pytest.approx(plain(128, 5e5)[between] * (share + (1 - share) / 8))
    yarn = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    found, attention = frequencies(128, 1e4, yarn)
    low, high = 20, 46  # ⌊64 ln(4096 / 64π) / ln 10⁴⌋, ⌈64 ln(4096 / 2π) / ln 10⁴⌉
    np.testing.assert_allclose(found[: low + 1], plain(128)[: low + 1])
    np.testing.assert_allclose(found[high:], plain(128)[high:] / 16)
    assert found[33] == pytest.approx(plain(128)[33] * (0.5 + 0.5 / 16))
    assert attention == pytest.approx(0.1 * math.log(16) + 1)
    assert frequencies(128, 1e4, yarn | {"mscale": 1.0, "mscale_all_dim": 1.0})[1] == 1
    long = {
        "short_factor": [1.0, 2.0],
        "long_factor": [4.0, 8.0],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    for length, by in ((64, [1, 2]), (65, [4, 8])):
        found, attention = frequencies(4, 1e4, long | {"rope_type": "longrope"}, length)
        np.testing.assert_allclose(found, plain(4) / by)
        assert attention == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))
    for wrong, text in (
        ({"rope_type": "other"}, "a rope_type ∈"),
        ({"rope_type": "linear"}, "factor, which linear needs"),
    ):
        with pytest.raises(ArgumentError, match=text):
            frequencies(8, 1e4, wrong)
    with pytest.raises(ArgumentError, match="an even number"):
        frequencies(7)


# --- torch -----------------------------------------------------------------------------------------------------------


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_hugging_faces(dtype):
    """In their words: every angle twice, and rotate_half."""
    q, k = (torch.from_numpy(heads_last(2, h, 5, 8)).to(dtype).requires_grad_() for h in (4, 2))
    angles = torch.from_numpy(np.random.default_rng(0).uniform(0, 9, (2, 5, 4)))
    cos, sin = (f(torch.cat([angles, angles], -1)).to(dtype) for f in (torch.cos, torch.sin))
    true = [x.double() * cos.double()[:, None] + rotate_half(x.double()) * sin.double()[:, None] for x in (q, k)]
    dys = [torch.randn_like(y) for y in true]
    wanted = torch.autograd.grad(true, (q, k), dys)
    for by, turned in ((1, (q, k)), (2, (q.transpose(1, 2), k.transpose(1, 2)))):
        found = gt.functional.apply_rotary_pos_emb(*turned, cos, sin, unsqueeze_dim=by)
        found = found if by == 1 else [y.transpose(1, 2) for y in found]
        assert found[0].stride() == q.stride()
        got = torch.autograd.grad(found, (q, k), [dy.to(dtype) for dy in dys])
        near = {"rtol": 1e-2, "atol": 4e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close([y.double() for y in found], true, **near)
        torch.testing.assert_close([g.double() for g in got], [g.double() for g in wanted], **near)


def test_the_function():
    """Compiled in one graph, differentiated twice; the twin is the definition."""
    q, tables = torch.from_numpy(draw(1, 1, 2, 8)).requires_grad_(), [torch.from_numpy(t).double() for t in (COS, SIN)]
    places = torch.tensor([[2, 11]])
    for interleaved in (False, True):
        call = lambda q, how=interleaved: gt.functional.rotary(q, None, *tables, places, how)  # noqa: E731
        theirs = _rotary.twin(q, *tables, None, places, interleaved)
        torch.testing.assert_close(call(q), theirs)
        assert torch.autograd.gradgradcheck(call, q)
    compiled = torch.compile(lambda q, k: gt.functional.rotary(q, k, *tables), backend="aot_eager", fullgraph=True)
    for mine, true in zip(compiled(q, q * 2), gt.functional.rotary(q, q * 2, *tables)):
        torch.testing.assert_close(mine, true)


def test_the_layer(tmp_path):
    x = draw(2, 3, 5, 10).astype(np.float32)
    layer = gl.RotaryEmbedding(8, 16, scaling={"rope_type": "linear", "factor": 2.0})
    y = layer(x)
    np.testing.assert_allclose((y**2).sum(-1), (x**2).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])
    np.testing.assert_allclose(layer.backward(y), x, atol=1e-6)  # its inverse
    gl.save(layer, tmp_path / "rotary")
    np.testing.assert_array_equal(gl.load(tmp_path / "rotary")(x), y)
    assert layer.output_shape((None, 3, 5, 10)) == (None, 3, 5, 10) and not layer.trainable_weights
