"""What tests of pooling draw, and how they hold an op against torch's function."""

import numpy as np
import torch


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
