"""Every loss against torch.nn's own class: outputs, gradients and errors, call by call."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch_calls import ANY, DEVICE, DTYPES, draw, grid, report, some_layouts

import gpulayers.torch as gt
from gpulayers.testing.check_torch import check_torch, same_strides
from gpulayers.testing.torch_cases import MADE_OF_OTHERS, TARGETS

LOSSES = {
    "CrossEntropyLoss": grid(reduction=("mean", "sum", "none"), ignore_index=(-100, 1), label_smoothing=(0.0, 0.1)),
    "NLLLoss": grid(reduction=("mean", "sum", "none"), ignore_index=(-100, 1)),
}


def targets(shape, classes, kind):
    samples = shape[:1] + shape[2:] if len(shape) > 1 else ()
    if kind == "labels":
        return torch.from_numpy(np.asarray(np.random.default_rng(1).integers(0, classes, samples))).to(DEVICE)
    return torch.rand(shape, dtype=torch.float64, device=DEVICE).softmax(min(1, len(shape) - 1))


class _RowMajor(nn.NLLLoss):
    """torch's loss on a row-major copy: its own backward fails where x is transposed."""

    def forward(self, x, target):
        return super().forward(x.contiguous(), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, dtype):
    complaints = []
    for kwargs in LOSSES[name]:
        for number, shape in enumerate([(4, 5), (5,), (3, 4, 2), (2, 3, 2, 3), (0, 3), (1, 1)]):
            classes = shape[min(1, len(shape) - 1)]
            for kind, weighted in itertools.product(("labels", "probabilities"), (False, True)):
                if kind == "probabilities" and (name == "NLLLoss" or kwargs["ignore_index"] >= 0):
                    continue
                target = targets(shape, classes, kind)
                target = target if kind == "labels" else target.to(dtype)
                weight = draw((classes,), dtype, seed=3).abs() if weighted else None
                for x in some_layouts(draw(shape, dtype, seed=number), number + weighted):
                    ours, theirs = (getattr(m, name)(weight=weight, **kwargs) for m in (gt, nn))
                    if name == "NLLLoss":
                        theirs = _RowMajor(weight=weight, **kwargs)
                    found = check_torch(ours, theirs, [x, target])
                    complaints += [f"{name}({kwargs}) {list(shape)} {kind} {x.stride()}: {line}" for line in found]
    report(complaints)


# What losses are called with, besides their reductions: those of one formula an element, and of one number a sample.
ROWS = {
    "TripletMarginLoss": [{}, {"p": 1, "swap": True, "margin": 0.4}, {"p": 3.0}, {"p": float("inf")}],
    "TripletMarginWithDistanceLoss": [
        {"swap": True},
        {"distance_function": nn.PairwiseDistance(1.0)},
        {"distance_function": nn.L1Loss()},
    ],
    "CosineEmbeddingLoss": grid(margin=(0.0, 0.3)),
    "MultiMarginLoss": grid(p=(1, 2), margin=(1.0, 0.4)),
    "MultiLabelSoftMarginLoss": [{}],
    "MultiLabelMarginLoss": [{}],
}
POINTWISE = {
    **{name: [{}] for name in ("MSELoss", "L1Loss", "BCELoss", "SoftMarginLoss")},
    "SmoothL1Loss": grid(beta=(1.0, 0.3, 0.0)),
    "HuberLoss": grid(delta=(1.0, 0.3)),
    "BCEWithLogitsLoss": [{}, {"pos_weight": torch.tensor(2.5)}, {"weight": torch.tensor([0.5])}],
    "KLDivLoss": grid(log_target=(False, True)),
    "PoissonNLLLoss": grid(log_input=(True, False), full=(False, True)),
    "GaussianNLLLoss": [{}, {"full": True, "eps": 0.5}],
    "HingeEmbeddingLoss": grid(margin=(1.0, 0.2)),
    "MarginRankingLoss": grid(margin=(0, 0.2)),
}


TURNS = {torch.float16: 0, torch.bfloat16: 1, torch.float64: 0}
"""Every second call is left out; float32 has all."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*POINTWISE, *ROWS])
def test_loss_of_arrays(name, dtype):
    complaints = []
    reductions = ("mean", "sum", "none", *(("batchmean",) if name == "KLDivLoss" else ()))
    shapes = (
        ANY if name in POINTWISE else [(4, 5), (5,), (2, 3), (1, 4), *([(0, 3)] if name != "MultiMarginLoss" else [])]
    )
    for number, (kwargs, shape) in enumerate(itertools.product((POINTWISE | ROWS)[name], shapes)):
        if number % 2 == TURNS.get(dtype, -1):
            continue
        given = TARGETS[name](draw(shape, torch.float64, number, 1.0), draw(shape, torch.float64, number + 1, 1.0))
        given = [some_layouts(t, number + i)[-(number % 3 != 0)] for i, t in enumerate(given)]
        if name == "PoissonNLLLoss" and not kwargs["log_input"]:
            given[0] = given[0].abs()
        how = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and shape else v
            for k, v in kwargs.items()
            if shape or k != "weight"
        }
        how["reduction"] = reductions[number % len(reductions)]
        grad = [True, name not in ("HingeEmbeddingLoss", "SoftMarginLoss"), name != "CosineEmbeddingLoss"][: len(given)]
        ours, theirs = (getattr(m, name)(**how).to(dtype) for m in (gt, nn))
        if name in ("MultiMarginLoss", "MultiLabelMarginLoss") and dtype in (
            torch.float16,
            torch.bfloat16,
        ):  # torch has none on a CPU
            theirs = lambda x, t, m=theirs: m.to(torch.promote_types(x.dtype, torch.float32))(  # noqa: E731
                x.to(torch.promote_types(x.dtype, torch.float32)), t
            ).to(x.dtype)
        found = check_torch(
            ours, theirs, [same_strides(t, dtype if t.is_floating_point() else None) for t in given], grad=grad
        )
        complaints += [f"{name}({how}) {list(shape)} {[t.stride() for t in given]}: {line}" for line in found]
    report(complaints)


def test_every_loss_is_judged():
    losses = {n for n, c in vars(gt).items() if n.endswith("Loss") and issubclass(c, nn.Module)} - {*MADE_OF_OTHERS}
    assert losses == LOSSES.keys() | POINTWISE.keys() | ROWS.keys() | {"LinearCrossEntropyLoss", "CTCLoss"}


NOT_FINITE = {
    "TripletMarginLoss": ({"swap": True}, {"p": 1}),
    "CosineEmbeddingLoss": ({"margin": 0.1},),
    "MultiMarginLoss": ({}, {"p": 2}),
    "MultiLabelMarginLoss": ({},),
    "MultiLabelSoftMarginLoss": ({},),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_rows_that_are_not_finite(name):
    """NaN and Inf in a row, and a row of them, go through as in torch; distances of 0 have no slope."""
    complaints = []
    for kwargs, value in itertools.product(NOT_FINITE[name], (float("nan"), float("inf"), float("-inf"), 0.0)):
        given = TARGETS[name](draw((6, 4), torch.float32, 1), draw((6, 4), torch.float32, 2))
        given[0][1, 2] = given[0][4] = value
        if value == 0 and name != "MultiMarginLoss":
            given[1][4] = 0
        ours, theirs = (getattr(m, name)(**kwargs, reduction="none") for m in (gt, nn))
        found = check_torch(
            ours, theirs, given, grad=[True, True, "Cosine" not in name][: len(given)], dy=torch.ones_like
        )
        complaints += [f"{name}({kwargs}) {value}: {line}" for line in found]
    report(complaints)


def adaptive(library, dtype, **options):
    torch.manual_seed(3)
    return library.AdaptiveLogSoftmaxWithLoss(8, 20, [4, 10], div_value=2.0, **options).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_adaptive_softmax(dtype):
    """Rows of the shortlist and of every cluster, of one alone, a row without a batch; all log-probabilities; predictions."""
    ours, theirs = (adaptive(m, dtype, head_bias=True) for m in (gt, nn))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    every = torch.tensor([3, 19, 0, 4, 10, 9], device=DEVICE)
    assert not check_torch(ours, theirs, [draw((6, 8), dtype, seed=4), every])
    ours, theirs = (adaptive(m, torch.float64) for m in (gt, nn))
    for target in ([1, 2], [15], 5):  # of which some parameters have no gradients
        target = torch.tensor(target, device=DEVICE)
        calls = [lambda x, m=m, t=target: tuple(m(x, t)) for m in (ours, theirs)]
        assert not check_torch(*calls, [draw((*target.shape, 8), torch.float64, seed=4)])
    x = draw((5, 8), torch.float64)
    assert not check_torch(ours.log_prob, theirs.log_prob, [x])
    assert torch.equal(ours.predict(x), theirs.predict(x))


@pytest.mark.parametrize(
    "shape, target", [((2, 8), [3, 20]), ((2, 8), [1]), ((8,), [1]), ((1, 8), 1), ((1, 8), [[1]]), ((1, 7), [1])]
)
def test_adaptive_softmax_raises_as_torch(shape, target):
    for library in (gt, nn):
        with pytest.raises(RuntimeError):
            adaptive(library, torch.float32)(torch.ones(shape, device=DEVICE), torch.tensor(target, device=DEVICE))


def test_nll_loss_2d():
    x, target = draw((2, 3, 4, 2), torch.float32), targets((2, 3, 4, 2), 3, "labels")
    with pytest.warns(FutureWarning, match="NLLLoss2d"):
        ours = gt.NLLLoss2d(ignore_index=1)
    with pytest.warns(FutureWarning, match="NLLLoss2d"):
        theirs = nn.NLLLoss2d(ignore_index=1)
    assert not check_torch(ours, theirs, [x, target])
