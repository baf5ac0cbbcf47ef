import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpulayers.bench.judging import predicted_loss
from gpulayers.bench.judging.predicted import PRODUCTS
from gpulayers.kernels.triton import _configs, _linear_cross_entropy, _tile
from halves import check_op

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import arrays, dispatch, transfer
from gpulayers.arrays import Spec, bfloat16
from gpulayers.definition import ArgumentError, LabelError, ShapeError, UnsupportedTypeError
from gpulayers.ops.linear import linear
from gpulayers.ops.loss import cross_entropy, linear_cross_entropy
from gpulayers.testing.arena import arena
from gpulayers.torch._linear_cross_entropy import _Loss, _twin


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


LABELS = np.array([[1, 0, -100], [4, 2, 4]])
CALLS = {
    "mean": ([draw(2, 3, 4), draw(5, 4), LABELS], {}),
    "sum": ([draw(2, 3, 4)[..., ::-1], draw(4, 5).T, LABELS, draw(5)], {"reduction": "sum", "label_smoothing": 0.2}),
    "each": (
        [draw(2, 3, 4), draw(5, 4), LABELS.T.copy().T, draw(5), abs(draw(5))],
        {"reduction": "none", "z_loss": 0.1},
    ),
    "capped": (
        [draw(6, 4), 2 * draw(5, 4), LABELS.reshape(-1).astype("int32"), None, abs(draw(5))],
        {"softcap": 1.5, "z_loss": 0.01, "label_smoothing": 0.1},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_backend(name):
    inputs, options = CALLS[name]
    served = check_op(linear_cross_entropy, *inputs, numeric=True, dys=["dense"], **options)
    assert served == ["definition", "numpy", "triton"]


EXTRAS = {"z_loss": 0.1, "softcap": 1.5, "label_smoothing": 0.2, "weighted": True, "ignore_index": 2}


def case_of(chosen: tuple, reduction: str, dtype: torch.dtype) -> tuple:
    """(inputs, options, torch's loss and its gradients in float64) with the options that are chosen."""
    options = {"reduction": reduction} | {name: EXTRAS[name] for name in chosen if name != "weighted"}
    x, w, b, cw = (torch.from_numpy(draw(*s)).to(dtype) for s in ((4, 3), (5, 3), (5,), (5,)))
    cw, target = cw.abs() if "weighted" in chosen else None, torch.tensor([0, 2, 4, 2])
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    full = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "", "z_loss": 0.0, "softcap": 0.0} | options
    y = _twin(*leaves[:2], target, leaves[2], None if cw is None else cw.double(), *full.values(), False)
    given = [x, w, target, b, cw]
    return given, options, [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]


@pytest.mark.parametrize("backend", ["definition", "numpy", "triton"])
def test_every_combination_of_options(backend):
    """All options on and off, in float32 and bfloat16, against torch's own in float64."""
    for number, chosen in enumerate(c for n in range(6) for c in itertools.combinations(EXTRAS, n)):
        dtype = torch.bfloat16 if number % 2 else torch.float32
        for reduction in ("mean", "sum", "none") if backend != "triton" else (("mean", "none", "sum")[number % 3],):
            given, options, true = case_of(chosen, reduction, dtype)
            with arena(backend) as room:
                lent = [None if t is None else room.put(transfer.to_numpy(t)) for t in given]
                y, call = linear_cross_entropy.record(*lent, **options)
                found = [y, *call.backward(room.put(np.ones(y.shape, transfer.to_numpy(given[0]).dtype)))]
            got = [torch.from_numpy(room.get(t).astype("float64")) for t in found if t is not None]
            for mine, wanted in zip(got, true, strict=True):
                error, scale = (mine - wanted).abs().max(), wanted.abs().max()
                assert error <= 3 * torch.finfo(dtype).eps * max(scale, 1), (chosen, reduction, error, scale)


@pytest.mark.parametrize("backend", ["definition", "numpy", "triton"])
def test_no_tokens_and_all_ignored(backend):
    """A mean over nothing is NaN, as torch's, and its gradients are 0; a sum is 0."""
    x, w = draw(3, 4).astype("float32"), draw(5, 4).astype("float32")
    for labels in (np.full(3, -100), np.zeros(0, int)):
        for reduction in ("mean", "sum", "none"):
            with arena(backend) as room:
                given = [room.put(a) for a in (x[: len(labels)], w, labels)]
                try:
                    y, call = linear_cross_entropy.record(*given, reduction=reduction)
                except dispatch.Refused:
                    assert backend != "definition" and not len(labels)
                    continue
                grads = [room.get(g) for g in call.backward(room.put(np.ones(y.shape, "float32"))) if g is not None]
            y = room.get(y)
            assert np.isnan(y) if reduction == "mean" else not y.any()
            assert [g.shape for g in grads] == [(len(labels), 4), (5, 4)] and not any(g.any() for g in grads)


def test_several_chunks(monkeypatch):
    """dweight is added to from chunk to chunk; the last one is not whole. Rows of classes in several blocks."""
    monkeypatch.setattr(_linear_cross_entropy, "LEAST_TOKENS", 4)
    monkeypatch.setattr(_linear_cross_entropy, "MOST_CHUNKS", 4)
    assert _linear_cross_entropy.tokens_at_once(8) == 64
    monkeypatch.setattr(_linear_cross_entropy, "tokens_at_once", lambda n: 4)
    labels = np.random.default_rng(0).integers(0, 37, 10)
    labels[3] = -100
    with _configs.forced("linear_cross_entropy", _configs.Row(None, 32, 4)):
        for dtype, how in (("float32", {"reduction": "none"}), ("bfloat16", {}), ("float16", {"reduction": "sum"})):
            given = draw(10, 8), draw(37, 8), labels, draw(37), abs(draw(37))
            check_op(linear_cross_entropy, *given, backends=["triton"], dtypes=[dtype], dys=["dense"], **how)


def test_memory(monkeypatch):
    """At 8K tokens and a vocabulary of 128K: at most a tenth of what a linear layer and its cross entropy take."""

    def taken(op, specs, needs, **options):
        """Bytes that forward and backward of a call allocate, gradients of its inputs left out."""
        sizes, kinds = [], {"bfloat16": 2, "float32": 4, "int64": 8}

        def empty(shape, dtype, order=None):
            found = torch.empty(shape, dtype=arrays.to_torch_dtype(arrays.dtype(dtype)), device="meta")
            sizes.append(found.numel() * kinds[str(found.dtype).removeprefix("torch.")])
            return found

        xs = [torch.empty(s.shape, dtype=arrays.to_torch_dtype(s.dtype), device="meta") for s in specs]
        module = dispatch.kernels("triton", op)
        full = {k: v for k, v in (op.options | options).items()}
        monkeypatch.setattr(_tile, "pretend", _tile.Device(90, 132, 232448))
        monkeypatch.setattr(_tile, "launch", lambda *args, **options: None)
        monkeypatch.setattr(_tile, "described", lambda x, block: x)
        outputs, saved = getattr(module, f"{op.name}_forward")(*xs, needs=needs, empty=empty, **full)
        padded = (*specs, *[None] * (len(op.inputs) - len(specs)))
        dys = tuple(torch.empty_like(y) for y in outputs)
        getattr(module, f"{op.name}_backward")(dys, saved, inputs=padded, needs=needs, empty=empty, **full)
        return sum(sizes)

    n, classes, width = 8192, 131072, 64
    x, w, labels = Spec((n, width), bfloat16), Spec((classes, width), bfloat16), Spec((n,), arrays.int64)
    logits = Spec((n, classes), bfloat16)
    grads = 2 * (n * width + classes * width)
    plain = taken(linear, (x, w), ("x", "weight")) + taken(cross_entropy, (logits, labels), ("x",)) - grads
    fused = taken(linear_cross_entropy, (x, w, labels), ("x", "weight")) - 2 * grads
    assert plain >= 2 * n * classes * 2 and fused <= plain / 10


def test_predicted_times():
    """No less than the products take at the limit; less memory bandwidth makes passes slower, and only them."""
    lines = predicted_loss.table(predicted_loss.HEAD, predicted_loss.lines()).splitlines()
    assert len(lines) == 2 + len(predicted_loss.SIZES) * len(predicted_loss.MEMORY)
    for _, *size in predicted_loss.SIZES:
        limit = predicted_loss.flops(*size) / PRODUCTS
        times = [predicted_loss.predicted(*size, gpu) for gpu in ("H200", "H100")]
        assert limit < times[0].products == times[1].products and times[0].passes < times[1].passes


WRONG = [
    ((draw(2, 4), draw(5, 3), LABELS[0, :2]), {}, ShapeError, "x.shape = (…, D) = [2, 3]"),
    ((draw(2, 4), draw(5), LABELS[0, :2]), {}, ShapeError, "weight.shape = (C, D) for x (…, D)"),
    ((draw(2, 4), draw(5, 4), LABELS[0]), {}, ShapeError, "target.shape = x.shape[:-1] = [2]"),
    ((draw(2, 4), draw(5, 4), draw(2)), {}, UnsupportedTypeError, "class indices (an integer dtype)"),
    (
        (draw(2, 4), draw(5, 4), np.array([5, 0])),
        {},
        LabelError,
        "0 ≤ target < C = 5, or target = ignore_index = -100; got 5",
    ),
    ((draw(2, 4), draw(5, 4), LABELS[0, :2], draw(4)), {}, ShapeError, "bias.shape = (C,) = [5]"),
    ((draw(2, 4), draw(5, 4), LABELS[0, :2]), {"reduction": "max"}, ArgumentError, "one of mean, sum, none"),
    ((draw(2, 4), draw(5, 4), LABELS[0, :2]), {"label_smoothing": 2.0}, ShapeError, "0 ≤ label_smoothing ≤ 1"),
    ((draw(2, 4), draw(5, 4), LABELS[0, :2]), {"softcap": -1.0}, ArgumentError, "softcap ≥ 0"),
]


@pytest.mark.parametrize("inputs, options, error, text", WRONG)
def test_errors(inputs, options, error, text):
    with pytest.raises(error) as raised:
        linear_cross_entropy(*inputs, **options)
    assert text in str(raised.value) and str(raised.value).startswith("linear_cross_entropy: ")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_function_is_torchs(dtype, reduction):
    ours = gt.functional.linear_cross_entropy
    x, w, b, cw = (torch.from_numpy(draw(*s)).to(dtype) for s in ((7, 4), (5, 4), (5,), (5,)))
    cw, target = cw.abs(), torch.tensor([0, 4, 2, -100, 1, 1, 3])
    leaves = [t.requires_grad_() for t in (x, w, b)]
    how = {"linear_bias": b, "weight": cw, "reduction": reduction, "label_smoothing": 0.1}
    found, true = ours(x, w, target, **how), F.linear_cross_entropy(x, w, target, options=None, **how)
    torch.testing.assert_close(found, true)
    dy = torch.randn_like(true)
    for mine, theirs in zip(*(torch.autograd.grad(y, leaves, dy) for y in (found, true))):
        torch.testing.assert_close(mine, theirs)
    capped = {"z_loss": 0.1, "softcap": 2.0, "reduction": reduction, "linear_bias": b, "weight": cw}
    found = ours(x, w, target, **capped)
    true = _twin(x, w, target, b, cw, -100, 0.0, reduction, 0.1, 2.0, False)
    torch.testing.assert_close(found, true)
    for mine, theirs in zip(*(torch.autograd.grad(y, leaves, dy) for y in (found, true))):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_gradients(reduction):
    """Of the input, the weight and the bias, with every option."""
    x, w, b, cw = (torch.from_numpy(draw(*s)) for s in ((3, 2), (4, 2), (4,), (4,)))
    target, how = torch.tensor([0, -100, 2]), {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0}
    ours = lambda *leaves: gt.functional.linear_cross_entropy(  # noqa: E731
        leaves[0], leaves[1], target, linear_bias=leaves[2], weight=cw.abs(), reduction=reduction, **how
    )
    assert torch.autograd.gradgradcheck(ours, [t.requires_grad_() for t in (x, w, b)])


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_loss(lower):
    """Loss and factors of classes are float32, sums are made there; of float16 no share of many tokens vanishes."""
    x, w = torch.from_numpy(draw(512, 8)).float() / 4, torch.from_numpy(draw(3000, 8)).float() / 4
    target, cw = torch.arange(512) % 7, torch.linspace(0.1, 2, 3000)
    for reduction in ("mean", "sum", "none"):
        leaves = [x.requires_grad_(), w.requires_grad_()]
        with torch.autocast("cpu", lower):
            y = gt.functional.linear_cross_entropy(x, w, target, weight=cw, reduction=reduction, softcap=30.0)
        doubles = [t.to(lower).double().detach().requires_grad_() for t in leaves]
        true = _twin(*doubles, target, None, cw.double(), -100, 0.0, reduction, 0.0, 30.0, False)
        assert y.dtype is torch.float32
        torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=0)
        mine, theirs = (torch.autograd.grad(t.mean() * 2.0**8, of) for t, of in ((y, leaves), (true, doubles)))
        for got, wanted in zip(mine, theirs):
            error = (got.double() - wanted).norm() / wanted.norm()
            assert got.dtype is torch.float32 and error < 4 * torch.finfo(lower).eps


OPTIONS = [
    {},
    {"bias": True, "reduction": "sum", "label_smoothing": 0.1},
    {"weight": torch.tensor([0.5, 1.0, 2.0, 0.25]), "reduction": "none", "ignore_index": 1},
    {"out_features": (2, 3), "bias": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_class_of_torchs_that_have_none(options):
    """It has newer torch's attributes, weights under the same names, and text."""
    names = set()
    for library in (torch.nn, gt):
        module = library.LinearCrossEntropyLoss(3, 4, **options)
        other = _Loss(3, 4, **options)
        other.load_state_dict(module.state_dict())
        assert vars(module).keys() - {"__module__"} == vars(other).keys() and repr(module)[-40:] == repr(other)[-40:]
        names |= {*module.state_dict()}
        x = torch.randn(5, 3)
        target = torch.arange(5 * 6 if "out_features" in options else 5) % 4
        target = target.reshape(5, 2, 3) if "out_features" in options else target
        torch.testing.assert_close(gt.LinearCrossEntropyLoss.forward(other, x, target), module(x, target))
    assert names == {"linear.weight"} | {k for k in ("weight",) if k in options} | {
        k for k in ("linear.bias",) if "bias" in options
    }
    for wrong in ({"weight": torch.rand(3)}, {"label_smoothing": 1.5}):
        errors = []
        for cls in (torch.nn.LinearCrossEntropyLoss, _Loss):
            with pytest.raises(RuntimeError) as raised:
                cls(3, 4, **wrong)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]


def test_patch_leaves_the_linear_layer_inside():
    """Its parent computes with its weights and never calls it."""
    model = torch.nn.LinearCrossEntropyLoss(3, 4, bias=True)
    x, target, names = torch.randn(5, 3), torch.arange(5) % 4, [*model.state_dict()]
    y = model(x, target)
    report = gt.patch(model)
    assert type(model) is gt.LinearCrossEntropyLoss and type(model.linear) is torch.nn.Linear
    assert "never calls it" in report.bypassed["linear"] and [*model.state_dict()] == names
    torch.testing.assert_close(model(x, target), y)
    gt.unpatch(model)
    assert type(model) is torch.nn.LinearCrossEntropyLoss


def test_all_logits_at_once():
    """Probabilities, and several losses a sample."""
    ours = gt.functional.linear_cross_entropy
    with pytest.raises(RuntimeError, match="class indices"):
        ours(torch.randn(3, 4), torch.randn(5, 4), torch.rand(3, 5), z_loss=0.1)
    x, w, p = torch.randn(3, 4), torch.randn(5, 4), torch.rand(3, 5).softmax(1)
    torch.testing.assert_close(ours(x, w, p), F.linear_cross_entropy(x, w, p, options=None))
    w, target = torch.randn(5, 2, 4), torch.tensor([[0, 1], [4, 2], [3, 3]])
    torch.testing.assert_close(ours(x, w, target), F.linear_cross_entropy(x, w, target, options=None))


def test_a_loss_with_weights(tmp_path):
    """They are trained with the model, saved, tied to a table; the loss is that of a linear layer and its cross entropy."""
    x = np.random.default_rng(0).integers(0, 7, (24, 3))
    loss = gl.LinearCrossEntropyLoss(
        6, 7, bias=True, weight=[1, 2, 1, 1, 0.5, 1, 1], ignore_index=0, label_smoothing=0.1
    )
    names = {name: w.shape for name, w in loss.named_weights().items()}
    assert names == {"weight": (7,), "linear.weight": (7, 6), "linear.bias": (7,)}
    theirs = torch.nn.LinearCrossEntropyLoss(6, 7, bias=True, weight=torch.rand(7) + 0.5, ignore_index=0)
    loss.load_state_dict(theirs.state_dict())
    plain = gl.CrossEntropyLoss(loss.weight.data, 0, label_smoothing=0.1)
    features = draw(5, 3, 6).astype("float32")
    goal, logits = x[:5], loss.linear(features).reshape(-1, 7)
    np.testing.assert_allclose(loss(features, goal), plain(logits, goal.reshape(-1)), rtol=1e-5)
    assert loss.output_shape((None, 3, 6), (None, 3)) == () and loss.mean_over(features, goal) == pytest.approx(
        plain.mean_over(logits, goal.reshape(-1))
    )
    gl.save(loss, tmp_path / "loss")
    np.testing.assert_array_equal(gl.load(tmp_path / "loss")(features, goal), loss(features, goal))
    table, head = gl.Embedding(7, 6), gl.LinearCrossEntropyLoss(6, 7, z_loss=1e-3, softcap=20.0)
    head.linear.weight = table.weight
    before, biases = table.weight.data.copy(), loss.linear.bias.data.copy()
    for judge in (loss, head):
        history = gl.Sequential(table).fit(x, x, epochs=12, loss=judge, optimizer=gl.AdamW(lr=0.05), progress=False)
        assert history["loss"][-1] < 0.6 * history["loss"][0]
    assert (table.weight.data != before).all() and (loss.linear.bias.data != biases).all()
