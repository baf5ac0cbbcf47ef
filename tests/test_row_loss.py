"""Losses of one number a sample: every formula and option on every backend, layers, errors."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gpulayers as gl  # noqa: E402
from gpulayers.ops.loss import multilabel_margin, row_loss  # noqa: E402
from gpulayers.testing.arena import arena  # noqa: E402
from gpulayers.testing.check_layer import check_layer  # noqa: E402
from gpulayers.testing.check_op import check_op  # noqa: E402


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


A, B, C = (draw(6, 5, seed=s) for s in range(3))
SIGNS, LABELS = np.array([1, -1, 1, -1, -1, 1]), np.array([0, 4, 2, 2, 1, 3])
WEIGHT, SOFT = np.abs(draw(5, seed=4)) + 0.1, 1 / (1 + np.exp(-B))
# (inputs, options): each loss with each of its options.
CASES = [
    ((A, B, C), {"loss": "triplet_margin", "swap": True}),
    ((A, B, C), {"loss": "triplet_margin", "p": 1.0, "margin": 0.3}),
    ((A, B, C), {"loss": "triplet_margin", "p": 2.5, "swap": True, "eps": 1e-3}),
    ((A, B, None, SIGNS), {"loss": "cosine_embedding", "margin": -0.2}),
    ((A, B, None, SIGNS.astype(float)), {"loss": "cosine_embedding", "margin": 0.0}),
    ((A, A + B, None, np.full(6, -1)), {"loss": "cosine_embedding", "margin": 0.3}),
    ((A, None, None, LABELS, WEIGHT), {"loss": "multi_margin", "p": 1.0}),
    ((A, None, None, LABELS), {"loss": "multi_margin", "p": 2.0, "margin": 0.7}),
    ((A, SOFT, None, None, WEIGHT), {"loss": "multilabel_soft_margin"}),
]


@pytest.mark.parametrize(
    "inputs, options", CASES, ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else ""
)
def test_definition(inputs, options):
    for number, reduction in enumerate(("none", "mean")):
        few = {} if number == 0 else {"dys": ["dense", "expanded"], "dtypes": ["float32", "float64"]}
        served = check_op(row_loss, *inputs, reduction=reduction, numeric=number == 0, **options, **few)
        assert served == ["definition", "triton"]


def test_walks():
    """Rows longer than a block, with gaps, transposed; one sample; none; several axes."""
    few = {"dtypes": ["float32"], "dys": ["dense"]}
    for shape in ((3, 1300), (2, 3, 4), (7,), (0, 4)):
        a, b, c = (draw(*shape, seed=s) for s in range(3))
        check_op(row_loss, a, b, c, loss="triplet_margin", reduction="sum", **few)
    apart = [draw(4, 9, seed=s)[:, 2:7] for s in range(2)]
    check_op(row_loss, *apart, draw(5, 4).T, loss="triplet_margin", reduction="none", **few)
    check_op(row_loss, draw(30, 70), None, None, np.arange(30) % 70, loss="multi_margin", p=1.0, **few)


@pytest.mark.parametrize("label", [4, -1])
def test_on_a_gpu_a_wrong_label_gives_nan(label):
    x, t = draw(3, 4).astype(np.float32), np.array([1, label, 2])
    with arena("triton") as room:
        y, call = row_loss.record(
            room.put(x), None, None, room.put(t), loss="multi_margin", p=1.0, needs=["x"], reduction="none"
        )
        dx = room.get(call.backward(room.put(np.ones(3, np.float32)))[0])
        assert list(np.isnan(room.get(y))) == list(np.isnan(dx).any(1)) == [False, True, False]


LISTED = np.array(
    [[0, 2, -1, 4, 4], [1, -1, 0, 0, 0], [-1, 3, 3, 3, 3], [4, 3, 2, 1, 0], [2, 2, 1, -1, 0], [3, -1, -1, 0, 1]]
)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_multilabel_margin(reduction):
    """No class, all classes, one class twice, what is listed after −1; one sample; none; several blocks."""
    few = {"reduction": reduction, "dys": ["dense", "expanded"]}
    served = check_op(multilabel_margin, A, LISTED, **few, numeric=True)
    assert served == ["definition", "triton"]
    few["dtypes"] = ["float32"]
    check_op(multilabel_margin, A[0], LISTED[0].astype(np.int32), **few)
    check_op(multilabel_margin, A[:0], LISTED[:0], **few)
    check_op(multilabel_margin, draw(40, 2).T[:, 3:], np.tile(np.arange(37) % 9 * 4 - 1, (2, 1)), **few)


def test_on_a_gpu_a_wrong_class_gives_nan():
    x, wrong = A.astype(np.float32), LISTED.copy()
    wrong[1, 0] = 5
    with arena("triton") as room:
        y, call = multilabel_margin.record(room.put(x), room.put(wrong), needs=["x"], reduction="none")
        dx = room.get(call.backward(room.put(np.ones(6, np.float32)))[0])
    assert list(np.isnan(room.get(y))) == list(np.isnan(dx).any(1)) == [False, True, False, False, False, False]
    with pytest.raises(RuntimeError, match="multilabel_margin: target: the rule is −1 ≤ target < C = 5; got 5"):
        multilabel_margin(A, wrong)


LAYERS = [
    (gl.MultiLabelMarginLoss("none"), torch.nn.MultiLabelMarginLoss(reduction="none"), (A, LISTED)),
    (gl.TripletMarginLoss(0.5, swap=True), torch.nn.TripletMarginLoss(0.5, swap=True), (A, B, C)),
    (gl.CosineEmbeddingLoss(0.1, "none"), torch.nn.CosineEmbeddingLoss(0.1, reduction="none"), (A, B, SIGNS)),
    (gl.MultiMarginLoss(2, 0.6), torch.nn.MultiMarginLoss(2, 0.6), (A, LABELS)),
    (gl.MultiLabelSoftMarginLoss([1, 2, 1, 3, 1]), torch.nn.MultiLabelSoftMarginLoss(torch.tensor([1.0, 2, 1, 3, 1])), (A, SOFT)),
]  # fmt: skip


@pytest.mark.parametrize("ours, theirs, inputs", LAYERS, ids=lambda v: type(v).__name__)
def test_layers(ours, theirs, inputs):
    """Each layer is right by itself, and computes what torch's does."""
    check_layer(ours, *inputs)
    single = [a.astype("f4") if a.dtype == float else a for a in inputs]
    np.testing.assert_allclose(ours(*single), theirs(*map(torch.tensor, single)).numpy(), rtol=1e-5, atol=1e-6)


WRONG = {
    "loss": ((A, B), {"loss": "pairs"}, ValueError, "one of triplet_margin, "),
    "reduction": ((A, B, C), {"loss": "triplet_margin", "reduction": "max"}, ValueError, "one of mean, sum, none"),
    "missing": ((A, B), {"loss": "triplet_margin"}, ValueError, "third where loss takes it"),
    "shape": ((A, B[:2], C), {"loss": "triplet_margin"}, RuntimeError, "second.shape = x.shape = [6, 5]; got [2, 5]"),
    "dtype": ((A, B.astype("f4"), C), {"loss": "triplet_margin"}, RuntimeError, "second.dtype = x.dtype"),
    "norm": ((A, B, C), {"loss": "triplet_margin", "p": 0.5}, ValueError, "1 ≤ p < ∞; got 0.5"),
    "power": ((A, None, None, LABELS), {"loss": "multi_margin", "p": 3.0}, ValueError, "p ∈ {1, 2}; got 3.0"),
    "label": ((A, None, None, LABELS + 1), {"loss": "multi_margin"}, RuntimeError, "0 ≤ target < C = 5; got 5"),
    "kind": ((A, None, None, SIGNS * 1.0), {"loss": "multi_margin"}, NotImplementedError, "class indices"),
    "samples": ((A, None, None, LABELS[:2]), {"loss": "multi_margin"}, RuntimeError, "(N,), () for x (D,) = [6]; got [2]"),
    "weight": ((A, SOFT, None, None, WEIGHT[:2]), {"loss": "multilabel_soft_margin"}, RuntimeError, "weight.shape = (C,) = [5]"),
    "no weight": ((A, B, C, None, WEIGHT), {"loss": "triplet_margin"}, ValueError, "for losses of classes alone"),
    "axes": ((A[None], B[None], None, SIGNS), {"loss": "cosine_embedding"}, RuntimeError, "x.shape = (N, D) or (D,)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    inputs, options, error, text = WRONG[case]
    with pytest.raises(error) as raised:
        row_loss(*inputs, **options)
    assert str(raised.value).startswith("row_loss: ") and text in str(raised.value)
