"""Torch's own tools on patched models: FlopCounterMode counts, torch.fx traces."""

import copy
import pickle
import subprocess
import sys
import types

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import gpulayers.torch as gt  # noqa: E402

same = torch.testing.assert_close


# --- FlopCounterMode --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.wide = nn.Conv2d(8, 8, (3, 2), dilation=2, groups=4, bias=False, padding_mode="circular", padding=1)
        self.same = nn.Conv2d(8, 4, 2, padding="same")
        self.head = nn.Sequential(nn.Flatten(2), nn.Linear(12, 6), nn.GELU(), nn.Linear(6, 5, bias=False))

    def forward(self, x):
        return self.head(self.same(self.wide(self.stem(x))))


def counted(model, frozen=()):
    """Floating-point operations by module, and whether forward or backward."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(tuple(frozen)) if frozen else True)
    found = []
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        found.append({name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()})
        y.sum().backward()
    found.append({name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()})
    return found


@pytest.mark.parametrize("frozen", [(), ("stem", "wide"), ("head",)])
def test_flops_are_those_of_the_unpatched_model(frozen):
    """Forward and backward, module by module."""
    plain = Net()
    patched = copy.deepcopy(plain)
    assert {type(m).__module__ for m in patched.modules()} > {"torch.nn.modules.conv"}
    theirs = counted(plain, frozen)
    gt.patch(patched)
    assert counted(patched, frozen) == theirs and theirs[1]["Global"] > theirs[0]["Global"] > 0


@pytest.mark.parametrize("outs", [(4, 6), (4, 6, 7)])
def test_flops_of_several_products(outs):
    x, *weights = (torch.ones(n, 5, requires_grad=True) for n in (3, *outs))
    with FlopCounterMode(display=False) as counter:
        ys = gt.functional.linears(x, weights)
        forward = counter.get_total_flops()
        sum(y.sum() for y in ys).backward()
    assert (forward, counter.get_total_flops()) == (2 * 3 * 5 * sum(outs), 3 * 2 * 3 * 5 * sum(outs))


LATE = """
import torch, sys
import gpulayers.torch as gt
assert not {'triton', 'torch.utils.flop_counter'} & sys.modules.keys()
linear, x = gt.Linear(3, 4), torch.ones(2, 3)
linear(x)
from torch.utils.flop_counter import FlopCounterMode
for _ in range(2):
    with FlopCounterMode(display=False) as counter:
        linear(x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 2, counter.get_total_flops()
"""


def test_a_counter_that_is_imported_late():
    """It costs the import of gpulayers.torch nothing."""
    subprocess.run([sys.executable, "-c", LATE], check=True, timeout=120)


# --- torch.fx ---------------------------------------------------------------------------------------------------------


class Features(torch.fx.Tracer):
    """Looks into everything that is not a leaf by default, as tracers of features and of quantisation do."""

    def __init__(self):
        super().__init__()
        self.leaves = []

    def is_leaf_module(self, m, qualified_name):
        leaf = super().is_leaf_module(m, qualified_name)
        self.leaves += [qualified_name] * leaf
        return leaf


class NormedNet(Net):
    """With a norm in the manner of Llama's, and a residual."""

    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm(5)

    def forward(self, x):
        y = super().forward(x)
        return y + self.norm(y)


class LlamaRMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def step(model, x):
    model.zero_grad()
    torch.manual_seed(0)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.state_dict().values()]


@pytest.mark.parametrize("before", [False, True])
def test_a_patched_model_is_traced(before):
    """Its layers stay whole, in training too, whatever was called before; so in copies and pickles of what is traced."""
    x, net = torch.randn(2, 3, 9, 7), NormedNet()
    truth = step(copy.deepcopy(net), x)
    report = gt.patch(net)
    if before:
        copy.deepcopy(net)(x)
    tracer = Features()
    graph = tracer.trace(net)
    assert set(tracer.leaves) >= set(report.replaced)
    assert {n.target for n in graph.nodes if n.op == "call_module"} == set(tracer.leaves)
    same(step(torch.fx.GraphModule(copy.deepcopy(net), graph), x), truth)
    traced = torch.fx.symbolic_trace(net)
    for other in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), traced):
        assert isinstance(other.get_submodule("stem.0"), gt.Conv2d)
        same(step(other, x), truth)
    gt.unpatch(net)
    assert not any("__module__" in vars(m) for m in net.modules())


def test_drop_ins_are_leaves_and_what_derives_from_them_is_not():
    class Doubled(gt.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(gt.BatchNorm1d(3), gt.Dropout(0.5), Doubled(3, 2))
    x = torch.randn(4, 3)
    traced = torch.fx.symbolic_trace(model)
    targets = {n.target for n in traced.graph.nodes if n.op == "call_module"}
    assert targets == {"0", "1"} and gt.Linear.__module__ == "gpulayers.torch.linear"
    same(step(traced, x)[:2], step(model, x)[:2])
    same(step(pickle.loads(pickle.dumps(traced)), x)[:2], step(model, x)[:2])


def calls(F):
    """Functions on an image, by their names."""

    def run(x, weight):
        x = F.relu(F.conv2d(x, weight, stride=(1, 2), padding=1), inplace=True)
        x = F.max_pool2d(F.pad(x, (1, 0, 2, 1), mode="replicate"), 2) + F.adaptive_avg_pool2d(x, 1)
        x = F.silu(F.leaky_relu(x * 1, 0.2, inplace=True) * 1, True)
        x = F.layer_norm(F.gelu(x, approximate="tanh"), (2,)) + F.softmax(x, dim=1)
        return F.linear(x, x[0, 0]), F.mse_loss(x, x * 2)

    return run


@pytest.mark.parametrize("imported", [False, True])
def test_functions_are_traced(imported):
    """As nodes that call them; and by what they compute where they were imported one by one."""
    x, weight = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)

    F = types.SimpleNamespace(**vars(gt.functional)) if imported else gt.functional  # torch.fx does not find the former
    for _ in range(2):  # known calls, too
        truth = calls(nn.functional)(x.clone(), weight)
        traced = torch.fx.symbolic_trace(calls(F))
        modules = {n.target.__module__ for n in traced.graph.nodes if n.op == "call_function"}
        assert {"gpulayers.torch.activation", "gpulayers.torch.conv", "gpulayers.torch.pooling"} <= modules
        same(traced(x.clone(), weight), truth)
        same(pickle.loads(pickle.dumps(traced))(x.clone(), weight), truth)
        same(calls(F)(x.clone(), weight), truth)
