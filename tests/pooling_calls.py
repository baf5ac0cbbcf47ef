"""What tests of pooling draw, and how they hold an op against torch's function."""

import numpy as np
import torch
import torch.nn.functional as F

from gpulayers.torch import functional


def draw(*shape: int, last: bool = False) -> np.ndarray:
    """Random values; ``last``: channels-last in memory."""
    x = np.random.default_rng(list(shape)).standard_normal(shape)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1) if last else x


def special(x: np.ndarray) -> np.ndarray:
    """Ties, NaN, and many −∞."""
    x = np.round(x)
    x[np.random.default_rng(0).random(x.shape) < 0.1] = np.nan
    x[np.random.default_rng(1).random(x.shape) < 0.4] = -np.inf
    return x


def compare_with_torch(op, function, x, **options):
    y, record = op.record(x, **options)
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    expected = function(tensor, **options)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12)
    dy = draw(*y.shape)
    expected.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(record.backward(dy)[0], tensor.grad.numpy(), rtol=1e-12, atol=1e-12)


def same(name, x, *more, **options):
    """Our function and torch's give the same numbers, and gradients."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, truth = getattr(functional, name)(a, *more, **options), getattr(F, name)(b, *more, **options)
    if isinstance(truth, tuple):
        assert torch.equal(mine[1], truth[1])
        mine, truth = mine[0], truth[0]
    torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12, equal_nan=True)
    dy = torch.randn_like(truth)
    mine.backward(dy)
    truth.backward(dy)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, equal_nan=True)
