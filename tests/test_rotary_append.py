"""Rotary positions and the cache in one launch: as the two one after the other, in arrays and tensors."""

import numpy as np
import pytest
import torch
from gpulayers.kernels.triton import _tile
from halves import check_op
from test_attention_decode import cache, caches, draw, paged

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import dispatch
from gpulayers.ops.attention import attention, kv_append, rotary_append
from gpulayers.ops.rotary import frequencies, rotary, tables
from gpulayers.testing.interpreter import interpreting
from gpulayers.torch.attention import _turned_and_appended

FIRST, EACH = np.array([0, 15, 45], np.int32), np.array([[3, 0, -1], [47, 16, 5], [-1, -1, -1]])


def given(pages: int = 0) -> tuple:
    """(q, k, v), the caches, the table of pages"""
    whole = cache(3, 48, 2, 16), cache(3, 48, 2, 8, 1)
    if not pages:
        return (draw(3, 4, 3, 16), draw(3, 2, 3, 16), draw(3, 2, 3, 8)), whole, None
    (k, table), (v, _) = (paged(x, pages) for x in whole)
    return given()[0], (np.nan_to_num(k), np.nan_to_num(v)), table


def angles(pairs: int, rows: tuple = (48,)) -> list[np.ndarray]:
    angle = draw(*rows, pairs)
    return [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]


@pytest.mark.parametrize("pages, interleaved, positions, pairs, rows", [
    (0, False, FIRST, 8, (48,)), (16, True, EACH, 8, (48,)), (16, False, FIRST, 5, (3, 3)), (0, True, EACH, 6, (1, 3)),
])  # fmt: skip
def test_every_backend(pages, interleaved, positions, pairs, rows):
    """Tables by places and of each token's own, pairs of both kinds, widths that are not all turned; tokens that are left out."""
    new, held, table = given(pages)
    kinds = ["float64", "float32", ["float16", "bfloat16"][pages > 0]]
    inputs = *new, *held, *angles(pairs, rows), positions, table
    served = check_op(rotary_append, *inputs, interleaved=interleaved, dtypes=kinds)
    assert {"definition", "numpy", "triton"} <= set(served)


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_after_the_other(interleaved):
    (q, k, v), held, _ = given()
    table, places = angles(8), FIRST[:, None] + np.arange(3)
    found, true = ([x.copy() for x in held] for _ in range(2))
    y = rotary_append(q, k, v, *found, *table, FIRST, interleaved=interleaved)
    u, z = rotary(q, *table, k, places, interleaved=interleaved)
    kv_append(*true, z, v, FIRST)
    for mine, its in zip((y, *found), (u, *true)):
        np.testing.assert_array_equal(mine, its)


def test_past_the_tables():
    """On a CPU it raises; on a GPU it makes NaN of what it turns, and not of what is left out."""
    (q, k, v), held, _ = given()
    short = [x[:40] for x in angles(8)]
    with pytest.raises(IndexError, match=r"positions: the rule is place < cos.shape\[0\] = 40; got 47"):
        rotary_append(q, k, v, *held, *short, FIRST)
    check, rotary_append.check = rotary_append.check, None
    try:
        for backend in ("definition", "triton"):
            with gl.only(backend), dispatch.policy(simulate=("triton",)), interpreting(_tile.Device(90, 4, 232448)):
                inputs = [x.astype(np.float32) for x in (q, k, v, *held)]
                y = rotary_append(*inputs, *short, EACH)
            assert np.isnan(y[1, :, 0]).all() and np.isfinite(np.delete(y.swapaxes(1, 2).reshape(9, -1), 3, 0)).all()
            assert np.isnan(inputs[3][1, :, 47]).all() and np.isfinite(inputs[3]).sum() == inputs[3].size - 32
    finally:
        rotary_append.check = check


def test_errors():
    (q, k, v), held, _ = given()
    with pytest.raises(RuntimeError, match=r"k: the rule is k\.dtype = x\.dtype"):
        rotary_append(q.astype("f4"), k, v, *held, *angles(8), FIRST)
    with pytest.raises(RuntimeError, match=r"cos: the rule is cos\.shape = "):
        rotary_append(q, k, v, *held, *angles(9), FIRST)
    with pytest.raises(ValueError, match="rotary: the rule is q and"):
        gl.KVCache(3, 8, 2, 16, value_width=8).append(k, v, q=q)


def test_caches():
    """A prompt, then tokens: as attention to all of them, turned before."""
    q, k, v = draw(2, 4, 6, 8), draw(2, 2, 6, 8), draw(2, 2, 6, 4)
    cos, sin = tables(*frequencies(8)[:1], 12)
    u, z = rotary(q, cos, sin, k)
    true = attention(u, z, v, causal=True)[0]
    for held, put in caches():
        turn = put(cos), put(sin)
        found = [
            held(put(q[:, :, part]), put(k[:, :, part]), put(v[:, :, part]), rotary=turn)
            for part in map(slice, (0, 4, 5), (4, 5, 6))
        ]
        np.testing.assert_allclose(np.concatenate([np.asarray(y) for y in found], 2), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [(48,), (3, 3)])
def test_torch(rows):
    """Its own operations, the op, and the op as a compiler meets it, are one."""
    new, held, _ = given()
    new = [torch.tensor(x) for x in new]
    turn, places = [torch.tensor(x) for x in angles(8, rows)], torch.tensor(EACH)
    found, true, traced = ([torch.tensor(x) for x in held] for _ in range(3))
    y = gt.functional.rotary_append(*new, *found, *turn, places, interleaved=True)
    torch.testing.assert_close(y, _turned_and_appended(*new, *true, *turn, places, None, True))
    compiled = torch.compile(gt.functional.rotary_append, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*new, *traced, *turn, places, interleaved=True), y)
    for one in (true, traced):
        torch.testing.assert_close(one, found)
    with pytest.raises(
        RuntimeError, match="rotary_append: it is for inference and has no gradient, and q requires one"
    ):
        gt.functional.rotary_append(new[0].requires_grad_(), *new[1:], *found, *turn, places)
