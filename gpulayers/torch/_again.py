"""An optimizer's step that is like the one before: its kernels are launched by a tape, with what changes from step to
step (addresses, lr, the count) as its arguments.

All that could have changed since is looked at, in a few calls for all tensors together: who the parameters and their state
are, which have gradients, metadata, values that somebody wrote into the count of steps.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gpulayers import dispatch
from gpulayers.torch._guards import checker
from gpulayers.torch._op import is_plain

_gradient = operator.attrgetter("grad")


def _same(now: Sequence[Any], then: Sequence[Any]) -> bool:
    return len(now) == len(then) and all(map(operator.is_, now, then))


class Again:
    """A group's update, as it was made.

    names: the tensors of a parameter's state that are updated. Every parameter's "step" becomes a part of one array, so
    that counting is one operation, and a glance at its version shows whether anybody else wrote to one.
    """

    def __init__(self, optimizer: Any, group: dict, params: list[Tensor], names: Sequence[str], plan: dispatch.Plan):
        self.forward: Any = plan.run_forward
        self.options, self.policy = plan.options, dispatch._policy.get()
        self.all, self.params = list(group["params"]), params
        served = set(map(id, params))
        self.rest = [p for p in self.all if id(p) not in served]
        self.states = list(optimizer.state.values())
        self.own = [optimizer.state[p] for p in params]
        self.moments = [s[name] for name in names for s in self.own]
        self._count(torch.stack([s["step"] for s in self.own]))
        self.kept = self._kept()
        self.grads = [*map(_gradient, params)]
        self.check = checker([*params, *self.grads], False)

    def _count(self, counter: Tensor) -> None:
        """Every parameter's step is a part of ``counter``."""
        self.counter, self.version, self.count = counter, counter._version, int(counter[0])
        for i, state in enumerate(self.own):
            state["step"] = counter[i]

    def _kept(self) -> list[Tensor]:
        """All that the parameters' states hold."""
        return [*chain.from_iterable(map(dict.values, self.own))]

    @staticmethod
    def serves(lists: Sequence[list[Tensor]]) -> bool:
        """Whether these are tensors whose memory a tape may be given: no parts of what is spread over processes."""
        return all(is_plain(t) for tensors in lists for t in tensors)

    def step(self, optimizer: Any, group: dict, values: dict[str, Any]) -> bool:
        """Make the step; False, and nothing is done, where it is not like the one before.

        values: the op's dynamic options, but for the number of the step.
        """
        if not self._is_whole(optimizer, group):
            return False
        grads = [*map(_gradient, self.params)]
        if (self.rest and any([p.grad is not None for p in self.rest])) or not self.check(*self.params, *grads):
            return False  # None is no tensor, so that the check refuses it
        now = values | {"step": self.count + 1}
        given = (*self.params, *grads, *self.moments, *self.forward.varying(**now))
        if self.forward.kind(now).play(*given) is NotImplemented:
            return False
        torch.autograd.graph.increment_version(self.params)  # nobody differentiates through the others
        self.counter.add_(1)
        self.count, self.version = self.count + 1, self.counter._version
        return True

    def _is_whole(self, optimizer: Any, group: dict) -> bool:
        """Whether parameters and state are the tensors that they were, and the counts what was counted here."""
        if not _same(group["params"], self.all) or not _same([*optimizer.state.values()], self.states):
            return False
        counted = self.counter._version == self.version and self.policy is dispatch._policy.get()
        return counted and _same(self._kept(), self.kept)
