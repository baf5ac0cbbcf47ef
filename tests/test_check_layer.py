"""A right layer passes; each faulty one is caught, with a message that names its fault."""

import inspect
import re

import numpy as np
import pytest
from check_mutants import finding, gradcheck, proven
from layer_mutants import MUTANTS, RIGHT
from layer_mutants._bases import Scale, Swish
from layer_mutants.library import layers

import gpulayers as gl
from gpulayers.testing import CheckError, check_layer
from gpulayers.testing.check_layer import CHECKS


def by_name(case):
    return getattr(case, "name", None) or case[0]


@pytest.mark.parametrize("mutant", MUTANTS, ids=by_name)
def test_faulty_layer_is_caught_and_named(mutant):
    said = finding(mutant.make, mutant.inputs)
    assert said is not None
    assert re.search(mutant.names, said), said


@pytest.mark.parametrize("mutant", MUTANTS, ids=by_name)
def test_mutants_are_faulty(mutant):
    """A direct test fails for them; it holds for the right layer that they are variants of."""
    assert proven(mutant)
    base = type(mutant.make()).__mro__[1]
    if base in {type(make()) for _, make, _ in RIGHT}:
        make = next(make for _, make, _ in RIGHT if type(make()) is base)
        assert not proven(mutant._replace(make=make))


@pytest.mark.parametrize("case", RIGHT, ids=by_name)
def test_right_layer_passes(case):
    _, make, inputs = case
    assert finding(make, inputs) is None


@pytest.mark.parametrize("case", list(layers())[::11], ids=by_name)
def test_the_librarys_layers_pass(case):
    _, make, inputs = case
    assert finding(make, inputs, 3) is None


def test_gradcheck_passes_what_is_right():
    """Its column in the table is of the layers' doing."""
    named = {name: (make, inputs) for name, make, inputs in RIGHT}
    assert all(gradcheck(*named[name]) for name in ("Scale", "Dense", "Standard", "Drop", "Table"))


def test_the_layer_is_not_changed():
    layer = Scale()
    layer.ensure_built((None, 5))
    gl.random.seed(3)
    before, state = layer.state_dict(), gl.random.get_state()
    passed = check_layer(layer, (None, 5))
    assert {"gradients, training", "memory order of dy", "float16", "threads", "kernels"} <= set(passed)
    assert gl.random.get_state() == state and not layer.w.has_grad
    assert all(np.array_equal(v, before[n]) for n, v in layer.state_dict().items())


def test_what_was_given_is_said():
    with pytest.raises(CheckError, match=r"smallest input that shows it: x = float64\[1, 5\]"):
        check_layer(next(m for m in MUTANTS if m.name == "TwiceTheGradient").make(), (None, 5))


def test_kernels_are_checked():
    """A model of library layers, whose kernels are interpreted and emulated where there is no GPU."""
    check_layer(gl.Sequential(Swish(), gl.Residual(Swish(), gl.Softmax()), gl.Flatten()), (None, 3, 4))


def test_layer_used_twice():
    """The same layer twice in a model, and called twice before the backwards."""
    gl.random.seed(3)
    swish = Swish()
    check_layer(gl.Sequential(swish, gl.Softmax(), swish), (None, 4))


def test_checks_are_documented():
    for check in CHECKS.values():
        assert inspect.getdoc(check), check.__name__
