"""Drop-ins that draw: rates, scales, and that a gradient is what was drawn."""

import pytest
import torch
import torch.nn as nn

import gpulayers.torch as gt
from gpulayers.testing.arena import has_gpu
from gpulayers.torch.dropout import _dropout_twin as twin

DEVICE = "cuda" if has_gpu() else "cpu"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype):
    """Its rate, its scale, and that its gradient is its mask; the same seed gives the same mask."""
    x = torch.ones(300, 400, dtype=dtype, device=DEVICE, requires_grad=True)
    torch.manual_seed(3)
    y = gt.Dropout(0.3)(x)
    dy = torch.randn(x.shape, device=DEVICE).to(dtype)
    y.backward(dy)
    kept = y != 0
    rate = 1 - kept.double().mean().item()
    assert abs(rate - 0.3) < 5 * (0.3 * 0.7 / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))
    torch.testing.assert_close(x.grad, torch.where(kept, (dy.double() / 0.7), 0.0).to(dtype))
    torch.manual_seed(3)
    assert torch.equal(gt.Dropout(0.3)(x), y)
    assert not torch.equal(gt.Dropout(0.3)(x), y)
    assert torch.equal(gt.Dropout(0.3).eval()(x), x)
    assert not gt.Dropout(1.0)(x).any() and torch.equal(gt.Dropout(0.0)(x), x)


FEATURES = [
    ("Dropout1d", (40, 30, 3)),
    ("Dropout2d", (40, 30, 2, 3)),
    ("Dropout3d", (40, 30, 1, 2, 2)),
    ("FeatureAlphaDropout", (40, 30, 2, 3)),
]


@pytest.mark.parametrize("name, shape", FEATURES)
def test_dropout_of_features(name, shape):
    """Each feature is kept or dropped whole, in every memory order; the gradient is its factor."""
    channels_last = torch.randn(*shape).movedim(1, -1).contiguous().movedim(-1, 1)
    for x in (torch.randn(*shape), channels_last):
        x.requires_grad_()
        y = getattr(gt, name)(0.4)(x)
        y.backward(torch.ones_like(y))
        factor, shift = x.grad.flatten(2), (y - x * x.grad).flatten(2)
        assert y.stride() == x.stride() and torch.equal(factor, factor[..., :1].expand_as(factor))
        torch.testing.assert_close(shift, shift[..., :1].expand_as(shift))
        dropped = factor[..., 0] == 0
        assert abs(dropped.double().mean() - 0.4) < 5 * (0.24 / dropped.numel()) ** 0.5
        torch.testing.assert_close(factor[~dropped], factor[~dropped][:1].expand_as(factor[~dropped]))


def test_one_sample_without_a_batch():
    x = torch.ones(50, 4, 2, 3)
    for y in (gt.functional.dropout1d(x[:, 0, 0]), gt.functional.dropout3d(x)):
        assert set(y.flatten(1).unique(dim=1).unique().tolist()) == {0.0, 2.0} and y.shape[0] == 50
        assert all(len(row.unique()) == 1 for row in y)
    assert gt.functional.dropout1d(x[:, 0, 0], inplace=True).data_ptr() == x.data_ptr() and set(
        x[:, 0, 0].unique().tolist()
    ) == {0, 2}


def test_torchs_own_of_one_sample():
    """What serves where the op does not: each feature of [C, …] whole, in place too."""
    x = torch.ones(50, 2, 3, 4)
    for inplace in (False, True):
        y = twin(x, None, 0.5, features=1, inplace=inplace)
        assert y.shape == x.shape and all(len(row.unique()) == 1 for row in y) and (y is x) == inplace
        assert set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("name", ("AlphaDropout", "FeatureAlphaDropout"))
def test_alpha_dropout(name):
    """What torch's own gives of x = 1 and x = 0, kept and dropped; mean 0 and variance 1 stay."""
    ours, theirs = (getattr(library, name)(0.3) for library in (gt, nn))
    for x in (torch.ones(300, 20, dtype=torch.float64), torch.zeros(300, 20, dtype=torch.float64)):
        found = [module(x).unique() for module in (ours, theirs)]
        torch.testing.assert_close(*found)
        assert len(found[0]) == 2
    y = ours(torch.randn(400, 500))
    assert abs(y.mean()) < 0.02 and abs(y.var() - 1) < 0.02
    assert torch.equal(getattr(gt, name)(1.0)(y), torch.zeros_like(y)) and torch.equal(ours.eval()(y), y)


def test_dropout_of_nothing():
    """With p = 0 torch neither draws nor writes, in place too."""
    state = torch.get_rng_state()
    for module in (nn.Dropout(0.0), gt.Dropout(0.0), nn.Dropout(0.0, inplace=True), gt.Dropout(0.0, inplace=True)):
        leaf = torch.linspace(-1, 1, 6, requires_grad=True)
        for x in (leaf, leaf.exp(), leaf.chunk(2)[0]):
            before = x._version
            y = module(x)
            assert torch.equal(y, x) and x._version == before
            y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_rrelu():
    """Slopes within their range, uniform in it; the gradient is the slope."""
    x = torch.full((100_000,), -1.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = gt.RReLU(0.2, 0.6)(x)
    y.backward(torch.ones_like(x))
    slopes = -y.detach()
    assert slopes.min() >= 0.2 and slopes.max() <= 0.6
    assert abs(slopes.mean() - 0.4) < 5 * (0.4 / 12**0.5) / 100_000**0.5
    torch.testing.assert_close(x.grad, slopes, rtol=0, atol=0)
