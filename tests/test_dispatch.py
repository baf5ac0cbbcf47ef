"""Who computes, why, and what a caller is told."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import gpulayers as gl
from gpulayers import arrays, dispatch
from gpulayers.ops.linear import linear
from gpulayers.ops.pooling import max_pool2d
from gpulayers.ops.softmax import log_softmax, softmax, softmin
from gpulayers.testing.interpreter import interpreting

X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
IMAGE = np.zeros((1, 2, 4, 4), np.float32)


@pytest.fixture
def simulated():
    """CPU arrays count as CUDA arrays; Triton kernels are interpreted."""
    with interpreting(), dispatch.policy(simulate=("triton",)):
        yield


def test_same_kind_out():
    """NumPy and torch arrays in, the same kind out; torch sees what NumPy computed."""
    y = softmax(X)
    t = softmax(torch.from_numpy(X))
    assert type(y) is np.ndarray and isinstance(t, torch.Tensor)
    assert np.array_equal(y, t.numpy())
    out, call = softmax.record(torch.from_numpy(X).bfloat16().t(), axis=0)
    (dx,) = call.backward(torch.ones_like(out))
    assert out.dtype == dx.dtype == torch.bfloat16 and dx.shape == (6, 4)


def test_explain_launches_nothing(simulated):
    with interpreting() as session:
        backend, reasons = gl.explain(softmax, X)
        assert backend == "triton" and reasons == {} and not session.launches
        softmax(X)
        assert [launch.kernel for launch in session.launches] == ["_softmax_forward_kernel"]


def test_reasons():
    backend, reasons = gl.explain(softmax, X)
    assert backend in ("numpy", "definition") and reasons["triton"] == "its kernels take CUDA arrays"
    with dispatch.policy(simulate=("triton",)):
        assert gl.explain(softmax, X.astype(np.float64))[1]["triton"] == "float64 is left to the definition"


def test_only():
    with gl.only("definition"):
        assert gl.explain(softmax, X)[0] == "definition"
    with (
        gl.only("triton"),
        pytest.raises(gl.Refused, match=r"softmax on numpy arrays \(cpu\): .*triton: its kernels take"),
    ):
        softmax(X)
    with pytest.raises(ValueError, match="unknown backend 'cudnn': expected one of triton, cuda, numpy, definition"):
        gl.only("cudnn")


def test_the_policy_of_forward_holds_for_backward(simulated):
    with gl.only("triton"):
        y, call = softmax.record(X)
    with gl.only("definition"), interpreting() as session:
        call.backward(np.ones_like(y))
    assert [launch.kernel for launch in session.launches] == ["_softmax_backward_kernel"]


def test_strict_forbids_the_definition_on_a_gpu(monkeypatch):
    """Seen from a call on CUDA arrays that no kernel serves."""
    monkeypatch.setattr(dispatch, "_home", lambda op, inputs: (arrays.NUMPY, "cuda:0"))
    monkeypatch.setattr(dispatch, "_missing", lambda package: "not here" if package == "triton" else None)
    monkeypatch.setattr(dispatch, "_too_old", lambda device: None)
    with gl.strict(), pytest.raises(gl.Refused, match=r"strict mode forbids the definition.*triton: not here"):
        softmax(X)


def test_each_fallback_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_reported", set())
    with caplog.at_level(logging.INFO, "gpulayers"):
        for _ in range(2):
            dispatch._report(softmax, "definition", {"triton": "torch is not installed"}, "cuda:0")
    assert [r.getMessage() for r in caplog.records] == ["softmax runs on definition (triton: torch is not installed)"]
    assert caplog.records[0].levelno == logging.WARNING


def test_environment_sets_the_policy():
    code = "from gpulayers import dispatch; print(dispatch._policy.get())"
    env = os.environ | {"GPULAYERS_BACKEND": " numpy, definition", "GPULAYERS_STRICT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "backends=('numpy', 'definition'), strict=True" in done.stdout


def test_wrong_calls():
    with pytest.raises(TypeError, match=r"softmax: unknown option 'dim'; it has axis"):
        softmax(X, dim=1)
    with pytest.raises(TypeError, match=r"linear: it takes x, weight, bias; got 1 inputs"):
        linear(X)
    with pytest.raises(TypeError, match=r"linear: weight is required; got None"):
        linear(X, None)
    with pytest.raises(TypeError, match=r"softmax: expected a NumPy, CuPy or torch array, got builtins.str"):
        softmax("x")
    with pytest.raises(ValueError, match=r"softmax: no gradient for 'y'; it has them for x"):
        softmax.record(X, needs=["y"])
    with pytest.raises(
        RuntimeError, match=r"linear: all arrays must be of one library and on one device; got numpy on cpu, torch"
    ):
        linear(X, torch.zeros(2, 6))
    with pytest.raises(NotImplementedError, match=r"softmax: x: the rule is dtype ∈ .*; got int64"):
        softmax(np.arange(3))
    y, call = softmax.record(X)
    with pytest.raises(
        RuntimeError, match=r"softmax: dy of y: the rule is dy.shape, dtype = float32\[4, 6\]; got float32\[6, 4\]"
    ):
        call.backward(y.T)
    with pytest.raises(RuntimeError, match="backward takes one dy for each output: y"):
        call.backward(y, y)


def test_a_kernels_exception_is_not_swallowed(monkeypatch):
    module = dispatch.kernels("triton", softmax)

    def broken(*args, **kwargs):
        raise ZeroDivisionError("in the kernel")

    monkeypatch.setattr(module, "softmax_forward", broken)
    with dispatch.policy(simulate=("triton",)), pytest.raises(ZeroDivisionError):
        softmax(np.ones((3, 7), np.float32))


def test_list_options_are_plans_too():
    before = len(dispatch._plans)
    softmax(X, axis=-1)
    softmax(X, axis=-1)
    assert len(dispatch._plans) <= before + 1


def test_options_and_gradients_are_named():
    with pytest.raises(TypeError, match=r"max_pool2d: option kernel_size is required"):
        max_pool2d(IMAGE)
    for wrong in ({2}, {}, np.array([2, 2])):
        with pytest.raises(TypeError, match=r"max_pool2d: kernel_size: the rule is .*; got (set|dict|ndarray)"):
            max_pool2d(IMAGE, kernel_size=wrong)
    with pytest.raises(TypeError, match=r"on the CPU or on a CUDA device, got one on meta"):
        softmax(torch.empty(3, device="meta"))
    y, call = softmax.record(X)
    assert call.backward(None) == (None,)
    with pytest.raises(RuntimeError, match=r"softmax: dy of y: the rule is a numpy array, .*; got one of torch"):
        call.backward(torch.tensor(y))
    with pytest.raises(ValueError, match=r"softmax: record: .*; got none"):
        softmax.record(X, needs=[])


@pytest.mark.parametrize("op", [softmax, log_softmax, softmin])
def test_no_axes_give_an_array_too(op):
    assert type(op(np.array(2, np.float32))) is np.ndarray


def test_a_lazily_negated_tensor_is_refused():
    """Its memory holds the values with the other sign, and a plan made for a plain tensor must not read it."""
    z = torch.randn(4, 3, dtype=torch.complex64)
    plain, negated = z.imag, z.conj().imag
    assert plain.stride() == negated.stride()
    np.testing.assert_allclose(softmax(plain), plain.softmax(-1), rtol=1e-6)
    with pytest.raises(TypeError, match=r"softmax: .*resolve_neg\(\)"):
        softmax(negated)
    np.testing.assert_allclose(softmax(negated.resolve_neg()), negated.softmax(-1), rtol=1e-6)
