"""What losses share: their reductions, and which labels are right."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.definition import ArgumentError, LabelError

REDUCTIONS = ("mean", "sum", "none")


def require_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ArgumentError("reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))


def require_labels(target: Any, classes: int, ignore_index: int) -> None:
    """Raises LabelError for a label outside [0, C) that is not ``ignore_index``."""
    wrong = (target < 0) | (target >= classes)
    if wrong.any() and (wrong := wrong & (target != ignore_index)).any():
        rule = f"0 ≤ target < C = {classes}, or target = ignore_index = {ignore_index}"
        raise LabelError("target", rule, np.asarray(target)[wrong][0])
