"""Which backends may compute, in which order: the policy in force, and how it is changed."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gpulayers.kernels import _multiprocessors


class Refused(RuntimeError):
    """No permitted backend serves the call; the text gives each one's reason."""


class Policy(NamedTuple):
    """Who may compute, in order of preference."""

    backends: tuple[str, ...] = ("triton", "cuda", "aten", "numpy", "definition")
    strict: bool = False
    """A GPU array that no kernel serves is an error, not a fallback."""
    simulate: tuple[str, ...] = ()
    """GPU backends that CPU arrays may use: their kernels run interpreted or emulated (gpulayers.testing)."""
    reserve: int = 0
    """Multiprocessors that launches leave free."""
    batch_invariant: bool = False
    """A row's bits do not hang on the other rows, nor on how many there are."""
    definitions: Any = None
    """(op) → (forward, backward) that stand for its definition: where a layer is recorded."""


def _initial_policy() -> Policy:
    order = os.environ.get("GPULAYERS_BACKEND", "")
    strict, invariant = (os.environ.get(f"GPULAYERS_{v}", "0") not in ("", "0") for v in ("STRICT", "BATCH_INVARIANT"))
    backends = tuple(b.strip() for b in order.split(",")) if order.strip() else Policy().backends
    return Policy(backends, strict, reserve=_multiprocessors.from_environment(), batch_invariant=invariant)


def _known(backends: Sequence[str]) -> tuple[str, ...]:
    for b in backends:
        if b not in Policy().backends:
            raise ValueError(f"unknown backend {b!r}: expected one of {', '.join(Policy().backends)}")
    return tuple(backends)


def permitted(first: str = "") -> tuple[str, ...]:
    """The backends that may compute, in order; ``first`` before others where no order is asked for. Raises ValueError if the
    environment sets a policy that cannot be."""
    _multiprocessors.check_environment(_policy.get().reserve)
    try:
        backends = _known(_policy.get().backends)
        return (first, *(b for b in backends if b != first)) if first and backends == Policy().backends else backends
    except ValueError as error:
        raise ValueError(f"GPULAYERS_BACKEND: {error}") from None


_policy: contextvars.ContextVar[Policy] = contextvars.ContextVar("policy", default=_initial_policy())  # noqa: B039


@contextlib.contextmanager
def policy(**changes: Any) -> Iterator[Policy]:
    """Change fields of the policy in force, for the calls made inside and for their backwards."""
    new = _policy.get()._replace(**changes)
    token = _policy.set(new)
    try:
        yield new
    finally:
        _policy.reset(token)


def only(*backends: str) -> contextlib.AbstractContextManager:
    """Forbid every other backend: ``with only("triton"): ...`` raises Refused where Triton does not serve the call."""
    return policy(backends=_known(backends))


def strict(on: bool = True) -> contextlib.AbstractContextManager:
    """Make every fallback from a GPU kernel to the definition an error, as GPULAYERS_STRICT=1 does."""
    return policy(strict=on)


def sms(*, reserve: int) -> contextlib.AbstractContextManager:
    """Leave ``reserve`` multiprocessors free, as GPULAYERS_RESERVE_SMS=n does, for NCCL's kernels: grids that the GPU's size
    decides are made for so many fewer, but at least one. TypeError, ValueError: no whole number ≥ 0."""
    return policy(reserve=_multiprocessors.checked(reserve))


def batch_invariant(on: bool = True) -> contextlib.AbstractContextManager:
    """A row's results and gradients have the same bits whatever rows stand beside it, as with GPULAYERS_BATCH_INVARIANT=1: of
    norms, linear layers, attention (a row: a sequence), softmax and the losses of single rows. Refused is raised for what
    cannot be so: attention of packed sequences, and float64 where matrices are multiplied."""
    return policy(batch_invariant=on)
