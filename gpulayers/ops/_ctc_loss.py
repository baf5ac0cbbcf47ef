"""Connectionist temporal classification: the likelihood of a sequence of labels, summed over the ways to align it."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, arranged, compute_dtype, namespace, up
from gpulayers.definition import Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops._loss import require_reduction
from gpulayers.ops._op import Op, require_float, require_shape


def ctc_loss_rule(
    x: Spec,
    targets: Spec,
    input_lengths: Spec,
    target_lengths: Spec,
    *,
    needs: tuple = (),
    blank: int = 0,
    zero_infinity: bool = False,
    reduction: str = "mean",
) -> Rule:
    require_float("x", x)
    require_reduction(reduction)
    if x.ndim != 3:
        raise ShapeError("x", "x.shape = (T, N, C)", list(x.shape))
    t, n, c = x.shape
    given = {"targets": targets, "input_lengths": input_lengths, "target_lengths": target_lengths}
    for name, each in given.items():
        if each.dtype.kind not in "iu":
            raise UnsupportedTypeError(name, "an integer dtype", each.dtype)
    if targets.ndim != 2:
        raise ShapeError("targets", "targets.shape = (N, S), padded", list(targets.shape))
    require_shape("targets", targets, (n, targets.shape[1]), "targets.shape = (N, S)")
    for name in ("input_lengths", "target_lengths"):
        require_shape(name, given[name], (n,), f"{name}.shape = (N,)")
    if c is not None and not 0 <= blank < c:
        raise ShapeError("blank", f"0 ≤ blank < C = {c}", blank)
    work = compute_dtype(x.dtype)
    kept = {"alpha": Spec((n, t, 2 * targets.shape[1] + 1), work), "nll": Spec((n,), work)}
    y = Spec((n,) if reduction == "none" else (), x.dtype)
    return Rule({"y": y}, {"x": x, **given, **kept} if needs else {}, None, {"x": Spec(x.shape, x.dtype)})


def _check(x: np.ndarray, targets: Any, input_lengths: Any, target_lengths: Any, **_: Any) -> None:
    for name, each, most in (
        ("input_lengths", input_lengths, x.shape[0]),
        ("target_lengths", target_lengths, targets.shape[1]),
    ):
        if (wrong := (each < 0) | (each > most)).any():
            raise ShapeError(name, f"0 ≤ {name} ≤ {most}", np.asarray(each)[wrong][0])
    read = np.arange(targets.shape[1]) < np.asarray(target_lengths)[:, None]
    if (wrong := read & ((targets < 0) | (targets >= x.shape[2]))).any():
        raise ShapeError("targets", f"0 ≤ targets < C = {x.shape[2]}", np.asarray(targets)[wrong][0])


def _extended(targets: Any, target_lengths: Any, blank: int) -> tuple[Any, Any, Any]:
    """(the labels with a blank before, between and after them (N, 2 S + 1), which count, which may follow the label before
    without a blank)"""
    xp, (n, s) = namespace(targets), targets.shape
    places = xp.arange(2 * s + 1)
    inside = places < 2 * xp.expand_dims(target_lengths, 1) + 1
    blanks = xp.full((n, s + 1, 1), blank, dtype=targets.dtype)
    pairs = xp.concatenate([blanks[:, :s], xp.expand_dims(targets, 2)], 2).reshape(n, 2 * s)
    labels = xp.where(inside, xp.concatenate([pairs, blanks[:, s]], 1), blank)
    before = xp.concatenate([labels[:, :1] * 0 + blank, labels[:, :1] * 0 + blank, labels], 1)[:, : 2 * s + 1]
    return labels, inside, inside & (labels != before)


def _moved(a: Any, by: int) -> Any:
    """a[:, s − by], −∞ beyond the ends."""
    xp = namespace(a)
    edge = xp.full((a.shape[0], min(abs(by), a.shape[1])), -xp.inf, dtype=a.dtype)
    return xp.concatenate([edge, a[:, :-by]] if by > 0 else [a[:, -by:], edge], 1)


def _of_labels(v: Any, labels: Any) -> Any:
    return namespace(v).take_along_axis(v, labels, 1)


def ctc_loss_forward(
    x: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    *,
    needs: tuple = (),
    blank: int = 0,
    zero_infinity: bool = False,
    reduction: str = "mean",
) -> tuple[tuple, dict]:
    """−log p(targets) for each sequence, where p sums over all ways to stretch the labels to the input's length: each label
    once or more, with blanks between them, of which those between two equal labels are a must.

    x: (T, N, C), float: log-probabilities of the C classes. targets: (N, S), integers, of which the first
    ``target_lengths[n]`` are read; input_lengths, target_lengths: (N,), integers. What cannot be aligned has the loss ∞,
    with zero_infinity 0. reduction: "mean" divides each loss by its target's length (at least 1) and averages, "sum",
    or "none": y of (N,). Returns y in x's dtype. Lengths and labels out of range raise RuntimeError on the CPU.
    Source: Graves et al., "Connectionist Temporal Classification" (2006).
    """
    xp, v = namespace(x), up(x)
    labels, inside, skips = _extended(targets, target_lengths, blank)
    none = xp.asarray(-xp.inf, dtype=v.dtype)
    lengths, ends = xp.expand_dims(input_lengths, 1), xp.expand_dims(2 * target_lengths.astype(np.int64), 1)
    places = xp.arange(labels.shape[1])
    rows = []
    row = last = xp.where(places < 0, v[:1, :1, 0].sum(), none) + xp.zeros_like(labels, dtype=v.dtype)
    with np.errstate(all="ignore"):
        for t in range(x.shape[0]):
            here = _of_labels(v[t], labels)
            if t:
                paths = xp.logaddexp(row, _moved(row, 1))
                new = here + xp.logaddexp(paths, xp.where(skips, _moved(row, 2), none))
            else:
                new = xp.where(places < 2, here, none)
            row = xp.where(inside & (lengths > t), new, none)
            last = xp.where(lengths > t, row, last)
            rows.append(row)
        ways = xp.where((places == ends) | (places == ends - 1), last, none)
        top = ways.max(1)
        nll = -(xp.log(xp.exp(ways - xp.where(top == none, 0, top)[:, None]).sum(1)) + top)
        nll = xp.where(input_lengths == 0, xp.where(target_lengths == 0, 0, -none), xp.where(top == none, -none, nll))
        nll = nll.astype(v.dtype, copy=False)
        y = xp.where(nll == xp.inf, 0, nll) if zero_infinity else nll
        if reduction == "mean":
            y = y / xp.maximum(target_lengths, 1).astype(v.dtype)
            y = y.mean() if y.size else xp.asarray(xp.nan)
        y = y.sum() if reduction == "sum" else y
    y = xp.asarray(y).astype(x.dtype, copy=False)
    if not needs:
        return (y,), {}
    given = {"x": x, "targets": targets, "input_lengths": input_lengths, "target_lengths": target_lengths}
    alpha = xp.stack(rows, 1) if rows else xp.zeros((*labels.shape[:1], 0, labels.shape[1]), dtype=v.dtype)
    return (y,), given | {"alpha": alpha, "nll": nll}


def ctc_loss_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    blank: int = 0,
    zero_infinity: bool = False,
    reduction: str = "mean",
) -> tuple:
    """dx = dy (exp(x) − the probability of each class at each time, given the targets), 0 after a sequence's end.

    That is the gradient by the logits whose log softmax x is, and as good a one by x, since the backward of log softmax
    leaves it as it is. Of an infinite loss it is NaN, with zero_infinity 0.
    """
    (dy,), x, nll = dys, saved["x"], saved["nll"]
    xp, v, input_lengths = namespace(x), up(x), saved["input_lengths"]
    labels, inside, skips = _extended(saved["targets"], saved["target_lengths"], blank)
    none = xp.asarray(-xp.inf, dtype=v.dtype)
    lengths = xp.expand_dims(input_lengths, 1)
    ends = xp.expand_dims(2 * saved["target_lengths"].astype(np.int64), 1)
    places = xp.arange(labels.shape[1])
    final = (places == ends) | (places == ends - 1)
    hot = (xp.expand_dims(labels, 2) == xp.arange(x.shape[2])).astype(v.dtype)
    row, found = xp.zeros_like(labels, dtype=v.dtype) + none, []
    with np.errstate(all="ignore"):
        g = up(dy) + xp.zeros_like(nll)
        if reduction == "mean":
            g = g / xp.maximum(saved["target_lengths"], 1).astype(v.dtype) / max(len(nll), 1)
        g = xp.where(nll == xp.inf, 0 if zero_infinity else xp.nan, g)
        for t in reversed(range(x.shape[0])):
            here = _of_labels(v[t], labels)
            jumps = _moved(xp.where(skips, row, none), -2)
            paths = xp.logaddexp(xp.logaddexp(row, _moved(row, -1)), jumps)
            start = xp.where(final, here, none)
            new = xp.where(lengths == t + 1, start, here + paths)
            row = xp.where(inside & (lengths > t), new, none)
            both = saved["alpha"][:, t] + row
            given = xp.where(both == none, 0, xp.exp(both + xp.expand_dims(nll, 1) - here))
            given = xp.where(xp.expand_dims(nll == xp.inf, 1), 0, given)
            slope = xp.exp(v[t]) - xp.matmul(xp.expand_dims(given, 1), hot)[:, 0]
            found.append(xp.where(lengths > t, slope * xp.expand_dims(g, 1), 0))
    dx = xp.stack(found[::-1]) if found else xp.zeros_like(v)
    return arranged(dx.astype(x.dtype, copy=False), None), None, None, None


ctc_loss = Op(ctc_loss_rule, ctc_loss_forward, ctc_loss_backward, differentiable=("x",), check=_check, family="loss")
