"""A training step of a patched model in channels_last launches what its layers need, and brings nothing into another layout.

Counted without a GPU, over a driver that does nothing; what each kind of layer needs is said in ``bench/judging/step.py``, and
what a step takes on a GPU is predicted from the same count. Topologies are ResNet-50's, ConvNeXt's and Stable Diffusion's U-Net's,
with as many channels as the kernels on tiles want.
"""

import collections
import contextlib
import functools
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import torch.nn as nn  # noqa: E402
from gpulayers.bench.judging import predicted_language, predicted_step, trace  # noqa: E402
from gpulayers.bench.judging.step import parts, torchs  # noqa: E402
from gpulayers.bench.measuring import warm  # noqa: E402
from gpulayers.bench.measuring.whole import every, turns_memory  # noqa: E402
from gpulayers.bench.models import gpt  # noqa: E402
from gpulayers.bench.models.convnext import ConvNeXt  # noqa: E402
from gpulayers.bench.models.kind import OPTIONS, Kind, images, stepping  # noqa: E402
from gpulayers.bench.models.resnet import ResNet  # noqa: E402
from gpulayers.bench.models.unet import UNet, latents  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers.testing.compiling import Planned  # noqa: E402
from gpulayers.testing.null_driver import null_driver  # noqa: E402
from gpulayers.torch import _head_loss  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")


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
    *(
        "view",
        "view_as",
        "reshape",
        "permute",
        "transpose",
        "expand",
        "as_strided",
        "slice",
        "select",
        "unsqueeze",
        "detach",
        "t",
    ),
    *("flatten", "split", "chunk", "narrow", "unbind", "alias", "empty", "empty_like", "empty_strided", "to"),
    *("result_type", "squeeze", "_reshape_alias", "item", "contiguous", "numpy_T", "unflatten"),
}


@pytest.mark.parametrize("half", [True, False], ids=["bfloat16 autocast", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_a_step(name, half):
    kind, torchs = CASES[name]
    model, batch = kind.made()
    gt.patch(model, fuse=True)
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
    needed = parts(kind, half)
    assert launched.total() <= sum(part.launches for part in needed)
    assert seconds <= sum(part.sums for part in needed)
    assert launched["_nhwc_kernel"] == 0
    assert launched["_copy_kernel"] <= half  # of the first layer's weights
    events = [*every(found.profiler.kineto_results.experimental_event_tree())]
    copies = [e for e in events if e.name == "aten::copy_"]
    assert not any(map(turns_memory, copies))
    given = [e.typed[1].inputs[:2] for e in copies]
    assert all(to.dtype is not source.dtype for to, source in given)
    assert half or all(len(to.sizes) < 2 for to, _ in given)  # numbers, and the row of arange's
    tops = {e.name.removeprefix("aten::") for e in events if e.name.startswith("aten::") and not is_within(e)}
    assert tops - VIEWS <= {*torchs}


def test_what_a_step_launches_can_be_compiled_ahead(monkeypatch):
    """The kernels of the calls that a model of fake tensors makes are those of its step, and come to the compiler."""
    kind = CASES["ConvNeXt"].kind
    model, batch = kind.made()
    gt.patch(model, fuse=True)
    with null_driver(compiled=False) as driver, torch.autocast("cpu", torch.bfloat16):
        _, noted = driver.noted(lambda: model(*batch).backward())
    compiled = set()
    monkeypatch.setattr(Planned, "compile", lambda self: compiled.add(self.kernel))
    for call in warm.calls_of(kind, True, "cpu"):
        warm.compile_call(call, 90)
    assert {launch.kernel for launch in noted} <= compiled


def is_within(event):
    """Whether another operation of torch's called it."""
    while (event := event.parent) is not None:
        if event.name.startswith("aten::"):
            return True
    return False


def test_what_a_step_moves():
    """A linear layer and a convolution of one tap, by hand; a residual and an activation that run in a norm's op."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64)
            self.conv2, self.norm2 = nn.Conv2d(64, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64)
            self.act, self.pool, self.flatten, self.fc = (
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(64, 8),
            )

        def forward(self, x):
            x = self.act(self.norm1(self.conv1(x)) + x)
            return self.fc(self.flatten(self.pool(self.norm2(self.conv2(x)))))

    def batch(g):
        return torch.randn(4, 64, 8, 8, generator=g), torch.randint(8, (4,), generator=g)

    kind = Kind(Net, batch, optimizer="SGD")
    n, w, e = 4 * 64 * 8 * 8, 64 * 64, 2
    found = collections.defaultdict(list)
    for part in parts(kind, half=True):
        found[part.kind].append((part.launches, part.nbytes, part.flops))
    small = n // 4
    assert found["conv, forward"] == [
        (1, (2 * n + w) * e, 2 * n * 64),
        (1, (n + small + 9 * w) * e, 2 * small * 64 * 9),
    ]
    assert found["conv, dx"] == [(1, (n + small + 9 * w) * e, 2 * small * 64 * 9)]  # nobody wants the image's
    assert found["batch norm, forward"] == [(1, 3 * n * e, 0), (1, 2 * small * e, 0)]
    assert found["batch norm, backward"] == [(2, (3 + 5) * n * e, 0), (2, (2 + 3) * small * e, 0)]
    assert "activation" not in found and found["linear, dx"] == [(1, (4 * 64 + 4 * 8 + 8 * 64) * e, 2 * 4 * 8 * 64)]
    own = {part.kind: part for part in torchs(kind)}
    assert own["torch: counters of batches"].launches == 2
    assert own["torch: sums, products, copies"].launches == 0  # the residual's gradient has one use
    with pytest.raises(ValueError, match="no rule says what a step needs of Softplus"):
        parts(kind._replace(net=lambda: nn.Sequential(nn.Softplus())), half=True)


def test_a_predicted_step(monkeypatch):
    """Its parts add up, no part is faster than memory and products are; convolutions by the tiles that would be chosen."""
    kind = CASES["ResNet"].kind._replace(batch=images(64, 64, 16))
    monkeypatch.setattr(predicted_step, "kinds", lambda size, names: {names[0]: kind})
    *found, whole = predicted_step.lines("ResNet-50")
    assert whole.ms == pytest.approx(sum(line.ms for line in found)) and whole.launches > sum(
        p.launches for p in parts(kind, True)
    )
    assert all(line.ms >= predicted_step._limit(line) for line in found)
    convs = [p for p in parts(kind, True) if p.kind.startswith("conv")]
    assert all(predicted_step._by_tiles(p.call, p.kind) is not None for p in convs)
    text = predicted_step.shown("ResNet-50")
    assert "batch norm, backward" in text and "torch.compile 29.4 ms" in text


def test_a_predicted_language_step(monkeypatch):
    """What the trace of a GPT's step says of launches is what the null driver counts; no part is faster than memory is."""
    monkeypatch.setattr(_head_loss, "LEAST", 8)
    kind = gpt.TINY
    model, batch = kind.made()
    gt.patch(model, fuse=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch)
        loss.backward()

    with trace.as_on_a_gpu(), null_driver(compiled=False) as driver:
        step()
        _, noted = driver.noted(step)
    ran = trace.traced(kind)
    assert sum(r.launches for r in ran if r.is_ours) == len(noted)
    monkeypatch.setattr(predicted_language, "traced", lambda *_: ran)
    *found, whole = predicted_language.lines(kind)
    assert whole.ms == pytest.approx(sum(line.ms for line in found))
    assert all(line.ms >= line.gigabytes * 1e12 / predicted_step.COPY for line in found)
    by_name = {line.kind: line for line in found}
    products = sum(line.teraflops for name, line in by_name.items() if name.startswith("linear"))
    width, rows = 32, 32
    assert products == pytest.approx(3 * 2 * rows * (2 * 12 * width**2 + 96 * width) / 1e12)
    assert "torch.compile 33.4 ms" in predicted_language.shown("GPT-2", kind)
