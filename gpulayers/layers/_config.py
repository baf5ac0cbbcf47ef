"""Objects that remember how they were made, so that a saved model can make them again."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import numpy as np

_registry: dict[str, type] = {}
_BUILT_IN = ("gpulayers.layers.", "gpulayers.train.")  # registered without being asked
C = TypeVar("C", bound=type)


class Configurable:
    """Its config is the arguments of its ``__init__``, kept as they came."""

    _arguments: inspect.BoundArguments

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            self._arguments = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            takes = ", ".join(list(signature.parameters)[1:])
            raise TypeError(f"{cls.__name__}({takes}): {error}") from None
        return self

    def __getnewargs_ex__(self) -> tuple[tuple, dict[str, Any]]:
        """What copy and pickle give to ``__new__``."""
        return self._arguments.args[1:], self._arguments.kwargs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(_BUILT_IN):
            _registry[cls.__name__] = cls

    def get_config(self) -> dict[str, Any]:
        """{"class": …, "args": […], "kwargs": {…}}, JSON throughout; {"again": n} is the n-th object described before.

        Raises TypeError for a class that is not registered, or an argument that JSON cannot hold.
        """
        return to_config(self, type(self).__name__, {})


def register(target: C | None = None, *, name: str | None = None) -> Any:
    """Class decorator: lets ``load`` find your layer (regularizer, constraint) by name.

    name: what a saved model calls it; by default the class's own name. Raises ValueError if another class has it.
    """

    def add(cls: C) -> C:
        key = name or cls.__name__
        known = _registry.get(key)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"register: {key!r} is already {known.__module__}.{known.__qualname__}; give another name="
            )
        _registry[key] = cls
        return cls

    return add(target) if target is not None else add


def from_config(config: Any) -> Any:
    """The object that ``get_config`` described. Raises KeyError for a class that is not registered."""
    return _made(config, [])


def to_config(value: Any, where: str, seen: dict[int, int] | None = None) -> Any:
    """``value`` as JSON; ``where`` is whose argument it is. An object that occurs twice is one object again when made."""
    seen = {} if seen is None else seen
    if isinstance(value, Configurable):
        return _described(value, seen)
    if isinstance(value, list | tuple):
        return [to_config(v, where, seen) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: to_config(v, where, seen) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    kind = type(value).__name__
    raise TypeError(f"{where}: an argument of type {kind} cannot be saved (numbers, strings, lists and layers can)")


def _described(value: Configurable, seen: dict[int, int]) -> dict[str, Any]:
    if id(value) in seen:
        return {"again": seen[id(value)]}
    where = type(value).__name__
    name = next((n for n, c in _registry.items() if c is type(value)), None)
    if name is None:
        raise TypeError(f"{where} is not registered: write @gl.register above the class")
    seen[id(value)] = len(seen)
    bound = value._arguments
    args = [to_config(a, where, seen) for a in bound.args[1:]]
    return {"class": name, "args": args, "kwargs": {k: to_config(v, where, seen) for k, v in bound.kwargs.items()}}


def _made(config: Any, made: list) -> Any:
    if isinstance(config, list):
        return [_made(c, made) for c in config]
    if not isinstance(config, dict):
        return config
    if "again" in config:
        return made[config["again"]]
    if "class" not in config:
        return {k: _made(v, made) for k, v in config.items()}
    cls = _registry.get(config["class"])
    if cls is None:
        raise KeyError(f"{config['class']} is not registered here: import the module that has it under @gl.register")
    place = len(made)
    made.append(None)
    made[place] = cls(*_made(config["args"], made), **{k: _made(v, made) for k, v in config["kwargs"].items()})
    return made[place]
