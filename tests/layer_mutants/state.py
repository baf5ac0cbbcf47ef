"""Faults that a saved model shows."""

import numpy as np

import gpulayers as gl
from layer_mutants._bases import Drop, Same, Scale, Swish
from layer_mutants._kinds import MUTANTS, Mutant, drawn, mutant

F = ((None, 5),)


def _saved_and_loaded(*args, training=False):
    def proof(make):
        import tempfile

        layer, x = make(), drawn(4, 5).astype("float32")
        layer(x)
        layer.backward(x)
        with tempfile.TemporaryDirectory() as folder:
            gl.random.seed(99)
            gl.save(layer, f"{folder}/model")
            again = gl.load(f"{folder}/model")
        found = []
        for one in (layer, again):
            gl.random.seed(7)
            y = one.train(training)(x)
            found.append(np.concatenate([y, one.backward(x)]))
        assert np.allclose(*found)

    return proof


@mutant("state", F, "made again from its config and weights it gives another output", _saved_and_loaded())
class ATableDrawnInInit(Same):
    def __init__(self):
        self._table = gl.random.generator().standard_normal(5)

    def forward(self, x):
        return x * self._table

    def backward(self, dy):
        return dy * self._table


@mutant("state", F, "made again from its config and weights it gives another output", _saved_and_loaded(), 3.0)
class ConfigLosesTheArgument(Same):
    def __init__(self, factor=1.0):
        self.factor = factor

    def get_config(self):
        return super().get_config() | {"args": [], "kwargs": {}}

    def _config_arguments(self):
        return (), {}

    def _config_of_changes(self, seen):
        return {}

    def forward(self, x):
        return x * self.factor

    def backward(self, dy):
        return dy * self.factor


@mutant("state", F, r"gives another output: keep every setting", _saved_and_loaded(training=True), 0.6)
class ConfigLosesWhatTrainingNeeds(Drop):
    def _config_arguments(self):
        return (), {}

    def _config_of_changes(self, seen):
        return {}


def _weights_before_a_call(make):
    layer = make()
    layer.ensure_built((None, 5))
    before = set(layer.named_weights())
    layer(drawn(4, 5))
    assert before == set(layer.named_weights())


@mutant("state", F, "forward adds the weights", _weights_before_a_call)
class WeightsAddedInForward(Swish):
    def forward(self, x):
        if "late" not in self.named_weights():
            self.late = self.add_weight("late", x.shape[-1:], "ones", dtype=str(x.dtype))
        self.save()
        return super().forward(x) * np.asarray(self.late)

    def backward(self, dy):
        return super().backward(dy * np.asarray(self.late))


def _lost_weight(make):
    layer = make()
    layer.ensure_built((None, 5))
    assert layer.state_dict()


@mutant("state", F, "made again from its config and weights it gives another output", _saved_and_loaded())
class AWeightThatIsNoWeight(Same):
    """Drawn in build, and not by add_weight."""

    def build(self, input_shape):
        self._w = gl.random.generator().standard_normal(input_shape[-1])

    def forward(self, x):
        return x * self._w

    def backward(self, dy):
        return dy * self._w


def _first_of_two():
    class TwoUnderOneName(Scale):
        pass

    return gl.register(TwoUnderOneName)


def _two_under_one_name():
    cls = _first_of_two()
    layer = cls()
    _first_of_two()
    return layer


def _cannot_be_saved(make):
    try:
        make().get_config()
    except TypeError:
        raise AssertionError from None


MUTANTS.append(
    Mutant(
        "TwoUnderOneName", "state", _two_under_one_name, F, "two layers are registered under one name", _cannot_be_saved
    )
)
