"""Moments of a batch, and SyncBatchNorm of one process; of two: ``test_torch_distributed.py``."""

import numpy as np
import pytest
import torch
import torch.nn as nn

import gpulayers.torch as gt
from gpulayers.ops.norm import batch_moments
from gpulayers.testing.check_op import check_op


def draw(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape) + 3


def test_moments():
    assert {"definition", "numpy", "triton"} <= set(check_op(batch_moments, draw(3, 5, 4)))
    check_op(batch_moments, draw(40, 70))
    check_op(batch_moments, draw(2, 4, 5, 3).transpose(0, 3, 1, 2))
    for shape in ((0, 3), (1, 3), (2, 3, 0)):
        check_op(batch_moments, draw(*shape))
    with pytest.raises(ValueError, match="batch_moments: x"):
        batch_moments(draw(3))


@pytest.mark.parametrize("how", ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}), ids=str)
def test_one_process(how):
    """As torch's batch norm, in training and in evaluation, with its errors."""
    ours, theirs = gt.SyncBatchNorm(3, **how).double(), nn.BatchNorm2d(3, **how).double()
    for _ in range(2):
        x = torch.randn(4, 3, 2, 5, dtype=torch.float64, requires_grad=True)
        runs = []
        for module in (ours, theirs):
            y = module(x)
            runs.append((y, *torch.autograd.grad(y.square().sum(), x)))
        torch.testing.assert_close(*runs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    for x in (torch.ones(3), torch.ones(2, 0, 3)):
        messages = []
        for module in (gt.SyncBatchNorm(3), nn.SyncBatchNorm(3)):
            with pytest.raises(ValueError) as caught:
                module(x)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_patched():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert gt.patch(model).replaced["1"] is gt.SyncBatchNorm and type(model[1]) is gt.SyncBatchNorm
