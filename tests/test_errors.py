"""Bad input: the error names the layer, the argument, the rule as a formula, and what came."""

import numpy as np
import pytest
import torch

import gpulayers as gl
from gpulayers.ops.linear import linear


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


CASES = {
    "wrong rank": (
        gl.Conv2d(3, 8, 3),
        (zeros(3, 9),),
        RuntimeError,
        r"Conv2d.*: x: the rule is .*\(N, C, H, W\).*; got \[3, 9\]",
    ),
    "wrong rank, batch norm": (
        gl.BatchNorm2d(3),
        (zeros(4, 3),),
        ValueError,
        r"BatchNorm2d: x: the rule is a 4-dim array; got \[4, 3\]",
    ),
    "wrong channels": (
        gl.Conv2d(3, 8, 3),
        (zeros(2, 4, 9, 9),),
        RuntimeError,
        r"Conv2d.*: .*the rule is .*groups.*; got ",
    ),
    "wrong features": (
        gl.Linear(5, 2),
        (zeros(4, 6),),
        RuntimeError,
        r"Linear: x: the rule is x.shape = \[.*\]; got \[4, 6\]",
    ),
    "wrong normalized shape": (
        gl.LayerNorm(5),
        (zeros(4, 6),),
        RuntimeError,
        r"LayerNorm: x: the rule is x.shape = .*; got \[4, 6\]",
    ),
    "one value a channel": (gl.BatchNorm1d(3), (zeros(1, 3),), ValueError, r"BatchNorm1d.*: .*the rule is .*; got "),
    "unknown dtype": (
        gl.ReLU(),
        (zeros(3, dtype=np.int32),),
        NotImplementedError,
        r"ReLU.*: x: the rule is dtype ∈ .*; got int32",
    ),
    "kernel larger than the padded image": (
        gl.Conv2d(3, 8, 7, padding=1),
        (zeros(2, 3, 4, 9),),
        RuntimeError,
        r"Conv2d: x: the rule is OH = .* ≥ 1; got H = 4",
    ),
    "window larger than the padded image": (
        gl.MaxPool2d(5),
        (zeros(2, 3, 4, 9),),
        RuntimeError,
        r"MaxPool2d.*: .*the rule is .*; got ",
    ),
    "labels out of range": (
        gl.CrossEntropyLoss(),
        (zeros(4, 3), np.array([0, 1, 2, 3])),
        IndexError,
        r"CrossEntropyLoss.*: target: the rule is .*; got .*3",
    ),
    "negative label": (
        gl.CrossEntropyLoss(),
        (zeros(2, 3), np.array([0, -1])),
        IndexError,
        r"CrossEntropyLoss.*: target: the rule is .*; got .*-1",
    ),
    "batches of input and target": (
        gl.CrossEntropyLoss(),
        (zeros(4, 3), np.array([0, 1])),
        ValueError,
        r"CrossEntropyLoss.*: target: the rule is .*; got ",
    ),
    "no array": (gl.ReLU(), ("x",), TypeError, r"ReLU: x: expected a NumPy, CuPy or torch array, got builtins.str"),
}


def test_weights_follow_the_activations():
    """float64 weights and a float32 input are no error: the layer computes in the input's dtype."""
    layer = gl.Linear(5, 2).to("float64")
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    y = layer(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x @ layer.weight.data.T + layer.bias.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_layers_name_the_rule(case):
    layer, inputs, error, text = CASES[case]
    with pytest.raises(error, match=text):
        layer(*inputs)
    assert not layer._waiting.frames, "a refused call leaves nothing behind"


def test_layers_inside_a_model_are_named():
    model = gl.Sequential(gl.Linear(4, 8), gl.ReLU(), gl.Linear(9, 2))
    with pytest.raises(RuntimeError, match=r"2.Linear: x: the rule is"):
        model(zeros(3, 4))


def test_wrong_options_of_layers():
    with pytest.raises(ValueError, match=r"p: the rule is 0 ≤ p ≤ 1; got 1.5"):
        gl.Dropout(1.5)
    with pytest.raises(ValueError, match=r"groups"):
        gl.Conv2d(3, 8, 3, groups=2)
    with pytest.raises(ValueError, match=r"Conv2d: groups: the rule is groups ≥ 1; got 0"):
        gl.Conv2d(3, 8, 3, groups=0)
    with pytest.raises(RuntimeError, match=r"Conv2d: kernel_size: the rule is .*; got \(1, 2, 3\)"):
        gl.Conv2d(3, 8, (1, 2, 3))
    with pytest.raises(RuntimeError, match=r"GELU.*: approximate: the rule is"):
        gl.GELU("erf")(zeros(3))
    with pytest.raises(ValueError, match=r"CrossEntropyLoss.*: reduction: the rule is"):
        gl.CrossEntropyLoss(reduction="average")(zeros(4, 3), np.zeros(4, int))
    with pytest.raises(TypeError, match=r"Linear: to: the rule is cpu, cuda\[:index\] or a dtype ∈ .*; got 'float15'"):
        gl.Linear(2, 2).to("float15")
    with pytest.raises(TypeError, match=r"Linear: to: the rule is .*; got None"):
        gl.Linear(2, 2).to(None)
    with pytest.raises((RuntimeError, ValueError), match=r"no GPU|cuda"):
        if torch.cuda.is_available():
            raise ValueError("cuda is here")
        gl.Linear(2, 2).to("cuda")


def test_mixed_libraries_and_dtypes():
    with pytest.raises(RuntimeError, match=r"linear: all arrays must be of one library and on one device"):
        linear(zeros(4, 5), torch.zeros(3, 5))
    with pytest.raises(RuntimeError, match=r"linear: weight: the rule is weight.dtype = x.dtype"):
        linear(zeros(4, 5), zeros(3, 5, dtype=np.float64))
