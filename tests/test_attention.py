"""Attention: its definition against torch's, its kernels under every mask and option."""

import check_attention
import numpy as np
import pytest
from gpulayers.kernels.numpy import attention as attention_on_cpu
from gpulayers.kernels.triton import _tile
from halves import check_op

import gpulayers as gl
from gpulayers import dispatch
from gpulayers.ops.attention import attention
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.interpreter import interpreting

SEED = np.array([3, 4])
ONE_DY = {"dys": ["dense"]}


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def shapes(heads: int = 2, groups: int = 1, rows: int = 5, keys: int = 7, width: int = 3, values: int = 2, n: int = 1):
    return draw(n, heads, rows, width), draw(n, groups, keys, width), draw(n, groups, keys, values)


SMALL = shapes(n=2)
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "causal from the end": {"causal": True, "corner": "bottom_right"},
    "window": {"window": (5, 3)},
    "capped": {"softcap": 1.5, "scale": -0.7},
}
CU = np.array([0, 3, 3, 37, 69]), np.array([0, 40, 46, 46, 75], "int32")


@pytest.mark.parametrize("name", OPTIONS)
def test_by_definition(name):
    """Its gradients against finite differences; lse's are among them."""
    check_op(attention, *SMALL, numeric=True, backends=("definition",), **ONE_DY, **OPTIONS[name])


def test_by_definition_with_all_inputs():
    more = draw(2, 1, 7), draw(2), SEED
    check_op(attention, *SMALL, *more, p=0.3, causal=True, numeric=True, backends=("definition",), **ONE_DY)


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_are_torchs(seed):
    """A sample; ``python tests/check_attention.py`` makes more."""
    for call, dy in check_attention.calls(10, seed):
        check_attention.check(call, dy)


@pytest.mark.parametrize("length", [1, 17, 128])
def test_lengths(length):
    """Blocks that a diagonal cuts, whole ones, and less than one."""
    dtypes = ["float32", "bfloat16"] if length < 128 else ["float16"]
    q, k, v = shapes(2, 1, length, length, 16, 16)
    served = check_op(attention, q, k, v, causal=True, **ONE_DY, dtypes=dtypes)
    assert {"numpy", "triton"} <= set(served)


@pytest.mark.parametrize("name", OPTIONS)
def test_kernels(name):
    """Heads whose width is no power of two, values of another; in one 16-bit type each."""
    half = ["bfloat16", "float16"][len(name) % 2]
    check_op(attention, *shapes(2, 1, 70, 90, 24, 8), **ONE_DY, dtypes=[half], **OPTIONS[name])


def test_kernels_in_float32():
    """Without tensor cores, a part of a head is multiplied at a time."""
    more = draw(2, 9, 20), draw(2), SEED
    check_op(attention, *shapes(2, 1, 9, 20, 20, 17), *more, p=0.4, **ONE_DY, dtypes=["float32"], window=(9, 30))


def test_wide_heads():
    """On sm_90 descriptors load what the gradient of q takes, and not what those of k and v do, at heads as wide as that."""
    with interpreting(_tile.Device(90, 4, 232448)) as session:
        check_op(
            attention, *shapes(2, 1, 21, 24, 136, 256), **ONE_DY, dtypes=["bfloat16"], causal=True, needs=["q", "k"]
        )
    boxed = {run.kernel: run.constexprs.get("BOXED") for run in session.launches}
    assert not boxed["_attention_keys_kernel"] and boxed["_attention_queries_kernel"]


def test_all_at_once():
    more = draw(2, 17, 37), draw(2), SEED
    given = shapes(2, 1, 17, 37, 16, 8)
    check_op(attention, *given, *more, p=0.3, causal=True, softcap=2.0, **ONE_DY, dtypes=["float16"])


@pytest.mark.parametrize("causal", [False, True])
def test_packed_kernels(causal):
    """Sequences of no queries, of no keys, of one; queries and keys that belong to none."""
    options = {"causal": True, "corner": "bottom_right"} if causal else {"window": (6, 2)}
    given = shapes(2, 1, 75, 80, 16, 16)
    check_op(
        attention, *given, None, None, None, *CU, **ONE_DY, dtypes=["float16" if causal else "bfloat16"], **options
    )


@pytest.mark.parametrize("backend", ["definition", "numpy", "triton"])
def test_packed_sequences_are_separate_ones(backend):
    q, k, v = (x.astype(np.float32) for x in shapes(2, 2, 70, 75, 16, 16))
    device = _tile.Device(90, 4, 232448)
    with gl.only(backend), dispatch.policy(simulate=("triton",)), interpreting(device):
        y, lse = attention(q, k, v, None, None, None, *CU, causal=True)
        for q0, q1, k0, k1 in zip(CU[0][:-1], CU[0][1:], CU[1][:-1], CU[1][1:]):
            if q0 < q1:
                one, its = attention(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], causal=True)
                np.testing.assert_allclose(y[:, :, q0:q1], one, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(lse[:, :, q0:q1], its, rtol=1e-5, atol=1e-6)
    assert not y[:, :, CU[0][-1] :].any()


@pytest.mark.parametrize("shape", [(2, 2, 17, 37), (2, 17, 37), (1, 37), (2, 1, 17, 1), (1, 1, 1, 1)])
def test_gradient_of_a_bias(shape):
    """It is summed where the bias was repeated, by several programs where that is much."""
    half = ["bfloat16", "float16"][len(shape) % 2]
    check_op(attention, *shapes(2, 1, 17, 37, 16, 8, n=2), draw(*shape), **ONE_DY, dtypes=[half], needs=["q", "bias"])
    if len(shape) == 3:  # several blocks of rows
        check_op(attention, *shapes(1, 1, 150, 20, 16, 16), draw(150, 20), **ONE_DY, dtypes=[half], needs=["bias"])


@pytest.mark.parametrize("backend", ["definition", "numpy", "triton"])
@pytest.mark.parametrize("mask", [bool, float])
def test_a_query_without_keys(backend, mask):
    """Gives zeros and lse = −∞, and passes no gradient: by a mask of whichever kind."""
    inputs = [x.astype(np.float32) for x in shapes(2, 2, 9, 11, 16, 16)]
    there = draw(2, 9, 11) > -0.5
    there[:, 4] = False
    bias = there if mask is bool else np.where(there, draw(2, 9, 11), -np.inf).astype(np.float32)
    with gl.only(backend), dispatch.policy(simulate=("triton",)), interpreting(_tile.Device(90, 4, 232448)):
        (y, lse), call = attention.record(*inputs, bias, needs=("q", "k", "v"))
        dq, dk, dv, *_ = call.backward(np.ones_like(y), np.ones_like(lse))
    assert not y[:, :, 4].any() and np.isneginf(lse[:, :, 4]).all() and not dq[:, :, 4].any()
    assert all(np.isfinite(x).all() for x in (y, dq, dk, dv))


@pytest.mark.parametrize("backend", ["numpy", "triton"])
def test_gradient_of_lse_alone(backend):
    """As on a large GPU, by whose multiprocessors a bias' gradient is shared out."""
    inputs = [x.astype(np.float32) for x in (*shapes(2, 1, 9, 11, 16, 8), draw(9, 11))]
    dlse = draw(1, 2, 9).astype(np.float32)
    found = []
    for one in ("definition", backend):
        with gl.only(one), dispatch.policy(simulate=("triton",)), interpreting(_tile.Device(90, 132, 232448)):
            found.append(attention.record(*inputs)[1].backward(None, dlse)[:4])
    for true, mine in zip(*found):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-5)


def test_memory_orders():
    """Heads last, in gaps, and turned: only what is not contiguous along a head's width is copied."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in shapes(17, 19, 2, 2, 16, 16))
    check_op(
        attention, q, k[:, :, :17], v[:, :, :17], causal=True, dtypes=["float16"], dys=["dense", "gapped", "expanded"]
    )
    joint = draw(1, 17, 3, 2, 16)
    q, k, v = (joint[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    with interpreting(_tile.Device(90, 4, 232448)) as session:
        check_op(attention, q, k, v, dtypes=["bfloat16"], **ONE_DY)
    assert not [run for run in session.launches if run.kernel == "_copy_kernel"]
    check_op(attention, q, k, v.swapaxes(2, 3).copy().swapaxes(2, 3), dtypes=["float16"], **ONE_DY)


@pytest.mark.parametrize("causal", [False, True])
def test_by_torch(causal):
    """Of plain calls on its tensors, in both memory orders; the gradient of lse, which its kernel lacks, by operations."""
    given = shapes(2, 2, 37, 45, 16, 16)
    served = check_op(attention, *given, causal=causal, dtypes=["float32"], **ONE_DY, backends=("aten", "numpy"))
    assert "aten" in served
    given = [x.transpose(0, 2, 1, 3) for x in shapes(37, 45, 2, 2, 16, 16)]
    check_op(attention, *given, causal=causal, dtypes=["float32"], **ONE_DY, backends=("aten",))


def on_device(arch: int, *inputs: np.ndarray, **options) -> tuple[list, set[bool]]:
    """(y and the gradients, whether descriptors loaded the arrays) of a call, as on a GPU of this architecture."""
    with (
        gl.only("triton"),
        dispatch.policy(simulate=("triton",)),
        interpreting(_tile.Device(arch, 4, 232448)) as session,
    ):
        (y, lse), call = attention.record(*inputs, needs=("q", "k", "v"), **options)
        grads = call.backward(inputs[0][..., : y.shape[3]], np.ones_like(lse))[:3]
    return [y, *grads], {run.constexprs["BOXED"] for run in session.launches if "BOXED" in run.constexprs}


def test_boxes():
    """What descriptors load in 16 bits, of several images and groups, is what addresses do."""
    inputs = [x.astype(np.float16) for x in shapes(4, 2, 65, 70, 16, 8, n=2)]
    found, boxed = on_device(90, *inputs, causal=True)
    other, addressed = on_device(80, *inputs, causal=True)
    assert (boxed, addressed) == ({True}, {False})
    for mine, true in zip(found, other):
        np.testing.assert_allclose(mine.astype(float), true.astype(float), rtol=2e-2, atol=2e-2)


def test_what_boxes_hold():
    """Rows at multiples of 16 bytes, in any order; more queries than a warp group would waste; nothing but a mask of places."""
    q, k, v = (x.astype(np.float16) for x in shapes(1, 1, 17, 17, 16, 16))
    last = [x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3) for x in (q, k, v)]
    apart = np.zeros((1, 1, 17, 20), np.float16)
    shifted = np.zeros((1, 1, 17, 24), np.float16)
    for inputs, options, boxed in (
        (last, {"window": (3, 2)}, True),
        ([q, shifted[..., :16], v], {}, True),
        ([q, shifted[..., 4:20], v], {}, False),
        ([q, k, apart[..., :16]], {}, False),
        ([x[..., :12].copy() for x in (q, k, v)], {}, False),
        ([q[:, :, :16].copy(), k, v], {}, False),
        ([q, k, v], {"softcap": 1.0}, False),
        ([q, k, v, np.zeros((17, 17), np.float16)], {}, False),
    ):
        assert on_device(90, *inputs, **options)[1] == {boxed}


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("factor", [1, 30])
@pytest.mark.parametrize("scores", [8 * 33 * 40, 1 << 18])
def test_several_heads_at_once(groups, factor, scores, monkeypatch):
    """On a CPU, of an image or of several; scores that exp bears as they are, and larger ones, whose maxima go off first."""
    monkeypatch.setattr(attention_on_cpu, "SCORES", scores)
    q, k, v = (x.astype(np.float32) for x in shapes(6, groups, 33, 40, 16, 8, n=5))
    found = []
    for backend in ("definition", "numpy"):
        with gl.only(backend):
            found.append(attention(q * factor, k, v, causal=groups == 2))
    for true, mine in zip(*found):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-5)


def test_predicted_times():
    """Of the tiles that are shipped; no kernel is quicker than its products, nor one alone than these and its exponentials."""
    from gpulayers.bench.judging import predicted_attention as by

    for shape in map(by.Shape._make, by.SHAPES):
        forward, backward = by.predicted(shape)
        products = shape.flops / by.PRODUCTS
        assert forward.seconds > products and backward.seconds > 3.5 * products
        if shape.width == 128:
            each = by.CLOCK * by.EXPONENTIALS * by.H200.sms
            assert forward.seconds > products + shape.flops / (4 * shape.width) / each
    full, causal = (by.predicted(by.Shape(1, 32, 16384, 128, c))[0].seconds for c in (False, True))
    assert 0.45 < causal / full < 0.6
    assert len(by.table(by.HEAD, by.lines()).splitlines()) == 2 + len(by.SHAPES)


def test_empty():
    for given in (shapes(n=0), shapes(rows=0), shapes(keys=0), shapes(0, 0)):
        check_op(attention, *given, **ONE_DY, dtypes=["float32"], backends=("definition", "numpy", "triton"))


WRONG = {
    "rank": ([SMALL[0][0], *SMALL[1:]], {}, RuntimeError, "q: the rule is q.shape = [N, Hq, Lq, D]"),
    "heads": (shapes(3, 2), {}, RuntimeError, "Hq is a multiple of Hk; got Hq = 3, Hk = 2"),
    "width": ([SMALL[0][..., :2], *SMALL[1:]], {}, RuntimeError, "k: the rule is k.shape = [N, Hk, Lk, D] = [2, 1, 7, 2]"),
    "bias": ([*SMALL, draw(2, 5, 6)], {}, RuntimeError, "bias: the rule is it broadcasts to [N, Hq, Lq, Lk]"),
    "kind of bias": ([*SMALL, np.ones((5, 7), int)], {}, NotImplementedError, "bias: the rule is dtype = q.dtype, or bool"),
    "corner": (SMALL, {"corner": "left"}, ValueError, "corner: the rule is one of top_left, bottom_right; got 'left'"),
    "window": (SMALL, {"window": (-2, 0)}, ValueError, "window: the rule is left, right ≥ 0, or -1 for no limit"),
    "one of two": ([*SMALL, None, None, None, CU[0]], {}, ValueError, "cu_q and cu_k are given, or neither"),
    "batch": ([*SMALL, None, None, None, *CU], {}, RuntimeError, "packed sequences are one batch item: N = 1"),
    "order": ([*shapes(), None, None, None, np.array([0, 4, 3]), np.array([0, 4, 7])], {}, ValueError, "0 ≤ cu_q[0] ≤"),
    "softcap": (SMALL, {"softcap": -1.0}, ValueError, "softcap ≥ 0, 0 for none; got -1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    inputs, options, error, text = WRONG[case]
    with pytest.raises(error) as raised:
        attention(*inputs, **options)
    assert text in str(raised.value)


def test_layer():
    """Grouped queries and dropout; then that a token does not see those after it."""
    check_layer(gl.MultiHeadAttention(8, 4, 2, dropout=0.3, bias=False), (2, 3, 8))
    layer, x = gl.MultiHeadAttention(6, 3, causal=True), draw(1, 5, 6).astype(np.float32)
    y = layer(x)
    x[:, 3:] += 1
    np.testing.assert_array_equal(layer(x)[:, :3], y[:, :3])
    assert np.abs(layer(x)[:, 3:] - y[:, 3:]).min() > 0
