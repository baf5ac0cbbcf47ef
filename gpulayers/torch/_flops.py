"""What torch's FlopCounterMode counts: the floating-point operations of our ops that are products of matrices.

Its module imports Triton, so nothing is imported for it here: the formulas are handed over when a counter is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gpulayers.torch._library import LibraryOp

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}
"""By the packet of a ``torch.library`` op."""


def declare(library: LibraryOp, flops: Callable[..., dict[str, int]], count: int) -> None:
    """flops: (shapes of the first ``count`` inputs that are there, shape of y) → {"y": of forward, name: of an input's gradient}."""

    def forward(*args: Any, out_val: Any, **_: Any) -> int:
        y = out_val if hasattr(out_val, "shape") else out_val[0]
        return flops(*[t.shape for t in args[:count] if t is not None], y.shape)["y"]

    def backward(*args: Any, **_: Any) -> int:
        wanted, specs, dy = library.gradients_of(args)
        costs = flops(*[s.shape for s in specs[:count] if s is not None], dy.shape)
        return sum(costs.get(name, 0) for name in wanted)

    _formulas[library.forward._overloadpacket] = forward
    if library.backward is not None:
        _formulas[library.backward._overloadpacket] = backward
    tell()


def tell() -> None:
    """Hand the formulas to torch's table, and to the counters that copied it before."""
    module = sys.modules.get(_COUNTER)
    if module is None:
        return
    modes = _get_current_dispatch_mode_stack()
    counters = [getattr(mode, "counter", mode) for mode in modes]
    for table in (module.flop_registry, *[c.flop_registry for c in counters if hasattr(c, "flop_registry")]):
        for packet, formula in _formulas.items():
            table.setdefault(packet, formula)
