"""What a benchmark measures: one call of an op on declared shapes, and what others offer for it.

Each ``bench/<family>.py`` has ``cases() -> list[Case]``, and ``audits() -> list[Case]``: calls that reach each branch of
its kernels in its largest configuration, which nobody measures and every test run compiles. The bytes an op must move
follow from its rule; a case states its flops where arithmetic bounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpulayers import arrays
from gpulayers.arrays import FLOATS, Spec, float32
from gpulayers.ops._op import Op


class Labels(NamedTuple):
    """An int64 input with values in [0, high)."""

    shape: tuple[int, ...]
    high: int


class Seeds(NamedTuple):
    """A Philox seed and offset."""


CHANNELS_LAST = (0, 2, 3, 1)
ONE_ARCH = (90,)


class Case(NamedTuple):
    op: Op
    name: str
    """The shape in a reader's words: "ResNet-50 3×3, 56²"."""
    shapes: tuple
    """One for each input: a shape (random normal values), a list of shapes, a Spec (its dtype is fixed), Labels, Seeds,
    or None."""
    options: dict[str, Any] = {}
    torch: Callable | None = None
    """torch's function for the same call: takes tensors for the inputs, gives the output."""
    flops: int = 0
    """Of the forward pass; the backward's follow (once more for each of the two GEMM gradients)."""
    cpu: bool = True
    """Measured on the CPU too (small enough for it)."""
    needs: tuple[str, ...] | None = None
    most: float = 8.0
    """The NumPy side may take at most this many times torch's CPU time; 1.5 times where a GEMM bounds it."""
    gemm: bool | None = None
    """Whether arithmetic bounds it rather than memory; None: it does where there are flops."""

    order: tuple[int, ...] | None = None
    """The memory order of arrays with four axes; None: row-major."""
    archs: tuple[int, ...] = (80, 90, 100)
    """What the tests compile it for: one (and in bfloat16 alone), where another call reaches almost the same code."""

    @property
    def by_gemm(self) -> bool:
        return bool(self.flops) if self.gemm is None else self.gemm

    def specs(self, dtype: np.dtype = float32) -> tuple:
        def one(s: Any) -> Any:
            if s is None:
                return None
            if isinstance(s, Labels):
                return Spec(s.shape, arrays.int64)
            if isinstance(s, Seeds):
                return Spec((2,), arrays.int64)
            if isinstance(s, Spec):
                return s
            if isinstance(s, list):
                return [one(a) for a in s]
            return Spec(tuple(s), dtype, self.order if len(s) == 4 else None)

        return tuple(map(one, self.shapes))

    def draw(self, random: np.random.Generator, dtype: np.dtype = float32) -> list:
        """Fresh random inputs."""

        def one(s: Any) -> Any:
            if s is None:
                return None
            if isinstance(s, Labels):
                return random.integers(0, s.high, s.shape)
            if isinstance(s, Seeds):
                return random.integers(0, 2**40, 2)
            if isinstance(s, list):
                return [one(a) for a in s]
            if isinstance(s, Spec):
                return random.standard_normal(s.shape, dtype=np.float32).astype(s.dtype)
            return random.standard_normal(s, dtype=np.float32).astype(dtype)

        return [one(s) for s in self.shapes]

    def wanted(self) -> tuple[str, ...]:
        if self.needs is not None:
            return self.needs
        specs = dict(zip(self.op.inputs, self.specs()))
        return tuple(n for n in self.op.differentiable if (s := specs.get(n)) is not None and s.dtype in FLOATS)

    def bytes(self, dtype: np.dtype = float32) -> tuple[int, int]:
        """The fewest bytes forward and backward must move: each array they need read or written once."""
        specs = self.specs(dtype)
        needs = self.wanted()
        fixed = {k: v for k, v in (self.op.options | self.options).items() if k not in self.op.dynamic}
        padded = [*specs, *[None] * (len(self.op.inputs) - len(specs))]
        rule = self.op.rule(*padded, needs=needs, **fixed)
        outputs = sum(s.nbytes for s in rule.outputs.values())
        updated = sum(
            s.nbytes for n, s in zip(self.op.inputs, specs) if n in self.op.updates for s in arrays.lists([s])
        )
        forward = sum(s.nbytes for s in arrays.lists(specs)) + outputs + updated
        grads = sum(s.nbytes for n, s in zip(self.op.inputs, specs) if s is not None and n in needs)
        return forward, outputs + sum(s.nbytes for s in rule.saved.values()) + grads
