import numpy as np
import pytest
import triton
import triton.language as tl
from gpulayers.kernels.triton import _random

import gpulayers as gl
from gpulayers.ops._random import philox, random_bits
from gpulayers.ops.dropout import dropout
from gpulayers.testing import emulator, interpreter
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.check_op import check_op
from gpulayers.testing.interpreter import interpreting

SEED = np.array([2**40 + 12345, -7])


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def test_philox_known_answers():
    """The three vectors that come with the authors' Random123 library."""
    ones = np.uint64(2**64 - 1)
    answers = [
        ((0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for words, answer in answers:
        got = philox(*(np.array([w], np.uint64) for w in words))
        assert tuple(int(word[0]) for word in got) == answer


@triton.jit
def _randint_kernel(seed, out, N: tl.constexpr):
    i = tl.arange(0, N)
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed), i)
    tl.store(out + 4 * i, r0)
    tl.store(out + 4 * i + 1, r1)
    tl.store(out + 4 * i + 2, r2)
    tl.store(out + 4 * i + 3, r3)


def test_bits_are_tritons(monkeypatch):
    """With offset 0, element i has word i % 4 of tl.randint4x(seed, i // 4)."""
    monkeypatch.setattr(interpreter, "proven", set())  # the kernel is a toy: it stays out of the record
    out = np.zeros(64, np.int32)
    with interpreting():
        _randint_kernel[(1,)](SEED, out, N=16)
    np.testing.assert_array_equal(out.view(np.uint32), random_bits(np.array([SEED[0], 0]), 64))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_kernels(p):
    served = check_op(dropout, draw(3, 5), SEED, p=p, numeric=True)
    assert {"definition", "numpy", "triton"} <= set(served)


def test_shapes():
    for shape in [(), (1,), (0, 3), (9, 1031)]:
        check_op(dropout, draw(*shape), SEED, dys=["dense", "expanded"])


HOW = [dict(alpha=alpha, features=features) for alpha in (False, True) for features in (0, 2)][1:]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_kinds(how):
    """Of features, in each memory order; alpha, with its shift."""
    check_op(dropout, draw(3, 5, 2, 3), SEED, p=0.4, **how, numeric=True)
    check_op(dropout, draw(2, 70, 3, 3).transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2), SEED, p=0.4, **how)
    if how["features"]:
        check_op(dropout, draw(3, 5), SEED, p=0.4, **how | {"features": 1}, dys=["dense"])
        for x in (draw(140, 3, 2).transpose(2, 0, 1), draw(5, 7), draw(0, 3, 2)):
            check_op(dropout, x, SEED, p=1.0 if x.size == 35 else 0.2, dys=["expanded"], **how)


def test_features_are_drawn_as_an_array_of_them_is():
    for shape in [(3, 5), (3, 5, 7), (3, 5, 2, 2)]:
        kept = dropout(np.ones(shape, np.float32), SEED, p=0.5, features=2)
        alone = dropout(np.ones((3, 5), np.float32), SEED, p=0.5)
        np.testing.assert_array_equal(kept, np.broadcast_to(alone.reshape(3, 5, *[1] * (len(shape) - 2)), shape))


def test_memory_orders():
    """The mask belongs to the element, wherever it lies in memory."""
    check_op(dropout, draw(5, 7).T, SEED)
    check_op(dropout, draw(2, 4, 5, 3).transpose(0, 3, 1, 2), SEED)
    check_op(dropout, draw(2, 3, 4, 5).transpose(2, 0, 3, 1), SEED)
    check_op(dropout, draw(6, 9)[::2, 1:8], SEED)
    x = draw(4, 3, 5)
    np.testing.assert_array_equal(dropout(x, SEED), dropout(np.asfortranarray(x), SEED))


def test_special_values():
    with np.errstate(invalid="ignore"):
        check_op(dropout, np.array([np.nan, np.inf, -np.inf, 0.0] * 8), SEED, p=0.5, dys=["dense"])


def test_statistics():
    """As many are dropped as p says, seeds and offsets draw different masks, and the scale is 1 / (1 − p)."""
    x = np.ones(1 << 18, np.float32)
    for p in (0.1, 0.5, 0.9):
        y = dropout(x, SEED, p=p)
        assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - p))}
        assert abs((y == 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / x.size)
    masks = [dropout(x, np.array(s), p=0.5) != 0 for s in ((1, 0), (1, 1), (2, 0), (-1, 0))]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).mean() - 0.5) < 0.01
    assert np.array_equal(random_bits(SEED, 7), random_bits(SEED, 100)[:7])


def test_large_counters():
    """Elements past 2³² use the counter's upper half."""
    key, first, second = (np.array([v], np.uint64) for v in (5, 2**32 + 3, 9))
    low = np.array([3], np.uint64)
    assert philox(key, first, second)[0] != philox(key, low, second)[0]


FAR = 2**34 + 16
"""An element whose counter needs the upper half: four elements share one."""


def words_from(start: int, count: int) -> np.ndarray:
    key, offset = SEED.view(np.uint64).reshape(2, 1)
    counter = np.arange(start // 4, (start + count) // 4, dtype=np.uint64)
    return np.stack(philox(key, counter, offset), axis=1).reshape(-1).astype(np.uint32)


def test_large_counters_in_numpy():
    from gpulayers.kernels.numpy import _random

    found = np.stack(_random.words(*_random.halves(SEED), FAR, FAR + 32), axis=1).reshape(-1)
    np.testing.assert_array_equal(found, words_from(FAR, 32))


@triton.jit
def _words_kernel(seed, out, start, n1, n2, step0, step1, step2, PERMUTED: tl.constexpr, BLOCK: tl.constexpr):
    bits = _random.words(seed, start.to(tl.int64), n1, n2, step0, step1, step2, PERMUTED, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), bits)


@pytest.mark.parametrize("permuted", [False, True])
def test_large_counters_in_triton(permuted, monkeypatch):
    """Row-major, and in another memory order, in which two neighbours lie 2³⁵ elements apart row-major."""
    monkeypatch.setattr(interpreter, "proven", set())
    out = np.zeros(32, np.int64)
    steps = (2**36, 2, 0, 4, 2**35) if permuted else (1, 1, 0, 0, 1)
    with interpreting():
        _words_kernel[(1,)](SEED, out, FAR, *steps, PERMUTED=permuted, BLOCK=32)
    if permuted:
        expected = [
            words_from(at - at % 4, 4)[at % 4] for i in range(FAR, FAR + 32) for at in [i // 2 * 4 + i % 2 * 2**35]
        ]
    else:
        expected = words_from(FAR, 32)
    np.testing.assert_array_equal(out.astype(np.uint32), expected)


PROBE = """
extern "C" __global__ void probe(const int64* seed, unsigned* out, int64 element) {
    Words words = philox(seed, (element + threadIdx.x * 4) / 4);
    for (int k = 0; k < 4; ++k) out[threadIdx.x * 4 + k] = words.word[k];
}
"""


def test_large_counters_in_cuda(monkeypatch):
    from gpulayers.kernels.cuda import _launch

    monkeypatch.setattr(emulator, "proven", set())
    text = _launch.source("_gates")
    text = text[: text.index("// --- glu")] if "// --- glu" in text else text
    out = np.zeros(32, np.uint32)
    with emulator.emulating():
        emulator.run(text + PROBE, "probe", (1,), (8,), [SEED, out, np.int64(FAR)], 0)
    np.testing.assert_array_equal(out, words_from(FAR, 32))


def test_errors():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(RuntimeError, match=r"dropout: x: the rule is features=2 axes, or more; got \[3\]"):
        dropout(x[0], SEED, features=2)
    with pytest.raises(
        RuntimeError, match=r"Dropout2d: x: the rule is samples and features, \[N, C, H, W\]; got \[2, 3\]"
    ):
        gl.Dropout2d()(x)
    with pytest.raises(ValueError, match=r"dropout: p: the rule is 0 ≤ p ≤ 1; got 1\.5"):
        dropout(x, SEED, p=1.5)
    with pytest.raises(TypeError, match="dropout: seed: the rule is dtype = int64; got float64"):
        dropout(x, np.zeros(2), p=0.5)
    with pytest.raises(RuntimeError, match=r"dropout: seed: the rule is seed = \[seed, offset\]"):
        dropout(x, np.zeros(3, np.int64), p=0.5)


def test_layer():
    check_layer(gl.Dropout(0.4), (4, 5))
    check_layer(gl.Dropout(0.0), (4, 5))
    check_layer(gl.Dropout1d(0.4), (4, 5, 3))
    check_layer(gl.FeatureAlphaDropout(0.4), (4, 5, 2, 3))
    layer, x = gl.Dropout(0.5), np.ones((64, 64), np.float32)
    with gl.no_grad():
        gl.random.seed(3)
        first, second = layer(x), layer(x)
        gl.random.seed(3)
        assert np.array_equal(layer(x), first) and not np.array_equal(first, second)
        assert np.array_equal(layer.eval()(x), x)
    with pytest.raises(ValueError, match="Dropout: p: the rule is 0 ≤ p ≤ 1; got 2"):
        gl.Dropout(2)


def test_a_mask_waits_for_its_backward(monkeypatch):
    """The NumPy kernel draws once for a forward and its backward, again for another backward, and keeps little."""
    from gpulayers.kernels.numpy import _masks as kernel
    from gpulayers.kernels.numpy import _random as words

    monkeypatch.setattr(kernel, "_masks", type(kernel._masks)())
    drawn, draws = [], words.words
    monkeypatch.setattr(words, "words", lambda *a: drawn.append(a) or draws(*a))
    x, dy = (np.random.default_rng(i).standard_normal((5, 6)).astype(np.float32) for i in range(2))
    with gl.only("numpy"):
        _, call = dropout.record(x, SEED, p=0.4)
        once = call.backward(dy)[0]
        assert len(drawn) == 1
        np.testing.assert_array_equal(call.backward(dy)[0], once)
        assert len(drawn) == 2
        dropout(x, SEED, p=0.4)  # without needs: nothing waits
        assert not kernel._masks
        monkeypatch.setattr(kernel, "MASKS", 2 * x.nbytes)
        calls = [dropout.record(x, SEED + i, p=0.4)[1] for i in range(3)]
        assert len(kernel._masks) == 2
        others = [c.backward(dy)[0] for c in calls]
        assert not kernel._masks and np.array_equal(others[0], once) and not np.array_equal(others[1], once)
