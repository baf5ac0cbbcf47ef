"""Objects that remember how they were made, and what was changed since, so that a saved model can make them again."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gpulayers import arrays
from gpulayers.layers._tokens import UNKNOWN, token
from gpulayers.layers._weight import Weight

_registry: dict[str, type] = {}
_BUILT_IN = ("gpulayers.layers.", "gpulayers.train.")  # registered without being asked
_RESERVED = {"class", "again", "weight", "dict", "tuple"}
_serials = itertools.count()
C = TypeVar("C", bound=type)


class Seen:
    """What a config describes so far, so that an object that occurs twice is one object again when made."""

    def __init__(self, places: dict[int, int] | None = None, inside: set[int] | None = None):
        self.places = places or {}
        """Which of the described objects each is, by id."""
        self.inside = inside or set()
        """Layers of which only the changes are told."""

    def copy(self) -> Seen:
        return Seen(dict(self.places), set(self.inside))


class Configurable:
    """Its config is the arguments of its ``__init__``, kept as they came, and the attributes that were changed since."""

    _internal = frozenset({"_arguments", "_serial", "_made"})
    """Attributes that are no settings."""
    _arguments: inspect.BoundArguments
    _serial: int
    _made: dict[str, Any] | None
    """A token of each attribute as ``__init__`` left it; None before that."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            arguments = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            takes = ", ".join(list(signature.parameters)[1:])
            raise TypeError(f"{cls.__name__}({takes}): {error}") from None
        made: dict | None = {} if cls.__init__ is object.__init__ else None
        self.__dict__.update({"_arguments": arguments, "_serial": next(_serials), "_made": made})
        return self

    def __reduce__(self) -> tuple:
        return _blank, (type(self),), self.__getstate__()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            setattr(cls, "__init__", _remembered(cls.__dict__["__init__"]))  # noqa: B010
        if cls.__module__.startswith(_BUILT_IN):
            _registry[cls.__name__] = cls

    def get_config(self) -> dict[str, Any]:
        """{"class": …, "args": […], "kwargs": {…}}, JSON throughout; {"again": n} is the n-th object described before.

        What is not as ``__init__`` left it stands under "set" and "deleted", and changes of the layers that it made for
        itself under "inside".

        Raises TypeError for a class that is not registered, or for a value that JSON cannot hold.
        """
        return to_config(self, type(self).__name__)

    # --- what was changed since it was made --------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._internal}

    def _remember(self) -> None:
        """All attributes are as they should be: only changes from here on are saved beside the arguments."""
        self._made = {name: token(value) for name, value in self._settings().items()}

    def _note(self, name: str, in_call: bool) -> None:
        """``name`` was assigned: by a layer's own code in a call or build, which will assign it again, or by others."""
        if self._made is None:
            return
        if in_call:
            self._made[name] = UNKNOWN
        elif self._made.get(name) is UNKNOWN:
            del self._made[name]

    def _changed(self) -> dict[str, Any]:
        """The attributes that are not as ``__init__``, or a call, left them."""
        if self._made is None:
            return {}
        known = ((name, value, self._made.get(name)) for name, value in self._settings().items())
        return {name: value for name, value, was in known if was is not UNKNOWN and was != token(value)}

    def _config_arguments(self) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) that make this object."""
        return self._arguments.args[1:], self._arguments.kwargs

    def _config_of_changes(self, seen: Seen) -> dict[str, Any]:
        """What has to be done to an object made by ``_config_arguments`` to make it this one."""
        where = type(self).__name__
        described: dict[str, Any] = {}
        for name, value in self._changed().items():
            trial = seen.copy()
            try:
                described[name] = to_config(value, where, trial, tuples=True)
                seen.places, seen.inside = trial.places, trial.inside
            except TypeError as error:
                if self._is_a_setting(name, value):
                    text = "was changed, and cannot be saved as it is now"
                    raise TypeError(f"{getattr(self, 'name', where)}.{name} {text}: {error}") from None
        here = self._settings()
        gone = [name for name, was in (self._made or {}).items() if name not in here and was is not UNKNOWN]
        return ({"set": described} if described else {}) | ({"deleted": gone} if gone else {})

    def _is_a_setting(self, name: str, value: Any) -> bool:
        """Whether it matters that this attribute is as it is; a note that somebody left does not."""
        if holds_parts(value) or hasattr(type(self), name):
            return True
        return not name.startswith("_") and self._made is not None and name in self._made

    def _apply(self, changes: dict[str, Any]) -> None:
        """Do what ``_config_of_changes`` said; its values are objects by now."""
        for name, value in changes.get("set", {}).items():
            setattr(self, name, value)
        for name in changes.get("deleted", ()):
            if name in self.__dict__:
                delattr(self, name)


def _blank(cls: type) -> Any:
    """An object without its attributes, for copies and pickles."""
    return object.__new__(cls)


def _remembered(init: Callable) -> Callable:
    @functools.wraps(init)
    def managed(self: Configurable, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is managed:  # and no base class's, called by it
            self._remember()

    return managed


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


# --- objects to JSON -------------------------------------------------------------------------------------------------


def to_config(value: Any, where: str, seen: Seen | None = None, tuples: bool = False) -> Any:
    """``value`` as JSON; ``where`` is whose argument it is. tuples: they come back as such, not as lists."""
    seen = seen or Seen()
    if isinstance(value, Configurable):
        return _described(value, seen)
    if isinstance(value, Weight):
        config = {"weight": value.name, "shape": list(value.shape), "dtype": str(value.dtype)}
        pulls = {what: to_config(getattr(value, what), where, seen) for what in ("regularizer", "constraint")}
        return config | {"trainable": value.learned} | pulls
    if isinstance(value, list | tuple):
        items = [to_config(v, where, seen, tuples) for v in value]
        return {"tuple": items} if tuples and isinstance(value, tuple) else items
    if isinstance(value, dict):
        pairs = [(to_config(k, where, seen, True), to_config(v, where, seen, tuples)) for k, v in value.items()]
        plain = all(isinstance(k, str) and k not in _RESERVED for k in value)
        return dict(pairs) if plain else {"dict": [list(pair) for pair in pairs]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    kind = type(value).__name__
    raise TypeError(f"{where}: an argument of type {kind} cannot be saved (numbers, strings, lists and layers can)")


def holds_parts(value: Any) -> bool:
    """Whether ``value`` is or holds an object with a config, or a weight."""
    if isinstance(value, list | tuple | dict):
        return any(map(holds_parts, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Configurable | Weight)


def _described(value: Configurable, seen: Seen) -> dict[str, Any]:
    if id(value) in seen.places:
        return {"again": seen.places[id(value)]}
    where = type(value).__name__
    name = next((n for n, c in _registry.items() if c is type(value)), None)
    if name is None:
        raise TypeError(f"{where} is not registered: write @gl.register above the class")
    seen.places[id(value)] = len(seen.places)
    args, kwargs = value._config_arguments()
    config: dict[str, Any] = {"class": name, "args": [to_config(a, where, seen) for a in args]}
    config["kwargs"] = {k: to_config(v, where, seen) for k, v in kwargs.items()}
    return config | value._config_of_changes(seen)


# --- and back --------------------------------------------------------------------------------------------------------


def from_config(config: Any) -> Any:
    """The object that ``get_config`` described. Raises KeyError for a class that is not registered."""
    return _Reader().whole(config)


class _Later(NamedTuple):
    """Stands for an object that is being made: a child may know its parent."""

    place: int


class _Reader:
    """Makes what a config describes, in the order in which it was described."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.waiting: list[tuple[Any, dict]] = []
        """Changes that name an object which is not made yet."""

    def whole(self, config: Any) -> Any:
        value = self.read(config)
        for target, changes in self.waiting:
            target._apply(self.resolved(changes))
        return value

    def read(self, config: Any) -> Any:
        if isinstance(config, list):
            return [self.read(c) for c in config]
        if not isinstance(config, dict):
            return config
        if "again" in config:
            found = self.made[config["again"]]
            return _Later(config["again"]) if found is None else found
        if "dict" in config:
            return {self.read(k): self.read(v) for k, v in config["dict"]}
        if "tuple" in config:
            return tuple(self.read(config["tuple"]))
        if "weight" in config:
            pulls = [self.read(config[what]) for what in ("regularizer", "constraint")]
            data = np.zeros(config["shape"], arrays.dtype(config["dtype"]))
            return Weight(config["weight"], data, config["trainable"], *pulls)
        if "class" not in config:
            return {k: self.read(v) for k, v in config.items()}
        return self.object(config)

    def object(self, config: dict[str, Any]) -> Any:
        cls = _registry.get(config["class"])
        if cls is None:
            raise KeyError(
                f"{config['class']} is not registered here: import the module that has it under @gl.register"
            )
        place = len(self.made)
        self.made.append(None)
        args = [self.read(a) for a in config["args"]]
        made = self.made[place] = cls(*args, **{k: self.read(v) for k, v in config["kwargs"].items()})
        changes = self.changes(config)
        if _holds_later(changes):
            self.waiting.append((made, changes))
        else:
            made._apply(changes)
        return made

    def changes(self, config: dict[str, Any]) -> dict[str, Any]:
        """The part of a config that ``_config_of_changes`` wrote, its values objects again."""
        found: dict[str, Any] = {key: config[key] for key in ("deleted", "built") if key in config}
        if "set" in config:
            found["set"] = {name: self.read(value) for name, value in config["set"].items()}
        if "inside" in config:
            found["inside"] = {name: self.changes(c) for name, c in config["inside"].items()}
        return found

    def resolved(self, value: Any) -> Any:
        if isinstance(value, _Later):
            return self.made[value.place]
        if isinstance(value, list | tuple):
            return type(value)([self.resolved(v) for v in value])
        return {k: self.resolved(v) for k, v in value.items()} if isinstance(value, dict) else value


def _holds_later(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, _Later) or any(map(_holds_later, inner))
