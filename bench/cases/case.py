"""What a benchmark measures: one call of an op on declared shapes, and what others offer for it.

Each ``bench/<family>.py`` has ``cases() -> list[Case]``, and ``audits() -> list[Case]``: calls that reach each branch of
its kernels in its largest configuration, which nobody measures and every test run compiles. The bytes an op must move
follow from its rule; a case states its flops where arithmetic bounds it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers import arrays
from gpulayers.arrays import FLOATS, Spec, float32
from gpulayers.definition import Rule
from gpulayers.inventory import families
from gpulayers.ops._op import Op

DIRECTIONS = ("forward", "backward", "both")
"""backward: alone, from a recorded forward. both: forward that records, and backward."""


class Labels(NamedTuple):
    """An int64 input with values in [0, high)."""

    shape: tuple[int, ...]
    high: int


class Places(NamedTuple):
    """An int64 input as max_pool's indices: of images (N, C, OH, OW), each the place of a pixel under a window of its own."""

    shape: tuple[int, int, int, int]
    window: int
    """Its rows and columns."""

    def of(self, taps: Any, arange: Callable[..., Any]) -> Any:
        """``taps``: which pixel of each window."""
        (h, w), k = self.shape[2:], self.window
        rows, columns = arange(h).reshape(h, 1) * k + taps // k, arange(w) * k + taps % k
        return rows * (w * k) + columns


class Seeds(NamedTuple):
    """A Philox seed and offset."""


CHANNELS_LAST = (0, 2, 3, 1)
ONE_ARCH = (90,)


class Squares(NamedTuple):
    """A float input without negative values."""

    shape: tuple[int, ...]


class Other(NamedTuple):
    """Someone else's function for a case: a library's, or torch's own under a setting or in a memory format."""

    call: Callable
    """Takes tensors for the inputs, gives the output; torch's autograd differentiates it."""
    package: str = "torch"
    """Served where this package is installed."""
    put: Callable[[Any], Any] | None = None
    """A tensor as this function wants it in memory; not timed."""
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """Entered around all calls: a setting, a backend."""
    directions: tuple[str, ...] = DIRECTIONS
    in_place: bool = False
    """It writes to its inputs, so it gets its own, and no CUDA graph."""
    made: Callable[[Any], Any] | None = None
    """(case) → the ``providers.Function`` that computes it, where torch's autograd does not differentiate."""


class Traffic(NamedTuple):
    """Bytes that a pass reads and writes at least: each array it needs, once."""

    read: int
    written: int
    saved: int
    """Read, too, by a backward that needs what the op's rule saves; another way may save less."""

    @property
    def total(self) -> int:
        return sum(self)


class Case(NamedTuple):
    op: Op
    name: str
    """The shape in a reader's words: "ResNet-50 3×3, 56²"."""
    shapes: tuple
    """One for each input: a shape (random normal values), a list of shapes, a Spec (its dtype is
    fixed), Labels, Places, Seeds, Squares, or None."""
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
    saving: float = 1.0
    """How many times fewer flops the cleverest algorithm takes (Winograd's): only below that is a reading impossible."""
    others: dict[str, Other] = {}
    """Further providers, by name."""
    hardly_read: tuple[str, ...] = ()
    """Inputs of which it needs a few elements only."""
    put: Callable[[Any], Any] | None = None
    """A tensor as every provider gets it in memory (channels-last); None: row-major."""
    headline: bool = False
    """Measured before all others."""
    sweep: str = ""
    """Of the cases that differ in size alone, what they are: "4,096 rows of growing length"."""
    size: int = 0
    """In a sweep, the size that grows."""
    nearest: Callable[[Any, Any, Any], Any] | None = None
    """nearest(got, of, x): of the results that some random draw gives, the one next to ``got`` (``of``: x or dy).

    For ops that draw: others draw their own numbers, so they are held against this.
    """
    tf32: str = ""
    """torch's setting that lets float32 use TF32 here: "cuda.matmul", "cudnn.conv"."""

    order: tuple[int, ...] | None = None
    """The memory order of arrays with so many axes; None: row-major."""
    archs: tuple[int, ...] = (80, 90, 100)
    """What the tests compile it for: one (and in bfloat16 alone), where another call reaches almost the same code."""

    ways: tuple[str, ...] = DIRECTIONS
    """The directions that are measured, where there are gradients."""

    @property
    def by_gemm(self) -> bool:
        return bool(self.flops) if self.gemm is None else self.gemm

    @property
    def draws(self) -> bool:
        """Whether its result depends on random numbers."""
        return any(isinstance(s, Seeds) for s in self.shapes)

    def _map(self, one: Callable[[Any], Any]) -> list:
        """``one`` of each shape, in lists too; None stays."""

        def each(s: Any) -> Any:
            return None if s is None else [each(a) for a in s] if isinstance(s, list) else one(s)

        return [each(s) for s in self.shapes]

    def specs(self, dtype: np.dtype = float32) -> tuple:
        def one(s: Any) -> Spec:
            if isinstance(s, Labels):
                return Spec(s.shape, arrays.int64)
            if isinstance(s, Places):
                return Spec(s.shape, arrays.int64, self.order)
            if isinstance(s, Seeds):
                return Spec((2,), arrays.int64)
            if isinstance(s, Spec):
                return s
            shape = s.shape if isinstance(s, Squares) else tuple(s)
            return Spec(shape, dtype, self.order if self.order and len(shape) == len(self.order) else None)

        return tuple(self._map(one))

    def draw(self, random: np.random.Generator, dtype: np.dtype = float32) -> list:
        """Fresh random NumPy arrays."""

        def one(s: Any) -> np.ndarray:
            if isinstance(s, Labels):
                return random.integers(0, s.high, s.shape)
            if isinstance(s, Places):
                return s.of(random.integers(0, s.window**2, s.shape), np.arange)
            if isinstance(s, Seeds):
                return random.integers(0, 2**40, 2)
            if isinstance(s, Spec):
                return random.standard_normal(s.shape, dtype=np.float32).astype(s.dtype)
            drawn = random.standard_normal(s.shape if isinstance(s, Squares) else s, dtype=np.float32).astype(dtype)
            return drawn * drawn if isinstance(s, Squares) else drawn

        return self._map(one)

    def draw_tensors(self, generator: Any, dtype: np.dtype = float32) -> list:
        """Fresh random tensors, drawn where the torch.Generator lives."""
        import torch

        where: dict[str, Any] = {"device": generator.device, "generator": generator}

        def one(s: Any) -> Any:
            if isinstance(s, Labels):
                return torch.randint(0, s.high, s.shape, **where)
            if isinstance(s, Places):
                taps = torch.randint(0, s.window**2, s.shape, **where)
                return s.of(taps if self.put is None else self.put(taps), lambda n: torch.arange(n, device=taps.device))
            if isinstance(s, Seeds):
                return torch.randint(0, 2**40, (2,), **where)
            shape, kind = (s.shape, s.dtype) if isinstance(s, Spec) else (s, dtype)
            shape = s.shape if isinstance(s, Squares) else shape
            drawn = torch.randn(shape, dtype=arrays.to_torch_dtype(kind), **where)
            drawn = drawn * drawn if isinstance(s, Squares) else drawn
            return drawn if self.put is None else self.put(drawn)

        return self._map(one)

    def wanted(self) -> tuple[str, ...]:
        """The inputs whose gradients are measured."""
        if self.needs is not None:
            return self.needs
        specs = dict(zip(self.op.inputs, self.specs()))
        return tuple(n for n in self.op.differentiable if (s := specs.get(n)) is not None and s.dtype in FLOATS)

    def directions(self) -> tuple[str, ...]:
        return self.ways if self.wanted() else DIRECTIONS[:1]

    def rule(self, dtype: np.dtype = float32) -> Rule:
        """What the op's rule says of this call."""
        specs = self.specs(dtype)
        fixed = {k: v for k, v in (self.op.options | self.options).items() if k not in self.op.dynamic}
        padded = [*specs, *[None] * (len(self.op.inputs) - len(specs))]
        return self.op.rule(*padded, needs=self.wanted(), **fixed)

    def traffic(self, dtype: np.dtype = float32) -> dict[str, Traffic]:
        """The fewest bytes of each direction."""
        specs, needs, rule = dict(zip(self.op.inputs, self.specs(dtype))), self.wanted(), self.rule(dtype)

        def size(found: Iterable[Any]) -> int:
            return sum(s.nbytes for s in arrays.lists([*found]))

        outputs = size(rule.outputs.values())
        inputs = size(s for n, s in specs.items() if n not in self.hardly_read)
        saved = size(s for n, s in rule.saved.items() if n not in self.hardly_read)
        forward = Traffic(inputs, outputs + size(s for n, s in specs.items() if n in self.op.updates), 0)
        same = self.op.again(needs, [*specs.values()])
        backward = Traffic(outputs, size(specs[n] for n in needs if n != same), saved)
        both = Traffic(*map(sum, zip(forward, backward)))
        return dict(zip(DIRECTIONS, (forward, backward, both)))

    def work(self) -> dict[str, int]:
        """The flops of each direction."""
        times = 2 if self.needs is None else min(2, len(self.needs))
        return {"forward": self.flops, "backward": times * self.flops, "both": (1 + times) * self.flops}


def sweep(name: str, cases: Sequence[tuple[int, Case]]) -> list[Case]:
    """(size, case) as a sweep of this name, measured on a GPU alone."""
    return [c._replace(name=f"{name}: {size}", cpu=False, sweep=name, size=size) for size, c in cases]


BESIDE = ("fused",)
"""Files with cases of no family of ops: kernels that ``gl.fuse`` writes."""


def every_case(only: Sequence[str] = ()) -> Iterator[tuple[str, Case]]:
    """(family, case) of the families asked for; of all families of ops, if none. Raises ValueError for an unknown one."""
    known = [*families(), *BESIDE]
    for family in only:
        if family not in known:
            raise ValueError(f"family: the rule is one of {', '.join(known)}; got {family!r}")
    for family in known:
        if family in (only or families()):
            for case in importlib.import_module(f"gpulayers.bench.{family}").cases():
                yield family, case


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
