"""Layers in a row as one op: what is found, what it computes, and what stays as the model says."""

import copy
import pickle
import random
from typing import Optional

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpulayers.torch as gt
from gpulayers.torch import source


class Residual(nn.Module):
    """A ResNet's block."""

    def __init__(self, inside, outside, act=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.relu = act or nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x):
        identity = x
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        y += identity
        return self.relu(y)


class Hidden(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.up, self.down = nn.Linear(n, 2 * n), nn.Linear(2 * n, n)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer's block, before the norms' names."""

    def __init__(self, n, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.mix, self.norm2, self.mlp = norm(n), nn.Linear(n, n), norm(n), Hidden(n)

    def forward(self, x, mask: Optional[torch.Tensor] = None):  # noqa: UP045  (TorchScript reads it)
        if mask is not None:
            x = x * mask
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PostNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.mix, self.norm = nn.Linear(n, n), nn.LayerNorm(n)

    def forward(self, x):
        return self.norm(torch.add(self.mix(x), x))


class Convolved(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x[:, None])))


def images(*shape):
    return torch.randn(*shape, requires_grad=True)


def row():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3), nn.LeakyReLU(0.3))


def norm_first():
    return nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3))


MODELS = {
    "residual": (lambda: Residual(4, 4), (2, 4, 5, 5), ["conv1 → bn1 → relu", "conv2 → bn2 → add → relu"]),
    "downsample": (lambda: Residual(3, 4), (2, 3, 5, 5), ["conv1 → bn1 → relu", "conv2 → bn2 → add → relu"]),
    "silu": (lambda: Residual(3, 4, nn.SiLU()), (2, 3, 5, 5), ["conv1 → bn1 → relu", "conv2 → bn2 → add → relu"]),
    "norm first": (norm_first, (2, 4, 5), ["0 → 1"]),
    "block": (lambda: Block(6), (2, 3, 6), ["add → norm2", "add → next norm", "mlp.up → gelu"]),
    "rms": (lambda: Block(6, nn.RMSNorm), (2, 3, 6), ["add → norm2", "add → next norm", "mlp.up → gelu"]),
    "post norm": (lambda: PostNorm(6), (2, 6), ["add → norm"]),
    "row": (row, (3, 6), ["0 → 1", "2 → 3"]),  # LeakyReLU(0.3): not torch's default number
}


def rows_of(report):
    found = []
    for name, rows in report.fused.items():
        found += [f"{name}.{r}" if name else r for r in rows]
    return found


def nodes(y):
    """How often each function stands in the graph of y."""
    found, todo, seen = [], [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(node.name())
        todo += [n for n, _ in node.next_functions]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_fused_computes_the_same(name, training):
    make, shape, rows = MODELS[name]
    torch.manual_seed(0)
    theirs = make().train(training)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours, judge = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    report = gt.patch(ours, fuse=True)
    assert rows_of(report) == rows and report.unfused.keys() <= {"downsample", "2"}
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images(*shape)
    found = []
    for model, given in (
        (theirs, x),
        (ours, x.detach().clone().requires_grad_()),
        (judge, x.detach().double().requires_grad_()),
    ):
        y = model(given)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        found.append({"y": y.detach(), "x": given.grad} | grads | dict(model.named_buffers()))
        given.grad = None
    for key, truth in found[2].items():
        off, most = ((f[key].double() - truth.double()).abs().max() for f in (found[1], found[0]))
        assert off <= 4 * most + 4e-6 * truth.abs().max(), key
    assert len(nodes(ours(x))) < len(nodes(theirs(x)))


def test_the_fused_forward_can_be_read():
    model = Residual(4, 4)
    assert source(model) == ""
    gt.patch(model, fuse=True)
    text = source(model)
    assert text.startswith("def forward(self, x):") and "conv_norm_act" in text and "self.bn2" in text


def test_copies_and_pickles_are_fused_and_unpatch_undoes_it():
    model = nn.Sequential(Block(6), Block(6))
    kinds = [type(m) for m in model.modules()]
    gt.patch(model, fuse=True)
    x = torch.randn(2, 6)
    model(x)  # the first block learns what follows it
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y) and len(nodes(other(x))) == len(nodes(y))
        assert isinstance(other[0], Block) and source(other[0])
    assert repr(gt.patch(model, fuse=True)).endswith("6 rows fused>")  # again: nothing more to replace
    gt.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds and not [m for m in model.modules() if source(m)]
    torch.testing.assert_close(model(x), y)


def test_gradients_of_gradients():
    model = row()[:4].double()
    gt.patch(model, fuse=True)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().requires_grad_() for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]

    def call(x, *weights):
        return torch.func.functional_call(model, dict(zip(names, weights)), (x,))

    assert torch.autograd.gradgradcheck(call, (x, *weights))


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_a_frozen_weight_does_not_keep_its_input(act):
    """As the unfused layers keep it: GELU's gradient needs z alone."""
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU() if act == "gelu" else nn.ReLU())
    model[0].weight.requires_grad_(False)
    gt.patch(model, fuse=True)
    x = torch.randn(3, 6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert not any(t is x for t in kept)
    assert len(nodes(y)) == (5 if act == "gelu" else 4) - 1  # two functions or one, and what gathers gradients


# --- where the model's own forward runs --------------------------------------------------------------------------------


def test_hooks_see_their_module():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    gt.patch(model, fuse=True)
    x, seen = torch.randn(3, 6), []
    with torch.no_grad():
        expected = F.linear(x, model[0].weight, model[0].bias)
    hook = model[0].register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    model(x)
    torch.testing.assert_close(seen[0], expected)
    hook.remove()
    hook = model[1].register_full_backward_hook(lambda m, *_: seen.append(m))
    model(x).sum().backward()
    assert seen[1] is model[1]
    hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    model(x)
    hook.remove()
    assert seen[2:] == [model[0], model[1], model]
    model(x)
    assert len(seen) == 5


def test_what_changed_since_runs_as_the_model_says():
    x = torch.randn(2, 6)
    model = gt.patch(m := row(), fuse=True) and m
    model.append(nn.Tanh())
    assert model(x).abs().max() <= 1
    model = gt.patch(m := Block(6), fuse=True) and m
    y = model(x)
    torch.testing.assert_close(model(x=x), y)
    torch.testing.assert_close(model(x, None), y)
    torch.testing.assert_close(model(x, mask=torch.ones(6)), y)
    assert not torch.allclose(model(x, torch.zeros(6)), y)
    model.norm2 = nn.Identity()
    torch.testing.assert_close(model(x), (h := x + model.mix(model.norm1(x))) + model.mlp(h))
    assert source(model) == "" and gt.patch(model, fuse=True).fused == {
        "": ("add → next norm",),
        "mlp": ("up → gelu",),
    }
    gelu = gt.patch(m := nn.Sequential(nn.Linear(6, 5), nn.GELU()), fuse=True) and m
    gelu[1].approximate = "tanh"
    torch.testing.assert_close(gelu(x), F.gelu(F.linear(x, gelu[0].weight, gelu[0].bias), approximate="tanh"))
    slope = gt.patch(m := nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU()), fuse=True) and m
    slope[1].negative_slope = 0.5
    torch.testing.assert_close(slope(x), F.leaky_relu(F.linear(x, slope[0].weight, slope[0].bias), 0.5))


class _Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()
        self.count, self.seen, self.layers = 0, [], nn.ModuleList([nn.Linear(4, 4)])

    def both(self, x):
        return self.relu(self.linear(x))


def _refused(forward):
    return type("Model", (_Refused,), {"forward": forward})()


def _counts(self, x):
    self.count += 1
    return self.both(x)


def _remembers(self, x):
    self.seen.append(x)
    return self.both(x)


def _types(self, x):
    return self.both(x.data if isinstance(x, nn.Parameter) else x)


def _helper(model, x):
    return model.both(x) if type(x) is torch.Tensor else x


def _in_a_helper(self, x):
    return _helper(self, x)


def _by_chance(self, x):
    return self.both(x) if random.random() < 2 else x


def _by_mode(self, x):
    y = self.linear(x)
    return self.relu(y) if self.training else self.relu(y) + 1


def _by_value(self, x):
    return self.both(x) if x.sum() > 0 else x


def _any_number(self, *xs):
    return self.both(xs[0])


def _grows(self, x):
    for layer in self.layers:
        x = layer(x)
    return self.both(x)


REFUSED = {
    _counts: "its forward writes to self.count",
    _remembers: "its forward writes to self.seen",
    _types: "its forward asks for types",
    _in_a_helper: "its forward asks for types",
    _by_chance: "its forward draws random numbers",
    _by_mode: "its forward differs between training and evaluation",
    _by_value: "torch.fx cannot trace its forward",
    _any_number: "its forward takes any number of arguments",
    _grows: "its forward calls modules in a ModuleList or ModuleDict",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_a_forward_that_may_say_something_else_stays(forward):
    model = _refused(forward)
    x, kind = torch.randn(2, 4), type(model)
    expected = model(x)
    report = gt.patch(model, fuse=True)
    assert report.unfused[""].startswith(REFUSED[forward]) and "not fused" in str(report) and type(model) is kind
    torch.testing.assert_close(model(x), expected)
    assert all(isinstance(each, torch.Tensor) for each in model.seen)


def _twice(self, x):
    y = self.linear(x)
    return self.relu(y) + y


def _written_between(self, x):
    x = x * 1
    y = self.linear(x)
    x.mul_(2)
    return self.relu(y)


def _written_sum(self, x):
    y = self.relu(x)
    y += self.bn(x)
    return self.relu(y) + y


@pytest.mark.parametrize("forward", [_twice, _written_between, _written_sum], ids=lambda f: f.__name__)
def test_what_is_used_elsewhere_is_no_row(forward):
    model = _refused(forward)
    model.bn = nn.BatchNorm1d(4)
    x = torch.randn(3, 4)
    expected = copy.deepcopy(model)(x)
    report = gt.patch(model, fuse=True)
    assert not report.fused and report.unfused.keys() <= {"bn"}
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(Block(6), Hidden(6)), lambda: Convolved(6).eval()])
def test_torchs_own_tools_take_a_fused_model(make):
    model, x = make(), torch.randn(2, 6)
    gt.patch(model, fuse=True)
    y = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), y)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
    torch.testing.assert_close(torch.jit.script(model)(x), y)
    again = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False)
    again.sum().backward()
    torch.testing.assert_close(again, y)
    program = torch.export.export(model.eval(), (torch.randn(2, 6),))
    torch.testing.assert_close(program.module()(x.detach()), y)


def test_a_module_that_is_compiled_stays_fused():
    """What torch.compile sets on it is no change of what its forward depends on."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    gt.patch(model, fuse=True)
    source = gt.source(model)
    torch.compile(model, backend="eager")
    assert gt.source(model) == source != ""
    model.compile(backend="eager")
    assert gt.source(model) == source
