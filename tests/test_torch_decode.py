"""Attention to a cache of keys and values from torch: against torch's own attention to the tokens it holds."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from gpulayers.torch import functional as ours  # noqa: E402
from gpulayers.torch.attention import _appended, _decoded  # noqa: E402


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


@pytest.mark.parametrize("page", [0, 16])
def test_token_by_token(page):
    """Prompts, then a token at a time, each sequence at its own place; turned by its position, both ways of pairing."""
    lengths, total = [3, 18], 22
    q, k, v = draw(2, total, 4, 16), draw(2, total, 2, 16), draw(2, total, 2, 16)
    angles = torch.outer(torch.arange(32.0), 10.0 ** -torch.arange(6.0))
    cos, sin = angles.cos(), angles.sin()
    turned = [ours.rotary(x.transpose(1, 2), None, cos, sin, None, page == 0).transpose(1, 2) for x in (q, k)]
    k_cache, v_cache, table = torch.zeros(2, 32, 2, 16), torch.zeros(2, 32, 2, 16), None
    if page:
        table = torch.tensor([[3, 0], [2, 1]])
        k_cache, v_cache = (x.view(4, page, 2, 16) for x in (k_cache, v_cache))
    for at, n in enumerate(lengths):  # each prompt alone, then both go on together
        one = slice(at, at + 1)
        caches = (k_cache[one], v_cache[one]) if table is None else (k_cache, v_cache)
        ours.attention_with_kvcache(
            q[one, :n], *caches, k[one, :n], v[one, :n], causal=True, rotary_cos=cos, rotary_sin=sin,
            rotary_interleaved=page == 0, block_table=None if table is None else table[one],
        )  # fmt: skip
    for step in range(3):
        ends = torch.tensor(lengths, dtype=torch.int32) + step
        rows = [[x[at, end] for at, end in enumerate(ends.tolist())] for x in (q, k, v)]
        y, lse = ours.attention_with_kvcache(
            torch.stack(rows[0])[:, None], k_cache, v_cache, *(torch.stack(r)[:, None] for r in rows[1:]),
            rotary_cos=cos, rotary_sin=sin, cache_seqlens=ends, causal=True, rotary_interleaved=page == 0,
            block_table=table, return_softmax_lse=True,
        )  # fmt: skip
        assert y.shape == (2, 1, 4, 16) and lse.shape == (2, 4, 1)
        for at, end in enumerate(ends.tolist()):
            its = [x[at : at + 1, : end + 1].transpose(1, 2) for x in (*turned, v)]
            true = F.scaled_dot_product_attention(its[0][:, :, -1:], *its[1:], enable_gqa=True)
            torch.testing.assert_close(y[at, 0], true[0, :, 0])


def test_whole_cache_and_one_length_for_all():
    q, k, v = draw(2, 3, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8)
    for length in (None, 7):
        y = ours.attention_with_kvcache(q, k, v, cache_seqlens=length, softmax_scale=0.3)
        its = (x[:, :length].transpose(1, 2) for x in (k, v))
        true = F.scaled_dot_product_attention(q.transpose(1, 2), *its, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(y, true.transpose(1, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_torchs_own_operations(causal):
    """What computes where no kernel does: the same."""
    q, table, sinks = draw(2, 4, 3, 8), torch.tensor([[1, 2], [3, 0]]), draw(4)
    k, v, new = draw(4, 16, 2, 8).transpose(1, 2), draw(4, 16, 2, 4).transpose(1, 2), draw(2, 2, 3, 8)
    lengths, places = torch.tensor([19, 32]), torch.tensor([[16, -1, 18], [29, 30, 31]])
    theirs = k.clone(), v.clone()
    ours.kv_append(k, v, new, new[..., :4], places, table)
    assert _appended(*theirs, new, new[..., :4], places, table) == ()
    assert torch.equal(theirs[0], k) and torch.equal(theirs[1], v)
    options = causal, (5, 1), 0.4, 2.0
    found = ours.attention_decode(
        q, k, v, lengths, table, sinks=sinks, causal=causal, window=(5, 1), scale=0.4, softcap=2.0, return_lse=True
    )
    torch.testing.assert_close(found, _decoded(q, k, v, lengths, table, sinks, *options))


def test_has_no_gradient():
    q, k = draw(1, 2, 1, 8), draw(1, 2, 4, 8)
    with pytest.raises(
        RuntimeError, match="attention_decode: it is for inference and has no gradient, and q requires one"
    ):
        ours.attention_decode(q.requires_grad_(), k, k)
    with torch.no_grad():
        assert not ours.attention_decode(q, k, k).requires_grad
    with pytest.raises(RuntimeError, match="kv_append: it is for inference and has no gradient, and v requires one"):
        ours.kv_append(k, k.clone(), k[:, :, :1], k[:, :, :1].clone().requires_grad_(), torch.tensor([0]))


def test_traced():
    """As one custom op each, which torch knows to write to the caches."""

    def step(q, k_cache, v_cache, k, v, lengths):
        return ours.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    given = (
        draw(2, 1, 4, 8),
        draw(2, 6, 2, 8),
        draw(2, 6, 2, 8),
        draw(2, 1, 2, 8),
        draw(2, 1, 2, 8),
        torch.tensor([2, 5]),
    )
    mine, theirs = ([x.clone() for x in given] for _ in range(2))
    y = step(*theirs)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(*mine), y)
    torch.testing.assert_close(mine, theirs)
    assert not torch.equal(mine[1], given[1])
