"""Functions written again over other globals.

A file's functions are globals (``apply_rotary_pos_emb``, ``nn.functional.gelu``) of all that it defines; so a function
that is to call others in their place gets globals of its own.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any


def rebuilt(f: Any, found: Mapping[str, Any], code: types.CodeType | None = None) -> Any:
    """f whose globals are those that it has and ``found``; decorators that keep it as ``__wrapped__`` stay around it. code: of
    the function within, in the place of its own."""
    inner, cells, names = getattr(f, "__wrapped__", None), f.__closure__, f.__globals__
    if inner is not None:
        again = rebuilt(inner, found, code)
        cells = tuple(types.CellType(again) if c.cell_contents is inner else c for c in cells or ())
    else:
        # Without a name torch.compile takes these globals as they are, and not those of the module called so.
        names = {k: v for k, v in names.items() if k != "__name__"} | dict(found)
    own = f.__code__ if inner is not None or code is None else code
    other = types.FunctionType(own, names, f.__name__, f.__defaults__, cells)
    vars(other).update(vars(f) | ({} if inner is None else {"__wrapped__": again}))
    other.__kwdefaults__, other.__module__, other.__qualname__ = f.__kwdefaults__, f.__module__, f.__qualname__
    return other


def innermost(f: Any) -> Any:
    """Without decorators; None where one does not hold it in a cell, so that ``rebuilt`` could not reach it."""
    while inspect.isfunction(f) and hasattr(f, "__wrapped__"):
        inner = f.__wrapped__
        if not any(_content(c) is inner for c in f.__closure__ or ()):
            return None
        f = inner
    return f if inspect.isfunction(f) else None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
