"""Every loss against torch.nn's own class: outputs, gradients and errors, call by call."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch_calls import ANY, DEVICE, DTYPES, draw, grid, report, some_layouts

import gpulayers.torch as gt
from gpulayers.testing.check_torch import check_torch, same_strides
from gpulayers.testing.torch_cases import TARGETS

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*POINTWISE, *ROWS])
def test_loss_of_arrays(name, dtype):
    complaints = []
    reductions = ("mean", "sum", "none", *(("batchmean",) if name == "KLDivLoss" else ()))
    shapes = (
        ANY if name in POINTWISE else [(4, 5), (5,), (2, 3), (1, 4), *([(0, 3)] if name != "MultiMarginLoss" else [])]
    )
    for number, (kwargs, shape) in enumerate(itertools.product((POINTWISE | ROWS)[name], shapes)):
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
        if name == "MultiMarginLoss" and dtype in (torch.float16, torch.bfloat16):  # torch has none on a CPU
            theirs = lambda x, t, m=theirs: m.to(torch.promote_types(x.dtype, torch.float32))(  # noqa: E731
                x.to(torch.promote_types(x.dtype, torch.float32)), t
            ).to(x.dtype)
        found = check_torch(
            ours, theirs, [same_strides(t, dtype if t.is_floating_point() else None) for t in given], grad=grad
        )
        complaints += [f"{name}({how}) {list(shape)} {[t.stride() for t in given]}: {line}" for line in found]
    report(complaints)


def test_every_loss_is_judged():
    losses = {n for n, c in vars(gt).items() if n.endswith("Loss") and issubclass(c, nn.Module)}
    assert losses == LOSSES.keys() | POINTWISE.keys() | ROWS.keys() | {"LinearCrossEntropyLoss", "CTCLoss"}
