"""A model's last linear layer and its loss as one op: where it is found, what it computes, where the layers run alone."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpulayers.bench.models import gpt, llama  # noqa: E402
from gpulayers.bench.models.kind import NextToken, WithLoss  # noqa: E402
from test_torch_fuse import nodes, rows_of  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers.torch import _head_loss  # noqa: E402

FUSED = "linear_cross_entropyBackward"


@pytest.fixture(autouse=True)
def few_classes_will_do(monkeypatch):
    monkeypatch.setattr(_head_loss, "LEAST", 8)


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(12, 6), nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 12, bias=bias)

    def forward(self, tokens):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Own(nn.Module):
    """Layer and loss in one forward."""

    def __init__(self, view):
        super().__init__()
        self.tokens, self.head, self.view = nn.Embedding(12, 6), nn.Linear(6, 12), view
        self.criterion = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 1.5, 12), label_smoothing=0.1)

    def forward(self, tokens, target):
        logits = self.head(self.tokens(tokens))
        if self.view == "shape":
            return self.criterion(logits.view(-1, logits.shape[-1]), target.view(-1))
        if self.view == "size":
            return self.criterion(logits.reshape(-1, logits.size(-1)), target.view(-1))
        if self.view == "number":
            return F.cross_entropy(logits.view(-1, 12), target.flatten(), ignore_index=3, reduction="sum")
        if self.view == "used":
            return self.criterion(logits.flatten(0, 1), target.flatten()) + logits.sum()
        return self.criterion(logits.transpose(1, 2), target)  # a loss of classes that come second


def batch():
    text = torch.randint(12, (3, 6), generator=torch.Generator().manual_seed(0))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


MODELS = {
    "GPT": (lambda: gpt.TINY.made(), "net → loss"),
    "Llama": (lambda: llama.TINY.made(), "net → loss"),
    "layers in a row": (
        lambda: (WithLoss(nn.Sequential(nn.Embedding(12, 6), nn.GELU(), nn.Linear(6, 12)), NextToken()), batch()),
        "net → loss",
    ),
    "its shape": (lambda: (Own("shape"), batch()), "head → getattr → getitem → view → criterion"),
    "its size": (lambda: (Own("size"), batch()), "head → size → reshape → criterion"),
    "a number": (lambda: (Own("number"), batch()), "head → view → cross_entropy"),
    "used elsewhere": (lambda: (Own("used"), batch()), ""),
    "another axis": (lambda: (Own("transposed"), batch()), ""),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_same_without_logits(name):
    make, row = MODELS[name]
    torch.manual_seed(0)
    plain, given = make()
    fused, judge = copy.deepcopy(plain), copy.deepcopy(plain).double()
    gt.patch(plain)
    report, found = gt.patch(fused, fuse=True), []
    assert ("" in report.fused) == bool(row) and (not row or report.fused[""] == (row,))
    assert list(fused.state_dict()) == list(plain.state_dict())
    for model in (plain, fused, judge):
        loss = model(*given)
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()})
        assert (FUSED in nodes(loss)) == (bool(row) and model is fused)
    for key, truth in found[2].items():
        if truth is not None:  # Llama's and GPT's rounding: some ten sums one after the other
            off, most = ((f[key].double() - truth).abs().max() for f in (found[1], found[0]))
            assert off <= 4 * most + 1e-5 * truth.abs().max(), key
    gt.unpatch(fused)
    assert FUSED not in nodes(fused(*given)) and not [k for m in fused.modules() for k in vars(m) if "gpulayers" in k]


def with_loss():
    torch.manual_seed(0)
    model = WithLoss(Net(), NextToken())
    gt.patch(model, fuse=True)
    return model, batch()


def test_copies_pickles_and_evaluation_are_fused_too():
    model, given = with_loss()
    loss = model(*given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*given), loss) and FUSED in nodes(other(*given))
    assert torch.equal(model.eval()(*given), loss) and model.net(given[0]).shape == (3, 5, 12)


def _hook(of):
    def change(model):
        seen = []
        of(model).register_forward_hook(lambda m, x, y: seen.append(y))
        return lambda: seen

    return change


def _grows(model):
    model.net.blocks.append(nn.Linear(6, 6))


def _another_head(model):
    model.net.head = nn.Sequential(nn.Linear(6, 12), nn.Tanh())


def _another_loss(model):
    model.loss.loss = nn.CrossEntropyLoss(reduction="sum")


def _fewer(model):
    _head_loss.LEAST = 13  # the fixture sets it again


def _float16(model):
    model.half()


CHANGES = {
    "hook on the head": _hook(lambda m: m.net.head),
    "hook on the net": _hook(lambda m: m.net),
    "hook on the criterion": _hook(lambda m: m.loss.loss),
    "hook on the loss": _hook(lambda m: m.loss),
    "one block more": _grows,
    "another head": _another_head,
    "another loss": _another_loss,
    "few classes": _fewer,
    "float16": _float16,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_op_must_not_serve_runs_as_the_model_says(name):
    model, given = with_loss()
    assert FUSED in nodes(model(*given))
    seen = CHANGES[name](model)
    plain = copy.deepcopy(model)
    gt.unpatch(plain)
    loss, wanted = model(*given), plain(*given)
    torch.testing.assert_close(loss, wanted)
    assert FUSED not in nodes(loss)
    assert seen is None or len(seen()) == 2  # the copy has the hook, too


def test_autocast_frozen_heads_checkpoints_and_compiled_code():
    model, given = with_loss()
    plain = copy.deepcopy(model)
    gt.unpatch(plain)
    with torch.autocast("cpu", torch.bfloat16):
        loss, wanted = model(*given), plain(*given)
    assert loss.dtype is wanted.dtype is torch.float32
    torch.testing.assert_close(loss, wanted, rtol=2**-7, atol=0)
    for m in (model, plain):
        m.net.head.requires_grad_(False)
        torch.utils.checkpoint.checkpoint(m, *given, use_reentrant=False).backward()
    assert model.net.head.weight.grad is None
    torch.testing.assert_close(model.net.tokens.weight.grad, plain.net.tokens.weight.grad)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), plain(*given))
    assert rows_of(gt.patch(model, fuse=True)) == ["net → loss"]


def test_torch_fx_sees_the_layers():
    model = Own("shape")
    gt.patch(model, fuse=True)
    traced = torch.fx.symbolic_trace(model)
    assert {"head", "criterion"} <= {n.target for n in traced.graph.nodes}
    torch.testing.assert_close(traced(*batch()), model(*batch()))
