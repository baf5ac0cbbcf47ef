"""What an interpreted kernel computes the short way is what Triton's own code computes, types and refusals included."""

import itertools

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

import triton.language as tl

from gpulayers.testing import _functions, _operators
from gpulayers.testing._builder import BUILDER
from gpulayers.testing._language import patched
from gpulayers.testing._rewriting import interpreted
from gpulayers.testing._values import STORAGE, block_type, made, pointer_to
from gpulayers.testing.memory import Memory

KINDS = ("int1", "int32", "int64", "float16", "bfloat16", "float32", "float64")
SHAPES = ((), (4,), (2, 1), (2, 4))
NUMBERS = (0, 3, -2, 2**31, 0.0, -0.0, 0.5, float("inf"), True, tl.constexpr(2), tl.constexpr(1.5))
OPERATORS = sorted(_operators.operators(lambda name: None).keys() - {"__getitem__"})


def value(kind, shape, seed=0):
    ty = getattr(tl, kind)
    data = (np.random.default_rng([seed, len(shape)]).integers(-3, 4, shape or (1,)) * 2 + 1).astype(STORAGE[ty.name])
    return made(data, ty, block_type(ty, shape) if shape else ty)


def values(seed):
    return [value(kind, shape, seed) for kind in KINDS for shape in SHAPES]


def outcome(function, *args, **named):
    """The type, shape and bits of what comes back, or the type of what is raised."""
    try:
        out = function(*args, **named)
    except Exception as error:
        return type(error)
    return out.type, out.handle.data.dtype, out.handle.data.shape, out.handle.data.tobytes(), out.handle.dtype


@pytest.fixture
def language():
    own = {name: getattr(tl, name) for name in _functions.functions(lambda name: None)}
    methods = {name: getattr(tl.tensor, name) for name in OPERATORS}
    with patched(), np.errstate(all="ignore"):
        yield {name: interpreted(function) for name, function in (own | methods).items()}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(language, name):
    pairs = [*itertools.product(values(0), values(1)), *itertools.product(values(0), NUMBERS)]
    for x, y in pairs:
        assert outcome(getattr(tl.tensor, name), x, y) == outcome(language[name], x, y), (x.type, getattr(y, "type", y))


@pytest.mark.parametrize("name", ["minimum", "maximum"])
def test_extremes(language, name):
    for x, y in [*itertools.product(values(0), values(1)), *itertools.product(values(0), NUMBERS)]:
        for args in ((x, y), (y, x)):
            assert outcome(getattr(tl, name), *args) == outcome(language[name], *args), (x.type, getattr(y, "type", y))


def test_where(language):
    conditions = [value("int1", shape) for shape in SHAPES]
    few = [value(kind, shape, 1) for kind in ("int32", "float16", "float32") for shape in SHAPES]
    for condition, x, y in itertools.product(conditions, few, [*few, 2, 0.5]):
        assert outcome(tl.where, condition, x, y) == outcome(language["where"], condition, x, y)
        assert outcome(tl.where, condition, y, x) == outcome(language["where"], condition, y, x)


def test_casts_and_constants(language):
    for x, kind in itertools.product([*values(0), 3, 0.5], KINDS):
        assert outcome(tl.cast, x, getattr(tl, kind)) == outcome(language["cast"], x, getattr(tl, kind))
    for shape, number, kind in itertools.product(([], (4,), [2, tl.constexpr(4)], (3,)), NUMBERS, KINDS):
        wanted = outcome(language["full"], shape, number, getattr(tl, kind))
        assert outcome(tl.full, shape, number, getattr(tl, kind)) == wanted
    for start, end in ((0, 8), (8, 16), (0, 3), (4, 4), (0, 2**33)):
        assert outcome(tl.arange, start, end) == outcome(language["arange"], start, end)


@pytest.mark.parametrize("kind", ["int32", "float16", "float32", "int1"])
def test_memory(language, monkeypatch, kind):
    element = getattr(tl, kind)
    array = np.arange(1, 9).astype(STORAGE[element.name])
    memory = Memory("test", poison=False)
    monkeypatch.setattr(BUILDER, "memory", memory, raising=False)
    base = pointer_to(element)
    start = made(np.array([memory.add("x", array)], np.uint64), base, base)
    lanes = [value("int1", shape, 2) for shape in SHAPES]
    others = [None, *NUMBERS, *(value(k, shape, 3) for k in ("int32", "float32", kind) for shape in SHAPES)]
    pointers = [start, start + tl.arange(0, 1), start + tl.arange(0, 4), (start + tl.arange(0, 8)).reshape((2, 4))]
    for pointer, mask in itertools.product(pointers, [None, True, *lanes]):
        for other in others:
            assert outcome(tl.load, pointer, mask, other) == outcome(language["load"], pointer, mask, other)
        for stored in others[1:]:
            after = []
            for function in (tl.store, language["store"]):
                array[...] = np.arange(1, 9)
                try:
                    function(pointer, stored, mask)
                except Exception as error:
                    after.append(type(error))
                else:
                    after.append(array.tobytes())
            assert after[0] == after[1]
    for wrong in (dict(cache_modifier="fast"), dict(eviction_policy="soon"), dict(padding_option="zero")):
        for load in (tl.load, language["load"]):
            with pytest.raises(ValueError):
                load(start, **wrong)
