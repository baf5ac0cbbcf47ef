"""Losses of one formula an element: every formula and option on every backend, special values, layers, errors."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gpulayers as gl  # noqa: E402
from gpulayers import dispatch  # noqa: E402
from gpulayers.ops.loss import pointwise_loss  # noqa: E402
from gpulayers.testing.arena import BACKENDS, arena  # noqa: E402
from gpulayers.testing.check_layer import check_layer  # noqa: E402
from gpulayers.testing.check_op import check_op  # noqa: E402
from gpulayers.torch._pointwise_loss import _twin  # noqa: E402

NAN, INF = np.nan, np.inf


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


X, T = draw(3, 5), draw(3, 5, seed=1)
P, Q = 1 / (1 + np.exp(-X)), 1 / (1 + np.exp(-T))
SIGNS = np.sign(draw(3, 5, seed=2))
ROW, COLUMN = np.abs(draw(5, seed=3)) + 0.1, np.abs(draw(3, 1, seed=4)) + 0.1
# (inputs, options): each loss with each of its options once.
CASES = {
    "bce": [((P, Q, None, ROW), {})],
    "bce_with_logits": [((X, Q), {}), ((X, Q, None, ROW, COLUMN), {})],
    "kl_div": [((np.log(P), Q), {"reduction": "batchmean"}), ((np.log(P), np.log(Q)), {"log": True})],
    "l1": [((X, T), {})],
    "smooth_l1": [((X, T), {"number": 0.5}), ((X, T), {"number": 0.0})],
    "huber": [((X, T, None, ROW), {"number": 0.7})],
    "poisson_nll": [((X, 3 * Q), {"log": True, "full": True}), ((P, np.arange(15).reshape(3, 5)), {"number": 1e-8})],
    "gaussian_nll": [((X, T, P), {"number": 1e-6}), ((X, T, P), {"number": 0.4, "full": True})],
    "hinge_embedding": [((X, SIGNS), {"number": 0.6}), ((X, SIGNS.astype(np.int64)), {})],
    "margin_ranking": [((X, SIGNS, T), {"number": 0.3})],
    "soft_margin": [((X, SIGNS), {}), ((X, SIGNS.astype(np.int8)), {})],
}
EVERY = [(loss, *case) for loss, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("loss, inputs, options", EVERY, ids=lambda v: v if isinstance(v, str) else "")
def test_definition(loss, inputs, options):
    kinks = options.get("number") == 0.4  # clamped variances have a gradient all the same, as in torch
    for number, reduction in enumerate(("none", options.get("reduction", "mean"))):
        how = options | {"loss": loss, "reduction": reduction}
        few = {} if number == 0 else {"dys": ["dense", "expanded"], "dtypes": ["float32", "bfloat16"]}
        assert check_op(pointwise_loss, *inputs, **how, **few, numeric=number == 0 and not kinks) == [
            "definition",
            "numpy",
            "triton",
        ]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1)])
def test_little(shape, reduction):
    how = {"loss": "bce_with_logits", "reduction": reduction}
    check_op(pointwise_loss, draw(*shape), draw(*shape, seed=1), **how, dtypes=["float32", "float64"])


def last(x):
    """x in channels-last memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_walks(reduction):
    """Another order than row-major, two orders, rows with gaps, factors of channels; several tiles a program."""
    how = {"loss": "bce_with_logits", "reduction": reduction, "dtypes": ["float32"], "dys": ["dense"]}
    x, t, weight, channels = draw(3, 5, 7, 2), draw(3, 5, 7, 2, seed=1), draw(7, 2), draw(5, 1, 1)
    check_op(pointwise_loss, x, last(t), None, weight, channels, **how)
    check_op(pointwise_loss, last(x), t, None, weight, channels, **how)
    check_op(pointwise_loss, draw(6, 40)[:, :33], draw(6, 33), None, draw(33), **how | {"dys": ["transposed"]})
    check_op(pointwise_loss, draw(30, 110), draw(30, 110, seed=1), **how, backends=["numpy", "triton"])


SPECIAL = np.array([NAN, INF, -INF, 0.0, 1.0, -2.0], np.float32)
A, B = (a.reshape(-1) for a in np.meshgrid(SPECIAL, SPECIAL))
"""Every pair of them."""
UNIT = np.clip(np.nan_to_num(A), 0, 1)


@pytest.mark.parametrize("loss", CASES)
def test_special_values(loss):
    """NaN, Inf and zeros go through every backend as through torch; 0 log 0 is 0, and BCE's logarithms are at least −100."""
    x, t, options = A, B, {"number": 0.5, "log": False, "full": loss == "poisson_nll"}
    if loss.startswith("bce"):
        x, t = UNIT if loss == "bce" else A, np.clip(np.nan_to_num(B), 0, 1)
    if loss in ("soft_margin", "margin_ranking", "hinge_embedding"):
        t = np.where(np.isnan(B) | (B < 0.5), -1, 1).astype(np.float32)
    other = {"gaussian_nll": np.abs(B), "margin_ranking": B[::-1].copy()}.get(loss)
    factor = np.nan_to_num(B) if loss == "bce_with_logits" else None
    given = [x, t, other, None, factor]
    tensors = [None if a is None else torch.tensor(a) for a in given]
    y = _twin(tensors[0].requires_grad_(), *tensors[1:], loss, *options.values(), "none")
    dy = np.abs(draw(len(x), seed=5)).astype(np.float32) + 0.1
    y.backward(torch.tensor(dy))
    for backend in BACKENDS:
        with arena(backend) as room:
            try:
                mine, call = pointwise_loss.record(
                    *room.put(given), loss=loss, **options, needs=["x"], reduction="none"
                )
            except dispatch.Refused:
                continue
            dx, mine = room.get(call.backward(room.put(dy))[0]), room.get(mine)
        true, slope = y.detach().numpy(), tensors[0].grad.numpy()
        known = ... if loss != "soft_margin" else np.isfinite(slope)  # where torch's exp(−t x) does not overflow
        np.testing.assert_allclose(mine[known], true[known], rtol=2e-5, atol=1e-6, err_msg=backend)
        np.testing.assert_allclose(dx[known], slope[known], rtol=1e-4, atol=1e-6, err_msg=backend)


def test_soft_margin_does_not_overflow():
    x, t = np.array([1000.0, -1000.0], np.float32), np.array([-1.0, -1.0], np.float32)
    for backend in ("definition", "numpy", "triton"):
        with arena(backend) as room:
            y, call = pointwise_loss.record(*room.put([x, t]), loss="soft_margin", needs=["x"], reduction="sum")
            dx = room.get(call.backward(room.put(np.ones((), np.float32)))[0])
            assert room.get(y) == 1000 and list(dx) == [1, 0]


LAYERS = {
    "BCELoss": ([ROW.tolist()], (P, Q)),
    "BCEWithLogitsLoss": ([None, "sum", COLUMN.tolist()], (X, Q)),
    "KLDivLoss": (["batchmean", True], (np.log(P), np.log(Q))),
    "L1Loss": (["none"], (X, T)),
    "SmoothL1Loss": (["mean", 0.5], (X, T)),
    "HuberLoss": (["sum", 0.7], (X, T)),
    "PoissonNLLLoss": ([False, True], (P, 3 * Q)),
    "GaussianNLLLoss": ([True], (P, T, Q)),
    "HingeEmbeddingLoss": ([0.3], (X, SIGNS.astype(np.int64))),
    "MarginRankingLoss": ([0.2], (X, T, SIGNS)),
    "SoftMarginLoss": (["none"], (X, SIGNS.astype(np.int64))),
}
NAMED = {
    "BCELoss": ["weight"],
    "BCEWithLogitsLoss": ["weight", "reduction", "pos_weight"],
    "KLDivLoss": ["reduction", "log_target"],
    "SmoothL1Loss": ["reduction", "beta"],
    "HuberLoss": ["reduction", "delta"],
    "PoissonNLLLoss": ["log_input", "full"],
    "GaussianNLLLoss": ["full"],
    "HingeEmbeddingLoss": ["margin"],
    "MarginRankingLoss": ["margin"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    """Each layer is right by itself, and computes what torch's does."""
    values, inputs = LAYERS[name]
    arguments = dict(zip(NAMED.get(name, ["reduction"]), values))
    check_layer(getattr(gl, name)(**arguments), *inputs)
    as_torch = {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in arguments.items()}
    true = getattr(torch.nn, name)(**as_torch)(*map(torch.tensor, inputs))
    single = [a.astype("f4") if a.dtype == float else a for a in inputs]
    np.testing.assert_allclose(getattr(gl, name)(**arguments)(*single), true.numpy(), rtol=1e-5, atol=1e-6)


WRONG = {
    "loss": ((X, T), {"loss": "l2"}, ValueError, "loss: the rule is one of bce, "),
    "reduction": ((X, T), {"loss": "l1", "reduction": "max"}, ValueError, "one of mean, sum, none; got 'max'"),
    "batchmean": ((X, T), {"loss": "l1", "reduction": "batchmean"}, ValueError, "one of mean, sum, none"),
    "shape": ((X, T[:2]), {"loss": "l1"}, RuntimeError, "target.shape = x.shape = [3, 5]; got [2, 5]"),
    "dtype": ((X, T.astype("f4")), {"loss": "l1"}, RuntimeError, "target.dtype = x.dtype"),
    "labels": ((X, T.astype(int)), {"loss": "l1"}, NotImplementedError, "target.dtype = x.dtype; got int64"),
    "kind": ((T.astype(int), T), {"loss": "l1"}, NotImplementedError, "dtype ∈"),
    "beta": ((X, T), {"loss": "smooth_l1", "number": -1.0}, RuntimeError, "number ≥ 0 for smooth_l1; got -1.0"),
    "delta": ((X, T), {"loss": "huber", "number": 0.0}, RuntimeError, "number > 0 for huber; got 0.0"),
    "no variance": ((X, T), {"loss": "gaussian_nll"}, ValueError, "other where loss takes it, and only there"),
    "a variance": ((X, T, P), {"loss": "l1"}, ValueError, "other where loss takes it, and only there"),
    "variance": ((X, T, P[:1]), {"loss": "gaussian_nll"}, RuntimeError, "other.shape = x.shape = [3, 5]; got [1, 5]"),
    "negative": (
        (X, T, -P),
        {"loss": "gaussian_nll"},
        ValueError,
        "other ≥ 0, the variance, for gaussian_nll; got -0.",
    ),
    "factor": ((X, T, None, COLUMN[:2]), {"loss": "l1"}, RuntimeError, "weight.shape broadcasts to x.shape = [3, 5]"),
    "pos_weight": ((X, T, None, None, ROW), {"loss": "bce"}, ValueError, "pos_weight where loss takes it"),
    "range": ((X, Q), {"loss": "bce"}, RuntimeError, "0 ≤ x ≤ 1 for bce; got "),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    inputs, options, error, text = WRONG[case]
    with pytest.raises(error) as raised:
        pointwise_loss(*inputs, **options)
    assert str(raised.value).startswith("pointwise_loss: ") and text in str(raised.value)
