"""torch's convolutions with what follows them in the same pass: by argument, and found by patch."""

import contextlib

import pytest

torch = pytest.importorskip("torch")
gt = pytest.importorskip("gpulayers.torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from gpulayers import dispatch  # noqa: E402
from gpulayers.torch import _conv_act  # noqa: E402
from gpulayers.torch import conv as drop_ins  # noqa: E402
from gpulayers.torch._epilogue import TWINS  # noqa: E402

SHAPES = {1: (2, 4, 7), 2: (2, 4, 5, 6), 3: (1, 4, 3, 4, 3)}


def drawn(axes: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, weight, bias, scale, residual."""
    torch.manual_seed(axes)
    x = torch.randn(SHAPES[axes], dtype=dtype)
    weight = torch.randn(6, 2, *(3,) * axes, dtype=dtype)
    residual = torch.randn(x.shape[0], 6, *x.shape[2:], dtype=dtype)
    return [x, weight, torch.randn(6, dtype=dtype), torch.randn(6, dtype=dtype), residual]


def theirs(axes: int, x, weight, bias, scale, residual, activation):
    shape = (-1, *(1,) * axes)
    z = getattr(F, f"conv{axes}d")(x, weight, None, 1, 1, 1, 2) * scale.view(shape) + bias.view(shape) + residual
    return z if activation is None else TWINS[activation](z)


def ours(axes: int, x, weight, bias, scale, residual, activation):
    function = getattr(gt.functional, f"conv{axes}d")
    return function(x, weight, bias, 1, 1, 1, 2, scale=scale, residual=residual, activation=activation)


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "tanh"])
@pytest.mark.parametrize("dtype, kept", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_functions(axes, activation, dtype, kept):
    found = []
    for function in (ours, theirs):
        inputs = drawn(axes, dtype)
        leaves = [t.requires_grad_() for i, t in enumerate(inputs) if i != 3]
        y = function(axes, *inputs, activation)
        found.append([y, *torch.autograd.grad(y, leaves, torch.cos(y.detach()))])
    for mine, true in zip(*found):
        torch.testing.assert_close(mine, true, rtol=kept, atol=kept)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_second_gradients(activation):
    x, weight, bias, scale, residual = drawn(1, torch.float64)
    leaves = [t.requires_grad_() for t in (x[:, :, :4], weight, bias, residual[:, :, :4].clone())]
    run = lambda x, weight, bias, residual: ours(1, x, weight, bias, scale, residual, activation)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, leaves)


def test_second_gradients_of_transposed():
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 2, 3), (2, 1, 3)))
    run = lambda x, weight: drop_ins._conv_transpose(x, weight, None, (2,), (0,), (1,), (1,), 1, "silu")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (x, weight))


def test_a_second_gradient_that_nothing_was_kept_for():
    x, weight, bias, scale, residual = drawn(1, torch.float64)
    y = ours(1, x.requires_grad_(), weight, bias, scale, residual, "silu")
    with pytest.raises(NotImplementedError, match="needs a weight that requires one"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Watching])
def test_a_scale_that_learns_is_torchs_own(mode):
    """It has no gradient here, so torch's operations compute it: in eager mode, and where something traces."""
    inputs = [t.requires_grad_() for t in drawn(2, torch.float64)]
    with mode():
        found = [torch.autograd.grad(f(2, *inputs, "relu").sum(), inputs) for f in (ours, theirs)]
    for mine, true in zip(*found):
        torch.testing.assert_close(mine, true)


def test_one_image_without_its_batch():
    x, weight, bias, scale, residual = drawn(2, torch.float64)
    y = ours(2, x[0], weight, bias, scale, residual[0], "relu")
    torch.testing.assert_close(y, theirs(2, x, weight, bias, scale, residual, "relu")[0])


# --- rows ------------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    def __init__(self, axes: int, act: nn.Module):
        super().__init__()
        kind = getattr(nn, f"Conv{axes}d")
        self.first, self.second, self.third = (
            kind(4, 4, 3, padding=1),
            kind(4, 4, 1, bias=False),
            kind(4, 6, 3, stride=2),
        )
        self.act, self.relu = act, nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.first(x))
        return F.relu(self.third(self.relu(self.second(y) + x)))


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()], ids=str)
def test_rows(axes, act, monkeypatch):
    torch.manual_seed(0)
    model, x = Rows(axes, act), torch.randn(SHAPES[axes][:2] + (7,) * axes)
    plain = [model(x)]
    plain += torch.autograd.grad(plain[0].sum(), model.parameters())
    gt.patch(model, fuse=True)
    assert gt.source(model).count("conv_act(") == 3
    asked, run = [], _conv_act._conv
    monkeypatch.setattr(_conv_act, "_conv", lambda *args: asked.append(args[-1]) or run(*args))
    mine = [model(x)]
    assert asked == [type(act).__name__.lower(), "relu", "relu"]
    mine += torch.autograd.grad(mine[0].sum(), model.parameters())
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_broadcast_is_added_alone():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(4, 6, 3), nn.SiLU()

        def forward(self, x, e):
            return self.act(self.conv(x) + e)

    model, x = Embedded(), torch.randn(2, 4, 5, 5)
    others = [torch.randn(2, 6, 1, 1), torch.randn(6, 3, 3), torch.randn(2, 6, 3, 3, dtype=torch.float64)]
    expected = [model(x, e) for e in others]
    gt.patch(model, fuse=True)
    with dispatch.policy(strict=True):
        for e, true in zip(others, expected):
            torch.testing.assert_close(model(x, e), true)


def test_hooks_see_the_convolution():
    model, x = Rows(2, nn.ReLU()), torch.randn(2, 4, 7, 7)
    gt.patch(model, fuse=True)
    true, seen = model(x), []
    model.first.register_forward_hook(lambda *args: seen.append(args[2]))
    torch.testing.assert_close(model(x), true)
    assert len(seen) == 1 and (seen[0] < 0).any()
