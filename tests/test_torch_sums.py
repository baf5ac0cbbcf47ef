"""A residual stream in models patched with ``fuse=True``: sums and the norms that follow them, within a block and from one to
the next, under autocast as on a GPU. No GPU is asked."""

import collections
import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import torch.nn as nn  # noqa: E402
from gpulayers.bench.judging import trace  # noqa: E402
from gpulayers.bench.models import gpt  # noqa: E402
from gpulayers.bench.models.attention import Attention, Block  # noqa: E402
from test_torch_fuse import nodes  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers.torch import _head_loss, _reading, _sums  # noqa: E402

WIDTH = 16


@pytest.fixture(autouse=True)
def as_on_a_gpu():
    ops = [op for op in vars(gt.norm).values() if type(op).__name__ == "TorchOp"]
    with trace.as_on_a_gpu():
        for op in ops:  # calls that were like the latest one by other rules
            op._known.clear()
            op._latest.clear()
        yield
    for op in ops:
        op._known.clear()
        op._latest.clear()


class Stack(nn.Module):
    """Blocks of a transformer, one after the other by Python, and a norm and a layer at the end."""

    def __init__(self, norm=nn.LayerNorm, count=2, way=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, 2, True) for _ in range(count))
        for block in self.blocks:
            block.norm1, block.norm2 = norm(WIDTH), norm(WIDTH)
        self.norm, self.head, self.way = norm(WIDTH), nn.Linear(WIDTH, 5), way

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.way is None else self.way(block, x)
        return self.end(x)

    def end(self, x):
        return self.head(self.norm(x))


def ran(model, x, half=True):
    """(y, gradients, {function: how often it is in y's graph}) of the second step: blocks know what follows."""
    for _ in range(2):
        x = x.detach().clone().requires_grad_()
        for p in model.parameters():
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = model(x)
        functions = collections.Counter(nodes(y))
        y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())], functions


def held(ours, theirs, truth):
    """No further from the float64 model than four times the plain one under autocast."""
    for mine, its, true in zip(ours, theirs, truth, strict=True):
        assert mine.dtype is its.dtype
        off, most = ((t.double() - true).abs().max() for t in (mine, its))
        assert off <= 4 * most + 1e-5 * true.abs().max()


def three(model, x, half=True):
    """The steps of a model fused, patched alone, and in float64."""
    plain, judge = copy.deepcopy(model), copy.deepcopy(model).double()
    gt.patch(plain)
    report = gt.patch(model, fuse=True)
    return ran(model, x, half), ran(plain, x, half), ran(judge, x.double(), False), report


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("half", [True, False], ids=["autocast", "float32"])
def test_the_stream(norm, half):
    """All sums but the last run with the norm that takes them: those of 32 bits beside 16 too, with no cast around."""
    torch.manual_seed(0)
    (ours, functions), (theirs, before), (truth, _), report = three(Stack(norm), torch.randn(2, 3, WIDTH), half)
    held(ours, theirs, truth)
    name = f"add_{'layer' if norm is nn.LayerNorm else 'rms'}_normBackward"
    assert functions[name] == 3 and functions["AddBackward0"] == before["AddBackward0"] - 3
    assert before["AddBackward0"] == 4  # the end's norm is called where torch.fx does not trace
    assert functions["ToCopyBackward0"] <= before["ToCopyBackward0"] - 3 * half
    assert report.fused["blocks.0"] == ("add → norm2", "add → next norm")
    assert {"blocks.0.norm1", "blocks.0.norm2"} <= report.lowered.keys()


def test_in_a_row_and_to_the_end():
    torch.manual_seed(0)
    model = nn.Sequential(*Stack().blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))
    before = [*model.state_dict()]
    (ours, functions), (theirs, _), (truth, _), _ = three(model, torch.randn(2, 3, WIDTH))
    held(ours, theirs, truth)
    assert functions["add_layer_normBackward"] == 4 and "AddBackward0" not in functions
    assert [*model.state_dict()] == before
    again = copy.deepcopy(model)
    x = torch.randn(2, 3, WIDTH)
    assert all(torch.equal(*pair) for pair in zip(ran(again, x)[0], ran(model, x)[0]))
    gt.unpatch(model)
    assert not any(type(m).__module__.startswith("gpulayers.torch") for m in model.modules())
    assert "add_layer_normBackward" not in ran(model, x)[1]


def by_checkpoint(reentrant):
    return lambda block, x: checkpoint(block, x, use_reentrant=reentrant)


def written(block, x):
    x = block(x)
    with torch.no_grad():
        x.mul_(1.5)
    return x


WAYS = {
    "checkpoint": by_checkpoint(False),
    "reentrant": by_checkpoint(True),
    "written to": written,
    "another tensor": lambda block, x: block(x).clone(),
    "without gradients": lambda block, x: block(x.detach()).detach(),
}


@pytest.mark.parametrize("way", WAYS)
def test_where_the_norm_computes_for_itself(way):
    torch.manual_seed(0)
    (ours, _), (theirs, _), (truth, _), _ = three(Stack(way=WAYS[way]), torch.randn(2, 3, WIDTH))
    given = [t for t in zip(ours, theirs, truth) if t[0] is not None]
    assert len(given) == len(ours) or way == "without gradients"
    held(*zip(*given))


def test_hooks_weights_and_other_norms():
    torch.manual_seed(0)
    model, x, seen = Stack(), torch.randn(2, 3, WIDTH), []
    plain = copy.deepcopy(model)
    gt.patch(model, fuse=True)
    ran(model, x)
    first, second = model.blocks
    assert _sums._next[first][0][0] is second.norm1
    hook = second.norm1.register_forward_hook(lambda m, xs, y: seen.append(y.dtype))
    assert ran(model, x)[1]["add_layer_normBackward"] == 2 and seen == [torch.float32] * 2
    hook.remove()
    total = first(x.requires_grad_())
    assert total.__dict__
    for norm in (second.norm1, plain.blocks[1].norm1):
        with torch.no_grad():
            norm.weight.mul_(2)  # behind the sum's back
    with torch.no_grad():
        wanted = plain.blocks[1](total)
    torch.testing.assert_close(second(total), wanted, rtol=1e-5, atol=1e-5)
    model.blocks = nn.ModuleList([first, first])  # its sum goes to its own norm, and to the end's
    ran(model, x)
    second(first(x))
    assert _sums._next[first] == {0: None}


def test_what_a_step_runs(monkeypatch):
    """Of a GPT: one norm stands alone; the sums left are of positions, and of gradients that meet."""
    monkeypatch.setattr(_head_loss, "LEAST", 8)
    ran = collections.Counter((r.name, r.is_ours) for r in trace.traced(gpt.TINY))
    assert (ran["layer_norm", True], ran["add_layer_norm", True]) == (1, 4)
    assert ran["add", False] == 3
    assert ran["_to_copy", False] <= 2 * (2 * 8 + 1) + 2  # weights, biases, the head's, and their gradients


class Elsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class Scaled(Elsewhere):
    def forward(self, x):
        return self.a(x) * x


class Within(Elsewhere):
    def forward(self, x):
        n = x.shape[0]
        y = [layer for layer in (self.a(x), self.b(x))]
        x = y[0] + y[1]
        return x * n


class Perhaps(Elsewhere):
    def forward(self, x):
        if x.shape[0] > 1:
            x = self.a(x)
        return x


def test_who_reads():
    for module, wanted in {
        Attention(WIDTH, 2, True): ["qkv"],
        Within(): ["a", "b"],
        Scaled(): None,
        Perhaps(): None,
        nn.Sequential(Within(), nn.ReLU()): ["0", "0.a", "0.b"],
        nn.Sequential(nn.ReLU(), nn.Linear(2, 2)): None,
    }.items():
        gt.patch(module)
        assert _reading.readers_within(module) == wanted, module


@pytest.mark.parametrize("first", [True, False], ids=["norm first", "norm last"])
def test_torchs_own_transformer_layers(first):
    """An encoder's two sums and a decoder's three; that at the end of a layer with the next one's norm."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = dict(d_model=WIDTH, nhead=2, dim_feedforward=24, dropout=0.0, batch_first=True, norm_first=first)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 2, enable_nested_tensor=False)
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 2)

        def forward(self, x):
            causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=torch.bool)
            return self.decoder(x, self.encoder(x), causal, tgt_is_causal=True)

    torch.manual_seed(0)
    model, x = Both(), torch.randn(2, 3, WIDTH)
    plain, judge = copy.deepcopy(model), copy.deepcopy(model).double()
    gt.patch(model)
    (ours, functions), (theirs, _), (truth, _) = ran(model, x), ran(plain, x), ran(judge, x.double(), False)
    held(ours, theirs, truth)
    assert functions["add_layer_normBackward"] == (2 + 1 + 4 + 1 if first else 4 + 6)
