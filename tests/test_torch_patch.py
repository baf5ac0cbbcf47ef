"""gpulayers.torch.patch: layers of any model replaced in place."""

import contextlib
import copy
import pickle
import warnings
import weakref

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

import gpulayers.torch as gt  # noqa: E402


class LlamaRMSNorm(nn.Module):
    """As in Hugging Face's transformers."""

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class GemmaRMSNorm(nn.Module):
    """x̂ (1 + weight), as in Hugging Face's transformers."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class OtherRMSNorm(GemmaRMSNorm):
    """Another formula under the same kind of name."""

    def forward(self, x):
        return super().forward(x) + x


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Block(nn.Module):
    """Some of everything; ``again`` is ``first`` once more, ``out`` has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = LlamaRMSNorm(8)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.act = nn.Sequential(nn.GELU(), nn.LayerNorm(8), Doubled(8, 8))
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.again(torch.tanh(self.first(self.norm(x))))
        return self.out(self.act(x))


TOKENS = torch.arange(11)[:, None].expand(11, 3)
REPLACED = {"embed", "norm", "first", "act.0", "act.1", "out"}


def block():
    torch.manual_seed(0)
    return Block()


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_every_drop_in_is_found_by_its_name():
    found = gt._patch.drop_ins()
    assert found[nn.Linear] is gt.Linear and found[nn.BatchNorm1d] is gt.BatchNorm1d
    modules = {c for c in vars(gt).values() if isinstance(c, type) and issubclass(c, nn.Module)}
    assert set(found.values()) == modules and all(c.__name__ == t.__name__ for t, c in found.items())


def test_the_same_objects_compute_the_same():
    model = block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, modules = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_modules())
    state, y, had = copy.deepcopy(model.state_dict()), model(TOKENS), classes(model)
    report = gt.patch(model)
    assert set(report.replaced) == REPLACED and not report.bypassed
    assert report.replaced["first"] is type(model.first) is gt.Linear
    assert type(model.embed) is gt.Embedding and type(model.act[2]) is Doubled
    assert isinstance(model.norm, LlamaRMSNorm) and repr(model.norm) == "LlamaRMSNorm((8,), eps=1e-06)"
    assert dict(model.named_modules()) == modules and model.again is model.first
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert model.state_dict().keys() == state.keys()
    same(model(TOKENS), y)
    model(TOKENS).square().mean().backward()
    optimizer.step()  # it moves the parameters that the patched model computes with
    assert not torch.allclose(model(TOKENS), y)
    model.load_state_dict(state)
    same(model(TOKENS), y)
    assert str(gt.patch(model).left["first"]) == "it is gpulayers' already"
    gt.unpatch(model)
    assert classes(model) == had and not any("_gpulayers_patched" in vars(m) for m in model.modules())
    assert torch.equal(model(TOKENS), y)


class Scaled(nn.Embedding):
    __module__ = "transformers.models.scaled"

    def forward(self, x):
        return 2 * super().forward(x)


def test_the_report_names_the_drop_in_that_a_derived_class_calls():
    assert "by its forward over gpulayers.torch.Embedding" in str(gt.patch(nn.Sequential(Scaled(4, 2))))


def test_report():
    report = gt.patch(block())
    assert report.left == {"act.2": "a class derived from torch.nn.Linear"}
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "class", "why"]
    assert "first   Linear        replaced  by gpulayers.torch.Linear" in lines
    assert "norm    LlamaRMSNorm  replaced  by gpulayers.torch's rms_norm" in lines
    assert "act.2   Doubled       left      a class derived from torch.nn.Linear" in lines
    assert repr(report) == "<6 replaced, 1 left, 0 bypassed>"
    linear = nn.Linear(2, 2)
    assert "(the model)  Linear  replaced  by gpulayers.torch.Linear" in str(gt.patch(linear))
    assert type(linear) is gt.Linear
    assert gt.patch(nn.Sequential(nn.CrossMapLRN2d(2))).left == {"0": "gpulayers.torch has no CrossMapLRN2d"}
    with pytest.raises(TypeError, match=r"patch: model: the rule is a torch.nn.Module; got list"):
        gt.patch([linear])


def test_state_dicts_both_ways():
    plain, patched = Block(), block()
    gt.patch(patched)
    plain.load_state_dict(patched.state_dict())
    same(plain(TOKENS), patched(TOKENS))
    with torch.no_grad():
        plain.first.weight.mul_(2)
    patched.load_state_dict(plain.state_dict())
    same(plain(TOKENS), patched(TOKENS))


def test_hooks_stay():
    model, seen = block(), []
    model.first.register_forward_pre_hook(lambda m, xs: seen.append("pre"))
    model.first.register_forward_hook(lambda m, xs, y: y * 0)
    model.first.register_full_backward_hook(lambda m, dxs, dys: seen.append("backward"))
    y = model(TOKENS)
    gt.patch(model)
    same(model(TOKENS), y)
    model(TOKENS).sum().backward()
    assert seen.count("pre") == 6 and seen.count("backward") == 2


def test_copies_and_pickles():
    model = block()
    had = classes(model)
    gt.patch(model)
    y = model(TOKENS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(other) == classes(model) and other.again is other.first
        assert other.out.weight is other.embed.weight is not model.embed.weight
        assert torch.equal(other(TOKENS), y)
        gt.unpatch(other)
        assert classes(other) == had
        same(other(TOKENS), y)
    assert type(model.first) is gt.Linear


def test_functional_call():
    model = block()
    other = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, other, (TOKENS,))
    gt.patch(model)
    same(torch.func.functional_call(model, other, (TOKENS,)), y)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(norm, when):
    """Registered before the patch or after it, and removed from either, the class is what it must be."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), LlamaRMSNorm(6))
    model = copy.deepcopy(plain)
    if when == "after":
        assert set(gt.patch(model).replaced) == {"0", "1"}
    for m in (plain, model):
        torch.manual_seed(1)
        norm(m[0]), m.eval()
    had = type(model[0])
    if when == "before":
        assert set(gt.patch(model).replaced) == {"0", "1"}
    assert type(model[0]).__name__ == "ParametrizedLinear" and isinstance(model[0], gt.Linear)
    assert parametrize.is_parametrized(model[0], "weight")
    x = torch.randn(3, 4)
    same(model(x), plain(x))
    for m in (plain, model):
        m(x).square().sum().backward()
    for name, p in plain.named_parameters():
        same(dict(model.named_parameters())[name].grad, p.grad)
    same(copy.deepcopy(model)(x), plain(x))
    gt.unpatch(model)
    assert not isinstance(model[0], gt.Linear) and type(model[1]) is LlamaRMSNorm
    assert type(model[0]) is had or when == "after"
    same(model(x), plain(x))
    gt.patch(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is gt.Linear
    same(model(x), plain(x))
    gt.unpatch(model)
    assert type(model[0]) is nn.Linear


def test_a_second_parametrization_after_the_patch():
    linear = nn.Linear(3, 3)
    parametrizations.weight_norm(linear)
    gt.patch(linear)

    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    parametrize.register_parametrization(linear, "bias", Half())
    bias = linear.bias.detach().clone()
    gt.unpatch(linear)
    assert torch.equal(linear.bias, bias) and not isinstance(linear, gt.Linear)


def test_hooks_that_make_weights():
    """Pruning and the old weight_norm, which set the weight before each forward."""
    for change in (lambda m: prune.l1_unstructured(m, "weight", 0.5), torch.nn.utils.weight_norm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        with pytest.warns() if change is torch.nn.utils.weight_norm else contextlib.nullcontext():
            change(model[0])
        x = torch.randn(2, 6)
        y = model(x)
        assert set(gt.patch(model).replaced) == {"0", "1"}
        same(model(x), y)
    gt.patch(linear := nn.Linear(4, 4))
    prune.random_unstructured(linear, "weight", 0.5)
    assert int((linear.weight == 0).sum()) == 8
    prune.remove(linear, "weight")
    assert type(linear) is gt.Linear


def test_transformers_run_their_layers():
    """In evaluation too: torch's fused paths are gone. Of an attention itself, the projection is never called."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)
    x = torch.randn(2, 5, 8)
    y = model(x)
    report = gt.patch(model)
    inside = {"self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2"}
    assert set(report.replaced) == {"", "layers.0", *(f"layers.0.{name}" for name in inside)}
    assert report.bypassed.pop("layers.0.self_attn.out_proj").startswith("MultiheadAttention computes with its weights")
    assert not report.bypassed
    assert type(model.layers[0].self_attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    same(model(x), y)
    with torch.no_grad():
        same(model.eval()(x), y)
    attention = nn.MultiheadAttention(4, 2)
    attention.out_proj = nn.Linear(4, 4)
    assert list(gt.patch(attention).replaced) == [""] and type(attention.out_proj) is nn.Linear


def test_what_a_layer_of_another_class_bypasses():
    class Own(nn.TransformerEncoderLayer):
        pass

    report = gt.patch(Own(8, 2, 16, 0.0, batch_first=True))
    assert report.left[""] == "a class derived from torch.nn.TransformerEncoderLayer"
    assert report.bypassed["linear1"].startswith("in evaluation without gradients TransformerEncoderLayer runs torch's")
    assert set(report.replaced) == set(report.bypassed) - {"self_attn.out_proj"}


def test_what_is_left_alone():
    model = nn.Module()
    model.own = nn.Linear(2, 2)
    model.own.forward = lambda x: x
    model.lazy = nn.LazyLinear(3)
    model.scripted = torch.jit.script(nn.Linear(2, 2))
    model.marked = nn.Linear(2, 2)
    model.marked.qconfig = torch.ao.quantization.default_dynamic_qconfig
    model.wrapped = nn.Linear(2, 2)
    model.wrapped.weight = nn.Parameter(Strange(torch.ones(2, 2)))
    model.other, model.gated = OtherRMSNorm(4), GatedRMSNorm(4)
    model.ours = gt.Linear(2, 2)
    had = classes(model)
    report = gt.patch(model)
    assert classes(model) == had and not report.replaced and not report.bypassed
    assert report.left == {
        "own": "its forward is set on the instance",
        "lazy": "it is not initialised: patch it after its first call",
        "scripted": "it is scripted",
        "marked": "it is marked for quantisation (qconfig)",
        "wrapped": "its weight is a Strange",
        "other": "on a random input it computes something else",
        "gated": "its forward takes more than the hidden states",
        "ours": "it is gpulayers' already",
    }
    gt.unpatch(model)
    assert type(model.ours) is gt.Linear  # what was not patched is not unpatched
    model.lazy(torch.ones(1, 2))
    assert set(gt.patch(model).replaced) == {"lazy"}


class Strange(torch.Tensor):
    """A tensor of a kind of its own, as quantised weights are."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms_by_structure(dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(16, eps=0.1)
    nn.init.normal_(norm.weight)
    for of_weight in (torch.float32, dtype):
        norm.to(of_weight)
        x = torch.randn(3, 16).to(dtype).requires_grad_()
        plain = norm(x)
        dx, dw = torch.autograd.grad(plain.sum(), (x, norm.weight))
        gt.patch(norm)
        y = norm(hidden_states=x)
        assert y.dtype is plain.dtype
        # Theirs computes float64 in float32.
        bounds = {"rtol": 1.3e-6, "atol": 1e-5} if dtype is torch.float64 else {"rtol": None, "atol": None}
        torch.testing.assert_close(y, plain, **bounds)
        for mine, theirs in zip(torch.autograd.grad(y.sum(), (x, norm.weight)), (dx, dw)):
            torch.testing.assert_close(mine, theirs, **bounds)
        gt.unpatch(norm)
    gt.patch(norm)
    assert torch.compile(norm, backend="eager", fullgraph=True)(x).dtype is norm(x).dtype


def test_fsdp_classes(tmp_path):
    """A module that fully_shard has given a class of its own, on one process."""
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    y = model(x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        had = classes(model)
        assert set(gt.patch(model).replaced) == {"0", "1", "2", "3"}
        for part in (model[0], model[2]):
            assert isinstance(part, FSDPModule) and isinstance(part, gt.Linear)
        optimizer = gt.optim.AdamW(model.parameters(), lr=0.1)
        same(model(x), y)
        model(x).square().sum().backward()
        version = model[0].weight._version
        optimizer.step()
        assert model[0].weight._version > version and not torch.allclose(model(x), y)
        model[0].unshard(), model[0].reshard()
        gt.unpatch(model)
        assert classes(model) == had
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("axes", [2, 3])
def test_convolutions_are_turned_to_channels_last(axes):
    """On a CPU where that is asked for: the same model, whose activations follow its weights' memory."""
    convs, norm = (nn.Conv2d, nn.ConvTranspose2d) if axes == 2 else (nn.Conv3d, nn.ConvTranspose3d), nn.GroupNorm
    own = nn.Sequential(convs[0](3, 4, 3), norm(2, 4), convs[1](4, 2, 2), nn.ReLU())
    x = torch.randn(2, 3, *[5] * axes, requires_grad=True)
    (truth := own(x)).square().sum().backward()
    grads, x.grad = [x.grad, *(p.grad.clone() for p in own.parameters())], None
    own.zero_grad()
    before = {n: id(p) for n, p in own.named_parameters()}
    assert not gt.patch(copy.deepcopy(own)).turned
    report = gt.patch(own, memory_format=torch.channels_last)
    said = {2: "channels_last", 3: "channels_last_3d"}[axes]
    assert report.turned == {"0": said, "2": said} and f"to {said}" in str(report)
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[axes]
    y = own(x)
    assert own[0].weight.is_contiguous(memory_format=last) and own[0](x).is_contiguous(memory_format=last)
    y.square().sum().backward()
    same(y, truth)
    for got, want in zip([x.grad, *(p.grad for p in own.parameters())], grads):
        same(got, want)
    assert before == {n: id(p) for n, p in own.named_parameters()}
    assert gt.patch(own, memory_format=torch.contiguous_format).turned["0"] == "contiguous_format"
    assert own[0].weight.is_contiguous()
    with pytest.raises(ValueError, match="memory_format"):
        gt.patch(own, memory_format="channels_last")


def test_scripting_sees_torchs_modules():
    model = block()
    del model.act[2]  # super() cannot be scripted
    y = model(TOKENS)
    gt.patch(model)
    scripted = torch.jit.script(copy.deepcopy(model))
    same(scripted(TOKENS), y)
    assert torch.equal(torch.jit.script(gt.ReLU())(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))
    assert type(model.first) is gt.Linear


def test_traced_models():
    """torch.jit.trace checks its graph by a second one."""
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2))
    truth = model.eval()(x)
    gt.patch(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(torch.jit.trace(model, x)(x), truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(torch.jit.trace(model, x)(x), truth)


def test_a_patched_model_is_let_go():
    model = block()
    gt.patch(model)
    model(TOKENS)
    gone = weakref.ref(model.first)
    del model
    assert gone() is None
