"""Attention to a cache: against ordinary attention to the tokens it holds; its kernels, whole and in pages, under every
option; what is appended is what is read."""

import numpy as np
import pytest
from gpulayers.kernels.triton import _tile
from halves import check_op

import gpulayers as gl
from gpulayers import dispatch
from gpulayers.ops.attention import attention, attention_decode, kv_append
from gpulayers.testing.interpreter import interpreting

SEVERAL = _tile.Device(90, 132, 232448)
"""A GPU that shares keys out."""


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def cache(n: int, capacity: int, groups: int, width: int, seed: int = 0) -> np.ndarray:
    """As caches are: [N, capacity, Hk, width] in memory, (N, Hk, capacity, width) as the op takes it."""
    return (
        np.random.default_rng([n, capacity, groups, width, seed])
        .standard_normal((n, capacity, groups, width))
        .swapaxes(1, 2)
    )


def paged(x: np.ndarray, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(pages, table) that hold a cache (N, Hk, capacity, width) in any order, among pages of NaN."""
    n, groups, capacity, width = x.shape
    blocks = capacity // size
    table = np.random.default_rng(seed).permutation(n * blocks + 3)[: n * blocks].reshape(n, blocks)
    pages = np.full((n * blocks + 3, size, groups, width), np.nan)
    pages[table] = x.swapaxes(1, 2).reshape(n, blocks, size, groups, width)
    return pages.swapaxes(1, 2), table


OPTIONS = {
    "causal": {},
    "all": {"causal": False},
    "window": {"window": (9, 0)},
    "open window": {"window": (5, -1), "causal": False, "scale": -0.7},
    "capped": {"softcap": 1.5},
}
LENGTHS = np.array([0, 1, 16, 33, 48])


def truth(q, k, v, lengths, sinks=None, **options):
    """Ordinary attention of each sequence's queries to its tokens, in float64."""
    found = []
    for at, end in enumerate(lengths):
        tokens = k[at : at + 1, :, :end], v[at : at + 1, :, :end]
        options = {"causal": True} | options
        found.append(attention(q[at : at + 1], *tokens, None, sinks, corner="bottom_right", **options))
    return [np.concatenate(x) for x in zip(*found)]


def calls(pages: int = 0, rows: int = 2, width: int = 16, values: int = 8):
    """(inputs with NaN behind each sequence's tokens, the cache without)."""
    q, k, v = draw(5, 4, rows, width), cache(5, 48, 2, width), cache(5, 48, 2, values, 1)
    clean = k, v
    k, v = k.copy(), v.copy()
    for at, end in enumerate(LENGTHS):
        k[at, :, end:], v[at, :, end:] = np.nan, np.nan
    if not pages:
        return [q, k, v, LENGTHS], clean
    (k, table), (v, _) = paged(k, pages), paged(v, pages)
    table = np.where(np.arange(48 // pages) * pages < LENGTHS[:, None], table, -1)
    return [q, k, v, LENGTHS.astype(np.int32), table.astype(np.int32)], clean


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("pages", [0, 16])
@pytest.mark.parametrize("backend", ["definition", "numpy"])
def test_is_attention_to_the_tokens(backend, pages, name):
    """Of sequences without tokens, with fewer than there are queries, and up to a page's border; the rest is not read."""
    given, (k, v) = calls(pages)
    sinks = draw(4) if name == "window" else None
    kind = np.float64 if backend == "definition" else np.float32
    typed = [x if x.dtype.kind == "i" else x.astype(kind) for x in given]
    typed += [None] * (5 - len(typed)) + [None if sinks is None else sinks.astype(kind)]
    with gl.only(backend):
        y, lse = attention_decode(*typed, **OPTIONS[name])
    true_y, true_lse = truth(given[0], k, v, LENGTHS, sinks, **OPTIONS[name])
    close = dict(rtol=1e-12, atol=1e-12) if kind is np.float64 else dict(rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(y, true_y, **close)
    np.testing.assert_allclose(lse, true_lse, **close)
    if sinks is None:
        assert not y[0].any() and np.isneginf(lse[0]).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_kernels(name):
    """One program for a sequence's keys, whole and in pages of another number of tokens than a block has."""
    half = ["bfloat16", "float16"][len(name) % 2]
    given, _ = calls(0 if len(name) % 3 else 16)
    served = check_op(attention_decode, *given, dtypes=[half], **OPTIONS[name])
    assert {"definition", "numpy", "triton"} <= set(served)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_keys_shared_out(half):
    """Four shares of a long sequence; of a short one some have no keys; sinks join where they are merged."""
    n, capacity = 2, 1088
    q, k, v = draw(n, 2, 1, 16), cache(n, capacity, 1, 16), cache(n, capacity, 1, 24, 1)
    (k, table), (v, _) = paged(k, 64), paged(v, 64)
    with interpreting(SEVERAL) as session:
        check_op(attention_decode, q, k, v, np.array([1000, 70]), table, draw(2), dtypes=[half])
        check_op(attention_decode, q, k, v, np.array([1088, 0]), table, dtypes=[half])
    ran = {run.kernel for run in session.launches}
    assert {"_attention_decode_kernel", "_attention_merge_kernel"} <= ran


def test_sinks_above_all_scores():
    """A sink is among what the largest exponent is taken from, in one share of keys and where shares are merged."""
    given, _ = calls(16)
    check_op(attention_decode, *given, 300.0 * np.sign(draw(4)), dtypes=["bfloat16"])
    with interpreting(SEVERAL):
        q, k, v = draw(1, 2, 1, 16), cache(1, 1088, 1, 16), cache(1, 1088, 1, 24, 1)
        check_op(attention_decode, q, k, v, np.array([1088]), None, np.array([300.0, -300.0]), dtypes=["float16"])


def test_many_queries_and_single_precision():
    """More rows than a tile has; a part of a head at a time."""
    given, _ = calls(16, rows=9, width=20, values=17)
    check_op(attention_decode, *given, draw(4), dtypes=["float32"], window=(7, 0))
    check_op(attention_decode, draw(5, 4, 40, 20), *given[1:], dtypes=["float64"])


def test_empty():
    q, k, v = draw(2, 4, 1, 8), cache(2, 0, 2, 8), cache(2, 0, 2, 8)
    for given in ((q, k, v), (q[:0], k[:0], v[:0]), (q[:, :, :0], k, v)):
        check_op(attention_decode, *given, dtypes=["float32"], backends=("definition", "numpy", "triton"))


@pytest.mark.parametrize("backend", ["definition", "triton"])
def test_a_page_that_is_not_there(backend):
    """Makes NaN on a GPU, in its own sequence alone; a length past the capacity is cut."""
    given, _ = calls(16)
    given[4][3, 1] = 99
    given[3][4] = 77
    typed = [x if x.dtype.kind == "i" else x.astype(np.float32) for x in given]
    with gl.only(backend), dispatch.policy(simulate=("triton",)), interpreting(_tile.Device(90, 4, 232448)):
        y, lse = _unchecked(*typed)
    assert np.isnan(y[3]).all() and np.isnan(lse[3]).all()
    assert np.isfinite(np.delete(y, 3, 0)).all()


def _unchecked(*given):
    """As on a GPU, where no one looks at the data."""
    check, attention_decode.check = attention_decode.check, None
    try:
        return attention_decode(*given)
    finally:
        attention_decode.check = check


@pytest.mark.parametrize("pages", [0, 16])
def test_append(pages):
    """From each sequence's first new place on, over a page's border; and at places of each token's own."""
    k_cache, v_cache = cache(3, 48, 2, 16), cache(3, 48, 2, 8, 1)
    k, v = draw(3, 2, 3, 16), draw(3, 2, 3, 8)
    table = None
    if pages:
        (k_cache, table), (v_cache, _) = paged(k_cache, pages), paged(v_cache, pages)
        k_cache, v_cache = np.nan_to_num(k_cache), np.nan_to_num(v_cache)
    for positions in (np.array([0, 15, 45], np.int32), np.array([[3, 0, -1], [47, 16, 5], [-1, -1, -1]])):
        served = check_op(
            kv_append,
            k_cache,
            v_cache,
            k,
            v,
            positions,
            table,
            dtypes=["float64", "float32", "float16", "bfloat16"],
        )
        assert {"definition", "triton"} <= set(served)


def test_append_then_attend():
    """Token by token, each sequence at its own place: as attention to all of them."""
    q, k, v = draw(2, 4, 6, 16), draw(2, 2, 6, 16), draw(2, 2, 6, 16)
    k_cache, v_cache = np.full((2, 2, 9, 16), np.nan), np.full((2, 2, 9, 16), np.nan)
    lengths = np.zeros(2, np.int64)
    found = []
    for i in range(6):
        one = slice(i, i + 1)
        kv_append(k_cache, v_cache, k[:, :, one], v[:, :, one], lengths)
        lengths += 1
        found.append(attention_decode(q[:, :, one], k_cache, v_cache, lengths)[0])
    np.testing.assert_allclose(np.concatenate(found, 2), attention(q, k, v, causal=True)[0], rtol=1e-12)


def caches():
    """Of arrays and of tensors, whole and in pages."""
    torch = pytest.importorskip("torch")
    import gpulayers.torch as gt

    options = dict(heads=2, width=8, value_width=4)
    for module, put in ((gl, lambda x: x.astype(np.float32)), (gt, lambda x: torch.tensor(x, dtype=torch.float32))):
        yield module.KVCache(2, 12, **options), put
        yield module.PagedKVCache(2, 5, page_size=3, **options), put


def test_caches():
    """Prompts one by one, then tokens together; after a reset another sequence in the same place."""
    q, k, v = draw(2, 4, 9, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 4)
    for cache, put in caches():
        lengths = [5, 1]
        for at in (1, 0):
            one = slice(at, at + 1), slice(None), slice(lengths[at])
            y = cache(put(q[one]), put(k[one]), put(v[one]), [at])
            assert cache.used[at] == lengths[at] == int(cache.lengths[at])
            true = attention(q[one], k[one], v[one], causal=True)[0]
            np.testing.assert_allclose(np.asarray(y), true, rtol=1e-4, atol=1e-5)
        for _ in range(2):
            step = [np.stack([x[at, :, lengths[at], None] for at in (0, 1)]) for x in (q, k, v)]
            y = np.asarray(cache(*map(put, step), window=(3, 0)))
            lengths = [n + 1 for n in lengths]
            for at, n in enumerate(lengths):
                its = q[at : at + 1, :, :n], k[at : at + 1, :, :n], v[at : at + 1, :, :n]
                true = attention(*its, causal=True, window=(3, 0))[0]
                np.testing.assert_allclose(y[at], true[0, :, -1:], rtol=1e-4, atol=1e-5)
        cache.reset([0])
        assert cache.used == [0, 3] and np.asarray(cache.lengths).tolist() == [0, 3]
        y = cache(put(q[:1, :, :2]), put(k[:1, :, :2]), put(v[:1, :, :2]), [0])
        true = attention(q[:1, :, :2], k[:1, :, :2], v[:1, :, :2], causal=True)[0]
        np.testing.assert_allclose(np.asarray(y), true, rtol=1e-4, atol=1e-5)


def test_full_caches():
    new = np.zeros((2, 2, 4, 8), np.float32)
    cache = gl.KVCache(2, 6, 2, 8)
    cache.append(new, new)
    with pytest.raises(ValueError, match="k: the rule is at most 6 tokens a sequence, the capacity; got 8"):
        cache.append(new, new)
    with pytest.raises(RuntimeError, match=r"k: the rule is k.shape\[0\] = 1, the number of sequences"):
        cache.append(new, new, [1])
    with pytest.raises(ValueError, match="sequences: the rule is different numbers from 0 to 1"):
        cache.reset([1, 1])
    cache = gl.PagedKVCache(2, 3, 2, 8, page_size=4)
    cache.append(new, new)
    assert cache.free == 1
    with pytest.raises(RuntimeError, match="PagedKVCache: 2 pages are needed and 1 are free"):
        cache.append(new, new)
    cache.reset([0])
    cache.append(new[:1], new[:1], [1])
    assert cache.free == 1 and cache.used == [0, 8] and cache.table[0].tolist() == [-1, -1, -1]
    for make in (lambda: gl.KVCache(0, 1, 1, 1), lambda: gl.PagedKVCache(1, 1, 1, 1, page_size=0)):
        with pytest.raises(ValueError, match="≥ 1; got 0"):
            make()


def test_has_no_gradient():
    q, k, v = draw(1, 2, 1, 4), cache(1, 8, 1, 4), cache(1, 8, 1, 4)
    with pytest.raises(
        ValueError, match=r"attention_decode: record: the rule is at least one gradient .*no input has one"
    ):
        attention_decode.record(q, k, v)


Q, K = draw(2, 4, 1, 8), cache(2, 32, 2, 8)
TABLE = np.array([[0, 1], [1, 0]])
WRONG = {
    "rank": ([Q[0], K, K], {}, RuntimeError, "q: the rule is q.shape = [N, Hq, Lq, D]"),
    "heads": ([Q[:, :3], K, K], {}, RuntimeError, "Hq is a multiple of Hk; got Hq = 3, Hk = 2"),
    "width": ([Q[..., :4], K, K], {}, RuntimeError, "k: the rule is k.shape = [N, Hk, Lk, D] = [2, 2, 32, 4]"),
    "lengths": ([Q, K, K, np.array([3])], {}, RuntimeError, "lengths: the rule is lengths.shape = [2]; got [1]"),
    "kind of lengths": ([Q, K, K, draw(2)], {}, TypeError, "lengths: the rule is dtype ∈ {int32, int64}; got float64"),
    "too long": ([Q, K, K, np.array([3, 33])], {}, ValueError, "lengths: the rule is 0 ≤ length ≤ 32, the capacity; got 33"),
    "table": ([Q, K, K, None, TABLE[0]], {}, RuntimeError, "table: the rule is table.shape = [N, blocks] = [2, blocks]"),
    "page": ([Q, K, K, None, TABLE + 1], {}, IndexError, "table: the rule is 0 ≤ page < 2, for every block that is used; got 2"),
    "dtype": ([Q, K.astype("f4"), K], {}, RuntimeError, "k: the rule is k.dtype = q.dtype; got k float32 with q float64"),
    "softcap": ([Q, K, K], {"softcap": -1.0}, ValueError, "softcap ≥ 0, 0 for none; got -1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    inputs, options, error, text = WRONG[case]
    with pytest.raises(error) as raised:
        attention_decode(*inputs, **options)
    assert text in str(raised.value)


def test_errors_of_appending():
    new = draw(2, 2, 3, 8)
    with pytest.raises(ValueError, match="positions: the rule is place < 32, the capacity; got 32"):
        kv_append(K.copy(), K.copy(), new, new, np.array([0, 30]))
    with pytest.raises(
        IndexError, match="table: the rule is 0 ≤ page < 2, for every token's block; got none for place 32"
    ):
        kv_append(K.copy(), K.copy(), new, new, np.array([0, 31]), np.array([[0, 1], [1, 5]]))
    with pytest.raises(
        RuntimeError, match=r"v: the rule is v.shape = \[N, Hk, L, width\] = \[2, 2, 3, 8\]; got \[2, 2, 3, 4\]"
    ):
        kv_append(K.copy(), K.copy(), new, new[..., :4], np.array([0, 1]))
