"""Functions that are others under a second name, or a few in a row, against torch's own."""

import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpulayers.torch as gt

ours = gt.functional
same = torch.testing.assert_close


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


IN_PLACE = {
    "relu_": (), "selu_": (), "elu_": (0.7,), "celu_": (0.7,), "hardtanh_": (-0.3, 0.7), "leaky_relu_": (0.2,),
    "threshold_": (0.1, 2.0), "rrelu_": (0.1, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name):
    x = draw(3, 5)
    expected = getattr(F, name)(x.clone(), *IN_PLACE[name])
    assert getattr(ours, name)(x, *IN_PLACE[name]) is x
    same(x, expected)


IMAGE = draw(2, 3, 8, 8)
OTHERS = {
    "max_pool1d_with_indices": (IMAGE[0], 2, 1),
    "max_pool2d_with_indices": (IMAGE, 3, 2, 1),
    "max_pool3d_with_indices": (IMAGE, 2),
    "adaptive_max_pool1d_with_indices": (IMAGE[0], 3),
    "adaptive_max_pool2d_with_indices": (IMAGE, (3, 2)),
    "adaptive_max_pool3d_with_indices": (IMAGE, 2),
    "fractional_max_pool2d_with_indices": (IMAGE, 2, 3, None, False, torch.full((2, 3, 2), 0.4).double()),
    "fractional_max_pool3d_with_indices": (
        IMAGE,
        (1, 2, 2),
        (2, 4, 4),
        None,
        False,
        torch.full((1, 2, 3), 0.4).double(),
    ),
    "upsample_nearest": (IMAGE, None, 2),
    "upsample_bilinear": (IMAGE, (5, 11)),
    "conv_tbc": (draw(7, 2, 5), draw(3, 5, 4), draw(4), 1),
    "gumbel_softmax": (draw(4, 6), 0.7, False, 1e-10, 0),
}


def _leaf(a, i):
    """With a gradient, but for the numbers that places are drawn by."""
    return a.clone().requires_grad_(i < 5) if isinstance(a, torch.Tensor) else a


@pytest.mark.parametrize("name", OTHERS)
def test_outputs_and_gradients(name):
    runs = []
    for function in (getattr(F, name), getattr(ours, name)):
        given = [_leaf(a, i) for i, a in enumerate(OTHERS[name])]
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = function(*given)
        y = found[0] if isinstance(found, tuple) else found
        if y.requires_grad:
            y.square().sum().backward()
        runs.append((found, [a.grad for a in given if isinstance(a, torch.Tensor)], [str(w.message) for w in caught]))
    same(runs[0][:2], runs[1][:2])
    assert runs[0][2] == runs[1][2] and bool(runs[1][2]) == name.startswith("upsample")


def test_native_channel_shuffle():
    """torch has no gradient of it; ours is that of channel_shuffle."""
    same(ours.native_channel_shuffle(IMAGE, 3), F.native_channel_shuffle(IMAGE, 3))
    x = IMAGE.clone().requires_grad_()
    same(*(torch.autograd.grad(f(x, 3).square().sum(), x) for f in (ours.native_channel_shuffle, F.channel_shuffle)))


def test_errors_are_torchs():
    calls = {
        "conv_tbc": (draw(2, 3), draw(3, 5, 4), draw(4)),
        "gumbel_softmax": ([1.0],),
        "max_pool2d_with_indices": (IMAGE,),
    }
    for name, args in calls.items():
        errors = []
        for library in (F, ours):
            with pytest.raises((TypeError, RuntimeError, AttributeError)) as caught:
                getattr(library, name)(*args)
            errors.append(type(caught.value))
        assert errors[0] is errors[1]


def test_a_hard_sample_is_one_hot_and_has_the_soft_ones_gradient():
    x = draw(4, 6).requires_grad_()
    runs = []
    for function in (F.gumbel_softmax, ours.gumbel_softmax):
        torch.manual_seed(1)
        y = function(x, 0.5, hard=True)
        runs.append((y, *torch.autograd.grad((y * torch.arange(6.0)).sum(), x)))
    same(*runs)


@pytest.mark.parametrize("need_weights", (False, True))
def test_multi_head_attention_forward(need_weights):
    module, x = nn.MultiheadAttention(8, 2).double(), draw(5, 2, 8).requires_grad_()
    weights = (
        module.in_proj_weight,
        module.in_proj_bias,
        None,
        None,
        False,
        0.0,
        module.out_proj.weight,
        module.out_proj.bias,
    )
    runs = []
    for function in (F.multi_head_attention_forward, ours.multi_head_attention_forward):
        y, attended = function(x, x, x, 8, 2, *weights, need_weights=need_weights)
        runs.append((y, attended, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
    same(*runs)
    assert {"linearBackward", "softmaxBackward" if need_weights else "attentionBackward"} <= _nodes(y) and (
        attended is None
    ) != need_weights


def _nodes(y):
    """The names of all nodes behind y."""
    seen, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [n for n, _ in node.next_functions]
    return {n.name() for n in seen}


def test_lazy_linear_becomes_ours():
    torch.manual_seed(0)
    module, theirs = gt.LazyLinear(4), nn.LazyLinear(4)
    x = torch.randn(3, 5)
    assert type(module) is gt.LazyLinear and module(x).shape == theirs(x).shape == (3, 4)
    assert type(module) is gt.Linear and module.weight.shape == (4, 5)
    theirs.load_state_dict(module.state_dict())
    same(module(x), theirs(x))
