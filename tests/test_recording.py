"""Layers read by running them on arrays that record: what the graph computes is what the layer computes, or it is refused."""

import copy
import pathlib
import threading

import numpy as np
import pytest
from recorded import expressions
from recorded.array_layers import CASES, DTYPES, Same
from recorded.expressions import RECORDED, REFUSED, SHAPE, Computes

import gpulayers as gl
from gpulayers.export.recording import Formula, Unrecordable, check_replay, record
from gpulayers.ops._random import random_bits


def replayed(layer, shapes, dtypes=()):
    """Both modes, recorded and held against the layer."""
    for training in (True, False):
        recording = record(layer, shapes, training=training, dtypes=dtypes)
        assert check_replay(layer, recording, shapes, dtypes) < 2e-6
    return recording


@pytest.mark.parametrize("name", CASES)
def test_array_layers(name):
    """Forward, backward, states, at other batch sizes than those that were recorded, in both modes."""
    layer, shapes = CASES[name]
    replayed(layer, shapes, DTYPES.get(name, ()))


@pytest.mark.parametrize("name", RECORDED)
def test_functions_of_numpy(name):
    replayed(Computes(RECORDED[name]), [SHAPE])


@pytest.mark.parametrize("refused", REFUSED, ids=lambda r: str(r[0].__code__.co_firstlineno))
def test_what_cannot_be_read_is_refused(refused):
    """With the file, the line, its text, the reason and what to write instead."""
    function, reason, advice = refused

    class Refused(Same):
        def forward(self, x):
            return function(x)

        def backward(self, dy):
            return dy

    with pytest.raises(Unrecordable) as error:
        recording = record(Refused(), [SHAPE])
        check_replay(Refused(), recording, [SHAPE])
    assert error.value.place.file == expressions.__file__
    assert error.value.place.line == function.__code__.co_firstlineno
    lines = pathlib.Path(expressions.__file__).read_text().splitlines()
    assert error.value.place.text == lines[error.value.place.line - 1].strip()
    assert reason in error.value.reason and advice in error.value.advice


def test_a_branch_that_no_run_reached_is_caught_by_the_replay():
    class Branches(Same):
        def forward(self, x):
            return x * 2 if len(x) == 13 else x

        def backward(self, dy):
            return dy

    recording = record(Branches(), [SHAPE])
    with pytest.raises(Unrecordable, match=r"recorded output 0 is off by .* for a batch of 13"):
        check_replay(Branches(), recording, [SHAPE])


def test_rounding_that_batch_norm_magnifies_is_no_other_computation():
    """Of two samples a standardised channel knows its sign; where they nearly agree, float32 knows little more."""

    def worst(seed):
        gl.random.seed(seed)
        layer = gl.Sequential(gl.Linear(4, 4), gl.BatchNorm1d(4))
        recording = record(layer, [(None, 4)])
        return check_replay(layer, recording, [(None, 4)])

    assert max(map(worst, (15, 36, 39))) > 1e-5


BY_DEFINITION = {
    "GELU": (gl.GELU(), (None, 5)),
    "RReLU": (gl.RReLU(), (None, 5)),
    "GLU": (gl.GLU(), (None, 6)),
    "SwiGLU": (gl.SwiGLU(), (None, 6)),
    "ReLUSquared": (gl.ReLUSquared(), (None, 6)),
    "QuickGELU": (gl.QuickGELU(), (None, 6)),
    "Dropout": (gl.Dropout(0.3), (None, 20)),
    "BatchNorm2d": (gl.BatchNorm2d(2), (None, 2, 3, 3)),
    "GroupNorm": (gl.GroupNorm(2, 4), (None, 4, 3)),
    "InstanceNorm1d": (gl.InstanceNorm1d(2, affine=True, track_running_stats=True), (None, 2, 4)),
    "LocalResponseNorm": (gl.LocalResponseNorm(3, alpha=0.5), (None, 4, 2)),
    "AveragedNorm": (gl.BatchNorm1d(4, momentum=None), (None, 4)),
    "Conv2d": (gl.Conv2d(2, 2, 2, stride=2, padding=((1, 0), (0, 1)), groups=2), (None, 2, 4, 4)),
    "RNN": (gl.RNN(2, 2, 2, dropout=0.3), (None, 2, 2)),
    "Conv1d": (gl.Conv1d(2, 3, 2, padding=1, padding_mode="reflect"), (None, 2, 4)),
    "Conv3d": (gl.Conv3d(2, 2, 2, padding=1, padding_mode="circular", groups=2), (None, 2, 2, 3, 2)),
    "ConvTranspose2d": (gl.ConvTranspose2d(2, 4, 2, 3, 1, 1, 2), (None, 2, 2, 3)),
    "MaxPool2d": (gl.MaxPool2d(2, 2, 1, ceil_mode=True), (None, 1, 4, 5)),
    "Sequential": (
        gl.Sequential(gl.LayerNorm(6), gl.Residual(gl.Linear(6, 6), gl.Tanh()), gl.Parallel(gl.Softmax(), gl.SiLU())),
        (None, 6),
    ),
}


@pytest.mark.parametrize("name", BY_DEFINITION)
def test_layers_of_the_library_by_their_definitions(name):
    """Batch norm's statistics, dropout's masks, whole models; random draws are the layer's own, one for one."""
    layer, shape = BY_DEFINITION[name]
    for training in (True, False):
        recording = record(layer, [shape], training=training)
        assert check_replay(layer, recording, [shape]) < 1e-5


def test_random_numbers_of_a_layer_of_ones_own():
    class Noisy(Same):
        def forward(self, x):
            if not self.training:
                return x
            gl.random.draw()  # not used: those that follow are still the second, the third
            rng, kept = gl.random.generator(), gl.random.generator().random(x.shape) < 0.5
            rng.random(3)
            noise = rng.normal(1, 0.5, x.shape).astype(x.dtype) + rng.uniform(-1, 1, x.shape).astype(x.dtype)
            factor = noise * kept * (rng.random((len(x), 1, 1)) < 0.5)
            self.save(factor)
            return x * factor

        def backward(self, dy):
            return dy * self.saved[0] if self.training else dy

    recording = record(Noisy(), [SHAPE])
    assert check_replay(Noisy(), recording, [SHAPE]) < 1e-6
    drawn = [n.op for n in recording.forward.nodes if n.op.startswith("random")]
    assert drawn == ["random_uniform", "random_uniform", "random_normal", "random_uniform", "random_uniform"]
    assert not record(Noisy(), [SHAPE], training=False).forward.nodes


def test_a_backward_that_asks_for_other_random_numbers_is_refused():
    class Later(Same):
        def forward(self, x):
            self.save(gl.random.draw())
            return x * 1

        def backward(self, dy):
            return dy * (random_bits(self.saved[0], 4) > 2**31)

    with pytest.raises(
        Unrecordable, match=r"test_recording.py:\d+: .*backward takes random_bits of a draw that forward"
    ):
        record(Later(), [SHAPE])


def test_a_layer_that_is_wrong_by_itself_is_told_from_one_that_cannot_be_read():
    class Forgets(Same):
        def forward(self, x):
            return x * 2

        def backward(self, dy):
            (_x,) = self.saved
            return dy

    with pytest.raises(Unrecordable, match=r"on NumPy's own arrays, too, it raises ValueError: .*`gpulayers check`"):
        record(Forgets(), [SHAPE])


def test_numpys_makers_of_arrays_are_its_own_again():
    class Broken(Same):
        def forward(self, x):
            return np.asarray(x) + threading.Thread

    before = np.asarray, np.array
    with pytest.raises(Unrecordable):
        record(Broken(), [SHAPE])
    assert (np.asarray, np.array) == before and np.array(object=[1]).shape == (1,)


def test_the_layer_is_left_as_it_is():
    layer, shapes = copy.deepcopy(CASES["BatchCenter"])  # others build it, and set its mode
    layer.train().ensure_built(*shapes)
    before = layer.running.data.copy()
    record(layer, shapes)
    assert type(layer.running.data) is np.ndarray and np.array_equal(layer.running.data, before)
    assert not layer._waiting.frames and layer.training and not layer.running.has_grad


def test_numbers_that_follow_the_batch_are_formulas():
    class Scaled(Same):
        def forward(self, x):
            return (x * (len(x) / (len(x) + 2)) - np.sqrt(len(x)) * x).reshape(-1, 12).reshape(x.shape)

        def backward(self, dy):
            return dy / max(len(dy) - 1, 1)

    recording = record(Scaled(), [SHAPE])
    forward, backward = (
        [n.attributes["value"] for n in g.nodes if n.op == "const"] for g in (recording.forward, recording.backward)
    )
    assert forward == [Formula(0, 1, 2, 1), Formula(0, 1, 1, 0, root=True)]
    assert backward == [Formula(-1, 1, one=1)]
    assert replayed(Scaled(), [SHAPE])


def test_a_line_of_the_layers_is_named_not_one_of_the_library():
    class Calls(gl.OpLayer):
        op = gl.ops.activation.silu

        def forward(self, x):
            return self.run(self.op, x) * 2

        def backward(self, dy):
            return self.run_backward(dy * 2)

    recording = record(Calls(), [SHAPE])
    assert {n.place.text for n in recording.forward.nodes} >= {"return self.run(self.op, x) * 2"}
    assert {n.place.file for n in (*recording.forward.nodes, *recording.backward.nodes) if n.place} == {__file__}


def test_a_layer_may_say_what_is_read_in_its_place():
    class Readable(Same):
        def build(self, shape):
            self.w = self.add_weight("w", shape[-1:], init="normal")

        def forward(self, x):
            self.save(x)
            return np.where(x > 0, x, x * self.w)

        def backward(self, dy):
            (x,) = self.saved
            self.w.grad += np.where(x > 0, 0, dy * x).sum((0, 1))
            return np.where(x > 0, dy, dy * self.w)

    class Branching(Readable):
        def forward(self, x):
            return super().forward(np.array(x.tolist(), x.dtype))

        def exported(self):
            return self._tied(Readable())

        def _tied(self, other):
            other.ensure_built(*self._input_shapes)
            other.w = self.w
            return other

    replayed(Branching(), [SHAPE])

    class Wrong(Branching):
        def exported(self):
            return Same()

    with pytest.raises(ValueError, match=r"Wrong: exported.*same weights"):
        record(Wrong(), [SHAPE])


def test_shapes_and_dtypes():
    layer = CASES["LayerScale"][0]
    with pytest.raises(ValueError, match="known sizes"):
        record(layer, [(None, None, 4)])
    half = gl.Linear(4, 3).to("float16")
    recording = record(half, [(None, 4)])
    assert {n.dtype for n in recording.forward.weights.values()} == {np.dtype(np.float32)}
    assert check_replay(half, recording, [(None, 4)]) < 1e-6


def test_sums_into_blocks_need_no_masks():
    recording = record(Computes([expressions._blocks]), [SHAPE])
    assert {n.op for n in recording.forward.nodes} <= {"add", "pad", "slice", "reshape", "const", "broadcast"}
