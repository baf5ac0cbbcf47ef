"""gpulayers.torch.patch on models of Hugging Face's transformers, with small random configurations."""

import contextlib
import copy
import inspect
import pickle
import sys
import types
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import torch.nn as nn  # noqa: E402
from gpulayers.bench.judging import trace  # noqa: E402
from test_torch_fuse import nodes  # noqa: E402
from transformers import masking_utils, pytorch_utils  # noqa: E402
from transformers.loss import loss_utils  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers.torch import _head_loss  # noqa: E402
from gpulayers.torch._logits import Logits  # noqa: E402
from gpulayers.torch._rebuilt import rebuilt  # noqa: E402
from gpulayers.torch._transformers_attention import forward, mask  # noqa: E402

TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
    max_position_embeddings=64,
)  # fmt: skip
DECODER = TEXT | dict(num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2)
T5 = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
    feed_forward_proj="gated-gelu",
)  # fmt: skip
WHISPER = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
MODELS = {
    "Llama": ("LlamaForCausalLM", DECODER),
    "Qwen2": ("Qwen2ForCausalLM", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", DECODER),
    "Mistral": ("MistralForCausalLM", DECODER | dict(sliding_window=4)),
    "Mixtral": ("MixtralForCausalLM", DECODER | dict(num_local_experts=4)),
    "Gemma2": ("Gemma2ForCausalLM", DECODER | dict(sliding_window=4)),
    "Phi3": ("Phi3ForCausalLM", {k: v for k, v in DECODER.items() if k != "head_dim"}),
    "GPT2": ("GPT2LMHeadModel", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1)),
    "Bert": ("BertForMaskedLM", TEXT),
    "ModernBert": ("ModernBertForMaskedLM", TEXT | dict(local_attention=4, global_attn_every_n_layers=2)),
    "T5": ("T5ForConditionalGeneration", T5),
    "Whisper": ("WhisperForConditionalGeneration", WHISPER),
    "ViT": ("ViTForImageClassification", TEXT | dict(image_size=8, patch_size=4, num_labels=5)),
}
TABLES = "it makes the tables of cosines and sines, once for all layers"
LEFT = {
    "Identity": "it computes nothing",
    "WhisperPositionalEmbedding": "its forward reads its weight by itself, which is an index or a slice",
}
"""{class: the reason} of all that may be left."""


def made(name, **more):
    """A model of random weights, biases and norms too, in evaluation mode: none of its dropouts acts."""
    kind, settings = MODELS[name]
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings | more))
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0, 0.2)
    return model.eval()


def inputs(name):
    """(arguments, where logits count)."""
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (2, 9))
    there = torch.ones(2, 9, dtype=torch.long)
    there[0, 6:] = 0
    labels = ids.masked_fill(there == 0, -100)
    if name == "ViT":
        return dict(pixel_values=torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 3])), ...
    if name == "Whisper":
        return dict(input_features=torch.randn(2, 8, 20), labels=ids[:, :6].contiguous()), ...
    if name == "T5":
        return dict(input_ids=ids, attention_mask=there, labels=ids[:, 2:8].contiguous()), ...
    return dict(input_ids=ids, attention_mask=there, labels=labels), there.bool()


def run(model, given, counts=...):
    """{name: logits, loss and every gradient}, in float64."""
    kind = next(model.parameters()).dtype
    given = {k: x.to(kind) if torch.is_tensor(x) and x.is_floating_point() else x for k, x in given.items()}
    model.zero_grad()
    found = model(**given)
    found.loss.backward()
    gradients = {k: p.grad.double() for k, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits[counts].detach().double(), "loss": found.loss.detach().double()} | gradients


def check(plain, patched, given, counts=...):
    """As near to the plain model in float64 as the plain one in float32 is, up to a factor of 8."""
    exact = copy.deepcopy(plain).double()
    exact.config._experts_implementation = "eager"  # torch's grouped products have no float64
    truth, theirs, ours = (run(m, given, counts) for m in (exact, plain, patched))
    assert truth.keys() == theirs.keys() == ours.keys() and len(truth) > 10
    whole = max(float(x.abs().max()) for k, x in truth.items() if k not in ("logits", "loss"))
    for k, x in truth.items():
        size = x.abs().max() if k in ("logits", "loss") else max(float(x.abs().max()), 1e-3 * whole)
        bound = 8 * max(float((theirs[k] - x).abs().max()), 2 * torch.finfo(torch.float32).eps * float(size))
        assert float((ours[k] - x).abs().max()) <= bound, k


def classes(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_all_gradients_are_the_plain_models(name):
    plain = made(name)
    patched = copy.deepcopy(plain)
    report = gt.patch(patched)
    assert "attention by attn_implementation='gpulayers'" in report.called[""], report
    check(plain, patched, *inputs(name))
    for left, why in report.left.items():
        kind = type(patched.get_submodule(left)).__name__
        assert why == TABLES if kind.endswith("RotaryEmbedding") else why == LEFT.get(kind), (left, kind, why)
    assert plain.state_dict().keys() == patched.state_dict().keys()
    gt.unpatch(patched)
    assert (
        classes(patched) == classes(plain) and patched.config._attn_implementation == plain.config._attn_implementation
    )
    assert not [k for m in patched.modules() for k in vars(m) if k.startswith("_gpulayers")]
    assert inspect.ismethod(patched.forward) and patched.loss_function is plain.loss_function


STREAMS = {
    "Llama": (4, 4), "Qwen3": (4, 4), "Gemma2": (0, 4), "Phi3": (4, 0), "Bert": (4, 2), "GPT2": (4, 0), "ViT": (4, 2),
    "T5": (10, 10), "Whisper": (11, 6),
}  # fmt: skip
"""{model: (sums that run with the norm behind them, calls of several layers)}. Sums are two a block, three a decoder's that looks
at an encoder, Whisper's of its positions; Gemma's norms have weights of their own kind. Phi-3 and GPT-2 have one layer for
queries, keys and values; T5 and Whisper may take queries from elsewhere."""
GATED = {"Llama": 2, "Qwen3": 2, "Gemma2": 2, "Phi3": 2, "T5": 4}


@pytest.mark.parametrize("name", STREAMS)
def test_fused_too(name):
    """In the second step blocks know what follows them."""
    plain = made(name)
    patched = copy.deepcopy(plain)
    fused = gt.patch(patched, fuse=True).fused
    assert sum(" | " in row for rows in fused.values() for row in rows) == STREAMS[name][1]
    given, counts = inputs(name)
    patched(**given)
    check(plain, patched, given, counts)
    functions = nodes(patched(**given).loss)
    assert sum(f.startswith("add_") and "norm" in f for f in functions) == STREAMS[name][0]
    assert functions.count("gatedBackward") == GATED.get(name, 0)
    again = pickle.loads(pickle.dumps(patched))
    assert torch.equal(again(**given).loss, patched(**given).loss)
    gt.unpatch(patched)
    assert classes(patched) == classes(plain)
    assert not [k for m in patched.modules() for k in vars(m) if k.startswith("_gpulayers")]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_packed_sequences(name):
    """Two sequences in a row, by their positions, are what they are alone."""
    plain = made(name)
    patched = copy.deepcopy(plain)
    gt.patch(patched)
    given = {k: x[:1] for k, x in inputs(name)[0].items() if k != "attention_mask"}
    given |= dict(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False)
    check(plain, patched, given)
    with torch.no_grad():
        packed = patched(**given).logits
        alone = torch.cat([patched(part).logits for part in given["input_ids"].split([4, 5], 1)], 1)
    assert torch.allclose(packed, alone, 1e-4, 1e-5)


def test_packed_sequences_by_their_ends():
    """As transformers' collator gives them."""
    torch.manual_seed(0)
    module = nn.Module()
    module.is_causal = True
    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    y, _ = forward(module, q, k, k, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    parts = [forward(module, q[:, :, s], k[:, :, s], k[:, :, s], None)[0] for s in (slice(3), slice(3, 7))]
    assert torch.allclose(y, torch.cat(parts, 1), 1e-5, 1e-5)


def test_masks_are_described_and_not_written_out():
    """What a mask says is what transformers' own says: of one key for all queries, or of none, where it can."""
    there = torch.ones(2, 6, dtype=torch.bool)
    there[0, :2] = False
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    module = nn.Module()
    for made_by, size in (
        (masking_utils.causal_mask_function, None),
        (masking_utils.bidirectional_mask_function, None),
        (masking_utils.sliding_window_causal_mask_function(3), 3),
        (masking_utils.sliding_window_bidirectional_mask_function(2), 2),
        (masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int)), 3),
    ):
        skip = dict(allow_is_bidirectional_skip=True)
        how = dict(mask_function=made_by, local_size=size, attention_mask=there)
        ours = mask(2, 6, 6, **how, **skip)
        theirs = masking_utils.sdpa_mask(2, 6, 6, **how, **skip)
        chunked = size == 3 and ours.dim() == 4
        assert chunked == ("chunked" in str(made_by.__closure__[0].cell_contents) if size else False)
        assert chunked or ours.untyped_storage().nbytes() <= there.numel()
        found, truth = (forward(module, q, k, k, m, output_attentions=True) for m in (ours, theirs))
        seen = theirs.any(-1).transpose(1, 2)[..., None].expand_as(found[0])
        assert torch.allclose(found[0][seen], truth[0][seen], 1e-5, 1e-5)
        assert ((found[1] > 0) == theirs.expand_as(found[1])).all()


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "T5"])
def test_generate_gives_the_plain_models_tokens(name):
    plain = made(name)
    patched = copy.deepcopy(plain)
    gt.patch(patched)
    given = {k: x.flip(1) for k, x in inputs(name)[0].items() if k != "labels"}  # padded on the left
    theirs, ours = (m.generate(**given, max_new_tokens=6, do_sample=False) for m in (plain, patched))
    assert torch.equal(theirs, ours)


def test_trainer_gives_the_plain_models_losses(tmp_path):
    pytest.importorskip("accelerate")
    rows = [
        dict(input_ids=r, labels=r) for r in torch.randint(3, 64, (8, 6), generator=torch.Generator().manual_seed(0))
    ]

    def losses(patches):
        model = made("Llama").train()
        if patches:
            gt.patch(model)
        settings = transformers.TrainingArguments(
            str(tmp_path), max_steps=20, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = transformers.Trainer(model, settings, train_dataset=rows)
        trainer.train()
        return [step["loss"] for step in trainer.state.log_history if "loss" in step]

    theirs, ours = losses(False), losses(True)
    assert len(theirs) == 20 and theirs[-1] < 0.7 * theirs[0]
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), 1e-3, 1e-3)


@pytest.mark.parametrize("fuse", [False, True])
def test_autocast_to_bfloat16(fuse):
    """Fused, by a GPU's rules: the sums of 32 bits give their readers 16."""
    plain = made("Llama")
    patched = copy.deepcopy(plain)
    gt.patch(patched, fuse=fuse)
    given, counts = inputs("Llama")
    truth = run(plain, given, counts)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(plain, given, counts)
        with trace.as_on_a_gpu() if fuse else contextlib.nullcontext():
            patched(**given)
            ours = run(patched, given, counts)
            functions = nodes(patched(**given).loss)
    assert functions.count("add_rms_normBackward") == 4 * fuse
    for k in ("logits", "loss", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        bound = 4 * max(float((theirs[k] - truth[k]).abs().max()), 2**-8 * float(truth[k].abs().max()))
        assert float((ours[k] - truth[k]).abs().max()) <= bound, k


def test_compiled_it_is_one_graph_of_our_ops():
    """With a mask of booleans, and the functions that its forwards have as their own globals."""
    plain = made("Llama", num_hidden_layers=1)
    patched, targets = copy.deepcopy(plain), set()
    gt.patch(patched)

    def seen(graph, _):
        targets.update(str(node.target).split(".")[1] for node in graph.graph.nodes if "gpulayers" in str(node.target))
        return graph.forward

    given, counts = inputs("Llama")
    given["use_cache"] = False
    truth = run(plain, given, counts)
    patched.compile(backend=seen, fullgraph=True)
    ours = run(patched, given, counts)
    ops = {"attention", "rotary", "rms_norm", "embedding", "linear", "silu", "cross_entropy"}
    assert targets == ops and ours.keys() == truth.keys()
    assert all(torch.allclose(ours[k], truth[k], 1e-3, 1e-4) for k in truth)


def test_other_models_of_the_same_configuration_stay():
    config = made("Llama").config
    one, other = (transformers.LlamaForCausalLM(config) for _ in range(2))
    theirs = modeling_llama.apply_rotary_pos_emb
    gt.patch(one)
    assert other.config._attn_implementation == "sdpa" and one.config._attn_implementation == "gpulayers"
    assert modeling_llama.apply_rotary_pos_emb is theirs and type(other.model.norm) is modeling_llama.LlamaRMSNorm
    before = list(one.state_dict())
    assert gt.patch(one).called == {} and list(one.state_dict()) == before  # again: nothing more


def test_copies_and_attention_alone():
    plain = made("Gemma2")
    patched = copy.deepcopy(plain)
    gt.patch(patched)
    again = pickle.loads(pickle.dumps(patched))
    check(plain, again, *inputs("Gemma2"))
    gt.unpatch(again)
    assert classes(again) == classes(plain) and again.config._attn_implementation == "eager"
    gt.register_attention()
    alone = copy.deepcopy(plain)
    alone.set_attn_implementation("gpulayers")
    check(plain, alone, *inputs("Gemma2"))
    given = inputs("Gemma2")[0] | dict(output_attentions=True)
    theirs, ours = (m(**given).attentions for m in (plain, alone))
    assert len(ours) == 2 and all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(ours, theirs))


# --- versions that compute something else under the same names -------------------------------------------------------


def altered(source, old, new):
    """The file of Llama with another line, as a module of transformers."""
    text = inspect.getsource(source)
    assert old in text
    module = types.ModuleType("transformers.models.llama.altered")
    module.__package__ = "transformers.models.llama"
    module.__file__ = source.__file__
    sys.modules[module.__name__] = module
    exec(compile(text.replace(old, new), source.__file__, "exec"), vars(module))
    return module


@pytest.mark.parametrize(
    "old, new, stays",
    [
        ("return self.weight * hidden_states.to(", "return 2 * self.weight * hidden_states.to(", "LlamaRMSNorm"),
        ("(rotate_half(k) * sin)", "(rotate_half(k) * sin) * 0.5", "LlamaAttention"),
        ("x1 = x[..., : x.shape[-1] // 2]\n    x2 = x[..., x.shape[-1] // 2 :]", "x1, x2 = x[..., ::2], x[..., 1::2]",
         "LlamaAttention"),
        ("query_states, key_states = apply_rotary_pos_emb(", "query_states, key_states = turned(", "LlamaAttention"),
        ("class LlamaRMSNorm", "class LlamaNormalised", ""),
    ],
    ids=["norm", "rotary", "pairs", "renamed", "renamed norm"],
)  # fmt: skip
def test_an_altered_class_is_left_alone(old, new, stays):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = altered(modeling_llama, old, new)
        vars(module)["turned"] = lambda q, k, cos, sin: module.apply_rotary_pos_emb(2 * q, k, cos, sin)
        if "LlamaNormalised" in new:
            module.LlamaRMSNorm = module.LlamaNormalised
        torch.manual_seed(0)
        plain = module.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval()
        patched = copy.deepcopy(plain)
        gt.patch(patched)
        for m in patched.modules():
            if stays and type(m).__name__ == stays:
                assert type(m) is getattr(module, stays)
            assert type(m) is not getattr(module, "LlamaNormalised", None)
        check(plain, patched, *inputs("Llama"))
    finally:
        del sys.modules["transformers.models.llama.altered"]


def test_another_interface_of_masks_leaves_attention_alone(monkeypatch):
    """As in versions before q_length."""
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position, kv_length, **more: None)
    model = made("Llama")
    why = gt.patch(model).called[""]
    assert "attention stays: this version of transformers has no interface for it" in why and "cache_position" in why
    assert model.config._attn_implementation == "sdpa"


def test_clips_gelu():
    plain = made("GPT2", activation_function="quick_gelu")
    patched = copy.deepcopy(plain)
    gt.patch(patched)
    assert {b.mlp.act._activation for b in patched.transformer.h} == {"quick_gelu"}
    check(plain, patched, *inputs("GPT2"))


def test_altered_activations_losses_and_products_are_left_alone():
    def cross_entropy(source, target, num_items_in_batch=None, ignore_index=-100, **kwargs):
        return 2 * nn.functional.cross_entropy(source, target, ignore_index=ignore_index)

    loss = rebuilt(loss_utils.ForCausalLMLoss, {"fixed_cross_entropy": cross_entropy})
    model = made("GPT2")
    model.loss_function = loss
    act = type("GELUTanh", (nn.Module,), {"forward": lambda self, x: x * torch.sigmoid(1.7 * x)})
    act.__module__ = "transformers.activations"
    product = type("Conv1D", (pytorch_utils.Conv1D,), {"forward": lambda self, x: 2 * x @ self.weight + self.bias})
    for block in model.transformer.h:
        block.mlp.act, block.mlp.c_fc.__class__ = act(), product
    plain = copy.deepcopy(model)
    report = gt.patch(model)
    assert model.loss_function is loss and type(model.transformer.h[0].mlp.act) is act
    assert report.left["transformer.h.0.mlp.c_fc"] == "on a random input it computes something else"
    check(plain, model, *inputs("GPT2"))


@pytest.fixture
def few_classes_will_do(monkeypatch):
    monkeypatch.setattr(_head_loss, "LEAST", 8)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "Bert"])
def test_logits_that_only_the_loss_reads(name, few_classes_will_do):
    """They are left out in training, and are there for whoever asks; Gemma's are capped, and BERT's loss is its own."""
    plain = made(name).train()
    for m in plain.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    patched = copy.deepcopy(plain)
    report = gt.patch(patched, logits=False)
    assert "no logits in training" in report.called[""]
    given, _ = inputs(name)
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    theirs, ours = plain(**given), patched(**given)
    functions = nodes(ours.loss)
    left_out = name in ("Llama", "GPT2")
    assert (functions.count("linear_cross_entropyBackward") == 1) == left_out
    assert isinstance(ours.logits, Logits) == (name != "Gemma2")
    for loss in (theirs.loss, ours.loss):
        loss.backward()
    torch.testing.assert_close(ours.loss, theirs.loss)
    for a, b in zip(patched.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.logits + 0, theirs.logits)
    assert torch.is_tensor(patched.eval()(**given).logits)
    again = pickle.loads(pickle.dumps(patched.train()))
    torch.testing.assert_close(again(**given).loss, theirs.loss)
    gt.unpatch(patched)
    assert classes(patched) == classes(plain)


def test_logits_after_all(few_classes_will_do):
    """By operators, methods and torch's functions, with their gradients; not once the weight is another."""
    plain = made("Llama").train()
    patched = copy.deepcopy(plain)
    gt.patch(patched, logits=False)
    given, _ = inputs("Llama")
    given["num_items_in_batch"] = torch.tensor(5)
    calls = (
        lambda y: nn.functional.cross_entropy(y.view(-1, 64), given["labels"].flatten().clamp(0)),
        lambda y: (2 * y[:, 1:]).softmax(-1).square().sum(),
        lambda y: torch.cat([y, y]).mean() + len(y) + y.shape[1] + y.argmax(-1).sum(),
    )
    for call in calls:
        found = []
        for model in (plain, patched):
            model.zero_grad()
            y = model(**given)
            loss = call(y.logits) + y.loss
            loss.backward()
            found.append([loss.detach(), model.lm_head.weight.grad, model.model.embed_tokens.weight.grad])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y, its = patched(**given), plain(**given)
    assert y.loss.dtype is torch.float32 and y.logits.dtype is (y.logits * 1).dtype is torch.bfloat16
    torch.testing.assert_close(y.loss, its.loss, rtol=2e-2, atol=2e-2)
    y = patched(**given)
    with torch.no_grad():
        patched.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="read before the weight changes"):
        y.logits.sum()
