"""Group and instance norm with a residual and an activation in the same pass: kernels, torch functions, rows of models."""

import copy

import pytest
from halves import check_op
from test_group_norm import ALONE, OTHER, SHARED, weights
from test_group_norm import launched as launched
from test_norm import against_torch, draw, last, running

from gpulayers.ops.norm import group_norm, instance_norm

torch = pytest.importorskip("torch")
gt = pytest.importorskip("gpulayers.torch")
from test_torch_fuse import nodes  # noqa: E402

from gpulayers.torch import functional  # noqa: E402

nn, F = torch.nn, torch.nn.functional
ACTIVATIONS = ["silu", "relu", "tanh"]
"""f' from z, from either, from y."""
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@activations
def test_by_definition(activation):
    options = dict(activation=activation, numeric=True, backends=("definition",))
    check_op(group_norm, draw(2, 4, 3), *weights(4), num_groups=2, **options)
    check_op(group_norm, draw(2, 4, 3), num_groups=2, **options)
    for by_input in (True, False):
        check_op(instance_norm, draw(2, 2, 3), *weights(2), *running(2), use_input_stats=by_input, **options)


@activations
def test_a_residual_by_definition(activation):
    options = dict(activation=activation, numeric=True, backends=("definition",), dys=["dense"])
    added = draw(2, 4, 3, seed=3)
    check_op(group_norm, draw(2, 4, 3), *weights(4), added, num_groups=2, **options)
    for by_input in (True, False):
        given = draw(2, 4, 3), *weights(4), *running(4), added
        check_op(instance_norm, *given, use_input_stats=by_input, **options | {"numeric": by_input})


@pytest.mark.parametrize("activation, dtype", [("relu", "float16"), ("silu", "float32")])
def test_a_residual_in_kernels(activation, dtype, launched):
    """A program a group, several programs a group, channels-last; where dz is as exact as dy, and in float32."""
    options = dict(activation=activation, dtypes=[dtype], dys=["dense"], num_groups=2)
    for x in (draw(2, 6, 3, 5), draw(1, 2, 400), last(draw(2, 6, 3, 2))):
        added = draw(*x.shape, seed=7)
        ran = check_op(group_norm, x, *weights(x.shape[1]), added, **options)
        assert "triton" in ran and ("numpy" in ran) == (dtype == "float32") and "aten" not in ran
    assert launched - {"_copy_kernel"} == ALONE | SHARED


@pytest.mark.parametrize("activation", ["silu", None])
def test_a_residual_of_another_layout(activation):
    """Than x; and its gradient alone, or without the weights'."""
    added = last(draw(2, 4, 3, 1))
    options = dict(activation=activation, dtypes=["bfloat16"], dys=["dense"], backends=["triton"])
    for x in (draw(2, 4, 3, 1), added / 2):
        check_op(group_norm, x, None, None, added, needs=("residual",), num_groups=2, **options)
        check_op(instance_norm, x, *weights(4), *running(4), added, needs=("x", "residual"), **options)
    check_op(instance_norm, x, *weights(4), *running(4), added, use_input_stats=False, **options)


def test_in_kernels(launched):
    """A program a group, several programs a group, channels-last; without a weight or a bias; by running statistics."""
    for x in (draw(2, 6, 3, 5), draw(1, 2, 400), last(draw(2, 6, 3, 2))):
        ran = check_op(group_norm, x, *weights(x.shape[1]), num_groups=2, activation="silu", **OTHER)
        assert {"numpy", "triton"} <= set(ran) and "aten" not in ran
    assert launched - {"_copy_kernel"} == ALONE | SHARED
    options = dict(activation="relu", dtypes=["float32"], dys=["dense"])
    check_op(group_norm, last(draw(2, 4, 3, 1)), None, weights(4)[1], num_groups=2, **options)
    check_op(instance_norm, draw(2, 2, 5), *weights(2), *running(2), use_input_stats=False, **options)
    check_op(instance_norm, draw(2, 4, 5), weights(4)[0], needs=("weight",), **options | {"activation": "tanh"})


@pytest.mark.parametrize("activation", ["gelu", "softplus"])
def test_in_float16(activation):
    options = dict(activation=activation, num_groups=1, dtypes=["float16"], dys=["dense"], backends=("triton",))
    check_op(group_norm, draw(1, 2, 20), *weights(2), **options)


def test_what_is_saved():
    """Not y: x is read anyway."""
    for activation, kept in ((None, ()), ("relu", ("bias",)), ("gelu", ("bias",))):
        _, call = group_norm.record(draw(2, 4, 3), *weights(4), num_groups=2, activation=activation)
        assert set(call.saved) == {"x", "mean", "rstd", "weight", *kept}
        _, call = group_norm.record(draw(2, 4, 3), None, None, draw(2, 4, 3), num_groups=2, activation=activation)
        assert set(call.saved) == {"x", "mean", "rstd", *["residual"] * bool(kept)}
    with pytest.raises(RuntimeError, match=r"residual: the rule is residual\.shape = x\.shape"):
        instance_norm(draw(2, 4, 3), None, None, None, None, draw(2, 4, 1))
    with pytest.raises(ValueError, match="activation ∈"):
        group_norm(draw(2, 4, 3), num_groups=2, activation="swish")


@activations
def test_as_torch(activation):
    given = draw(3, 4, 2, 3), *weights(4)
    theirs = lambda x, w, b: getattr(F, activation)(F.group_norm(x, 2, w, b))  # noqa: E731
    against_torch(group_norm, given, theirs, ("x", "weight", "bias"), num_groups=2, activation=activation)
    more = lambda x, w, b, r: getattr(F, activation)(F.group_norm(x, 2, w, b) + r)  # noqa: E731
    names = "x", "weight", "bias", "residual"
    against_torch(group_norm, (*given, draw(3, 4, 2, 3, seed=5)), more, names, num_groups=2, activation=activation)


@activations
def test_gradients_of_gradients(activation):
    given = [torch.tensor(a, requires_grad=True) for a in (draw(2, 2, 3), *weights(2))]
    ours = lambda x, w, b: functional.group_norm(x, 1, w, b, activation=activation)  # noqa: E731
    assert torch.autograd.gradcheck(ours, given) and torch.autograd.gradgradcheck(ours, given)
    mean, var = (torch.tensor(a) for a in running(2))

    def by(by_input):
        return lambda x, w, b: functional.instance_norm(
            x, mean.clone(), var.clone(), w, b, by_input, activation=activation
        )

    for by_input in (True, False):
        assert torch.autograd.gradgradcheck(by(by_input), given)
    added = torch.tensor(draw(2, 2, 3, seed=9), requires_grad=True)
    groups = lambda x, r: functional.group_norm(x, 1, residual=r, activation=activation)  # noqa: E731
    images = lambda x, r: functional.instance_norm(x, residual=r, activation=activation)  # noqa: E731
    for both in (groups, images):
        assert torch.autograd.gradgradcheck(both, (given[0], added))


class Block(nn.Module):
    """Of a U-Net: norm, activation, convolution, twice."""

    def __init__(self, norm, act):
        super().__init__()
        self.norm1, self.act, self.conv1 = norm, act, nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.conv2, self.norm3 = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4)

    def forward(self, x):
        y = self.conv1(self.act(self.norm1(x)))
        return self.norm3(self.conv2(F.silu(self.norm2(y)))) + x


NORMS = {
    "group": lambda: nn.GroupNorm(4, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_rows_of_models(norm, training):
    torch.manual_seed(0)  # the gradient of a bias that a norm takes away again is rounding alone
    theirs = Block(NORMS[norm](), nn.ReLU(inplace=True)).train(training)
    ours = copy.deepcopy(theirs)
    report = gt.patch(ours, fuse=True)
    assert report.fused == {"": ("norm1 → act", "norm2 → silu")}
    assert set(report.unfused) == {"conv1", "conv2", "norm3"} and "no activation follows" in report.unfused["norm3"]
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    found = []
    for model in (theirs, ours):
        given = x.clone().requires_grad_()
        y = model(given + 0)
        functions = nodes(y)
        y.square().sum().backward()
        found.append([y.detach(), given.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    assert not {"ReluBackward0", "SiluBackward0", "reluBackward", "siluBackward"} & {*functions}
    seen = []
    ours.norm1.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    assert len(seen) == 1 and (seen[0] < 0).any()


def test_one_sample_and_other_widths():
    """What an instance norm says of them stays as it is."""
    theirs = nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.Tanh())
    ours = copy.deepcopy(theirs)
    assert gt.patch(ours, fuse=True).fused == {"": ("0 → 1",)}
    x = torch.randn(3, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(ValueError, match="num_features"):
        ours(torch.randn(2, 4, 5))


class Shortcut(nn.Module):
    """A ResNet's block of two norms, whose sum may be written in place."""

    def __init__(self, norm, in_place=False):
        super().__init__()
        self.conv1, self.norm1, self.act = nn.Conv2d(4, 4, 3, padding=1), norm(), nn.ReLU(inplace=True)
        self.conv2, self.norm2, self.in_place = nn.Conv2d(4, 4, 1), norm(), in_place

    def forward(self, x):
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        if self.in_place:
            y += x
        else:
            y = x + y
        return self.act(y)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("in_place", [True, False])
def test_rows_with_a_residual(norm, in_place):
    torch.manual_seed(1)
    theirs = Shortcut(NORMS[norm], in_place)
    ours = copy.deepcopy(theirs)
    assert gt.patch(ours, fuse=True).fused == {"": ("norm1 → act", "norm2 → add → act")}
    x, found = torch.randn(2, 4, 3, 5), []
    for model in (theirs, ours):
        given = x.clone().requires_grad_()
        y = model(given + 0)
        functions = nodes(y)
        y.square().sum().backward()
        weights = [p.grad for n, p in model.named_parameters() if n not in ("conv1.bias", "conv2.bias")]
        found.append([y.detach(), given.grad, *weights, *model.buffers()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    assert not {"ReluBackward0", "reluBackward"} & {*functions} and functions.count("AddBackward0") == 1
    with torch.autocast("cpu", torch.bfloat16):  # the sum is of two dtypes
        torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)
    seen = []
    ours.norm2.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    assert len(seen) == 1


def test_residuals_of_other_shapes_and_dtypes():
    """By torch's rules, in a pass of their own."""
    x, row, wide = torch.randn(2, 4, 3), torch.randn(4, 1), torch.randn(2, 4, 3).double()
    for added in (row, wide):
        pairs = [
            (functional.group_norm(x, 2, residual=added, activation="relu"), F.group_norm(x, 2)),
            (functional.instance_norm(x, residual=added, activation="relu"), F.instance_norm(x)),
        ]
        for mine, z in pairs:
            torch.testing.assert_close(mine, F.relu(z + added), rtol=1e-5, atol=1e-5)
    layer = gt.InstanceNorm1d(4)
    torch.testing.assert_close(layer.fused(x[0], x[1], "relu"), F.relu(F.instance_norm(x)[0] + x[1]))
