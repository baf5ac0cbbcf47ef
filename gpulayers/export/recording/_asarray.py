"""np.asarray of a recorded array, which is that array: NumPy itself would ask for its values."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpulayers.export.recording._handle import Handle
from gpulayers.layers._weight import Weight

_NAMES = ("asarray", "asanyarray", "ascontiguousarray", "array")
_lock = threading.Lock()
_theirs: dict[str, Callable] = {}
_recording = 0


def _taking_handles(name: str, theirs: Callable) -> Callable:
    def function(*args: Any, **options: Any) -> Any:
        x: Any = args[0] if args else None
        x = x.data if isinstance(x, Weight) else x
        if not isinstance(x, Handle):
            return theirs(*args, **options)
        dtype = args[1] if len(args) > 1 else options.get("dtype")
        y: Any = x if dtype is None else x.astype(dtype, copy=False)  # type: ignore[attr-defined]
        return y.copy() if options.get("copy", name == "array") else y

    return function


@contextlib.contextmanager
def arrays_stay_recorded() -> Iterator[None]:
    """Within it, these functions of NumPy's give recorded arrays for recorded ones, and do with all others what they do."""
    global _recording
    with _lock:
        if not _recording:
            _theirs.update({name: getattr(np, name) for name in _NAMES})
            for name, theirs in _theirs.items():
                setattr(np, name, _taking_handles(name, theirs))
        _recording += 1
    try:
        yield
    finally:
        with _lock:
            _recording -= 1
            if not _recording:
                for name, theirs in _theirs.items():
                    setattr(np, name, theirs)
