"""Transformers of many forms, patched with ``fuse=True``: they compute what they did, the report says what runs as one op and
why else not, and a step launches as many kernels as it should. No GPU is asked."""

import collections
import copy
import functools
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpulayers.bench.models import gpt, llama  # noqa: E402
from gpulayers.bench.models.kind import Kind, NextToken, WithLoss, tokens  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers.testing.null_driver import null_driver  # noqa: E402
from gpulayers.torch import _head_loss  # noqa: E402

WIDTH, HEADS, CLASSES = 8, 4, 12


@pytest.fixture(autouse=True)
def few_classes_will_do(monkeypatch):
    monkeypatch.setattr(_head_loss, "LEAST", 8)


class Attention(nn.Module):
    def __init__(self, groups, bias):
        super().__init__()
        self.groups = groups
        self.q, self.out = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, groups * (WIDTH // HEADS), bias=bias) for _ in range(2))

    def forward(self, x):
        n, t, width = x.shape
        q = self.q(x).view(n, t, HEADS, -1).transpose(1, 2)
        k = self.k(x).view(n, t, self.groups, -1).transpose(1, 2)
        v = self.v(x).view(n, t, self.groups, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(n, t, width))


class Gated(nn.Module):
    def __init__(self, act, bias, swapped):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 16, bias), nn.Linear(WIDTH, 16, bias), nn.Linear(16, WIDTH)
        self.act, self.swapped = act, swapped

    def forward(self, x):
        return self.down(self.up(x) * self.act(self.gate(x)) if self.swapped else self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, form, norm, attention, mlp):
        super().__init__()
        self.form, self.norm1, self.norm2, self.attention, self.mlp = form, norm(), norm(), attention, mlp

    def forward(self, x):
        if self.form == "parallel":  # GPT-J
            y = self.norm1(x)
            return x + self.attention(y) + self.mlp(y)
        if self.form == "post":
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    def __init__(self, blocks, norm, listed, tied, bias):
        super().__init__()
        self.tokens, self.listed = nn.Embedding(CLASSES, WIDTH), listed
        self.blocks = nn.ModuleList(blocks) if listed else nn.Sequential(*blocks)
        self.norm, self.head = norm(), nn.Linear(WIDTH, CLASSES, bias=bias)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens)
        if self.listed:
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks(x)
        return self.head(self.norm(x))


def made(seed):
    """(model, {what must be said to be fused: how often})"""
    r = random.Random(seed)
    torch.manual_seed(seed)
    norm = functools.partial(r.choice([nn.LayerNorm, nn.RMSNorm]), WIDTH)
    form, is_gated, count = r.choice(["pre", "post", "parallel"]), r.random() < 0.6, r.randint(1, 2)
    act = r.choice([nn.SiLU, nn.GELU, nn.ReLU, functools.partial(nn.GELU, approximate="tanh")])

    def block():
        mlp = nn.Sequential(nn.Linear(WIDTH, 16), act(), nn.Linear(16, WIDTH))
        if is_gated:
            mlp = Gated(act(), r.random() < 0.5, r.random() < 0.5)
        return Block(form, norm, Attention(r.choice([1, 2, 4]), r.random() < 0.5), mlp)

    blocks = [block() for _ in range(count)]
    net = Stack(blocks, norm, r.random() < 0.5, r.random() < 0.5, r.random() < 0.5)
    wanted = {"q | k | v": count, "net → loss": 1}
    wanted |= {"act → mul": count, "gate + up": count} if is_gated else {"0 → 1": count}
    wanted |= {
        "parallel": {"add → next norm": count},
        "pre": {"add → norm2": count, "add → next norm": count},
        "post": {"add → norm1": count, "add → norm2": count},
    }[form]
    return WithLoss(net, NextToken()), wanted


@pytest.mark.parametrize("seeds", [range(0, 30), range(30, 60)], ids=str)
def test_random_stacks(seeds):
    for seed in seeds:
        plain, wanted = made(seed)
        fused, judge = copy.deepcopy(plain), copy.deepcopy(plain).double()
        gt.patch(plain)
        report = gt.patch(fused, fuse=True)
        text = torch.randint(CLASSES, (2, 5), generator=torch.Generator().manual_seed(seed))
        found = []
        for model in (plain, fused, judge):
            loss = model(text[:, :-1], text[:, 1:])
            loss.backward()
            found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()})
        said = [row for rows in report.fused.values() for row in rows]
        rows = collections.Counter({"gate | up": "gate + up", "up | gate": "gate + up"}.get(row, row) for row in said)
        assert rows == wanted, seed
        assert report.unfused.keys() <= {"net"} and all("ModuleList" in why for why in report.unfused.values())
        for key, truth in found[2].items():
            if truth is None:  # a norm that parallel blocks have no use for
                assert found[0][key] is found[1][key] is None
                continue
            off, most = ((f[key].double() - truth).abs().max() for f in (found[1], found[0]))
            assert off <= 4 * most + 2e-5 * max(truth.abs().max(), 1e-3), (seed, key)


def launches(kind, fuse):
    model, batch = kind.made()
    gt.patch(model, fuse=fuse)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch)
        loss.backward()

    with null_driver(compiled=False) as driver:
        step()
        _, noted = driver.noted(step)
    return collections.Counter(launch.kernel for launch in noted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
def test_what_a_step_of_llama_launches():
    """Two blocks: five of seven products are two launches forward, dx, dweight; SiLU and a product of torch's are one kernel;
    queries and keys are turned by one each, where torch had ten; the logits' products are a chunk's."""
    kind = Kind(lambda: llama.Llama(512, 128, 4, 2, 256, 2, 64), tokens(2, 64, 512), NextToken)
    apart, fused = launches(kind, False), launches(kind, True)
    assert apart["_matmul_tma_kernel"] == 3 * (2 * 7 + 1) and "_linears_kernel" not in apart
    assert fused["_matmul_tma_kernel"] == 3 * (2 * 2 + 1) and fused["_linears_kernel"] == 3 * 2 * 2
    assert fused["_gated_forward_kernel"] == fused["_gated_backward_kernel"] == apart["_activation_forward_kernel"] == 2
    assert fused["_linear_cross_entropy_kernel"] == 1 and not any("activation" in k for k in fused)
    assert (apart.total(), fused.total()) == (78, 63 + 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
def test_what_a_step_of_gpt_launches():
    """GELU runs with its product; its gradient is in one pass with the bias', and a second stage. The loss is three launches more,
    which divide chunks of tokens, two gradients and the mean."""
    kind = Kind(lambda: gpt.GPT(512, 128, 2, 2, 64, 0.0), tokens(2, 64, 512), NextToken)
    apart, fused = launches(kind, False), launches(kind, True)
    assert apart["_activation_forward_kernel"] == 2 and not any("activation" in k for k in fused)
    assert fused["_linear_cross_entropy_kernel"] == 1 and "_cross_entropy_forward_kernel" not in fused
    assert (apart.total(), fused.total()) == (60, 63)
