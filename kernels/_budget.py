"""What a kernel's machine code may take. ``BUDGETS`` beside the kernels names each; ``gpulayers audit`` holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Budget(NamedTuple):
    """The worst that any configuration for any architecture may come to."""

    registers: int = 255
    """Of a thread, at most."""
    blocks: int = 1
    """On a multiprocessor at once, at least."""
    narrow: str | Callable[[dict[str, Any]], str] = ""
    """The accesses ("loads", "stores", "loads, stores") that rightly move less than 128 bits though arrays are aligned;
    or what gives them, from the constants of a launch: its constexprs, arguments that are 1 or None, and "odd", the set
    of the other sizes and steps that 16 does not divide."""
    spills: int = 0
    """Instructions that put registers aside, at most: one, outside the loops, costs nothing."""
    threads: int = 256
    """Of a block, at most. For CUDA C++, whose binary doesn't know; Triton's does."""
    shared: int = 0
    """Bytes of dynamic shared memory of a block, at most; for CUDA C++."""

    def rightly_narrow(self, constants: dict[str, Any]) -> str:
        """``narrow`` for one launch."""
        return self.narrow(constants) if callable(self.narrow) else self.narrow


def channels_first(constants: dict[str, Any]) -> str:
    """``narrow`` where a tile of one channel (BC) means NCHW: rows begin at any column, so a lane moves one pixel."""
    return "loads, stores" if constants["BC"] == 1 else ""
