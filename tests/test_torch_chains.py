"""Convolution → batch norm (+ residual) → activation as one op in models: what is found, what it computes, what stays."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_torch_fuse import Residual, nodes, rows_of

import gpulayers.torch as gt

CONVS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
BATCH_NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
INSTANCE_NORMS = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]
ACTS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.SiLU(),
    nn.Hardswish(),
    nn.GELU(),
    nn.LeakyReLU(0.3),
    nn.Tanh(),
    None,
    F.relu,
]
ONE_OP = "conv_batch_normBackward"


class Link(nn.Module):
    """act(norm(conv(x)) + residual), some of it left out."""

    def __init__(self, conv, norm, act=None, identity=None, adds="", twice=False):
        super().__init__()
        self.conv, self.norm, self.identity = conv, norm, identity
        self.act, self.function = (act, None) if isinstance(act, nn.Module) else (None, act)
        self.adds, self.twice = adds, twice

    def forward(self, x):
        y = self.conv(x)
        z = y if self.norm is None else self.norm(y)
        if self.identity is not None:
            z = self.identity(z)
        if self.adds == "in place":
            z += x
        elif self.adds:
            z = x + z
        if self.twice:
            z = z * y
        z = z if self.act is None else self.act(z)
        return z if self.function is None else self.function(z)


def drawn(rng: random.Random) -> tuple[nn.Module, torch.Tensor]:
    """Two links in a row, and their input."""
    axes, c = rng.choice([1, 2, 2, 2, 3]), 4
    links = []
    for _ in range(2):
        kernel = rng.choice([1, 3])
        options = {"padding": kernel // 2, "groups": rng.choice([1, 1, 2, c]), "bias": rng.random() < 0.5}
        options["padding_mode"] = rng.choice(["zeros", "zeros", "zeros", "circular"])
        conv = CONVS[axes - 1](c, c, kernel, **options)
        if rng.random() < 0.1:
            conv = getattr(nn, f"ConvTranspose{axes}d")(c, c, kernel, padding=kernel // 2)
        affine = rng.random() < 0.8
        norms = [
            *[BATCH_NORMS[axes - 1](c, affine=affine, momentum=rng.choice([0.1, 0.3, None]))] * 6,
            BATCH_NORMS[axes - 1](c, track_running_stats=False),
            INSTANCE_NORMS[axes - 1](c),
            nn.GroupNorm(2, c),
            None,
        ]
        act, identity = copy.deepcopy(rng.choice(ACTS)), nn.Identity() if rng.random() < 0.2 else None
        how = {"adds": rng.choice(["", "", "before", "in place"]), "twice": rng.random() < 0.1}
        links.append(Link(conv, rng.choice(norms), act, identity, **how))
    model = nn.Sequential(*links) if rng.random() < 0.8 else nn.Sequential(links[0], links[0])
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.train(rng.random() < 0.6), torch.randn(2, c, *(3, 2, 3)[:axes])


def hooked(model: nn.Module, rng: random.Random) -> list:
    """What a hook on one of the modules will have seen."""
    seen: list = []
    layers = [m for m in model.modules() if isinstance(m, (*CONVS, *BATCH_NORMS, nn.Identity))]
    rng.choice(layers or [model]).register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    return seen


def ran(model: nn.Module, x: torch.Tensor, grads: bool = True) -> tuple[dict, list]:
    """(y, all gradients and buffers after a step, the functions in y's graph)"""
    x = x.clone().requires_grad_(grads)
    with torch.set_grad_enabled(grads):
        y = model(x + 0)
    found = {"y": y.detach()} | {k: b.detach().clone() for k, b in model.named_buffers()}
    if not grads:
        return found, []
    functions = nodes(y)
    y.square().sum().backward()
    return found | {"x": x.grad} | {n: p.grad for n, p in model.named_parameters()}, functions


def close(ours: dict, theirs: dict, judge: dict) -> None:
    """Each as near to the truth as torch's own, and to it within a few roundings; of gradients that are zero, to the largest."""
    largest = max(t.abs().max() for t in judge.values() if t is not None)
    for key, truth in judge.items():
        if truth is None or not truth.is_floating_point():
            assert (ours[key] is None) == (truth is None) and (truth is None or torch.equal(ours[key], truth)), key
            continue
        off, most = ((f[key].double() - truth).abs().max() for f in (ours, theirs))
        size = truth.abs().max() if truth.abs().max() > 1e-9 * largest else largest
        assert off <= 4 * most + 4e-6 * size, key


@pytest.mark.parametrize("part", range(4))
def test_models_by_chance(part):
    """Each convolution and each norm is in a row or has its reason; the model computes what it did, hooks see it."""
    fused = 0
    for seed in range(25 * part, 25 * part + 25):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        theirs, x = drawn(rng)
        ours = copy.deepcopy(theirs)
        wants_hooks, state = rng.random() < 0.2, rng.getstate()
        seen = []
        for model in (theirs, ours) if wants_hooks else ():
            rng.setstate(state)
            seen.append(hooked(model, rng))
        report = gt.patch(ours, fuse=True)
        rows = rows_of(report)
        members = {f"{row.split('.')[0]}.{name}" for row in rows for name in row.split(".", 1)[1].split(" → ")}
        for name, layer in ours.named_modules():
            if isinstance(layer, nn.modules.conv._ConvNd) or "Norm" in type(layer).__name__:
                assert name in members or report.unfused.get(name), (seed, name, str(report))
        grads = rng.random() < 0.7
        judge = copy.deepcopy(theirs).double()
        found, functions = ran(ours, x, grads)
        plain = ran(theirs, x, grads)[0]
        close(found, plain, ran(judge, x.double(), grads)[0])
        if wants_hooks:
            assert len(seen[1]) >= len(seen[0]) / 2 > 0
            torch.testing.assert_close(seen[1], seen[0][: len(seen[1])], rtol=1e-3, atol=1e-4)
        elif grads:
            calls = [row for row in rows if row.split(".")[1].startswith("conv → norm")]
            assert functions.count(ONE_OP) == len(calls) * (2 if ours[0] is ours[1] else 1), (seed, rows)
            fused += len(calls)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
    assert fused >= 8


def block(**options) -> tuple[nn.Module, nn.Module]:
    """A ResNet's block as it was, and patched."""
    theirs = Residual(4, 4, **options)
    ours = copy.deepcopy(theirs)
    assert rows_of(gt.patch(ours, fuse=True)) == ["conv1 → bn1 → relu", "conv2 → bn2 → add → relu"]
    return theirs, ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The dtypes that torch gives a convolution and a batch norm: 16-bit images, float32 statistics."""
    theirs, ours = block()
    x, found = torch.randn(3, 4, 5, 5), []
    for model in (theirs, ours):
        with torch.autocast("cpu", dtype):
            y = model(x)
            z = model(x.to(dtype))  # a residual of the convolutions' dtype
        found.append((y, z))
        y.float().sum().backward()
    for (y, z), (w, v) in [found]:
        assert (w.dtype, v.dtype) == (y.dtype, z.dtype) == (dtype, dtype)  # += keeps it
        torch.testing.assert_close((w, v), (y, z), rtol=3e-2, atol=6e-2)
    assert nodes(found[1][1]).count(ONE_OP) == 2
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    buffers = zip(ours.buffers(), theirs.buffers())
    assert all(a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in buffers)


def test_norms_in_float32_over_halves():
    theirs, ours = block()
    for model in (theirs, ours):
        model.bfloat16()
        model.bn1.float(), model.bn2.float()
    x = torch.randn(3, 4, 5, 5).bfloat16()
    y, w = (model(x) for model in (theirs, ours))
    torch.testing.assert_close(w, y, rtol=3e-2, atol=6e-2)
    assert nodes(w).count(ONE_OP) == 2


def test_checkpoints_count_twice():
    """As torch's own norms do: their statistics move in each of the two forwards."""
    theirs, ours = block()
    x = torch.randn(3, 4, 5, 5)
    for model in (theirs, ours):
        torch.utils.checkpoint.checkpoint(model, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert ours.bn2.num_batches_tracked == theirs.bn2.num_batches_tracked == 2
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_one_compiled_graph(training):
    theirs, ours = block()
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours.train(training), fullgraph=True, backend="aot_eager")
    wanted, got = (
        [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])]
        for model, y in ((m, f(x)) for m, f in ((theirs.train(training), theirs), (ours, compiled)))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_copies_pickles_and_the_way_back():
    theirs, ours = block()
    x = torch.randn(3, 4, 5, 5)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert nodes(other(x)).count(ONE_OP) == 2
    gt.unpatch(ours)
    y = ours(x)
    assert ONE_OP not in nodes(y) and [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    torch.testing.assert_close(y, theirs(x))


def test_a_frozen_norm_and_a_residual_that_does_not_fit():
    theirs, ours = block()
    for model in (theirs, ours):
        model.bn1.eval().requires_grad_(False)
        model.downsample = nn.Conv2d(4, 4, 5)  # its result is broadcast; the plan is made again
    gt.patch(ours, fuse=True)
    x, found = torch.randn(3, 4, 5, 5), []
    for model in (theirs, ours):
        model.downsample.load_state_dict(theirs.downsample.state_dict())
        y = model(x)
        y.square().sum().backward()
        found.append([y.detach(), *[p.grad for p in model.parameters() if p.requires_grad], *model.buffers()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_calls_of_one_norm_stay_in_their_order():
    """Its statistics move in each: a row may not run after another call of its norm."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2, momentum=0.5), nn.ReLU()

        def forward(self, x, other):
            y = self.norm(self.conv(x))
            z = self.norm(self.conv(other))
            return self.act(z) - self.act(y)

    theirs = Twice()
    ours = copy.deepcopy(theirs)
    report = gt.patch(ours, fuse=True)
    x, other = torch.randn(2, 2, 3), 5 * torch.randn(2, 2, 3)
    torch.testing.assert_close(ours(x, other), theirs(x, other))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert rows_of(report) == ["conv → norm → act", "conv → norm"]


WHY = {
    "a SyncBatchNorm waits": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.SyncBatchNorm(2)),
    "no op computes a transposed": lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 1), nn.BatchNorm2d(2)),
    "no activation follows it": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2), nn.MaxPool2d(1)),
    "it has hooks": lambda: _hooked(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))),
    "no batch norm follows it": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(1)),
    "it stands in a ModuleList": lambda: nn.ModuleList([nn.Conv2d(2, 2, 1)]),
    "its parent's forward stays as it is": lambda: _Asking(),
    "it is no drop-in": lambda: nn.Sequential(type("Own", (nn.Conv2d,), {})(2, 2, 1), nn.BatchNorm2d(2)),
    "more steps than the norm": lambda: Link(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), twice=True),
}


def _hooked(model):
    model[0].register_forward_hook(lambda m, a, y: None)
    return model


class _Asking(Link):
    def __init__(self):
        super().__init__(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x):
        return super().forward(x if type(x) is torch.Tensor else x[0])


@pytest.mark.parametrize("why", WHY)
def test_the_report_says_why(why):
    model = WHY[why]()
    report = gt.patch(model, fuse=True)
    assert any(reason.startswith(why) for reason in report.unfused.values()), report.unfused
    assert "not fused" in str(report)


BOTH = ["_conv_tiles_kernel", "_batch_norm_forward_kernel"]
BACK = [
    "_batch_norm_sums_kernel",
    "_batch_norm_backward_kernel",
    "_conv_tiles_kernel",
    "_conv_tiles_weight_kernel",
    "_finish_kernel",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
def test_launches_of_a_resnet():
    """In bfloat16 autocast and channels last: two a chain forward, five backward, and no copy of an image between."""
    from gpulayers.bench.models.resnet import ResNet

    from gpulayers.testing.null_driver import null_driver

    def launched(part, x, training=True):
        def step():
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
                y = part(x)
            if training:
                y.backward(torch.empty_like(y))

        part.train(training)
        step(), step()
        return [launch.kernel for launch in driver.noted(step)[1]]

    def images(channels, **kind):
        x = torch.empty(2, channels, 16, 16, **kind).to(memory_format=torch.channels_last)
        return x.requires_grad_(channels > 3)

    with null_driver(90, compiled=False) as driver:
        model = ResNet((2,), 64, 16)
        report = gt.patch(model, fuse=True, memory_format=torch.channels_last)
        assert len(rows_of(report)) == 8 and not report.unfused
        half = {"dtype": torch.bfloat16}
        assert launched(model.blocks[0], images(64, **half)) == 4 * BOTH + 4 * BACK
        assert launched(model.blocks[1], images(256, **half)) == 3 * BOTH + 3 * BACK
        stem = launched(model.stem, images(3))
        assert stem[:5] == ["_conv_windows_kernel"] * 2 + BOTH + ["_max_pool_blocks_forward_kernel"]
        assert (
            stem[5:8] == ["_max_pool_blocks_backward_kernel", *BACK[:2]] and len(stem) == 12
        )  # no dx: images have no gradient
        evaluated = launched(model.blocks[1], images(256, **half), training=False)
        assert evaluated == ["_conv_scale_kernel", "_conv_tiles_kernel"] * 3


class Dense(nn.Module):
    """A DenseNet's layer: of one tensor, or of all that came before."""

    def __init__(self, inside, outside):
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, 4, 1, bias=False)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, outside, 3, padding=1)

    def narrowed(self, all):
        return self.conv1(self.relu1(self.norm1(torch.cat(all, 1))))

    def forward(self, x):
        y = self.narrowed([x] if isinstance(x, torch.Tensor) else x)
        return self.conv2(self.relu2(self.norm2(y)))


def test_a_forward_of_one_tensor_or_many():
    theirs = Dense(6, 3)
    ours = copy.deepcopy(theirs)
    report = gt.patch(ours, fuse=True)
    assert report.fused == {"": ("norm1 → relu1", "conv1 → norm2 → relu2")}
    assert report.unfused == {"conv2": "no batch norm follows it in the same forward"}
    x = [torch.randn(2, 2, 3, 3) for _ in range(3)]
    for given in (torch.cat(x, 1), x, tuple(x)):
        y, w = (model(given) for model in (theirs, ours))
        torch.testing.assert_close(w, y, rtol=1e-4, atol=1e-5)
        assert nodes(w).count(ONE_OP) == (not isinstance(given, tuple))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


class BatchNormAct2d(nn.BatchNorm2d):
    """In timm's manner."""

    def __init__(self, n, act=None, drop=None):
        super().__init__(n)
        self.drop, self.act = drop or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class BatchNormActTwice(BatchNormAct2d):
    def forward(self, x):
        return self.act(super().forward(x)) + 1


class Inverted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 1), BatchNormAct2d(8, nn.SiLU())
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), BatchNormAct2d(8, nn.SiLU(), nn.Dropout2d(0.0))
        self.conv3, self.bn3, self.drop_path = nn.Conv2d(8, 4, 1), BatchNormAct2d(4), nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.drop_path(self.bn3(self.conv3(y))) + x


@pytest.mark.parametrize("training", [True, False])
def test_norms_with_activations_of_their_own(training):
    theirs = Inverted().train(training)
    ours = copy.deepcopy(theirs)
    report = gt.patch(ours, fuse=True)
    rows = ("conv3 → bn3 → drop_path → add", "conv1 → bn1", "conv2 → bn2")
    assert report.fused == {"": rows} and "gpulayers.torch's batch_norm" in str(report)
    x, found = torch.randn(3, 4, 5, 5), []
    for model in (theirs, ours, pickle.loads(pickle.dumps(ours))):
        y = model(x)
        functions = nodes(y)
        y.square().sum().backward()
        found.append([y.detach(), *[p.grad for p in model.parameters()], *model.buffers()])
    torch.testing.assert_close(found[1:], [found[0]] * 2, rtol=1e-3, atol=1e-4)
    assert functions.count(ONE_OP) == 2  # bn2 has a module that may drop
    gt.unpatch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def test_a_norm_that_computes_something_else_stays():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), BatchNormActTwice(2, nn.ReLU()))
    report = gt.patch(model, fuse=True)
    assert report.left["1"] == "on a random input it computes something else" and not report.fused
    assert report.unfused["1"].startswith("it is no drop-in")
