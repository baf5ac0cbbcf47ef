"""A training step of a patched model in channels_last launches what its layers need, and brings nothing into another layout.

Counted without a GPU, over a driver that does nothing. Topologies are ResNet-50's, ConvNeXt's and Stable Diffusion's U-Net's,
with as many channels as the kernels on tiles want.
"""

import collections
import contextlib
import functools
import math
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import torch.nn as nn  # noqa: E402
from gpulayers.bench.measuring.whole import every, turns_memory  # noqa: E402
from gpulayers.bench.models.convnext import ConvNeXt  # noqa: E402
from gpulayers.bench.models.kind import OPTIONS, Kind, images, stepping  # noqa: E402
from gpulayers.bench.models.resnet import ResNet  # noqa: E402
from gpulayers.bench.models.unet import UNet, latents  # noqa: E402
from gpulayers.kernels.triton.optim import WRITTEN  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers.testing.null_driver import null_driver  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")

LAUNCHES = {
    nn.Conv2d: 3,  # y, dx, dweight
    nn.Linear: 3,
    nn.BatchNorm2d: 4,  # moments, y; Σ dz and Σ dz · x, dx
    nn.LayerNorm: 3,  # y; dx, with shares of dweight and dbias; their sums
    nn.GroupNorm: 7,  # moments, statistics, y; sums, means, dx; dweight and dbias
    nn.ReLU: 2,
    nn.SiLU: 2,
    nn.GELU: 2,
    nn.MaxPool2d: 2,
    nn.AdaptiveAvgPool2d: 2,
    nn.Upsample: 2,
    nn.CrossEntropyLoss: 3,  # rows, their mean; dx
    nn.MSELoss: 3,
}
"""Of a call's forward and backward, second stages of sums that are split not counted."""
ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.GELU)
OTHERS = (nn.Identity, nn.Flatten)
FEW = 4
"""Launches that the tiles take to read an image of few channels: it is padded, forward and backward, so are weights, and
their gradient is taken out of what was computed for the padding, too."""
ARRAYS = {"SGD": 3, "AdamW": 4}
"""Of each parameter, whose addresses the update's one launch finds in a table; others write it, so many addresses each."""


class Case(NamedTuple):
    kind: Kind
    torchs: tuple[str, ...]
    """torch's own operations in its step, beside views: what a model writes with +, * and torch.cat, and their gradients;
    sums of gradients of what was used twice; counters of steps and batches; attention; the gradient of the loss."""


COUNTERS = "stack", "_foreach_add_"
"""AdamW's steps, which are on the CPU."""


CASES = {
    "ResNet": Case(
        Kind(lambda: ResNet((2, 1, 1, 1), 64, 16), images(2, 64, 16), optimizer="SGD"), ("add_", "ones_like")
    ),
    "ConvNeXt": Case(
        Kind(lambda: ConvNeXt((1, 1, 2, 1), (64, 128, 192, 256), 16), images(2, 64, 16)),
        ("add_", "ones_like", "add", "mul", "sum", *COUNTERS),
    ),
    "U-Net": Case(
        Kind(lambda: UNet(8, 64, (1, 2), 1, 1, 2, 32), latents(2, 8, 16), nn.MSELoss),
        (
            *("add_", "ones_like", "add", "mul", "sum", "cat", "arange", "exp", "cos", "sin", *COUNTERS),
            *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu_backward"),
        ),
    ),
}
VIEWS = {
    *("view", "reshape", "permute", "transpose", "expand", "as_strided", "slice", "select", "unsqueeze", "detach", "t"),
    *("flatten", "split", "chunk", "narrow", "unbind", "alias", "empty", "empty_like", "empty_strided", "to"),
    *("result_type", "squeeze", "_reshape_alias", "item", "contiguous", "numpy_T", "unflatten"),
}


def calls_of(model, batch):
    """How often each class is called; and the modules whose input is the batch, which wants no gradient."""
    found, first = collections.Counter(), set()

    def watch(module, xs, _):
        if next(module.children(), None) is None:
            found[type(module)] += 1
            if not xs[0].requires_grad:
                first.add(module)

    hooks = [m.register_forward_hook(watch) for m in model.modules()]
    model(*batch)
    for hook in hooks:
        hook.remove()
    return found, first


def members(model, report):
    """The modules that run in a row with others, in one op."""
    for name, rows in report.fused.items():
        children = dict(model.get_submodule(name).named_children())
        yield from [children[word] for row in rows for word in row.split(" → ") if word in children]


def needed(model, batch, report, optimizer, half):
    """(launches of a step at most, how many of them may have a second stage)"""
    calls, first = calls_of(model, batch)
    assert {*calls} <= {*LAUNCHES, *OTHERS}
    # dbias is a sum of its own, over all pixels or rows.
    biases = sum(isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None for m in model.modules())
    products = 3 * (calls[nn.Conv2d] + calls[nn.Linear]) - len(first)
    launches = sum(n * LAUNCHES.get(kind, 0) for kind, n in calls.items()) - len(first) + biases
    launches -= 2 * sum(isinstance(child, ACTIVATIONS) for child in members(model, report))
    if half:
        launches += FEW * sum(isinstance(m, nn.Conv2d) for m in first) - calls[nn.BatchNorm2d]  # moments come with y
    tensors = len([*model.parameters()])
    launches += 1 + math.ceil(ARRAYS[optimizer] * tensors / WRITTEN)
    return launches, products + biases


@pytest.mark.parametrize("half", [True, False], ids=["bfloat16 autocast", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_a_step(name, half):
    kind, torchs = CASES[name]
    model, batch = kind.made()
    plain = kind.made()
    report = gt.patch(model, fuse=True)
    optimizer = getattr(gt.optim, kind.optimizer)(model.parameters(), **OPTIONS[kind.optimizer])
    cast = functools.partial(torch.autocast, "cpu", torch.bfloat16) if half else contextlib.nullcontext
    step = stepping(model, batch, optimizer, cast)
    with null_driver(compiled=False) as driver:
        for _ in range(2):
            step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            _, noted = driver.noted(step)
    launched = collections.Counter(launch.kernel for launch in noted)
    seconds = launched.pop("_finish_kernel")
    launches, sums = needed(*plain, report, kind.optimizer, half)
    assert launched.total() <= launches
    assert seconds <= sums
    assert launched["_nhwc_kernel"] == 0
    assert launched["_copy_kernel"] <= half  # FEW's last
    events = [*every(found.profiler.kineto_results.experimental_event_tree())]
    copies = [e for e in events if e.name == "aten::copy_"]
    assert not any(map(turns_memory, copies))
    given = [e.typed[1].inputs[:2] for e in copies]
    assert all(to.dtype is not source.dtype for to, source in given)
    assert half or all(len(to.sizes) < 2 for to, _ in given)  # numbers, and the row of arange's
    tops = {e.name.removeprefix("aten::") for e in events if e.name.startswith("aten::") and not is_within(e)}
    assert tops - VIEWS <= {*torchs}


def is_within(event):
    """Whether another operation of torch's called it."""
    while (event := event.parent) is not None:
        if event.name.startswith("aten::"):
            return True
    return False
