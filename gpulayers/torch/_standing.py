"""Classes that stand before one of somebody else's, which is known by what it computes: its modules keep all that they have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.nn as nn


class Standing:
    """The base of those."""

    _own: Any
    """The class that it stands before."""
    _made: tuple[Any, ...]
    """The function that made the class, and its arguments: copies in another process make it again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, self._made, self.__getstate__()  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> Any:
        return alias(self, self._own)


class Above(Standing):
    """Stands before a class that ``patch`` has given a module already."""


def without_above(c: type) -> tuple[type, type]:
    """(the class of that kind in a module's classes, the one that it stands before)."""
    kind: Any = next(
        k for k in c.__mro__ if any(issubclass(base, Above) and "_own" not in vars(base) for base in k.__bases__)
    )
    return kind, kind._own


def standing(kind: type, own: type, made: tuple[Any, ...], /, *behind: type, **inside: Any) -> Any:
    """The class of ``kind`` before ``own``, with those ``behind`` it. made: as in ``Standing``."""
    inside |= {"_own": own, "_made": made, "__module__": own.__module__, "__doc__": own.__doc__}
    return type(own.__name__, (kind, own, *behind), inside)


def _new(make: Callable[..., Any], *given: Any) -> Any:
    c = make(*given)
    return c.__new__(c)


def alias(module: Any, kind: Any) -> Any:
    """Another object of the class ``kind`` with the very attributes of ``module``."""
    other = kind.__new__(kind)
    other.__dict__ = module.__dict__
    return other


def unlike(agrees: Callable[[], bool]) -> str:
    """Why a module is not replaced, by what it computes on a random input; "" where that is what ours does."""
    try:
        return "" if agrees() else "on a random input it computes something else"
    except Exception as error:
        return f"its forward fails on a random input: {error}"


def bare(module: Any, kind: Any) -> Any:
    """A copy of the module's plain attributes as one of class ``kind``, without tensors, modules and hooks."""
    probe = kind.__new__(kind)
    nn.Module.__init__(probe)
    probe.__dict__ = copy.copy(module.__dict__) | {k: v for k, v in probe.__dict__.items() if k != "training"}
    return probe
