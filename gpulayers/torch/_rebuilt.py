"""Classes whose forward is written again over our functions, for one module, and for no other model."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpulayers.torch import functional
from gpulayers.torch._globals import innermost, rebuilt
from gpulayers.torch._standing import Standing, standing
from gpulayers.torch.loss import CrossEntropyLoss


class Rebuilt(Standing):
    """Stands before a class whose forward calls our functions."""

    _calls: tuple[str, ...]
    """Their names."""


def read(code: types.CodeType) -> Iterator[str]:
    """The names that a function reads: globals and attributes, those of functions within it too."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from read(inner)


@functools.cache
def rebuilt_class(own: Any, serve: Callable[[str, Any], Any]) -> Any:
    """The class before ``own`` whose forward calls ours; None where it calls nothing that is served.

    serve: (name, function of the model's file) → ours, or None.
    """
    inner = innermost(own.forward)
    if inner is None:
        return None
    names, attributes = inner.__globals__, set(read(inner.__code__))
    found = {name: ours for name in attributes & set(names) if (ours := serve(name, names[name])) is not None}
    calls = set(found)
    of_torch = (_ours().keys() & attributes) - calls
    for name, spaces in _namespaces().items():
        if of_torch and name in attributes and names.get(name) is spaces[0]:
            found[name], calls = spaces[1], calls | of_torch
    if not calls:
        return None
    forward = rebuilt(own.forward, found)
    return standing(Rebuilt, own, (rebuilt_class, own, serve), forward=forward, _calls=tuple(sorted(calls)))


@functools.cache
def _ours() -> dict[str, Any]:
    """torch.nn.functional's functions that we have. Dropout stays torch's: its mask is torch's for torch's seed."""
    shared = {name: f for name, f in vars(functional).items() if inspect.isfunction(f) and hasattr(F, name)}
    return {name: f for name, f in shared.items() if "dropout" not in name} | {"CrossEntropyLoss": CrossEntropyLoss}


@functools.cache
def _namespaces() -> dict[str, tuple[Any, Any]]:
    """{a global's name: (torch's, the same with our functions)}."""
    functions = _overlaid(F, _ours())
    within = _overlaid(nn, {"functional": functions, "CrossEntropyLoss": CrossEntropyLoss})
    loss = (nn.CrossEntropyLoss, CrossEntropyLoss)
    return {"F": (F, functions), "nn": (nn, within), "torch": (torch, _overlaid(torch, {"nn": within}))} | {
        "CrossEntropyLoss": loss
    }


def _overlaid(module: types.ModuleType, over: Mapping[str, Any]) -> types.ModuleType:
    other = types.ModuleType(module.__name__)
    vars(other).update(vars(module) | dict(over))
    return other
