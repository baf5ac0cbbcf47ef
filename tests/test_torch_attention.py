"""Attention in torch: scaled_dot_product_attention, MultiheadAttention and the Transformer against torch's own."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpulayers.torch as gt

try:
    from torch.testing._internal.common_modules import module_db
except ImportError:  # torch's own samples need expecttest, which a rented machine may lack
    module_db = []

same = torch.testing.assert_close
attend, attention = gt.functional.scaled_dot_product_attention, gt.functional.attention
DOUBLE = torch.float64


def draw(*shape, dtype=DOUBLE, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype).requires_grad_()


def alike(ours, theirs, *inputs, dtype=DOUBLE):
    """Outputs and all gradients, from the same gradients of the outputs."""
    found = []
    for call in (ours, theirs):
        outputs = call()
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
        dys = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) for y in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, dys, allow_unused=True)])
    for mine, true in zip(*found, strict=True):
        same(mine, true)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.tensor([[True, False, True], [False, False, False]]).repeat(1, 2)},
    "float": {"attn_mask": draw(2, 1, 2, 6)},
    "scale": {"scale": 0.3},
    "groups": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_it_is_torchs(name, dims):
    options = MASKS[name] if (name, dims) != ("groups", 2) else {}
    groups = 2 if "enable_gqa" in options and dims > 2 else 4
    q, k, v = (
        draw(2, h, n, d)[(0,) * (4 - dims)].detach().requires_grad_()
        for h, n, d in ((4, 2, 3), (groups, 6, 3), (groups, 6, 5))
    )
    mask = options.get("attn_mask")
    if mask is not None and mask.dim() > dims:
        options = options | {"attn_mask": mask[(0,) * (mask.dim() - dims)]}
    inputs = [q, k, v] + ([mask] if mask is not None and mask.requires_grad and mask.dim() <= dims else [])
    alike(lambda: attend(q, k, v, **options), lambda: F.scaled_dot_product_attention(q, k, v, **options), *inputs)


def test_what_torch_refuses():
    """Its errors are torch's; what the op does not serve, torch computes: keys of one head that all share."""
    q = draw(1, 2, 3, 4)
    for args in ((q, q.float(), q), (q, q[..., :3], q), (q, q, q, torch.zeros(3, 4, dtype=DOUBLE))):
        for function in (F.scaled_dot_product_attention, attend):
            with pytest.raises(RuntimeError):
                function(*args)
    same(attend(q, q[:, :1], q[:, :1]), F.scaled_dot_product_attention(q, q[:, :1], q[:, :1]))


def test_dropout():
    """The same mask backward, another one the next time, and none for p = 0."""
    q, k, v = draw(1, 2, 40, 8), draw(1, 2, 50, 8), torch.ones(1, 2, 50, 1, dtype=DOUBLE, requires_grad=True)
    y = attend(q, k, v, dropout_p=0.5)
    (dv,) = torch.autograd.grad(y, v, torch.ones_like(y))
    same(dv.sum(), y.sum())  # both sum the weights that were kept
    assert not torch.equal(y, attend(q, k, v, dropout_p=0.5)) and abs(float(y.detach().mean()) - 1) < 0.1
    same(attend(q, k, v, dropout_p=0.0), torch.ones_like(y))


def test_lse_and_gradients_of_gradients():
    q, k, v = draw(1, 2, 3, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 2)
    y, lse = attention(q, k, v, softcap=2.0, window=(2, -1), corner="bottom_right", return_lse=True)
    scores = 2 * torch.tanh(q @ k.transpose(2, 3) / 4)
    seen = torch.arange(5) - torch.arange(3)[:, None] >= 0
    scores = scores.masked_fill(~seen, -math.inf)
    same(lse, scores.logsumexp(3))
    same(y, scores.softmax(3) @ v)

    def both(*given):
        return attention(*given, softcap=2.0, window=(2, -1), corner="bottom_right", return_lse=True)

    assert torch.autograd.gradcheck(both, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(both, (q, k, v), fast_mode=True)
    seed = torch.get_rng_state()

    def dropped(*given):
        torch.set_rng_state(seed)
        return attention(*given, dropout_p=0.4)

    assert torch.autograd.gradgradcheck(dropped, (q, k, v), fast_mode=True)


def test_custom_op_and_compilers():
    q, k, v = draw(1, 2, 3, 4), draw(1, 1, 5, 4), draw(1, 1, 5, 2)
    op = torch.ops.gpulayers.attention.default
    sinks, cu = draw(2), torch.tensor([0, 1, 3])
    args = (q, k, v, None, sinks, torch.tensor([1, 2]), cu, torch.tensor([0, 2, 5]))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (*args, True, (-1, -1), "top_left", None, 0.0, 0.3, True), test_utils=checks)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, k, v = draw(1, 2, 3, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 2)
    alike(lambda: compiled(q, k, v, is_causal=True), lambda: attend(q, k, v, is_causal=True), q, k, v)
    same(torch.func.vmap(attend)(*(x[None] for x in (q, k, v)))[0], attend(q, k, v))


def test_autocast():
    q = draw(1, 2, 3, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(q, q, q)
        assert y.dtype == F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), q)[0].dtype == torch.float32


# --- MultiheadAttention and the Transformer --------------------------------------------------------------------------

ARGUMENTS = [dict(zip(("batch_first", "bias", "add_bias_kv", "add_zero_attn", "kdim"), v)) for v in [
    (True, True, False, False, None), (False, True, False, False, None), (True, False, True, False, 6),
    (False, True, True, True, 6), (True, True, False, True, None),
]]  # fmt: skip
HOW = itertools.cycle(
    [
        ("self", None),
        ("pair", "bool"),
        ("all", "float"),
        ("self", "heads"),
        ("pair", None),
        ("all", "bool"),
        ("self", "float"),
    ]
)


def given(kwargs, cross, mask, padding, batched):
    """(query, key, value, masks), key padding last."""
    n, rows, keys = 3, 4, 4 if cross == "self" else 5
    width = kwargs["kdim"] or 8
    shapes = [(n, length, size) for length, size in ((rows, 8), (keys, width), (keys, width))]
    if not batched:
        shapes = [s[1:] for s in shapes]
    elif not kwargs["batch_first"]:
        shapes = [(s[1], s[0], s[2]) for s in shapes]
    q, k, v = (draw(*s, seed=i) for i, s in enumerate(shapes))
    if cross == "self" and kwargs["kdim"] is None:
        k = v = q
    elif cross == "pair":
        v = k
    masks = {
        "bool": draw(rows, keys).detach() > 0.5,
        "float": draw(rows, keys).detach(),
        "heads": draw(2 * n, rows, keys).detach(),
    }
    found = masks.get(mask)
    if mask == "bool":
        found[:, 0] = False
    hidden = None
    if padding:
        hidden = torch.zeros(*([n] if batched else []), keys, dtype=torch.bool)
        hidden[..., -1] = True
        if mask in ("float", "heads"):
            hidden = torch.zeros(hidden.shape, dtype=DOUBLE).masked_fill(hidden, -math.inf)
    return (q, k, v), dict(attn_mask=found, key_padding_mask=hidden)


@pytest.mark.parametrize("kwargs", ARGUMENTS, ids=lambda k: "-".join(map(str, k.values())))
def test_multihead(kwargs):
    theirs, ours = (
        m.MultiheadAttention(8, 2, dropout=0.2, vdim=kwargs["kdim"], dtype=DOUBLE, **kwargs) for m in (nn, gt)
    )
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for (weights, average), padding, batched in itertools.product(
        ((False, True), (True, True), (True, False)), (False, True), (True, False)
    ):
        cross, mask = next(HOW)
        if mask == "heads" and not batched:
            mask = "float"
        inputs, masks = given(kwargs, cross, mask, padding, batched)
        leaves = [*{id(x): x for x in inputs}.values()]
        call = dict(masks, need_weights=weights, average_attn_weights=average)
        for training in (False, True):
            theirs.train(training).dropout, ours.train(training).dropout = 0.0, 0.0
            found = []
            for m in (ours, theirs):
                own = [p for _, p in sorted(m.named_parameters())]
                y = [t for t in m(*inputs, **call) if t is not None]
                dys = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in y]
                found.append([*y, *torch.autograd.grad(y, [*leaves, *own], dys, allow_unused=True)])
            for mine, true in zip(*found, strict=True):
                same(mine, true)
        with torch.no_grad():
            same(ours.eval()(*inputs, **call), theirs.eval()(*inputs, **call))


def test_multihead_runs_its_kernels(monkeypatch):
    """Not torch's fused path, in evaluation; a causal hint is a causal call; wrong calls are torch's errors."""
    from gpulayers.torch import _multihead

    calls, attend = [], _multihead.attention
    monkeypatch.setattr(
        _multihead, "attention", lambda *args, **kwargs: calls.append(kwargs) or attend(*args, **kwargs)
    )
    m, x = gt.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 3, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    with torch.no_grad():
        same(
            m(x, x, x, attn_mask=mask, is_causal=True, need_weights=False),
            m(x, x, x, attn_mask=mask, need_weights=False),
        )
    assert [c["causal"] for c in calls] == [True, False]
    with pytest.raises(AssertionError, match="was expecting embedding dimension"):
        m(x[..., :6], x, x)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        m(x, x, x, is_causal=True)


LAYERS = [dict(zip(("batch_first", "norm_first", "activation", "bias"), v)) for v in [
    (True, False, "relu", True), (False, True, "gelu", True), (True, True, "tanh", False),
]]  # fmt: skip


@pytest.mark.parametrize("kwargs", LAYERS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_layers(name, kwargs):
    if kwargs["activation"] == "tanh":
        kwargs = kwargs | {"activation": torch.tanh}
    theirs, ours = (getattr(m, name)(8, 2, 16, dropout=0.0, dtype=DOUBLE, **kwargs) for m in (nn, gt))
    ours.load_state_dict(theirs.state_dict())
    assert all(type(m).__module__.startswith("gpulayers.") for m in ours.children())
    inputs = [draw(3, 4, 8, seed=i) for i in range(1 + ("Decoder" in name))]
    for training in (True, False):
        ours.train(training), theirs.train(training)
        alike(lambda: ours(*inputs), lambda: theirs(*inputs), *inputs)
        with torch.no_grad():
            same(ours(*inputs), theirs(*inputs))
    report = gt.patch(theirs)
    assert (
        type(theirs) is type(ours)
        and not report.left
        and set(report.bypassed) <= {"self_attn.out_proj", "multihead_attn.out_proj"}
    )
    same(theirs(*inputs), ours(*inputs))


def test_transformer():
    """Its state_dict both ways, masks, and patched: what torch's own gives."""
    theirs, ours = (m.Transformer(8, 2, 1, 2, 16, dropout=0.0, dtype=DOUBLE) for m in (nn, gt))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    src, tgt = draw(5, 3, 8), draw(4, 3, 8, seed=1)
    hidden = torch.tensor([[False] * 4 + [True]]).expand(3, 5)
    masks = dict(tgt_mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=DOUBLE), tgt_is_causal=True)
    masks |= dict(src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        alike(lambda: ours(src, tgt, **masks), lambda: theirs(src, tgt, **masks), src, tgt)
    kinds = {type(m) for m in ours.modules()}
    gt.patch(theirs)
    assert {type(m) for m in theirs.modules()} == kinds
    same(theirs(src, tgt, **masks), ours(src, tgt, **masks))
    gt.unpatch(theirs)
    assert {type(m).__module__.split(".")[0] for m in theirs.modules()} == {"torch"}


def test_encoder_in_evaluation():
    """torch's fused path gives zeros at padding; all else is the same."""
    theirs, ours = (
        m.TransformerEncoder(
            m.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=DOUBLE),
            2,
            m.LayerNorm(8, dtype=DOUBLE),
        ).eval()
        for m in (nn, gt)
    )
    ours.load_state_dict(theirs.state_dict())
    x, hidden = draw(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        same(ours(x, src_key_padding_mask=hidden)[~hidden], theirs(x, src_key_padding_mask=hidden)[~hidden])
        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=DOUBLE)
        same(ours(x, mask=mask, is_causal=True), theirs(x, mask=mask, is_causal=True))


OWN = [m for m in module_db if "Transformer" in m.name or m.name == "nn.MultiheadAttention"]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("info", OWN, ids=lambda m: m.module_cls.__name__)
def test_torchs_own_samples(info):
    """A third of the masks, layouts and orders of norms that torch tries; without dropout, whose masks are other ones."""
    name, tried = info.module_cls.__name__, 0
    for training in (True, False):
        samples = info.module_inputs_func(info, "cpu", DOUBLE, requires_grad=True, training=training)
        for sample in itertools.islice(samples, 0, None, 5 if name == "Transformer" else 3):
            made, given = sample.constructor_input, sample.forward_input
            torch.manual_seed(0)
            theirs = nn_module(nn, name, made).train(training)
            ours = nn_module(gt, name, made).train(training)
            ours.load_state_dict(theirs.state_dict())
            inputs = [t for t in given.args if isinstance(t, torch.Tensor) and t.requires_grad]
            alike(lambda: ours(*given.args, **given.kwargs), lambda: theirs(*given.args, **given.kwargs), *inputs)  # noqa: B023
            tried += 1
    assert tried > 20


def nn_module(where, name, made):
    """TransformerEncoder takes a layer: of the same home."""
    args = list(made.args)
    if name == "TransformerEncoder":
        args[0] = copy.deepcopy(args[0])
        if where is gt:
            gt.patch(args[0])
    module = getattr(where, name)(*args, **made.kwargs).double()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return module
