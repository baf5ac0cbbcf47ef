"""gpulayers.torch.patch on models of Hugging Face's transformers, with small random configurations."""

import copy
import inspect

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import torch.nn as nn  # noqa: E402

import gpulayers.torch as gt  # noqa: E402

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
