"""The input of a row that others read, too: what comes back from them is added where the row's own gradient is written."""

import copy
import operator

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from gpulayers.bench.models.resnet import Bottleneck
from test_torch_chains import BACK, close, ran
from test_torch_fuse import Residual, nodes
from torch.utils.checkpoint import checkpoint

import gpulayers.torch as gt


class Written(nn.Module):
    """What reads x beside the convolution, or does more than to read it."""

    def __init__(self, other):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), other
        self.module = other if isinstance(other, nn.Module) else None

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y * self.other(x)


def block(make=lambda: Residual(4, 4)) -> tuple[nn.Module, nn.Module]:
    """As it was, and patched."""
    torch.manual_seed(3)
    theirs = make()
    ours = copy.deepcopy(theirs)
    report = gt.patch(ours, fuse=True, memory_format=torch.channels_last)
    assert [*report.joined] == ["conv1"] and "joined" in str(report)
    return theirs, ours


def images(channels: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, channels, 3, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)


def edges(y: torch.Tensor) -> list[int]:
    """Of all paths into convolutions with a norm, the output of theirs that the path comes from."""
    seen, found, left = set(), [], [y.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for after, output in node.next_functions:
            left.append(after)
            if after is not None and after.name() == "conv_batch_normBackward":
                found.append(output)
    return sorted(found)


@pytest.mark.parametrize(
    "make, channels, paths",
    [
        (lambda: Residual(4, 4), 4, [0, 1]),
        (lambda: Residual(4, 6), 4, [0, 1]),
        (lambda: Bottleneck(16, 4, 1), 16, [0, 0, 1]),
        (lambda: Bottleneck(4, 4, 2), 4, [0, 0, 0, 1]),  # the shortcut comes first in its forward
    ],
    ids=["identity", "downsampled", "three", "strided"],
)
def test_blocks(make, channels, paths):
    theirs, ours = block(make)
    x = images(channels)
    found, judge = ran(ours, x)[0], ran(copy.deepcopy(theirs).double(), x.double())[0]
    close(found, ran(theirs, x)[0], judge)
    y = ours(x.requires_grad_())
    assert edges(y) == paths and nodes(y).count("AddBackward0") == 0


class Inverted(nn.Module):
    """A MobileNet's block: its layers in Sequentials, one in the other or not, x added to what they give."""

    def __init__(self, nested: bool, in_place: bool):
        super().__init__()
        first = [nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
        rest = [nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        if nested:
            first, rest = [nn.Sequential(*first)], [nn.Sequential(*rest)]
        self.layers, self.in_place = nn.Sequential(*first, *rest, nn.Conv2d(8, 4, 1)), in_place

    def forward(self, x):
        y = self.layers(x)
        if self.in_place:
            y += x
            return y
        return x + y


@pytest.mark.parametrize("nested, in_place", [(False, True), (True, False)])
def test_sequentials(nested, in_place):
    torch.manual_seed(6)
    theirs = Inverted(nested, in_place)
    ours = copy.deepcopy(theirs)
    report = gt.patch(ours, fuse=True, memory_format=torch.channels_last)
    assert [*report.joined] == ["layers.0.0" if nested else "layers.0"] and "through" in gt.source(ours)
    x, judge = images(), copy.deepcopy(theirs).double()
    close(ran(ours, x)[0], ran(theirs, x)[0], ran(judge, x.double())[0])
    y = ours(images().requires_grad_())
    assert sums(lambda: y.backward(torch.ones_like(y))) == 0 and edges(ours(x.requires_grad_())) == [0, 0, 1]
    again = copy.deepcopy(ours)
    again(x)  # its modules are read when they are called first
    assert edges(again(x)) == [0, 0, 1]
    seen = []
    for part in (again.layers, again.layers[0], again.layers[-1]):  # the last one stands behind the row
        hook = part.register_forward_hook(lambda *a: seen.append(1))
        assert (1 in edges(again(x))) == (part is again.layers[-1])
        hook.remove()
    assert len(seen) == 3
    again.layers.append(nn.Identity())
    assert edges(again(x)) == ([0, 0, 1] if nested else [])  # as a fused forward says: another number of modules
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours, judge):
        model.eval()
    found, plain = (ran(model, x.detach(), grads=False)[0] for model in (ours, theirs))
    close(found, plain, ran(judge, x.detach().double(), grads=False)[0])


def sums(step) -> int:
    """How often torch added two tensors in a step."""
    with torch.autograd.profiler.profile() as seen:
        step()
    added = [e.cpu_parent.name for e in seen.function_events if e.name in ("aten::add", "aten::add_") and e.cpu_parent]
    return sum(parent.startswith("autograd::engine") for parent in added)


def test_autograd_adds_nothing():
    """Where it did, once for a block."""
    theirs, ours = block()
    dy = torch.randn(2, 4, 3, 4)
    for model, count in ((theirs, 1), (ours, 0)):
        y = model(images().requires_grad_())
        assert sums(lambda y=y: y.backward(dy)) == count


@pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
def test_a_block_launches_no_more():
    """Than its chains do: two each forward, five each backward, and nothing besides."""
    from gpulayers.testing.null_driver import null_driver

    def step(memory_format=torch.channels_last):
        x = torch.empty(2, 64, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x.requires_grad_())
        dy = torch.empty_like(y)
        return lambda: y.backward(dy)

    with null_driver(90, compiled=False) as driver:
        model = Bottleneck(64, 16, 1)
        gt.patch(model, fuse=True, memory_format=torch.channels_last)
        backwards = [step() for _ in range(3)]
        backwards[0]()
        assert [launch.kernel for launch in driver.noted(backwards[1])[1]] == 3 * BACK and sums(backwards[2]) == 0


def test_what_is_not_joined_computes_the_same():
    """Other layouts and dtypes than the kernel takes, images without gradients, hooks."""
    for x in (torch.randn(2, 4, 3, 4), images().double()):
        theirs, ours = (m.to(x.dtype) for m in block())
        judge = copy.deepcopy(theirs).double()
        close(ran(ours, x)[0], ran(theirs, x)[0], ran(judge, x.double())[0])
    ours = block()[1]
    assert edges(ours(images())) == [0]
    gt.patch(ours, fuse=True, memory_format=torch.contiguous_format)
    assert edges(ours(torch.randn(2, 4, 3, 4, requires_grad=True))) == [0]
    assert edges(ours(images().requires_grad_())) == [0, 1]
    with torch.autocast("cpu", torch.bfloat16):
        assert edges(ours(images().requires_grad_())) == [0, 0]
        assert edges(ours(images(dtype=torch.bfloat16).requires_grad_())) == [0, 1]
    seen = []
    ours.conv1.register_forward_hook(lambda *a: seen.append(1))
    assert edges(ours(images().requires_grad_())) == [] and seen == [1]


def test_gradients_of_one_path_alone():
    """Of the row's output, or of what it handed on; and of both."""
    ours, x = block()[1], images().requires_grad_()
    pair = gt._rows.conv_norm_act_joined(ours.conv1, ours.bn1, None, x)
    assert len(pair) == 2 and pair[1].data_ptr() == x.data_ptr()
    dx = torch.autograd.grad(pair[0].sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(pair[1].sum(), x, retain_graph=True)[0], torch.ones_like(x))
    both = torch.autograd.grad(pair[0].sum() + pair[1].sum(), x)[0]
    torch.testing.assert_close(both, dx + 1)


def test_gradients_of_gradients_and_batches_of_them():
    theirs, ours = block()
    found = []
    for model in (theirs.double().eval(), ours.double().eval()):
        torch.manual_seed(4)
        x = images(dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        batch = torch.autograd.grad(model(x), x, torch.randn(3, 2, 4, 3, 4).double(), is_grads_batched=True)
        found.append([dx.detach(), *torch.autograd.grad(dx.square().sum(), [x, model.conv1.weight]), *batch])
    torch.testing.assert_close(*found)


def test_checkpoints_hooks_and_the_way_back():
    theirs, ours = block()
    found = []
    for model in (theirs, ours, copy.deepcopy(ours)):
        torch.manual_seed(5)
        x, seen = images().requires_grad_(), []
        h = x * 2
        h.register_hook(seen.append)
        y = checkpoint(model, h, use_reentrant=False) if model is ours else model(h)
        y.square().sum().backward()
        found.append([x.grad, *seen, *[p.grad for p in model.parameters()]])
        assert len(seen) == 1
    for mine in found[1:]:
        torch.testing.assert_close(mine, found[0], rtol=1e-3, atol=1e-4)
    gt.unpatch(ours)
    assert nodes(ours(images().requires_grad_())).count("AddBackward0") == 1


class Sequence(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    "other, joined",
    [
        (lambda x: x + 1, True),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)), True),
        (nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), False),
        (nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(inplace=True)), nn.Conv2d(4, 4, 1)), False),
        (Sequence(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)), False),  # whose forward may begin with either
        (nn.Identity(), True),
        (lambda x: F.relu(x, True), False),
        (lambda x: x.mul_(2), False),
        (lambda x: operator.iadd(x, 1), False),
        (lambda x: x[:, :2].sum(), False),
    ],
)
def test_what_may_write_to_it(other, joined):
    model = Written(other)
    assert [*gt.patch(model, fuse=True).joined] == ["conv"] * joined
    x = images().requires_grad_()
    model.conv.weight.requires_grad_(False)
    model(x + 0)


class Handed(nn.Module):
    """A block whose input is among its outputs, by way of what may be nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.0)

    def forward(self, x):
        return self.bn(self.conv(x)), self.drop(x)


def test_what_is_handed_out_may_be_written_to():
    model, x = Handed().eval(), images().requires_grad_()
    assert not gt.patch(model, fuse=True).joined
    _, same = model(x + 0)
    same.mul_(2)
