"""What an op is: a rule, a plain forward and a plain backward, and the errors a rule raises.

An op `f` of the family file ``ops/<family>.py`` is three functions and one object over them::

    def f_rule(x, *, needs, axis): ...              -> Rule      from metadata (Spec) and options alone
    def f_forward(x, *, needs, axis): ...           -> outputs, saved
    def f_backward(dys, saved, *, inputs, needs, axis): ...  -> one gradient or None for each input
    f = Op(f_rule, f_forward, f_backward)

- ``needs`` names the inputs whose gradients will be wanted; empty, and nothing is saved.
- ``outputs`` is a tuple of arrays; ``saved`` a dict of arrays by name, the same from every backend.
- ``dys`` has one entry for each output, None where that output was not used, and may have one more for what an op
  ``joins``. ``inputs`` are the inputs' specs.
- Nothing returned aliases an input; saved inputs are the inputs themselves.

Launchers in ``kernels/<backend>/<family>.py`` have the same names and parameters, and one more, ``empty``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gpulayers.arrays import Spec


class Rule(NamedTuple):
    """What a call yields, derived from metadata alone; the only place where shapes are derived."""

    outputs: dict[str, Spec]
    saved: dict[str, Spec] = {}
    options: dict[str, Any] | None = None
    """The options in their one normal form (axis=-1 → 1), as forward and backward get them; None: as they came."""
    grads: dict[str, Spec] | None = None
    """Gradients whose memory order is not their input's; others have the input's shape, dtype and order."""


class RuleError(Exception):
    """A call that an op's rule refuses. ``where`` names the layer (or the op) that was called."""

    def __init__(self, argument: str, rule: str, came: Any):
        super().__init__(argument, rule, came)
        self.where = ""
        self.argument, self.rule, self.came = argument, rule, came

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        return f"{where}{self.argument}: the rule is {self.rule}; got {self.came}"


class ShapeError(RuleError, RuntimeError):
    """Shapes or dtypes that do not fit together (torch raises RuntimeError)."""


class ArgumentError(RuleError, ValueError):
    """An option outside its range (torch raises ValueError)."""


class LabelError(RuleError, IndexError):
    """A label out of range (torch raises IndexError)."""


class KindError(RuleError, TypeError):
    """An argument of the wrong kind (torch raises TypeError)."""


class UnsupportedTypeError(RuleError, NotImplementedError):
    """A dtype that the op is not defined for (torch raises NotImplementedError)."""


class Definition:
    """All that an op is, but for how it is called (``ops/_op.py``).

    updates: the inputs that are written in place; such an op has no backward.
    dynamic: options that change from call to call (a learning rate, a dropout's p): no plan depends on them, so the
    rule does not see them.
    guard: f_guard(*inputs, **options) raises for values of dynamic options that are wrong; it runs on every call.
    check: f_check(*inputs, **options) raises for wrong data (a label out of range). It looks at arrays on the CPU only;
    on a GPU looking would mean to wait, and kernels answer with NaN.
    adds: the output that is the sum of the first two inputs, rounded to their dtype (the wider), where all else comes from
    that sum alone: the gradients of both inputs are one array where they have one dtype.
    joins: the input of which ``dys`` may hold one gradient more, after the outputs': what came back to it from elsewhere,
    which backward adds to its own before that is rounded.
    rounds: what it computes first is rounded to x's dtype before the rest takes it, forward and backward, so the plain
    formula in 16 bits is the definition on 16-bit arrays.
    first: the backend that is asked before all others, where a policy's order is the usual one.
    family: its family's name, where the definition stands in a private file beside the family's.
    kernels: for an op of your own, {"triton": module with its launchers, or its name, "cuda": …}.
    """

    def __init__(
        self,
        rule: Callable[..., Rule],
        forward: Callable[..., tuple[tuple, dict]],
        backward: Callable[..., tuple] | None = None,
        *,
        differentiable: Sequence[str] | None = None,
        updates: Sequence[str] = (),
        dynamic: Sequence[str] = (),
        guard: Callable[..., None] | None = None,
        kernels: Mapping[str, Any] | None = None,
        check: Callable[..., None] | None = None,
        family: str = "",
        adds: str = "",
        joins: str = "",
        rounds: bool = False,
        first: str = "",
    ):
        self.rule, self.forward, self.backward, self.check, self.guard = rule, forward, backward, check, guard
        self.name = forward.__name__.removesuffix("_forward")
        self.family = family or forward.__module__.rpartition(".")[2]
        self.updates, self.dynamic, self.kernels = tuple(updates), frozenset(dynamic), dict(kernels or {})
        parameters = inspect.signature(forward).parameters.values()
        self.inputs = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self.required = sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
        self.options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "needs"}
        self.needed = tuple(n for n, default in self.options.items() if default is inspect.Parameter.empty)
        self.differentiable = () if backward is None else tuple(differentiable or self.inputs)
        self.rounds, self.joins = rounds, joins
        self.first = first
        self.adds, self.summands = adds, self.inputs[:2] if adds else ()
        self.__doc__ = forward.__doc__

    def again(self, needs: Sequence[str], specs: Sequence[Any]) -> str:
        """The input of ``needs`` whose gradient is the array that the first's is; "" for none. specs: of all inputs."""
        both = bool(self.summands) and set(self.summands) <= set(needs)
        return self.summands[1] if both and specs[0].dtype == specs[1].dtype else ""

    def __repr__(self) -> str:
        return f"<op {self.family}.{self.name}>"
