"""Batch-invariant mode: a row alone, among a few and among many has the same bits, on each backend that may compute it."""

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch
from gpulayers.kernels import _invariance
from gpulayers.kernels.numpy import _blocks
from gpulayers.kernels.triton import _tile

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import _policy, arrays
from gpulayers.ops.attention import attention, attention_decode
from gpulayers.ops.linear import linear, linears
from gpulayers.ops.loss import cross_entropy, linear_cross_entropy, mse, nll_loss, pointwise_loss
from gpulayers.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from gpulayers.ops.softmax import log_softmax, softmax, softmin
from gpulayers.testing.arena import arena
from gpulayers.testing.interpreter import interpreting


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def half(*shape: int) -> np.ndarray:
    return draw(*shape).astype(np.float16)


def labels(m: int, classes: int) -> np.ndarray:
    return np.arange(m) * 7 % classes


APART = np.float16([[[[30]], [[1]]]])
"""Of heads: one whose scores are large beside one of small ones, which NumPy need not reduce by their maxima."""
NONE = {"reduction": "none"}
LONG = {"normalized_shape": (17000,)}
CASES = {
    # what it is about: (op, inputs, names of those that have rows, options)
    "K that would be split": (linear, [half(64, 1024), half(64, 1024), half(64)], "x", {}),
    "columns for rows": (linear, [half(1024, 64).T, half(64, 1024), None], "x", {}),
    "an activation": (linear, [draw(64, 70), draw(33, 70), draw(33)], "x", {"activation": "gelu"}),
    "one column": (linear, [draw(64, 70), draw(1, 70), None], "x", {}),
    "three dimensions": (linear, [draw(64, 3, 20), draw(10, 20), None], "x", {}),
    "several products": (linears, [half(64, 264), half(64, 264), half(72, 264), None, half(64)], "x", {}),
    "layer_norm": (layer_norm, [draw(24, 300), draw(300), draw(300)], "x", {"normalized_shape": (300,)}),
    "rms_norm": (rms_norm, [half(64, 70), half(70)], "x", {"normalized_shape": (70,)}),
    "rows that are walked": (layer_norm, [draw(8, 17000), draw(17000), None], "x", LONG),
    "walked sums": (add_rms_norm, [draw(8, 17000), draw(8, 17000)[::-1].copy(), None], "x residual", LONG),
    "add_layer_norm": (
        add_layer_norm, [draw(64, 40), draw(64, 41)[:, 1:], draw(40), draw(40)], "x residual", {"normalized_shape": (40,)},
    ),
    "softmax": (softmax, [draw(64, 70)], "x", {}),
    "softmin": (softmin, [half(64, 40)], "x", {}),
    "log_softmax": (log_softmax, [draw(24, 3, 300)], "x", {}),
    "attention": (
        attention, [half(8, 2, 20, 16) * APART, half(8, 1, 24, 16), half(8, 1, 24, 16)], "q k v", {"window": (-1, 0)},
    ),
    "attention by boxes": (attention, [half(8, 1, 40, 16), half(8, 1, 40, 16), half(8, 1, 40, 16)], "q k v", {}),
    "attention_decode": (
        attention_decode, [draw(8, 4, 1, 16), draw(8, 2, 700, 16), draw(8, 2, 700, 16), np.arange(8) * 80 + 40], "q k v lengths",
        {},
    ),
    "cross_entropy": (
        cross_entropy, [draw(64, 70), labels(64, 70), np.abs(draw(70))], "x target", NONE | {"label_smoothing": 0.1},
    ),
    "classes that lie apart": (cross_entropy, [draw(50, 64).T, labels(64, 50)], "x target", NONE),
    "shares of classes": (cross_entropy, [draw(64, 50), np.abs(draw(50, 64)).T], "x target", NONE),
    "nll_loss": (nll_loss, [draw(64, 20), labels(64, 20)], "x target", NONE),
    "mse": (mse, [draw(64, 20), draw(64, 21)[:, 1:]], "x target", NONE),
    "pointwise_loss": (pointwise_loss, [draw(64, 20), draw(64, 21)[:, 1:]], "x target", NONE | {"loss": "huber"}),
    "linear_cross_entropy": (
        linear_cross_entropy, [draw(64, 70), draw(40, 70), labels(64, 40), draw(40)], "x target", NONE | {"label_smoothing": 0.1},
    ),
}  # fmt: skip


def results(op, inputs, names, options) -> list:
    """Its outputs, and the gradients of what has rows."""
    needs = [n for n in names.split() if n in op.differentiable]
    if op is attention_decode:
        return [*op(*inputs, **options)]
    ys, call = op.record(*inputs, needs=needs, **options)
    ys = arrays.lists([ys]) if isinstance(ys, np.ndarray) else [*ys]
    dys = [np.cos(np.arange(y[0].size)).astype(y.dtype).reshape(y[:1].shape) + np.zeros_like(y) for y in ys]
    return [*ys, *(g for g in call.backward(*dys) if g is not None)]


def rows_of(name: str, at: slice) -> list:
    op, inputs, names, options = CASES[name]
    given = [x[at] if n in names.split() and x is not None else x for n, x in zip(op.inputs, inputs)]
    return results(op, given, names, options)


def same(name: str) -> None:
    """Of one row, at three places."""
    m = len(CASES[name][1][0])
    i = m - 3
    found = [rows_of(name, at) for at in (slice(i, i + 1), slice(i - 4, i + 3), slice(None))]
    for alone, few, many in zip(*found):
        assert alone[0].tobytes() == few[4].tobytes() == many[i].tobytes()


def test_each_op_has_a_case():
    assert {op.name for op, *_ in CASES.values()} == _invariance.OPS


@pytest.mark.parametrize("name", CASES)
def test_numpy(name, monkeypatch):
    monkeypatch.setattr(_blocks, "threads", lambda: 2)
    with gl.only("numpy", "definition"), gl.batch_invariant():
        same(name)


def by_rows(x: np.ndarray, y: np.ndarray, matmul=np.matmul) -> np.ndarray:
    """A product whose rows are alike, as a GPU's are within a tile; BLAS's hang on their place in it."""
    return matmul(x[:, None], y)[:, 0]


@pytest.mark.parametrize("name", CASES)
def test_triton(name, monkeypatch):
    monkeypatch.setattr(np, "matmul", by_rows)
    sms = 4 if "walked" in name or name == "attention_decode" else 132  # so few that many rows fill them
    with interpreting(_tile.Device(90, sms, 232448), races=False) as session, arena("triton"), gl.batch_invariant():
        same(name)
    ran = [(each.kernel, each.constexprs) for each in session.launches if each.kernel != "_copy_kernel"]
    if CASES[name][0] in (mse, pointwise_loss):  # element by element
        return
    third = len(ran) // 3
    assert ran[:third] == ran[third : 2 * third] == ran[2 * third :]


def test_torch():
    """Drop-ins, for which torch's own kernels stand elsewhere."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        gt.Linear(40, 24), gt.GELU(), gt.LayerNorm(24), torch.nn.Unflatten(1, (3, 8)), gt.Softmax(dim=-1)
    )
    x = torch.randn(64, 40)

    def of(at: slice) -> tuple:
        rows = x[at].clone().requires_grad_()
        y = model(rows)
        y.square().sum().backward()
        return y.detach().numpy(), rows.grad.numpy()

    with gl.batch_invariant():
        found = [of(at) for at in (slice(60, 61), slice(56, 63), slice(None))]
        assert gl.explain(linear, x, model[0].weight)[0] == "numpy"
    for alone, few, many in zip(*found):
        assert alone[0].tobytes() == few[4].tobytes() == many[60].tobytes()


def test_what_cannot_be_is_refused():
    q, cu = draw(1, 2, 6, 8), np.array([0, 2, 6])
    with gl.batch_invariant():
        with pytest.raises(gl.Refused, match="blocks of packed sequences lie across them"):
            attention(q, q, q, None, None, None, cu, cu)
        with pytest.raises(gl.Refused, match="a row's bits hang on the other rows"):
            linear(draw(2, 3).astype(np.float64), draw(4, 3).astype(np.float64))
        with gl.batch_invariant(False):
            attention(q, q, q, None, None, None, cu, cu)
        softmax(draw(2, 3).astype(np.float64))


def test_others_stay_as_they_are():
    """Weights' gradients are sums over rows: K of their product is split as ever."""
    x, w, dy = half(1024, 64), half(64, 64), half(1024, 64)

    def launched() -> list:
        with interpreting(_tile.Device(90, 132, 232448), races=False) as session, arena("triton"):
            linear.record(x, w, None, needs=["weight"])[1].backward(dy)
        return [(each.kernel, each.grid) for each in session.launches[1:]]

    with gl.batch_invariant():
        inside = launched()
    assert inside == launched()
    assert [kernel for kernel, _ in inside] == ["_matmul_tma_kernel", "_finish_kernel"]


@pytest.mark.parametrize(("text", "found"), [("1", True), ("0", False), ("", False)])
def test_the_environment_turns_it_on(text, found, monkeypatch):
    monkeypatch.setenv("GPULAYERS_BATCH_INVARIANT", text)
    assert _policy._initial_policy().batch_invariant is found
