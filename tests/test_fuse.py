"""Layers of one's own as one Triton kernel each way: what is written, who runs it, and whether it is right."""

import ast

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import dispatch
from gpulayers.arrays import Spec, bfloat16, float32
from gpulayers.fusing import FusionError, fuse, fusion
from gpulayers.testing import audit_op, check_layer, check_op
from gpulayers.testing.interpreter import interpreting


class Swish(gl.Layer):
    """y = x σ(βx), β learned; any shape."""

    def build(self, input_shape):
        self.beta = self.add_weight("beta", (), init=1.5)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        s = 1 / (1 + np.exp(-self.beta * x))
        self.save(x, s)
        return x * s

    def backward(self, dy):
        x, s = self.saved
        slope = x * s * (1 - s)
        self.beta.grad += (dy * x * slope).sum()
        return dy * (s + self.beta * slope)


@gl.register
class Centred(gl.Layer):
    """(x − mean(x)) g along the last axis; scaled by what its setting says."""

    def __init__(self, scale=2.0):
        self.scale = scale

    def build(self, input_shape):
        self.gain = self.add_weight("gain", input_shape[-1:], init=0.5)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        d = x - x.mean(-1, keepdims=True)
        self.save(d)
        return d * self.gain * self.scale

    def backward(self, dy):
        (d,) = self.saved
        self.gain.grad += self.scale * (dy * d).reshape(-1, d.shape[-1]).sum(0)
        g = dy * self.gain * self.scale
        return g - g.mean(-1, keepdims=True)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Kernels are written where nobody else looks."""
    monkeypatch.setenv("GPULAYERS_CACHE", str(tmp_path_factory.getbasetemp() / "gpulayers"))


@pytest.fixture
def triton():
    """Within, only Triton computes, interpreted; the session lists its launches."""
    with interpreting() as session, dispatch.policy(simulate=("triton",)), gl.only("triton"):
        yield session


def arrays_for(layer: gl.Layer, *shapes: tuple, seed: int = 0) -> list[np.ndarray]:
    """Inputs, and the weights moved from where they start, in float64."""
    rng = np.random.default_rng(seed)
    layer.ensure_built(*((None, *s[1:]) for s in shapes))
    weights = layer.named_weights().values()
    return [*map(rng.standard_normal, shapes), *(w.data + 0.3 * rng.standard_normal(w.shape) for w in weights)]


def test_text_has_the_authors_lines_and_names():
    text = fusion(Swish(), (None, 8)).text
    ast.parse(text)
    for line in ("# s = 1 / (1 + np.exp(-self.beta * x))", "s = 1 / (1 + tl.exp(-beta * x))", "y = x * s"):
        assert f"    {line}\n" in text
    assert "import gpulayers" not in text


@pytest.mark.parametrize("shape", [(5, 7), (0, 3), (2, 3, 1), (3, 2, 130)])
@pytest.mark.parametrize("make", [Swish, Centred])
def test_kernels_give_what_the_array_code_gives(make, shape):
    layer = make()
    dtypes = ["float32", "float16", "bfloat16"] if shape == (5, 7) else ["float32"]
    op = fusion(layer, (None, *shape[1:])).op
    assert check_op(op, *arrays_for(layer, shape), backends=["definition", "triton"], dtypes=dtypes)


def test_a_fused_layer_runs_its_kernels(triton):
    layer, own = fuse(Swish(), (None, 5)), Swish()
    x = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    y = layer(x)
    dx = layer.backward(y)
    assert [launch.kernel for launch in triton.launches] == [
        "swish_forward",
        "swish_backward",
        "swish_backward_numbers",
    ]
    with dispatch.policy(simulate=()), gl.only("definition"):
        np.testing.assert_allclose(y, own(x), rtol=1e-6)
        np.testing.assert_allclose(dx, own.backward(y), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.beta.grad, own.beta.grad, rtol=1e-5)


def test_on_a_cpu_the_array_code_runs():
    layer = fuse(Swish(), (None, 5))
    x = np.ones((2, 5), np.float64)
    assert np.array_equal(layer(x), Swish()(x))
    backend, reasons = gl.explain(fusion(layer, (None, 5)).op, x, layer.beta.data)
    assert backend == "definition" and reasons["triton"] == "its kernels take CUDA arrays"


def test_check_layer_runs_the_kernels_of_a_fused_layer():
    with interpreting() as session:
        check_layer(fuse(Centred()), (None, 6), dtypes=["float32"], backends=["triton"])
    assert {launch.kernel for launch in session.launches} >= {"centred_forward", "centred_backward"}


def test_a_setting_that_changes_is_seen(triton):
    layer = fuse(Centred(), (None, 4))
    x = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)
    before = layer(x)
    layer.scale = 4.0
    np.testing.assert_allclose(layer(x), 2 * before, rtol=1e-6)


def test_a_class_may_say_that_it_is_fused(triton):
    class Fused(Swish):
        fused = True

    Fused()(np.ones((2, 3), np.float32))
    assert [launch.kernel for launch in triton.launches] == ["fused_forward"]


class Product(gl.Layer):
    """A fully connected layer, written out."""

    def build(self, input_shape):
        self.w = self.add_weight("w", (input_shape[-1], 3), init="ones")

    def output_shape(self, input_shape):
        return (*input_shape[:-1], 3)

    def forward(self, x):
        self.save(x)
        return x @ self.w

    def backward(self, dy):
        (x,) = self.saved
        self.w.grad += x.T @ dy
        return dy @ self.w.T


def test_a_refusal_names_the_line():
    with pytest.raises(
        FusionError, match=r"test_fuse.py:\d+: `return x @ self.w`: matmul .* Write instead: .*gl.Linear"
    ):
        fuse(Product(), (None, 4))


@pytest.mark.parametrize(("make", "shape"), [(Swish, (512, 1000)), (Centred, (512, 8192))])
def test_machine_code(make, shape):
    layer = make()
    op = fusion(layer, (None, *shape[1:])).op
    weights = [Spec(w.shape, float32) for w in layer.named_weights().values()]
    for report in audit_op(op, Spec(shape, bfloat16), *weights, archs=[90]):
        assert not report.spills
