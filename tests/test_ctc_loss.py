"""Connectionist temporal classification: definition, kernels, torch's own, errors."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpulayers.kernels.triton import _ctc_loss  # noqa: E402

import gpulayers as gl  # noqa: E402
import gpulayers.torch as gt  # noqa: E402
from gpulayers.ops.loss import ctc_loss  # noqa: E402
from gpulayers.testing.arena import arena  # noqa: E402
from gpulayers.testing.check_layer import check_layer  # noqa: E402
from gpulayers.testing.check_op import check_op  # noqa: E402
from gpulayers.testing.check_torch import check_torch  # noqa: E402

REDUCTIONS = ("none", "mean", "sum")


def probabilities(t, n, c, seed=0):
    x = np.random.default_rng(seed).standard_normal((t, n, c))
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


X = probabilities(6, 5, 4)
# Two equal labels in a row, a label that is the blank's number of another call, none at all, one that cannot be aligned.
TARGETS = np.array([[1, 2, 2], [3, 1, 7], [9, 9, 9], [2, 2, 2], [3, 0, 1]]) % 8
LENGTHS, COUNTS = np.array([6, 4, 3, 4, 5]), np.array([3, 2, 0, 3, 1])


@pytest.mark.parametrize("reduction, zero_infinity", [("none", False), ("none", True), ("mean", True), ("sum", False)])
def test_definition(reduction, zero_infinity):
    how = {"reduction": reduction, "zero_infinity": zero_infinity, "blank": 0}
    few = {"dys": ["dense", "expanded"]} | ({} if reduction == "none" else {"dtypes": ["float32", "float64"]})
    assert check_op(ctc_loss, X, TARGETS, LENGTHS, COUNTS, **how, **few) == ["definition", "triton"]


def test_walks():
    """Another blank, transposed and strided x, 32-bit lengths, several blocks of times and classes; nothing at all."""
    few = {"dys": ["dense"], "dtypes": ["float32"]}
    lengths, counts = LENGTHS.astype(np.int32), np.minimum(COUNTS, 2).astype(np.int32)
    turned = np.ascontiguousarray(X.transpose(1, 2, 0)).transpose(2, 0, 1)
    check_op(ctc_loss, turned, TARGETS[:, ::2] % 3, lengths, counts, blank=3, **few)
    check_op(ctc_loss, probabilities(40, 1, 90), np.arange(7)[None] * 5 + 1, np.array([39]), np.array([7]), **few)
    check_op(ctc_loss, X[:, :0], TARGETS[:0], LENGTHS[:0], COUNTS[:0], reduction="sum", **few)
    check_op(ctc_loss, X, TARGETS, LENGTHS * 0, COUNTS, reduction="none", **few)
    check_op(ctc_loss, X, TARGETS[:, :0], LENGTHS * 0, COUNTS * 0, **few)


def test_the_longest_target():
    """Its labels and blanks are one block."""
    for length, reason in ((4095, None), (4096, "ctc")):
        found = _ctc_loss.ctc_loss_refuses(X, np.zeros((1, length), int), needs=())
        assert found == (reason and _ctc_loss.REFUSALS[reason])


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_is_torchs(reduction, zero_infinity):
    """In float64, forward and backward, infinite losses too."""
    how = {"reduction": reduction, "zero_infinity": zero_infinity}
    x = torch.tensor(X, requires_grad=True)
    theirs = torch.nn.functional.ctc_loss(x, *map(torch.tensor, (TARGETS, LENGTHS, COUNTS)), **how)
    y, call = ctc_loss.record(X, TARGETS, LENGTHS, COUNTS, **how)
    dy = np.random.default_rng(3).standard_normal(y.shape)
    theirs.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(call.backward(dy)[0], x.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_slopes_of_logits():
    """Through log softmax the gradient is the true one: against finite differences."""
    logits = np.random.default_rng(5).standard_normal((4, 2, 3))
    given = np.array([[1, 1], [2, 0]]), np.array([4, 3]), np.array([2, 1])

    def loss(z):
        return ctc_loss(z - np.log(np.exp(z).sum(-1, keepdims=True)), *given, reduction="sum")

    _, call = ctc_loss.record(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), *given, reduction="sum")
    (dx, *_), step = call.backward(np.ones(())), 1e-6
    for at in np.ndindex(logits.shape):
        moved = [logits.copy(), logits.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        assert abs((loss(moved[0]) - loss(moved[1])) / (2 * step) - dx[at]) < 1e-7


CALLS = [
    ((X, TARGETS % 3, LENGTHS, COUNTS), {"blank": 3}),
    ((X, TARGETS[:, :2].ravel()[:7] % 4, tuple(LENGTHS.tolist()), (2, 1, 0, 3, 1)), {"zero_infinity": True}),
    ((X[:, 0], TARGETS[0], np.array(6), np.array(3)), {"reduction": "none"}),
    ((X[:, 0], TARGETS[0], (6,), (3,)), {}),
    ((X, TARGETS, LENGTHS * 1.0, COUNTS), {}),
    ((X, TARGETS, LENGTHS[:2], COUNTS), {}),
    ((X, TARGETS.ravel(), LENGTHS, COUNTS), {}),
    ((X, TARGETS, LENGTHS, COUNTS), {"blank": 7}),
    ((X[None], TARGETS, LENGTHS, COUNTS), {}),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_drop_in(number):
    """Targets padded and one after the other, lengths as tensors and tuples, one sequence without a batch, errors."""
    inputs, options = CALLS[number]
    x, *given = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in inputs]
    for dtype in (torch.float64, torch.float32):
        ours, theirs = gt.CTCLoss(**options), torch.nn.CTCLoss(**options)
        assert not check_torch(lambda x: ours(x, *given), lambda x: theirs(x, *given), [x.to(dtype)])  # noqa: B023


@gl.register
class OfLogits(gl.Layer):
    """Of the layer alone the gradient is no derivative: it is one of what log softmax was given."""

    def __init__(self):
        self.softmax, self.loss = gl.LogSoftmax(-1), gl.CTCLoss(zero_infinity=True)

    def output_shape(self, *input_shapes):
        return self.loss.output_shape(*input_shapes)

    def forward(self, x, *given):
        return self.loss(self.softmax(x), *given)

    def backward(self, dy):
        return self.softmax.backward(self.loss.backward(dy))


def test_layer():
    check_layer(OfLogits(), X, TARGETS, LENGTHS, COUNTS)


def test_on_a_gpu_a_wrong_label_gives_nan():
    x, wrong = X.astype(np.float32), TARGETS.copy()
    wrong[0, 0] = 4
    with arena("triton") as room:
        y = room.get(ctc_loss(*map(room.put, (x, wrong, LENGTHS, COUNTS)), reduction="none"))
    assert list(np.isnan(y)) == [True, False, False, False, False]


WRONG = {
    "axes": ((X[0], TARGETS, LENGTHS, COUNTS), {}, "x.shape = (T, N, C)"),
    "targets": ((X, TARGETS[0], LENGTHS, COUNTS), {}, "targets.shape = (N, S), padded"),
    "batch": ((X, TARGETS[:2], LENGTHS, COUNTS), {}, "targets.shape = (N, S) = [5, 3]; got [2, 3]"),
    "lengths": ((X, TARGETS, LENGTHS[:2], COUNTS), {}, "input_lengths.shape = (N,) = [5]; got [2]"),
    "blank": ((X, TARGETS, LENGTHS, COUNTS), {"blank": 4}, "0 ≤ blank < C = 4; got 4"),
    "kind": ((X, TARGETS * 1.0, LENGTHS, COUNTS), {}, "an integer dtype; got float64"),
    "too long": ((X, TARGETS, LENGTHS + 1, COUNTS), {}, "0 ≤ input_lengths ≤ 6; got 7"),
    "too many": ((X, TARGETS, LENGTHS, COUNTS + 1), {}, "0 ≤ target_lengths ≤ 3; got 4"),
    "label": ((X, TARGETS + 2, LENGTHS, COUNTS), {}, "0 ≤ targets < C = 4; got 4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    inputs, options, text = WRONG[case]
    with pytest.raises(RuntimeError) as raised:
        ctc_loss(*inputs, **options)
    assert str(raised.value).startswith("ctc_loss: ") and text in str(raised.value)
