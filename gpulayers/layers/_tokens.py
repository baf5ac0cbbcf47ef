"""Tokens of settings: equal where two values are the same setting. They survive copies and pickles."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np


class _Unknown:
    """Stands for a value that a call or a build assigned, and assigns again."""

    def __reduce__(self) -> str:
        return "UNKNOWN"  # one object, in copies and pickles too


UNKNOWN = _Unknown()


def token(value: Any, around: tuple[int, ...] = ()) -> Any:
    """What two values have in common where they are the same setting.

    A layer is known by its serial number, an array by its numbers, what else there is by its name and type.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    if hasattr(value, "add_grad"):
        return "weight", value.shape
    if hasattr(value, "get_config"):
        # A layer's own changes are told by itself, those of a regularizer by the weight that has it.
        return ("layer" if hasattr(value, "_look") else token(value._settings(), around)), value._serial
    if isinstance(value, np.ndarray) and value.dtype != object:
        return "array", str(value.dtype), value.shape, zlib.crc32(value.tobytes())
    if isinstance(value, list | tuple | dict):
        if id(value) in around:
            return "again"
        inner = (*around, id(value))
        if isinstance(value, dict):
            return "dict", tuple((token(k, inner), token(v, inner)) for k, v in value.items())
        return "list", tuple(token(v, inner) for v in value)
    of = value if hasattr(value, "__qualname__") else type(value)
    return "other", getattr(of, "__module__", ""), of.__qualname__
