"""Weights: moved and at their start, zero, frozen, changed after the layer was built."""

from __future__ import annotations

import numpy as np

from gpulayers.arrays import FLOATS
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check import gradients
from gpulayers.testing.layer_check._subject import Subject, close, is_float, said, same_bits, which


def changed(subject: Subject) -> None:
    """A weight that is changed after a call is seen by the next one."""
    for training in (True, False):
        for name in subject.layer.named_weights():
            layer = subject.fresh(training, of=subject.layer)
            subject.both(subject.xs, layer=layer)  # what a layer may have kept
            other = subject.fresh(training, of=subject.layer)
            layer.zero_grad()
            ours = subject.fresh(training).named_weights()
            for n, w in layer.named_weights().items():  # running statistics start from the same place
                w.data = np.array(ours[n].data)
            weight = layer.named_weights()[name]
            if weight.dtype not in FLOATS or not weight.size:
                continue
            new = np.array(weight.data) * 0.75
            weight.data, other.named_weights()[name].data = new, new.copy()
            want = subject.both(subject.xs, layer=other)
            got = subject.both(subject.xs, want.dys, layer=layer)
            if not all(close(a, b) for a, b in zip((*got.ys, *got.dxs), (*want.ys, *want.dxs))):
                raise CheckError(
                    f"a change of {name} after the first call does not reach the next: "
                    "the layer goes on with something that it computed from the old one"
                )


def reach(subject: Subject) -> None:
    """Built once, then changed: the output follows the weights, not what build copied from them."""
    moved, start = subject.fresh(), subject.fresh(of=subject.at_start)
    before, after = subject.both(subject.xs, layer=start), subject.both(subject.xs, layer=moved)
    if any(g.any() for g in after.weights.values()) and all(map(same_bits, before.ys, after.ys)):
        raise CheckError(
            f"the output is the same whatever {', '.join(after.weights)} may be, yet it has a gradient: "
            "forward uses a copy from before the weights were changed"
        )


def special(subject: Subject) -> None:
    """Gradients where the weights start, where one of them is zero, and where it has the other sign."""
    text = gradients.wrong(subject, subject.xs, of=subject.at_start, quick=True)
    if text is not None and "random and finite" not in text:
        raise CheckError(f"it is wrong for the weights that it starts with: {text}")
    for name, weight in subject.layer.named_weights().items():
        if not weight.trainable or weight.dtype not in FLOATS or not weight.size:
            continue
        zero = np.array(weight.data)
        zero.reshape(-1)[0] = 0.0
        for what, data in ((f"an element of {name} is zero", zero), (f"{name} has the other sign", -1.0 * weight.data)):
            layer = subject.fresh()
            layer.named_weights()[name].data = data
            ys = subject.forward(subject.fresh(of=layer), subject.xs)
            if not all(np.isfinite(y).all() for y in ys if is_float(y)):
                continue  # it divides by the weight, or takes its root
            text = gradients.wrong(subject, subject.xs, of=layer, quick=True)
            if text is not None:
                raise CheckError(f"it is wrong where {what}: {text}")


def frozen(subject: Subject) -> None:
    """With a weight frozen, the other gradients are what they were."""
    names = [n for n, w in subject.layer.named_weights().items() if w.trainable]
    want = subject.both(subject.xs)
    for some in dict.fromkeys((*((n,) for n in names), tuple(names))):
        if not some:
            continue
        layer = subject.fresh()
        for n in some:
            layer.named_weights()[n].trainable = False
        got = subject.both(subject.xs, want.dys, layer=layer)
        what = f"with {' and '.join(some)} frozen"
        if not all(close(a, b) for a, b in zip(got.ys, want.ys)):
            raise CheckError(f"{what} the output is another, for {said(subject.xs)}")
        for i, (a, b) in enumerate(zip(got.dxs, want.dxs)):
            if not close(a, b):
                raise CheckError(f"{what} d{which(i, subject.xs)} is wrong, for {said(subject.xs)}")
        for n, g in got.weights.items():
            if not close(g, want.weights[n]):
                raise CheckError(f"{what} the gradient of {n} is wrong, for {said(subject.xs)}")
        still = layer.named_weights()
        for n in some:
            if not same_bits(np.asarray(still[n].data), np.asarray(subject.layer.named_weights()[n].data)):
                raise CheckError(f"{what} a call changed it")
