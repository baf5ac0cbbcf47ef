"""Who takes what launchers do, where a compiler traces them instead of running them (``gpulayers/torch/_inductor.py``).

A traced launcher sees tensors without memory, whose sizes may be symbols: comparing one is a condition on the compiled code.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol


class Compiler(Protocol):
    def launch(self, kernel: Any, grid: tuple, args: Sequence[Any], options: dict[str, Any]) -> None:
        """Takes down a launch."""

    def describe(self, x: Any, block: Sequence[int]) -> Any:
        """What stands for a tensor descriptor among a launch's arguments."""

    def refuse(self, reason: str) -> None:
        """Raises what ends the tracing of a launcher."""

    def hint(self, n: Any) -> int:
        """The value of a symbol while it is traced; a choice made by it serves every other value, too."""


class _Thread(threading.local):
    compiler: Any = None
    """The ``Compiler`` that traces this thread's launchers."""


thread = _Thread()
