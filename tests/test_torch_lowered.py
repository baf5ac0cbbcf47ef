"""Norms that under autocast write what their readers take: as on a GPU, by giving the CPU its rule."""

import copy

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from test_torch_fuse import nodes  # noqa: E402
from test_torch_layer_norm_2d import LayerNorm2d  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers.torch import _autocast  # noqa: E402
from gpulayers.torch import norm as gt_norm  # noqa: E402


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_autocast, "WIDENED", "cpu")
    for op in (gt_norm._layer_norm, gt_norm._rms_norm, gt_norm._group_norm):
        monkeypatch.setattr(op, "cast", _autocast.FLOAT32)
        for known in ("_known", "_latest"):
            monkeypatch.setattr(op, known, {})


class Pixels(nn.Module):
    """A ConvNeXt's block."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.LayerNorm(4)
        self.up, self.act, self.down = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def forward(self, x):
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.down(self.act(self.up(y))).permute(0, 3, 1, 2)


class Two(nn.Module):
    """Its norm is read twice; ``kept``: by the sum, too."""

    def __init__(self, kept=False):
        super().__init__()
        self.norm, self.q, self.k, self.kept = nn.RMSNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), kept

    def forward(self, x):
        y = self.norm(x)
        z = self.q(y) * self.k(y.flatten(0, 1)).view(x.shape)
        return z + y if self.kept else z


MODELS = {
    "layer norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Pixels()), {"1.norm"}),
    "of pixels": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), LayerNorm2d(4), nn.Conv2d(4, 4, 2, 2)), {"1"}),
    "with an activation": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 8, 1)),
        {"1"},
    ),
    "before batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)),
        {"1"},
    ),
    "two readers": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(16, 4), Two()), {"3.norm"}),
    "another reader": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(16, 4), Two(True)), set()),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), LayerNorm2d(4), nn.Identity(), nn.Flatten(), nn.Linear(64, 3)),
        {"1"},
    ),
    "none reads": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), set()),
}


def ran(model, x):
    """(y, gradients, the functions in y's graph) of a step under autocast."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    functions = nodes(y)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())], functions


@pytest.mark.parametrize("name", MODELS)
def test_the_readers_get_the_same(name):
    make, norms = MODELS[name]
    torch.manual_seed(0)
    plain = make()
    model = copy.deepcopy(plain)
    gt.patch(plain)
    report = gt.patch(model, fuse=True)
    assert report.lowered.keys() == norms and ("lowered" in str(report)) == bool(norms)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    (ours, functions), (theirs, all_functions) = ran(model, x), ran(plain, x)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for mine, wanted in zip(ours, theirs):
        torch.testing.assert_close(mine, wanted, rtol=2e-2, atol=1e-2 * float(theirs[0].abs().max()))
    casts = all_functions.count("ToCopyBackward0") - functions.count("ToCopyBackward0")
    assert casts >= 2 * len(norms)  # of x, and of y for each reader
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)  # without autocast


def test_in_one_compiled_graph():
    """No cast of the norm's x or y is in it."""
    make, _ = MODELS["with an activation"]
    torch.manual_seed(0)
    model, graphs = make(), []
    gt.patch(model, fuse=True)
    x = torch.randn(2, 3, 4, 4)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, backend=keep, fullgraph=True)(x), wanted, rtol=2e-2, atol=2e-2)
    assert "lowered" in gt.source(model)  # what torch.compile sets on a module is no change of its forward
    (graph,) = graphs
    norms = [n for n in graph.graph.nodes if "group_norm" in str(n.target)]
    assert [n.meta["example_value"][0].dtype for n in norms] == [torch.bfloat16]


def test_who_looks_on_sees_float32():
    make, _ = MODELS["with an activation"]
    torch.manual_seed(0)
    model = make()
    gt.patch(model, fuse=True)
    x, seen = torch.randn(2, 3, 4, 4), []
    for watch in (
        lambda: model[3].register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype)),
        lambda: model[1].register_forward_hook(lambda m, a, y: seen.append(y.dtype)),
    ):
        hook = watch()
        functions = ran(model, x)[1]
        hook.remove()
        assert "ToCopyBackward0" in functions
    assert seen == [torch.float32] * 2
    with torch.autocast("cpu", torch.float16):  # the convolution gives 16 bits of another kind than x has
        assert F.relu(model[:3](x.bfloat16())).dtype is torch.float32
