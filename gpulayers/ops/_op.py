"""An op as it is called: its outputs, or its outputs and what computes the gradients; and the rules that many ops share.

What an op is stands in ``gpulayers/definition.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from gpulayers import dispatch
from gpulayers.arrays import FLOATS, Spec
from gpulayers.definition import Definition, KindError, LabelError, ShapeError, UnsupportedTypeError
from gpulayers.definition import (
    Rule as Rule,
)
from gpulayers.definition import (
    RuleError as RuleError,
)


class Op(Definition):
    """One op. Call it for its outputs; ``record`` it for its outputs and a ``Call`` that computes the gradients."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The output, or the tuple of outputs where there are several; nothing is saved."""
        plan, values = dispatch.plan_for(self, inputs, (), options)
        outputs, _ = plan.run_forward(*inputs, **values)
        return outputs[0] if len(outputs) == 1 else outputs

    def record(self, *inputs: Any, needs: Sequence[str] | None = None, **options: Any) -> tuple[Any, dispatch.Call]:
        """(output or tuple of outputs, call): ``call.backward(dy, …)`` gives one gradient or None for each input.

        needs: names of the inputs whose gradients will be wanted; by default every differentiable one that came.
        """
        if needs is None:
            needs = [n for n, x in zip(self.inputs, inputs) if x is not None and n in self.differentiable]
        if not needs:
            can = f"of {', '.join(self.differentiable)}" if self.differentiable else "no input has one"
            raise ValueError(f"{self.name}: record: the rule is at least one gradient that is needed ({can}); got none")
        outputs, call = dispatch.forward(self, inputs, tuple(needs), options)
        assert call is not None
        return (outputs[0] if len(outputs) == 1 else outputs), call


# --- rules that many ops share ---------------------------------------------------------------------------------------


def require_float(argument: str, x: Spec) -> None:
    if x.dtype not in FLOATS:
        raise UnsupportedTypeError(argument, "dtype ∈ {float64, float32, float16, bfloat16}", x.dtype)


def require_same_dtype(x: Spec, **others: Spec | None) -> None:
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype:
            raise ShapeError(name, f"{name}.dtype = x.dtype", f"{name} {other.dtype} with x {x.dtype}")


def require_shape(argument: str, x: Spec, shape: Sequence[Any], rule: str) -> None:
    """Sizes of None are not known and fit anything."""
    fits = len(x.shape) == len(shape) and all(a is None or b is None or a == b for a, b in zip(x.shape, shape))
    if not fits:
        raise ShapeError(argument, f"{rule} = {list(shape)}", list(x.shape))


def normal_axis(axis: int, ndim: int, argument: str = "axis") -> int:
    """``axis`` counted from the front. Raises IndexError as torch does (a 0-dim array has axes -1 and 0)."""
    last = max(ndim, 1)
    try:
        axis = operator.index(axis)
    except TypeError:
        raise KindError(argument, "an integer", repr(axis)) from None
    if not -last <= axis < last:
        raise LabelError(argument, f"{-last} ≤ {argument} < {last}", axis)
    return axis % last
