"""Whole models in plain torch.nn, patched: ten steps of training follow the unpatched model's."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402

import gpulayers as gl  # noqa: E402
import gpulayers.torch as gt  # noqa: E402
from gpulayers.testing.arena import has_gpu  # noqa: E402
from gpulayers.testing.tolerance import excess  # noqa: E402
from gpulayers.torch import _op  # noqa: E402

STEPS = 10


class BasicBlock(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += shortcut
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.blocks = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2))
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(16, classes)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, labels):
        return self.loss(self.fc(self.flatten(self.pool(self.blocks(self.stem(x))))), labels)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        n, t, width = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5
        later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = self.softmax(scores.masked_fill(later, float("-inf")))
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.0))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self, vocabulary=19, width=24, heads=3, length=12):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.loss = nn.CrossEntropyLoss()

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return self.loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def image_batches(dtype, device):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 3, 14, 13, generator=generator)
        yield x.to(device, dtype), torch.randint(5, (8,), generator=generator).to(device)


def token_batches(dtype, device):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield (torch.randint(19, (4, 12), generator=generator).cumsum(1).remainder(19).to(device),)


MODELS = {
    "ResNet": (ResNet, image_batches, "SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}),
    "GPT": (GPT, token_batches, "AdamW", {"lr": 3e-3, "weight_decay": 0.1}),
}


def initial(kind):
    torch.manual_seed(0)
    return kind()


def losses(model, optimizer, batches):
    found = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def trained(name, library, dtype, device="cpu"):
    """The model after ten steps, and their losses. library: whose layers and optimizer."""
    kind, batches, optimizer, options = MODELS[name]
    model = initial(kind).to(device, dtype)
    if library is gt:
        report = gt.patch(model)
        assert not report.bypassed and set(report.left.values()) <= {"gpulayers.torch has no Embedding"}
    optimizer = getattr(library.optim, optimizer)(model.parameters(), **options)
    return model, losses(model, optimizer, batches(dtype, device))


def compare(name, dtype, device="cpu"):
    """Each loss is as near to the float64 run's as torch's own is, times 4, and rounding."""
    (_, truth), (_, plain), (_, got) = (
        trained(name, *run, device) for run in ((torch, torch.float64), (torch, dtype), (gt, dtype))
    )
    of = np.float32 if dtype is torch.float32 else gl.arrays.from_torch_dtype(dtype)
    assert truth[0] != truth[-1]
    complaint = excess(np.array(got, of), np.array(truth), np.array(plain, of))
    assert complaint is None, complaint


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps(name):
    _op.fallbacks.clear()
    with gl.strict():
        compare(name, torch.float32)
    assert not _op.fallbacks


@pytest.mark.skipif(not has_gpu(), reason="in bfloat16 models are trained on a GPU; there is none")
@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_in_bfloat16(name):
    compare(name, torch.bfloat16, "cuda")


@pytest.mark.parametrize("name", MODELS)
def test_in_float64_the_weights_are_torchs(name):
    (plain, its), (patched, mine) = (trained(name, library, torch.float64) for library in (torch, gt))
    torch.testing.assert_close(mine, its)
    torch.testing.assert_close(patched.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_both_ways(name):
    kind, batches, *_ = MODELS[name]
    for source, target in ((torch, gt), (gt, torch)):
        model, _ = trained(name, source, torch.float32)
        other = kind()
        if target is gt:
            gt.patch(other)
        state = copy.deepcopy(model.state_dict())
        assert list(state) == list(other.state_dict())
        other.load_state_dict(state)
        batch = next(batches(torch.float32, "cpu"))
        torch.testing.assert_close(other.eval()(*batch), model.eval()(*batch))


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_step_is_seen(name, monkeypatch):
    """The bound is no wider than what a learning rate that is off by one in a thousand does."""
    kind, batches, optimizer, options = MODELS[name]
    monkeypatch.setitem(MODELS, name, (kind, batches, optimizer, options))
    _, truth = trained(name, torch, torch.float64)
    _, plain = trained(name, torch, torch.float32)
    monkeypatch.setitem(MODELS, name, (kind, batches, optimizer, options | {"lr": options["lr"] * 1.001}))
    _, wrong = trained(name, gt, torch.float32)
    assert excess(np.array(wrong, np.float32), np.array(truth), np.array(plain, np.float32))
