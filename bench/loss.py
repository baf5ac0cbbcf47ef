"""Losses of classifiers, language models, segmentation and regression."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F

from gpulayers.ops.loss import (
    cross_entropy,
    ctc_loss,
    linear_cross_entropy,
    mse,
    multilabel_margin,
    nll_loss,
    pointwise_loss,
    row_loss,
)

from .cases.case import ONE_ARCH, Case, Labels, Other, Squares, sweep


def _cross_entropy(name: str, *shape: int, cpu: bool = False, smoothing: float = 0.0) -> Case:
    def theirs(x: Any, target: Any) -> Any:
        return F.cross_entropy(x, target, label_smoothing=smoothing)

    labels = Labels((shape[0], *shape[2:]), shape[1])
    options = {"label_smoothing": smoothing} if smoothing else {}
    title = f"{name} {'×'.join(map(str, shape))}"
    # Liger computes the gradient in the forward, in place of the logits.
    liger = Other(partial(_liger, label_smoothing=smoothing), "liger_kernel", directions=("both",), in_place=True)
    others = {"liger": liger} if len(shape) == 2 else {}
    return Case(cross_entropy, title, (shape, labels), options, theirs, cpu=cpu, needs=("x",), others=others)


def _liger(x: Any, target: Any, label_smoothing: float) -> Any:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(x, target, label_smoothing=label_smoothing)


def _nll_loss(name: str, *shape: int, cpu: bool = False) -> Case:
    labels = Labels((shape[0], *shape[2:]), shape[1])
    return Case(
        nll_loss, f"{name} {'×'.join(map(str, shape))}", (shape, labels), {}, F.nll_loss, cpu=cpu, hardly_read=("x",)
    )


def _linear(name: str, tokens: int, width: int, classes: int, cpu: bool = False) -> Case:
    def theirs(x: Any, weight: Any, target: Any) -> Any:
        return F.cross_entropy(F.linear(x, weight), target)

    shapes = (tokens, width), (classes, width), Labels((tokens,), classes)
    others = {"liger": Other(_liger_linear, "liger_kernel", directions=("both",))}
    flops, needs = 2 * tokens * width * classes, ("x", "weight")
    title = f"{name}, {tokens}×{width} to {classes}"
    return Case(linear_cross_entropy, title, shapes, {}, theirs, flops, cpu=cpu, needs=needs, most=2.0, others=others)


def _liger_linear(x: Any, weight: Any, target: Any) -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, target)


_POINTWISE = {
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "kl_div": partial(F.kl_div, reduction="batchmean", log_target=True),
    "smooth_l1": F.smooth_l1_loss,
}


def _pointwise(loss: str, *shape: int, cpu: bool = False, **options: Any) -> Case:
    title = f"{loss} {'×'.join(map(str, shape))}"
    return Case(
        pointwise_loss, title, (shape, shape), {"loss": loss, **options}, _POINTWISE[loss], cpu=cpu, needs=("x",)
    )


def cases() -> list[Case]:
    return [
        _linear("digits", 128, 64, 10, cpu=True),
        _linear("Llama-3 vocabulary", 8192, 4096, 128256)._replace(headline=True),
        _linear("GPT-2", 8192, 768, 50257),
        _cross_entropy("digits", 128, 10, cpu=True),
        _cross_entropy("ImageNet", 256, 1000, cpu=True, smoothing=0.1),
        _cross_entropy("GPT-2", 64, 50257, cpu=True),
        _cross_entropy("Llama-2 vocabulary", 8192, 32000),
        _cross_entropy("Llama-3 vocabulary", 8192, 128256)._replace(headline=True),
        _cross_entropy("segmentation", 16, 21, 512, 512),
        _nll_loss("ImageNet", 256, 1000, cpu=True),
        _nll_loss("small segmentation", 4, 21, 128, 128, cpu=True),
        _nll_loss("Llama-2 vocabulary", 8192, 32000),
        _nll_loss("segmentation", 16, 21, 512, 512),
        Case(mse, "small 64×10", ((64, 10), (64, 10)), {}, F.mse_loss, needs=("x",)),
        Case(mse, "autoencoder 256×3×32²", ((256, 3, 32, 32),) * 2, {}, F.mse_loss, needs=("x",)),
        Case(mse, "8192×8192", ((8192, 8192),) * 2, {}, F.mse_loss, cpu=False, needs=("x",), headline=True),
        _pointwise("bce_with_logits", 256, 1000, cpu=True),
        _pointwise("bce_with_logits", 8192, 8192)._replace(headline=True),
        _pointwise("kl_div", 8192, 32000, log=True, reduction="batchmean"),
        _pointwise("smooth_l1", 256, 3, 32, 32, cpu=True),
        Case(multilabel_margin, "256×80", ((256, 80), Labels((256, 80), 80)), {}, F.multilabel_margin_loss, cpu=False),
        Case(row_loss, "triplets 4096×128", ((4096, 128),) * 3, {"loss": "triplet_margin"}, F.triplet_margin_loss),
        _ctc("speech", 1600, 32, 32, 200),
        *sweep("classes, 4,096 rows", [(n, _cross_entropy("", 4096, n)) for n in (1024, 4096, 16384, 32768, 131072)]),
    ]


def audits() -> list[Case]:
    """Long rows, short rows and pixels; classes as indices and as probabilities; and every reduction of mse."""
    found = [_linear("Llama-3 vocabulary", 8192, 4096, 128256)]
    every = ((4096, 1024), (32000, 1024), Labels((4096,), 32000), (32000,), (32000,))
    options = {"softcap": 30.0, "z_loss": 1e-4, "reduction": "none", "label_smoothing": 0.1}
    found.append(Case(linear_cross_entropy, "every option", every, options, archs=ONE_ARCH))
    for shape, archs in (((8192, 128256), (80, 90, 100)), ((65536, 1000), ONE_ARCH), ((8, 21, 512, 512), ONE_ARCH)):
        found.append(_cross_entropy("indices", *shape)._replace(archs=archs))
        probabilities, smoothing = (shape, shape, (shape[1],)), {"label_smoothing": 0.1}
        found.append(Case(cross_entropy, "probabilities", probabilities, smoothing, archs=archs))
        if shape[0] < 65536:
            labels = Labels((shape[0], *shape[2:]), shape[1])
            found.append(Case(nll_loss, "weighted", (shape, labels, (shape[1],)), archs=archs))
    for reduction in ("mean", "none"):
        found.append(Case(mse, reduction, ((4096, 4096),) * 2, {"reduction": reduction}))
    return found + _pointwise_audits() + _row_audits() + _ctc_audits()


def _ctc(name: str, times: int, samples: int, classes: int, labels: int) -> Case:
    """Labels are never the blank, which is the last class."""
    shapes = (
        (times, samples, classes), Labels((samples, labels), classes - 1), Labels((samples,), times), Labels((samples,), labels),
    )  # fmt: skip
    title = f"{name} {times}×{samples}×{classes}, {labels} labels"
    options = {"blank": classes - 1, "zero_infinity": True}
    return Case(ctc_loss, title, shapes, options, partial(F.ctc_loss, **options), cpu=False)


def _ctc_audits() -> list[Case]:
    """Few lanes, and as many as there can be."""
    return [_ctc("", 1600, 32, 32, 200), _ctc("", 64, 2, 5000, 4095)._replace(archs=ONE_ARCH)]


def _row_audits() -> list[Case]:
    """Each formula, of rows in one block and of rows that are walked."""
    x, long = (65536, 128), (4096, 8192)
    found = [
        Case(row_loss, "triplets", (long,) * 3, {"loss": "triplet_margin", "swap": True, "p": 3.0}),
        Case(row_loss, "short triplets", (x,) * 3, {"loss": "triplet_margin", "reduction": "none"}, archs=ONE_ARCH),
        Case(row_loss, "labels", (x, x, None, None, (128,)), {"loss": "multilabel_soft_margin"}, archs=ONE_ARCH),
    ]
    pairs, classes = (long, long, None, Labels(long[:1], 2)), (long, None, None, Labels(long[:1], 8192), long[1:])
    found.append(Case(row_loss, "cosines", pairs, {"loss": "cosine_embedding"}, archs=ONE_ARCH))
    found.append(Case(multilabel_margin, "labels", ((256, 1000), Labels((256, 1000), 1000)), archs=ONE_ARCH))
    return [*found, Case(row_loss, "classes", classes, {"loss": "multi_margin"}, archs=ONE_ARCH)]


def _pointwise_audits() -> list[Case]:
    """The formulas that take most registers, with every array; and one that takes few."""
    x, factor = (4096, 4096), (4096,)
    with_factors = (x, x, None, factor, factor)
    found = [
        Case(pointwise_loss, reduction, with_factors, {"loss": "bce_with_logits", "reduction": reduction})
        for reduction in ("mean", "none")
    ]
    for loss, shapes in (("poisson_nll", (x, x)), ("gaussian_nll", (x, x, Squares(x))), ("smooth_l1", (x, x))):
        found.append(Case(pointwise_loss, loss, shapes, {"loss": loss, "full": True}, archs=ONE_ARCH))
    return found
