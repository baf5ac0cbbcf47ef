"""Who computes, why, and what a caller is told."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import arrays, dispatch
from gpulayers.ops.dropout import dropout
from gpulayers.ops.linear import linear
from gpulayers.ops.loss import cross_entropy
from gpulayers.ops.norm import batch_norm
from gpulayers.ops.optim import adamw_update, sgd_update
from gpulayers.ops.pooling import max_pool
from gpulayers.ops.softmax import log_softmax, softmax, softmin
from gpulayers.testing.interpreter import interpreting
from gpulayers.torch.dropout import _dropout as torch_dropout

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
    with pytest.raises(
        ValueError, match="unknown backend 'cudnn': expected one of triton, cuda, aten, numpy, definition"
    ):
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
    monkeypatch.setattr(dispatch, "_too_old", lambda home, device: None)
    with gl.strict(), pytest.raises(gl.Refused, match=r"strict mode forbids the definition.*triton: not here"):
        softmax(X)


def test_each_fallback_is_logged_once(monkeypatch, logged):
    monkeypatch.setattr(dispatch, "_reported", set())
    for _ in range(2):
        dispatch._report(softmax, "definition", {"triton": "torch is not installed"}, "cuda:0")
    assert [r.getMessage() for r in logged] == ["softmax runs on definition (triton: torch is not installed)"]
    assert logged[0].levelno == logging.WARNING


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
    """A list where a tuple is meant gives the same result, from one plan however often it comes."""
    x = np.arange(36.0, dtype=np.float32).reshape(1, 1, 6, 6)
    expected = max_pool(x, kernel_size=(2, 3))
    first = max_pool(x, kernel_size=[2, 3])
    before = len(dispatch._plans)
    again = max_pool(x, kernel_size=[2, 3])
    assert len(dispatch._plans) == before
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(again, expected)


def test_options_and_gradients_are_named():
    with pytest.raises(TypeError, match=r"max_pool: option kernel_size is required"):
        max_pool(IMAGE)
    for wrong in ({2}, {}, np.array([2, 2])):
        with pytest.raises(TypeError, match=r"max_pool: kernel_size: the rule is .*; got (set|dict|ndarray)"):
            max_pool(IMAGE, kernel_size=wrong)
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


def annealed() -> dict:
    """Calls whose numbers change from step to step, by name: f(share of the way)."""
    x, seed, labels = X.copy(), np.zeros(2, np.int64), np.arange(4)
    lists = [[x], [X], [np.zeros_like(X)], [np.zeros_like(X)]]
    t = torch.from_numpy(X)
    parameter = torch.nn.Parameter(t.clone())
    parameter.grad = t.clone()
    sgd = gt.optim.SGD([parameter], lr=0.1, momentum=0.9)
    dropouts = gl.Dropout(), gt.Dropout()

    def stepped(**group):
        sgd.param_groups[0].update(group)
        sgd.step()

    def dropped(p):
        dropouts[0].p = dropouts[1].p = p
        dropouts[0](X), dropouts[1](t)

    return {
        "sgd": lambda a: sgd_update(*lists[:3], lr=a, momentum=0.5 + a / 2, dampening=a, weight_decay=a, grad_scale=a),
        "adamw": lambda a: adamw_update(*lists, lr=a, betas=(a, 1 - a / 2), eps=a, weight_decay=a, step=1 + int(9 * a)),
        "torch's SGD": lambda a: stepped(lr=a, momentum=0.5 + a / 2, dampening=a, weight_decay=a),
        "dropout": lambda a: dropout.record(x, seed, p=a)[1].backward(X),
        "dropout layers": lambda a: dropped(0.1 + a / 2),
        "cross entropy": lambda a: cross_entropy.record(x, labels, label_smoothing=a)[1].backward(np.float32(1)),
        "batch norm": lambda a: batch_norm(X, None, None, X[0].copy(), X[1].copy(), training=True, momentum=a),
    }


@pytest.mark.parametrize("name", annealed())
def test_numbers_that_change_every_step_make_no_plans(name):
    call = annealed()[name]
    call(0.25), call(0.35)
    before = len(dispatch._plans), len(torch_dropout._known), len(torch_dropout._latest)
    for i in range(1, 10):
        call(i / 10)
    assert (len(dispatch._plans), len(torch_dropout._known), len(torch_dropout._latest)) == before


def test_changing_numbers_are_looked_at_in_every_call():
    """Wrong ones raise where a call that differs in nothing else was made before."""
    seed, p = np.zeros(2, np.int64), [X.copy()]
    dropout(X, seed, p=0.5)
    with pytest.raises(ValueError, match=r"dropout: p: the rule is 0 ≤ p ≤ 1; got 1.5"):
        dropout(X, seed, p=1.5)
    cross_entropy(X, np.arange(4))
    with pytest.raises(RuntimeError, match="cross_entropy: label_smoothing"):
        cross_entropy(X, np.arange(4), label_smoothing=2.0)
    sgd_update(p, [X], lr=0.1)
    with pytest.raises(ValueError, match="sgd_update: weight_decay"):
        sgd_update(p, [X], lr=0.1, weight_decay=-1.0)
    with pytest.raises(RuntimeError, match="momentums: the rule is a list where momentum ≠ 0"):
        sgd_update(p, [X], lr=0.1, momentum=0.9)
    adamw_update(p, [X], [X.copy()], [X.copy()])
    with pytest.raises(ValueError, match="adamw_update: betas"):
        adamw_update(p, [X], [X.copy()], [X.copy()], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="dropout probability"):
        torch_dropout(torch.from_numpy(X), torch.from_numpy(seed), 1.5)
    with pytest.raises(ValueError, match="p: the rule is 0 ≤ p ≤ 1"):
        gl.explain(dropout, X, seed, p=1.5)


def test_plans_are_bounded(monkeypatch):
    """The oldest plan makes room for the newest."""
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(dispatch, "_MOST_PLANS", 4)
    for n in range(1, 8):
        softmax(np.zeros((n, 2), np.float32))
    assert [key[3][0] for key in dispatch._plans] == [4, 5, 6, 7]
