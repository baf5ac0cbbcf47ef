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
        other = self._own.__new__(self._own)
        other.__dict__ = self.__dict__
        return other


def standing(kind: type, own: type, made: tuple[Any, ...], /, **inside: Any) -> Any:
    """The class of ``kind`` before ``own``. made: as in ``Standing``."""
    inside |= {"_own": own, "_made": made, "__module__": own.__module__, "__doc__": own.__doc__}
    return type(own.__name__, (kind, own), inside)


def _new(make: Callable[..., Any], *given: Any) -> Any:
    c = make(*given)
    return c.__new__(c)


def bare(module: Any, kind: Any) -> Any:
    """A copy of the module's plain attributes as one of class ``kind``, without tensors, modules and hooks."""
    probe = kind.__new__(kind)
    nn.Module.__init__(probe)
    probe.__dict__ = copy.copy(module.__dict__) | {k: v for k, v in probe.__dict__.items() if k != "training"}
    return probe
