"""Whether a row's bits hang on that row alone, or also on how many are computed with it: that is quicker."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

PRODUCTS = frozenset({"linear", "linears", "linear_cross_entropy", "attention", "attention_decode"})
"""Ops whose definition multiplies matrices, which BLAS does in another order for each number of rows."""
OPS = PRODUCTS | {
    "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "softmax", "softmin", "log_softmax", "cross_entropy",
    "nll_loss", "mse", "pointwise_loss",
}  # fmt: skip
"""Ops that batch-invariant mode is for: their results, losses of each row, and gradients of what has rows. Gradients of
weights, and losses summed or averaged, are sums over all rows."""

_on: contextvars.ContextVar[bool] = contextvars.ContextVar("batch_invariant", default=False)


def on() -> bool:
    """Whether the launch at hand is one of the mode's. Ask in the caller's thread, not in one of a pool."""
    return _on.get()


def reason_against(op: str, backend: str, device: str, specs: Sequence[Any]) -> str | None:
    """Why a backend cannot keep the mode's promise for a call."""
    if op not in OPS:
        return None
    if op == "attention" and specs[6] is not None:
        return "batch-invariant: blocks of packed sequences lie across them"
    if backend == "aten" or (backend == "definition" and (op in PRODUCTS or device != "cpu")):
        return "batch-invariant: a row's bits hang on the other rows"
    return None


class Invariant(NamedTuple):
    """A launcher in the mode, in whatever thread it is called."""

    launcher: Callable

    def __call__(self, *args: Any, **options: Any) -> Any:
        token = _on.set(True)
        try:
            return self.launcher(*args, **options)
        finally:
            _on.reset(token)
