"""Indices as rows that are 1 in one place."""

from __future__ import annotations

import operator
from typing import Any

from gpulayers.arrays import Spec, int64, namespace
from gpulayers.definition import ArgumentError, KindError, LabelError, Rule
from gpulayers.ops._op import Op


def one_hot_rule(indices: Spec, *, needs: tuple = (), num_classes: int) -> Rule:
    if indices.dtype.kind not in "iu":
        raise KindError("indices", "an integer dtype", indices.dtype)
    try:
        count = operator.index(num_classes)
    except TypeError:
        raise KindError("num_classes", "an integer", repr(num_classes)) from None
    if count < 1:
        raise ArgumentError("num_classes", "num_classes ≥ 1", count)
    return Rule({"y": Spec((*indices.shape, count), int64)}, {}, {"num_classes": count})


def _check(indices: Any, *, num_classes: int, **_: Any) -> None:
    """Raises LabelError for an index that is no class."""
    if 0 in indices.shape:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= num_classes:
        raise LabelError("indices", f"0 ≤ index < num_classes = {num_classes}", low if low < 0 else high)


def one_hot_forward(indices: Any, *, needs: tuple = (), num_classes: int) -> tuple[tuple, dict]:
    """y[…, c] = 1 where indices[…] = c, else 0.

    indices: any shape, integers from 0 to num_classes − 1. Returns y (*indices.shape, num_classes), int64. Raises
    LabelError for an index out of range on the CPU; on a GPU its row is 0. As torch.nn.functional.one_hot.
    """
    xp = namespace(indices)
    return ((indices[..., None] == xp.arange(num_classes)).astype(int64),), {}


one_hot = Op(one_hot_rule, one_hot_forward, check=_check, family="embedding")
