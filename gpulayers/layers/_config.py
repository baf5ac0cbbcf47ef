"""Objects that remember how they were made, so that a saved model can make them again."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

_registry: dict[str, type] = {}
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
            _registry[cls.__name__] = cls

    def get_config(self) -> dict[str, Any]:
        """{"class": …, "args": […], "kwargs": {…}}, JSON throughout. Raises TypeError for an argument that is not."""
        name = next((n for n, c in _registry.items() if c is type(self)), None)
        if name is None:
            raise TypeError(f"{type(self).__name__} is not registered: write @gl.register above the class")
        where = type(self).__name__
        bound = self._arguments
        args = [_to_config(a, where) for a in bound.args[1:]]
        return {"class": name, "args": args, "kwargs": {k: _to_config(v, where) for k, v in bound.kwargs.items()}}


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


def from_config(config: dict[str, Any]) -> Any:
    """The object that ``get_config`` described. Raises KeyError for a class that is not registered."""
    cls = _registry.get(config["class"])
    if cls is None:
        raise KeyError(f"{config['class']} is not registered here: import the module that has it under @gl.register")
    return cls(*map(_from_config, config["args"]), **{k: _from_config(v) for k, v in config["kwargs"].items()})


def _to_config(value: Any, where: str) -> Any:
    if isinstance(value, Configurable):
        return value.get_config()
    if isinstance(value, list | tuple):
        return [_to_config(v, where) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _to_config(v, where) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{where}: an argument of type {type(value).__name__} cannot be saved (numbers, strings, lists, layers can)"
    )


def _from_config(value: Any) -> Any:
    if isinstance(value, dict):
        return from_config(value) if "class" in value else {k: _from_config(v) for k, v in value.items()}
    return [_from_config(v) for v in value] if isinstance(value, list) else value
