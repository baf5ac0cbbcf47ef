import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers.definition import ArgumentError, ShapeError
from gpulayers.ops.activation import gated
from gpulayers.testing.check_layer import check_layer


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


CALLS = {
    "of two": ([draw(3, 5, 6), draw(3, 5, 12)[..., ::2]], "silu"),
    "of halves": ([draw(3, 4, 10)], "gelu"),
    "of halves of slices": ([draw(4, 40)[:, 3:29]], "gelu_tanh"),
    "of turned": ([draw(6, 3).T, draw(3, 6)], "relu"),
    "one row": ([draw(34)], "sigmoid"),
    "nothing": ([draw(0, 4)], "silu"),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_backend(name):
    inputs, activation = CALLS[name]
    numeric = name in ("of halves", "of turned")
    served = check_op(gated, *inputs, numeric=numeric, dys=["dense", "gapped"], activation=activation)
    assert served == ["definition", "numpy", "triton"]


def test_the_functions():
    """Against their formulas in float64, and gradients of gradients."""
    x, g = (torch.from_numpy(draw(2, 3, n)).requires_grad_() for n in (8, 4))
    a, b = x[..., :4], x[..., 4:]
    ours = gt.functional
    for found, true in (
        (ours.swiglu(x), F.silu(a) * b),
        (ours.geglu(x), F.gelu(a) * b),
        (ours.geglu(x, approximate="tanh"), F.gelu(a, approximate="tanh") * b),
        (ours.reglu(x), F.relu(a) * b),
        (ours.gated(b, a, "sigmoid"), F.glu(x)),
        (ours.swiglu(a, g), F.silu(a) * g),
    ):
        torch.testing.assert_close(found, true)
        dy = torch.randn_like(true)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, dy, retain_graph=True)[0] for y in (found, true)))
    assert torch.autograd.gradgradcheck(ours.swiglu, (x[:1, :1],))


@pytest.mark.parametrize(
    "module, formula",
    [(gt.activation.ReLUSquared, lambda x: F.relu(x).square()),
     (gt.activation.QuickGELU, lambda x: x * torch.sigmoid(1.702 * x))],
)  # fmt: skip
def test_what_torch_has_no_module_of(module, formula):
    """As function, module and a chain's activation: the formula, and gradients of gradients."""
    name = gt._acts.name_of(module())
    function = getattr(gt.functional, name)
    x = torch.from_numpy(draw(3, 6)).requires_grad_()
    true = formula(x)
    dy = torch.randn_like(true)
    for found in (function(x), module()(x)):
        torch.testing.assert_close(found, true)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, dy, retain_graph=True)[0] for y in (found, true)))
    assert torch.autograd.gradgradcheck(function, (x[:1] + 1,))


LAYERS = {
    "SwiGLU": (gl.SwiGLU(), F.silu),
    "GEGLU": (gl.GEGLU(), F.gelu),
    "GEGLU, tanh": (gl.GEGLU("tanh"), lambda a: F.gelu(a, approximate="tanh")),
    "ReGLU": (gl.ReGLU(), F.relu),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers(name):
    """Outputs and gradients are their formulas'; gradients, config and files as of any layer."""
    layer, f = LAYERS[name]
    x = torch.from_numpy(draw(2, 3, 8)).requires_grad_()
    true = f(x[..., :4]) * x[..., 4:]
    dy = draw(2, 3, 4)
    true.backward(torch.from_numpy(dy))
    found = layer(x.detach().numpy())
    np.testing.assert_allclose(found, true.detach(), rtol=1e-12)
    np.testing.assert_allclose(layer.backward(dy), x.grad, rtol=1e-12, atol=1e-14)
    check_layer(layer, (None, 6))


def test_a_layers_error():
    with pytest.raises(AssertionError, match=r'GEGLU: approximate: the rule is .*; got "?\'erf\''):
        gl.GEGLU("erf")


@pytest.mark.parametrize(
    "inputs, options, error, text",
    [
        ((draw(2, 3),), {}, ShapeError, "x.shape = (…, 2 H) without gain"),
        ((draw(2, 3), draw(3, 2)), {}, ShapeError, "gain.shape = x.shape = [2, 3]"),
        ((draw(2, 4),), {"activation": "swish"}, ArgumentError, "activation ∈ {relu, "),
    ],
)
def test_errors(inputs, options, error, text):
    with pytest.raises(error) as raised:
        gated(*inputs, **options)
    assert text in str(raised.value) and str(raised.value).startswith("gated: ")
