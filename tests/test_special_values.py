"""NaN, Inf and what cancels go through every backend as they go through torch (activations: test_activation.py)."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpulayers import dispatch
from gpulayers.ops.loss import cross_entropy, mse, nll_loss
from gpulayers.ops.norm import layer_norm, rms_norm
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.ops.softmax import log_softmax, softmax, softmin
from gpulayers.testing.arena import BACKENDS, arena

NAN, INF = np.nan, np.inf
ROWS = np.array(
    [[1, 2, 3], [NAN, 1, 2], [INF, 1, 2], [-INF, 1, 2], [-INF] * 3, [INF, INF, 1], [INF, -INF, 0], [INF, NAN, 0]],
    np.float32,
)
IMAGES = np.array(
    [[[a, b, c], [0, a, 2], [c, -1, b]] for a, b, c in itertools.product([NAN, INF, -INF, 1.0], repeat=3)], np.float32
)[:, None]


def check(op, theirs, *inputs, **options):
    """Outputs and gradients on every backend that serves the call."""
    tensors = [torch.tensor(x, requires_grad=x.dtype == np.float32 and i < 1) for i, x in enumerate(inputs)]
    y = theirs(*tensors)
    dy = np.random.default_rng(0).standard_normal(tuple(y.shape)).astype(np.float32)
    (grad,) = torch.autograd.grad(y, tensors[0], torch.tensor(dy))
    served = []
    for backend in BACKENDS:
        with arena(backend) as room, np.errstate(all="ignore"):
            try:
                mine, call = op.record(*room.put(inputs), needs=["x"], **options)
            except dispatch.Refused:
                continue
            dx, mine = room.get(call.backward(room.put(np.asarray(dy)))[0]), room.get(mine)
        np.testing.assert_allclose(mine, y.detach().numpy(), rtol=2e-5, atol=1e-6, err_msg=backend)
        np.testing.assert_allclose(dx, grad.numpy(), rtol=1e-4, atol=1e-6, err_msg=backend)
        served.append(backend)
    assert {"definition", "triton"} <= set(served)


@pytest.mark.parametrize("op", [softmax, log_softmax, softmin], ids=lambda op: op.name)
def test_softmax(op):
    check(op, lambda x: getattr(F, op.name)(x, -1), ROWS)


def test_norms():
    check(layer_norm, lambda x: F.layer_norm(x, (3,)), ROWS, normalized_shape=(3,))
    check(rms_norm, lambda x: F.rms_norm(x, (3,)), ROWS, normalized_shape=(3,))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses(reduction, smoothing):
    every, labels = np.repeat(ROWS, 3, 0), np.tile(np.arange(3), len(ROWS))
    both = {"reduction": reduction, "label_smoothing": smoothing}
    for x, target in [(every, labels), (ROWS[:1], np.array([-100]))]:
        check(cross_entropy, lambda x, t: F.cross_entropy(x, t, **both), x, target, **both)
        check(nll_loss, lambda x, t: F.nll_loss(x, t, reduction=reduction), x, target, reduction=reduction)
    hot = np.eye(3, dtype=np.float32)[labels]
    for p in (hot, np.where(hot == 1, NAN, hot), np.full_like(hot, 1 / 3)):
        check(cross_entropy, lambda x, p: F.cross_entropy(x, p, **both), every, p.astype(np.float32), **both)
    check(mse, lambda x, t: F.mse_loss(x, t, reduction=reduction), ROWS, ROWS[::-1].copy(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_other_classes(reduction):
    """Only the weights of the classes that are chosen count; an ignored sample has gradient 0."""
    x = np.array([[1, 2, 3], [4, 6, 5]], np.float32)
    weights = [[0, 1, INF], [NAN, 1, 1], [0, 0, 0]]
    for weight, target in itertools.product(weights, ([0, 1], [2, 2], [-100, 1], [-100, -100])):
        given = x, np.array(target), np.array(weight, np.float32)
        for op in (cross_entropy, nll_loss):
            loss = getattr(F, op.name)
            check(op, lambda x, t, w, f=loss: f(x, t, w, reduction=reduction), *given, reduction=reduction)


WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 2, "stride": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 2, "stride": 2, "ceil_mode": True},
]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_pooling(options):
    check(max_pool, lambda x: F.max_pool2d(x, **options), IMAGES, **options)
    check(avg_pool, lambda x: F.avg_pool2d(x, **options), IMAGES, **options)


@pytest.mark.parametrize("size", [1, 2, (1, 3)])
def test_adaptive_pooling(size):
    check(adaptive_avg_pool, lambda x: F.adaptive_avg_pool2d(x, size), IMAGES, output_size=size)
