"""Linear layers of one input as one product, and gated units: what is found, what it computes, what stays."""

import copy
import re

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpulayers.bench.models.llama import TINY, Attention, SwiGLU  # noqa: E402
from test_torch_fuse import nodes, rows_of  # noqa: E402

import gpulayers.torch as gt  # noqa: E402


class Joint(nn.Module):
    """A gated unit whose halves are one layer's."""

    def __init__(self, swapped=False):
        super().__init__()
        self.both, self.down, self.swapped = nn.Linear(6, 16, bias=False), nn.Linear(8, 6), swapped

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(F.silu(up) * gate if self.swapped else up * F.gelu(gate, approximate="tanh"))


class Many(nn.Module):
    """Five layers of one input, of which one is called before with another; and an activation that others read, too."""

    def __init__(self):
        super().__init__()
        for i in range(5):
            setattr(self, f"layer{i}", nn.Linear(6, 6, bias=i % 2 == 0))

    def forward(self, x):
        a, b, c, d = self.layer0(x), self.layer1(x), self.layer2(x), self.layer3(x)
        kept = torch.sigmoid(a)
        return kept * b + kept + c.relu() + self.layer4(d) * self.layer4(x)


class Written(nn.Module):
    """Its input is written to between two layers that take it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.first.weight.requires_grad_(False)  # so that its input is not kept

    def forward(self, x):
        x = x * 1
        y = self.first(x)
        x.mul_(2)
        return y - self.second(x)


class Angles(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention(8, 4, 2)

    def forward(self, x):
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None]  # (T, D/2)
        return self.attention(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


MODELS = {
    "attention": (Angles, (2, 3, 8), ["attention.rotary", "attention.rotary", "attention.q | k | v"]),
    "gated": (lambda: SwiGLU(6, 8), (2, 3, 6), ["act → mul", "gate | up"]),
    "joint": (Joint, (5, 6), ["chunk → getitem → getitem → gelu → mul"]),
    "joint, swapped": (lambda: Joint(True), (5, 6), []),
    "many": (Many, (4, 6), ["layer0 | layer1 | layer2"]),
    "written between": (Written, (4, 6), []),
}


def steps(name):
    """{what: tensor} of a step of the patched model, the fused one, and one in float64; and the two models."""
    make, shape, _ = MODELS[name]
    torch.manual_seed(0)
    plain = make()
    fused, judge = copy.deepcopy(plain), copy.deepcopy(plain).double()
    gt.patch(plain)
    report, found, x = gt.patch(fused, fuse=True), [], torch.randn(shape)
    for model, given in (plain, x.clone()), (fused, x.clone()), (judge, x.double()):
        y = model(given.requires_grad_())
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": given.grad} | {n: p.grad for n, p in model.named_parameters()})
    return found, report, plain, fused, x


@pytest.mark.parametrize("name", MODELS)
def test_what_is_beside_each_other(name):
    (theirs, ours, truth), report, plain, fused, x = steps(name)
    assert rows_of(report) == MODELS[name][2]
    assert list(fused.state_dict()) == list(plain.state_dict())
    for key, wanted in truth.items():
        if wanted is not None:
            off, most = ((f[key].double() - wanted).abs().max() for f in (ours, theirs))
            assert off <= 4 * most + 4e-6 * wanted.abs().max(), key
    gt.unpatch(fused)
    torch.testing.assert_close(fused(x), ours["y"])


def test_hooks_see_their_module_and_a_new_activation_runs():
    fused, x = SwiGLU(6, 8), torch.randn(3, 6)
    gt.patch(fused, fuse=True)
    y, seen = fused(x), []
    hooks = [m.register_forward_hook(lambda m, *_: seen.append(m)) for m in (fused.up, fused.act)]
    torch.testing.assert_close(fused(x), y)
    assert {*seen} == {fused.act, fused.up} and len(seen) == 2
    for hook in hooks:
        hook.remove()
    fused.act = nn.LeakyReLU(0.3)  # of another number than the op's
    torch.testing.assert_close(fused(x), fused.down(F.leaky_relu(fused.gate(x), 0.3) * fused.up(x)))


def test_a_frozen_layer_beside_another():
    fused = SwiGLU(6, 8)
    fused.gate.weight.requires_grad_(False)
    gt.patch(fused, fuse=True)
    plain, x = copy.deepcopy(fused), torch.randn(3, 6)
    gt.unpatch(plain)
    for model in (plain, fused):
        model(x).sum().backward()
    assert fused.gate.weight.grad is None
    torch.testing.assert_close(fused.up.weight.grad, plain.up.weight.grad)


def test_autocast_checkpoints_and_compiled_code():
    torch.manual_seed(0)
    fused, x = SwiGLU(6, 8), torch.randn(3, 6, requires_grad=True)
    plain = copy.deepcopy(fused)
    gt.patch(plain)
    gt.patch(fused, fuse=True)
    with torch.autocast("cpu", torch.bfloat16):
        mine, wanted = fused(x), plain(x)
    assert mine.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(mine, wanted, rtol=2**-7, atol=2**-7 * float(wanted.detach().abs().max()))
    y = torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False)
    y.sum().backward()
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), y)


def test_a_norm_before_several_writes_what_they_take():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = nn.RMSNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            y = self.norm(x)
            return self.q(y) * self.k(y)

    model = Both()
    report = gt.patch(model, fuse=True)
    assert rows_of(report) == ["q | k"] and report.lowered.keys() == {"norm"}
    assert re.search(r"lowered\(norm\w*, \(q\w*, k\w*\), x\)", gt.source(model))


def test_a_small_llama():
    """Each block's attention and gated unit take two launches less forward; the loss is the unfused model's."""
    model, batch = TINY.made()
    plain = copy.deepcopy(model)
    gt.patch(plain)
    report = gt.patch(model, fuse=True)
    assert [rows for name, rows in report.fused.items() if name.endswith("mlp")] == [("act → mul", "gate | up")] * 2
    ours, theirs = model(*batch), plain(*batch)
    torch.testing.assert_close(ours, theirs)
    assert len(nodes(ours)) < len(nodes(theirs))


class Turning(nn.Module):
    """Queries and keys turned as models write it; how: what else it does."""

    def __init__(self, how=""):
        super().__init__()
        self.q, self.how = nn.Linear(8, 8), how

    def forward(self, x, cos, sin):
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        a, b = q.chunk(2, -1)
        if self.how == "other":
            return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
        if self.how == "read":
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1) + q + torch.cat([b, a], -1)
        if self.how == "promoted":
            return torch.cat([cos * a - sin * b, b * cos + sin * a], dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(q.dtype)


@pytest.mark.parametrize("how, rows", [("", ("rotary",)), ("promoted", ("rotary",)), ("other", ()), ("read", ())])
def test_rotary_positions_written_out(how, rows):
    """One op for tables of a row a position; what has others' shapes or dtypes is computed as it stands."""
    torch.manual_seed(0)
    model, angles = Turning(how), torch.randn(3, 2)
    plain = copy.deepcopy(model)
    report = gt.patch(model, fuse=True)
    assert report.fused.get("", ()) == rows
    x = torch.randn(2, 3, 8)
    tables = angles.cos(), angles.sin()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, *tables), plain(x, *tables))
    for cos, sin in (tables, [t[None] for t in tables], [t.double() for t in tables]):
        served = bool(rows) and cos.dim() == 2 and cos.dtype is x.dtype
        for half in (False, True):
            found = []
            for m in (model, plain):
                given = x.clone().requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    y = m(given, cos, sin)
                assert ("rotaryBackward" in nodes(y)) == (m is model and served and (how == "" or not half))
                y.square().sum().backward()
                found.append([y.detach(), given.grad])
            torch.testing.assert_close(*found, **dict(rtol=2e-2, atol=2e-2) if half else {})


def test_compiled_two_are_two():
    """The op that is traced has three outputs."""
    x, weights = torch.randn(2, 3), [torch.randn(n, 3) for n in (4, 5)]
    a, b = torch.compile(gt.functional.linears, backend="eager", fullgraph=True)(x, weights)
    torch.testing.assert_close((a, b), tuple(x @ w.t() for w in weights))
