"""What is inside a layer: the weights and layers that its attributes are, or hold in lists, tuples and dicts."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays, random
from gpulayers.layers._config import Configurable
from gpulayers.layers._frames import thread
from gpulayers.layers._initial import Init, initial
from gpulayers.layers._tokens import token
from gpulayers.layers._weight import Weight


class Members(Configurable):
    """A layer as the owner of weights and of other layers.

    They are looked for when they are asked for, so a list that grew, and an attribute that was replaced, set to None or
    deleted, are seen as they are.
    """

    name: str
    _internal = Configurable._internal | {"_weights", "_held", "_frozen", "_contents"}
    _weights: dict[str, Weight]
    """What ``add_weight`` made, by name."""
    _held: set[str]
    """The names in there that an attribute was once seen to hold: when none holds it any more, the weight is gone."""
    _frozen: bool
    _contents: tuple[dict[str, Weight], dict[str, Any]] | None
    """What was found, where nothing but an assignment can change it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls, *args, **kwargs)
        self.__dict__.update({"_weights": {}, "_held": set(), "_frozen": False, "_contents": None})
        self._rename(cls.__name__)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        where, now = f"{self.name}.{name}", self.__dict__.get(name)
        if isinstance(now, Weight) and now is not value and value is not None and not isinstance(value, Members):
            if not isinstance(value, Weight):
                now.assign(value, where)
                return
            if value.shape != now.shape:
                rule = f"a weight of shape {list(now.shape)}"
                raise ValueError(f"{where}: the rule is {rule}; got {value.name} of shape {list(value.shape)}")
            self._exchange_registered(now, value)
        parts = [part for _, part in inside(where, value)] if _kind(type(value)) else []
        object.__setattr__(self, name, value)
        if _kind(type(value)) or _kind(type(now)):
            self.__dict__["_contents"] = None
        if name in self.__dict__ and not (isinstance(now, Weight) and isinstance(value, Weight)):  # ties are told apart
            self._note(name, in_call=bool(thread.running or thread.building))
        for part in parts:
            self._held.update(key for key, w in self._weights.items() if w is part)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)
        self.__dict__["_contents"] = None

    def __copy__(self) -> Any:
        """Another layer with the same weights and layers in it; what happens to the one does not happen to the other."""
        other = object.__new__(type(self))
        other.__dict__.update({n: copy.copy(v) if n in self._internal else v for n, v in self.__dict__.items()})
        return other

    def _rename(self, name: str) -> None:
        """Give a name that is not saved: whoever makes this layer again gives it again."""
        object.__setattr__(self, "name", name)
        if self._made is not None:
            self._made["name"] = token(name)

    def _exchange_registered(self, old: Weight, new: Weight) -> None:
        self.__dict__["_contents"] = None
        for key, w in self._weights.items():
            if w is old:
                self._weights[key] = new

    def _exchange(self, old: Weight, new: Weight) -> None:
        """``new`` takes the place of ``old`` wherever this layer has it."""
        self._exchange_registered(old, new)
        for name, value in list(self.__dict__.items()):
            if _kind(type(value)) and name not in self._internal:
                self.__dict__[name] = _exchanged(value, old, new)

    def add_weight(
        self,
        name: str,
        shape: Sequence[int] = (),
        init: Init = "zeros",
        trainable: bool = True,
        regularizer: Any = None,
        constraint: Any = None,
        dtype: Any = "float32",
    ) -> Weight:
        """A new weight of this layer.

        init: a name ("zeros", "ones", "kaiming_uniform", …), a number, or a function of (shape, NumPy generator).
        regularizer: w → (penalty, its gradient), as gl.L2(1e-4). constraint: w → the w to keep, as gl.NonNegative().
        """
        if name in self._weights:
            raise ValueError(f"{self.name}: it has a weight {name!r} already")
        if not name or "." in name:
            raise ValueError(f"{self.name}: add_weight: the rule is a name without dots; got {name!r}")
        sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        if not all(isinstance(n, int | np.integer) and n >= 0 for n in sizes):
            raise ValueError(f"{self.name}: {name}: the rule is a shape of integers ≥ 0; got {shape!r}")
        data = initial(init, sizes, random.generator()).astype(arrays.dtype(dtype))
        if data.shape != sizes:
            raise ValueError(f"{self.name}: {name}: the rule is init(…).shape = {list(sizes)}; got {list(data.shape)}")
        w = self._weights[name] = Weight(f"{self.name}.{name}", data, trainable, regularizer, constraint)
        w.trainable = trainable and not self._frozen
        self.__dict__["_contents"] = None
        return w

    # --- looking for them --------------------------------------------------------------------------------------------

    def _attributes(self) -> list[tuple[str, Any]]:
        """What may be or hold a weight or a layer, by name."""
        return list(self.__dict__.items())

    def _look(self) -> tuple[dict[str, Weight], dict[str, Any]]:
        """The weights and the layers directly in this layer, by name; "blocks.0" where ``blocks`` is a list."""
        if (known := self._contents) is not None:
            return known
        weights: dict[str, Weight] = {}
        children: dict[str, Any] = {}
        lasting = True
        for name, value in self._attributes():
            kind = _kind(type(value))
            if not kind or name in self._internal:
                continue
            lasting &= not _may_grow(value, kind)
            for full, part in inside(name, value):
                if full in weights or full in children:
                    raise ValueError(f"{self.name}: the rule is one name for each layer and weight; got two {full!r}")
                (weights if isinstance(part, Weight) else children)[full] = part
        found = self._own(weights) if self._weights else weights, children
        if lasting:
            self.__dict__["_contents"] = found
        return found

    def _own(self, found: dict[str, Weight]) -> dict[str, Weight]:
        """What ``add_weight`` made and is not gone, by its names, then what else was found."""
        ids = {id(w) for w in found.values()}
        own: dict[str, Weight] = {}
        for key, w in list(self._weights.items()):
            if id(w) in ids:
                self._held.add(key)
            elif key in self._held:
                self._weights.pop(key, None)
                self._held.discard(key)
                continue
            own[key] = w
            ids.discard(id(w))
        for name, w in found.items() if ids else ():
            if id(w) in ids:
                if name in own:
                    raise ValueError(f"{self.name}: two weights are named {name!r}: give add_weight another name")
                own[name] = w
        return own

    def own_weights(self) -> dict[str, Weight]:
        """The weights of this layer itself, without those of layers inside, by name."""
        return dict(self._look()[0])

    def children(self) -> dict[str, Any]:
        """The layers directly inside this one, by name: attributes, and what is in lists, tuples and dicts of them."""
        return dict(self._look()[1])

    def layers(self) -> Iterator[Any]:
        """This layer and all inside it, each once."""
        return (layer for _, layer in self.named_layers())

    def named_layers(self) -> Iterator[tuple[str, Any]]:
        """(name, layer) for this layer (named "") and all inside it ("blocks.0.norm"), each once."""
        seen: set[int] = set()
        todo: list[tuple[str, Any]] = [("", self)]
        while todo:
            name, layer = todo.pop()
            if id(layer) not in seen:
                seen.add(id(layer))
                yield name, layer
                children = layer._look()[1]
                if children:
                    todo += [(f"{name}.{n}" if name else n, child) for n, child in reversed(children.items())]

    def _places(self) -> list[tuple[str, Any, Weight]]:
        """(name in a state dict, layer, weight) of every place of a weight: a shared one has several."""
        found: list[tuple[str, Any, Weight]] = []
        around: list[int] = []

        def walk(layer: Members, prefix: str) -> None:
            weights, children = layer._look()
            for name, w in weights.items():
                found.append((prefix + name, layer, w))
            around.append(id(layer))
            for name, child in children.items():
                if id(child) not in around:  # a child may know its parent
                    walk(child, f"{prefix}{name}.")
            around.pop()

        walk(self, "")
        return found

    def named_weights(self) -> dict[str, Weight]:
        """Every weight in here by its name in a state dict ("0.weight"); a weight that is shared comes once.

        Raises ValueError where two have one name.
        """
        found: dict[str, Weight] = {}
        seen: set[int] = set()
        for name, _, w in self._places():
            if id(w) not in seen:
                seen.add(id(w))
                if name in found:
                    raise ValueError(f"{self.name}: two weights are named {name!r}")
                found[name] = w
        return found

    def ties(self) -> dict[str, str]:
        """The other names of shared weights: {name: the name in ``named_weights``}."""
        first = {id(w): name for name, w in reversed(self.named_weights().items())}
        return {name: first[id(w)] for name, _, w in self._places() if first[id(w)] != name}

    @property
    def weights(self) -> list[Weight]:
        return list(self.named_weights().values())

    @property
    def trainable_weights(self) -> list[Weight]:
        return [w for w in self.weights if w.trainable]

    @property
    def trainable(self) -> bool:
        """Assigning False freezes the layer and all inside it: ``fit`` trains none of its weights, and batch
        normalisation keeps to its running statistics. True gives back what ``add_weight`` said. It is saved.
        """
        return not self._frozen

    @trainable.setter
    def trainable(self, value: bool) -> None:
        for layer in self.layers():
            layer._frozen = not value
        for w in self.weights:
            w.trainable = bool(value) and w.learned

    def zero_grad(self) -> None:
        for w in self.weights:
            w.zero_grad()


_PART, _LIST, _DICT, _SET = 1, 2, 3, 4
_KINDS: dict[type, int] = {}


def _kind(cls: type) -> int:
    """0 for a value that holds no layers and no weights."""
    try:
        return _KINDS[cls]
    except KeyError:
        order = ((Members | Weight, _PART), (list | tuple | deque, _LIST), (dict, _DICT), (set | frozenset, _SET))
        _KINDS[cls] = next((kind for classes, kind in order if issubclass(cls, classes)), 0)
        return _KINDS[cls]


def _may_grow(value: Any, kind: int) -> bool:
    """Whether what ``value`` holds may change without an assignment to the attribute."""
    if isinstance(value, tuple):
        return any(_kind(type(v)) and _may_grow(v, _kind(type(v))) for v in value)
    return kind != _PART


def inside(name: str, value: Any, around: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(name, weight or layer) of all that ``value`` is or holds, as deep as it goes."""
    kind = _kind(type(value))
    if kind == _PART:
        yield name, value
    elif kind == _SET:
        if any(_kind(type(v)) == _PART for v in value):
            raise TypeError(
                f"{name}: the rule is layers and weights in lists, tuples or dicts; got a set, with no order"
            )
    elif kind and id(value) not in around:
        for key, v in list(value.items() if kind == _DICT else enumerate(value)):
            if _kind(type(v)):
                yield from inside(f"{name}.{key}", v, (*around, id(value)))


def _exchanged(value: Any, old: Weight, new: Weight) -> Any:
    """``value`` with ``new`` for ``old``; lists and dicts stay the same ones."""
    if value is old:
        return new
    if isinstance(value, tuple):
        items = [_exchanged(v, old, new) for v in value]
        same = all(a is b for a, b in zip(items, value))
        return value if same else value._make(items) if hasattr(value, "_make") else type(value)(items)
    pairs: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | deque) else ()
    )
    for key, v in list(pairs):
        if _kind(type(v)):
            value[key] = _exchanged(v, old, new)
    return value
