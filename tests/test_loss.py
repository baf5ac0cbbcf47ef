import numpy as np
import pytest
from halves import check_op

import gpulayers as gl
from gpulayers import only
from gpulayers.ops.loss import cross_entropy, mse, nll_loss
from gpulayers.testing.arena import arena
from gpulayers.testing.check_layer import check_layer

torch = pytest.importorskip("torch")
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) * 2)


def labels(x: np.ndarray, ignored: bool = True) -> np.ndarray:
    """Random class indices for logits x; the first is ignored (−100)."""
    shape = (x.shape[0], *x.shape[2:]) if x.ndim > 1 else ()
    t = np.random.default_rng([7, *x.shape]).integers(0, x.shape[min(1, x.ndim - 1)], shape)
    if ignored and t.size > 1:
        t.flat[0] = -100
    return np.asarray(t)


def probabilities(x: np.ndarray) -> np.ndarray:
    p = np.exp(draw(*x.shape, seed=5))
    return p / p.sum(min(1, x.ndim - 1), keepdims=True)


def weights(x: np.ndarray) -> np.ndarray:
    return np.abs(draw(x.shape[min(1, x.ndim - 1)], seed=6)) + 0.1


@REDUCTIONS
@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 4), (2, 3, 2, 2), (0, 3), (1, 2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_by_definition(shape, reduction, smoothing):
    x, options = draw(*shape), dict(reduction=reduction, label_smoothing=smoothing)
    numeric = x.size > 0
    served = check_op(cross_entropy, x, labels(x), weights(x), **options, numeric=numeric)
    assert ("numpy" in served) == (x.ndim == 2 and x.size > 0)
    check_op(cross_entropy, x, probabilities(x), weights(x), **options, numeric=numeric)
    if smoothing:
        check_op(cross_entropy, x, labels(x, ignored=False), **options, ignore_index=1, dys=["dense"])
    else:
        check_op(cross_entropy, x, probabilities(x), **options, dys=["dense"])


def test_one_class_is_certain():
    """Its share and what smoothing adds to it are 1, and the gradient is 0."""
    check_op(cross_entropy, draw(3, 1), np.zeros(3, int), label_smoothing=0.5, reduction="sum", dys=["dense"])


@REDUCTIONS
@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 4), (2, 3, 2, 2), (0, 3), (2, 3, 0), (1, 2)])
def test_nll_loss_by_definition(shape, reduction):
    x, options = draw(*shape), dict(reduction=reduction)
    served = check_op(nll_loss, x, labels(x), weights(x), **options, numeric=x.size > 0)
    assert served == (["definition", "numpy", "triton"] if x.size else ["definition", "triton"])
    check_op(nll_loss, x, labels(x, ignored=False), **options, ignore_index=1, dys=["dense"])


@REDUCTIONS
def test_cross_entropy_of_blocks_of_infinity(reduction):
    """A running maximum over blocks of 16 classes that starts with blocks of −∞, or ends with them."""
    x, t = draw(2, 40, 3), np.array([[39, 20, 3], [38, 0, 33]])
    x[0, :20, :2], x[1, :32, 2], x[:, 16:, 1] = -np.inf, -np.inf, -np.inf
    x[0, 20, 1] = 0.5
    with np.errstate(all="ignore"):
        check_op(cross_entropy, x, t, reduction=reduction, backends=("triton",), dtypes=["float32"], dys=["dense"])


@REDUCTIONS
@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 2), (0, 3), (), (1, 1)])
def test_mse_by_definition(shape, reduction):
    served = check_op(mse, draw(*shape), draw(*shape, seed=1), reduction=reduction, numeric=True)
    assert ("numpy" in served) == (0 not in shape)


def against_torch(shape, target, weight, dy_seed=9, op=cross_entropy, **options):
    """The definition in float64 against torch's, forward and backward."""
    x = draw(*shape)
    y, call = op.record(x, target, weight, **options)
    tx, tt = torch.tensor(x, requires_grad=True), torch.tensor(target)
    soft = tt.is_floating_point()
    tt.requires_grad_(soft)
    function = getattr(torch.nn.functional, op.name)
    true = function(tx, tt, None if weight is None else torch.tensor(weight), **options)
    dy = draw(*y.shape, seed=dy_seed)
    true.backward(torch.tensor(dy))
    dx, dp, _ = call.backward(dy)
    np.testing.assert_allclose(y, true.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dx, tx.grad.numpy(), rtol=1e-10, atol=1e-12)
    if soft:
        np.testing.assert_allclose(dp, tt.grad.numpy(), rtol=1e-10, atol=1e-12)


@REDUCTIONS
@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(shape, reduction, smoothing):
    x, options = draw(*shape), dict(reduction=reduction, label_smoothing=smoothing)
    for weight in (None, weights(x)):
        against_torch(shape, labels(x), weight, **options)
        against_torch(shape, labels(x, ignored=False), weight, ignore_index=1, **options)
        against_torch(shape, probabilities(x), weight, **options)


@REDUCTIONS
@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 4), (2, 3, 2, 2)])
def test_nll_loss_is_torchs(shape, reduction):
    x, options = draw(*shape), dict(reduction=reduction, op=nll_loss)
    for weight in (None, weights(x), np.array([0.0, 0, 0, 1, 1])[: len(weights(x))]):
        against_torch(shape, labels(x), weight, **options)
        against_torch(shape, labels(x, ignored=False), weight, ignore_index=1, **options)
        against_torch(shape, np.full_like(labels(x), -100), weight, **options)


@REDUCTIONS
def test_nll_loss_of_infinite_numbers_is_torchs(reduction):
    """Impossible classes that are and are not the target, also with weight 0; an ignored row of NaN; an infinite weight."""
    x, t = draw(5, 4), np.array([1, 0, 2, -100, 3])
    x[0, 1], x[1, 1:], x[2, 2], x[3] = -np.inf, -np.inf, np.inf, np.nan
    for weight in (None, np.array([1.0, 0, 1, 2]), np.array([1.0, 1, np.inf, np.nan])):
        tx = torch.tensor(x, requires_grad=True)
        w = None if weight is None else torch.tensor(weight)
        true = torch.nn.functional.nll_loss(tx, torch.tensor(t), w, reduction=reduction)
        dy = draw(*true.shape)
        true.backward(torch.tensor(dy))
        for backend in ("definition", "numpy"):
            with np.errstate(invalid="ignore"), only(backend):
                kind = "f4" if backend == "numpy" else "f8"
                given = [None if a is None else a.astype(kind) for a in (x, weight)]
                y, call = nll_loss.record(given[0], t, given[1], reduction=reduction)
                np.testing.assert_allclose(y, true.detach().numpy(), rtol=1e-6)
                np.testing.assert_allclose(call.backward(dy.astype(kind))[0], tx.grad.numpy(), rtol=1e-6)


@REDUCTIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_infinite_logits_is_torchs(reduction, smoothing):
    """Impossible classes (−∞), a row of Inf, a row of NaN, an ignored row of each; a weight of 0; nothing counts."""
    x = draw(6, 4)
    x[0, 1] = x[1, 2] = x[4, 0] = -np.inf
    x[2, 0], x[3, 1] = np.inf, np.nan
    t = np.array([1, 0, 2, 3, -100, -100])
    for weight in (None, np.array([0.0, 0.0, 1, 2])):
        for target in (t, np.full(6, -100), np.eye(4)[[1, 0, 2, 3, 0, 0]]):
            with np.errstate(invalid="ignore"):
                y = cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing)
            w = None if weight is None else torch.tensor(weight)
            true = torch.nn.functional.cross_entropy(
                torch.tensor(x), torch.tensor(target), w, reduction=reduction, label_smoothing=smoothing
            )
            np.testing.assert_allclose(y, true.numpy(), rtol=1e-12)


@REDUCTIONS
def test_mse_is_torchs(reduction):
    x, t = draw(3, 4), draw(3, 4, seed=1)
    tx, tt = (torch.tensor(a, requires_grad=True) for a in (x, t))
    true = torch.nn.functional.mse_loss(tx, tt, reduction=reduction)
    y, call = mse.record(x, t, reduction=reduction)
    dy = draw(*y.shape, seed=2)
    true.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, true.detach().numpy(), rtol=1e-12)
    for ours, theirs in zip(call.backward(dy), (tx.grad, tt.grad)):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)


X, T = draw(3, 5), np.array([1, 2, 3])
WRONG = {
    "label": (cross_entropy, (X, T + 3), {}, IndexError, "0 ≤ target < C = 5, or target = ignore_index = -100; got 5"),
    "negative": (cross_entropy, (X, T - 3), {}, IndexError, "0 ≤ target < C = 5"),
    "batch": (cross_entropy, (X, T[:2]), {}, ValueError, "target.shape[0] = x.shape[0] = N"),
    "target": (cross_entropy, (X[..., None], T), {}, RuntimeError, "= (N, *d) for x (N, C, *d), () for (C,) = [3, 1]"),
    "soft": (cross_entropy, (X, X[:, :4]), {}, RuntimeError, "= x.shape = [3, 5]; got [3, 4]"),
    "softs dtype": (cross_entropy, (X, X.astype("f4")), {}, RuntimeError, "target.dtype = x.dtype"),
    "soft ignored": (cross_entropy, (X, X), dict(ignore_index=1), RuntimeError, "ignore_index < 0"),
    "kind": (cross_entropy, (X, T > 1), {}, NotImplementedError, "class indices"),
    "logits": (cross_entropy, (X.astype(int), T), {}, NotImplementedError, "dtype ∈"),
    "scalar": (cross_entropy, (X[0, 0], T), {}, RuntimeError, "x.shape = (C,) or (N, C, *d)"),
    "weight": (cross_entropy, (X, T, X[0, :4]), {}, RuntimeError, "weight.shape = (C,) = [5]; got [4]"),
    "weights dtype": (cross_entropy, (X, T, X[0].astype("f4")), {}, RuntimeError, "weight.dtype = x.dtype"),
    "reduction": (cross_entropy, (X, T), dict(reduction="max"), ValueError, "one of mean, sum, none; got 'max'"),
    "smoothing": (cross_entropy, (X, T), dict(label_smoothing=1.5), RuntimeError, "0 ≤ label_smoothing ≤ 1"),
    "nll label": (nll_loss, (X, T + 3), {}, IndexError, "0 ≤ target < C = 5, or target = ignore_index = -100; got 5"),
    "nll batch": (nll_loss, (X, T[:2]), {}, ValueError, "target.shape[0] = x.shape[0] = N"),
    "nll target of one": (nll_loss, (X[0], T), {}, ValueError, "target.shape = () for x (C,); got [3]"),
    "nll target": (nll_loss, (X[..., None], T), {}, RuntimeError, "= (N, *d) for x (N, C, *d), () for (C,) = [3, 1]"),
    "nll soft": (nll_loss, (X, X), {}, RuntimeError, "class indices (an integer dtype); got float64"),
    "nll numbers": (nll_loss, (X.astype(int), T), {}, NotImplementedError, "dtype ∈"),
    "nll scalar": (nll_loss, (X[0, 0], T), {}, ValueError, "x.shape = (C,) or (N, C, *d)"),
    "nll weight": (nll_loss, (X, T, X[0, :4]), {}, RuntimeError, "weight.shape = (C,) = [5]; got [4]"),
    "nll weights dtype": (nll_loss, (X, T, X[0].astype("f4")), {}, RuntimeError, "weight.dtype = x.dtype"),
    "nll reduction": (nll_loss, (X, T), dict(reduction="max"), ValueError, "one of mean, sum, none; got 'max'"),
    "mse shape": (mse, (X, X[:2]), {}, RuntimeError, "target.shape = x.shape = [3, 5]; got [2, 5]"),
    "mse dtype": (mse, (X, X.astype("f4")), {}, RuntimeError, "target.dtype = x.dtype"),
    "mse kind": (mse, (T, T), {}, NotImplementedError, "dtype ∈"),
    "mse reduction": (mse, (X, X), dict(reduction="max"), ValueError, "one of mean, sum, none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    op, inputs, options, error, text = WRONG[case]
    inputs = [np.asarray(i) for i in inputs]
    with pytest.raises(error) as raised:
        op(*inputs, **options)
    assert f"{op.name}: " in str(raised.value)
    assert text in str(raised.value)
    if op is nll_loss:
        with pytest.raises(error):
            torch.nn.functional.nll_loss(*map(torch.tensor, inputs), **options)


def test_nll_loss_layer():
    x = draw(4, 3, 2)
    for layer in (gl.NLLLoss(), gl.NLLLoss([1, 0.5, 2], ignore_index=1, reduction="none")):
        check_layer(layer, x, labels(x, ignored=False))
        weight = None if layer.weight is None else torch.tensor(layer.weight.data)
        theirs = torch.nn.NLLLoss(weight, ignore_index=layer.ignore_index, reduction=layer.reduction)
        t = labels(x, ignored=False)
        true = theirs(torch.tensor(x, dtype=torch.float32), torch.tensor(t))
        np.testing.assert_allclose(layer(x.astype("f4"), t), true.numpy(), rtol=1e-6)


# --- the kernels, branch by branch -----------------------------------------------------------------------------------

FEW = dict(dys=["dense", "expanded"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(70, 24), (3, 5000), (2, 5, 37), (2, 3, 4, 3)])
def test_cross_entropy_tiles(shape, smoothing):
    """Several short rows a program; classes in several blocks; classes that are not neighbours."""
    x, options = draw(*shape), dict(label_smoothing=smoothing, **FEW)
    assert "triton" in check_op(cross_entropy, x, labels(x), weights(x), **options)
    check_op(cross_entropy, x, probabilities(x), weights(x), **options, dtypes=["float32", "float16", "bfloat16"])


def last(x: np.ndarray) -> np.ndarray:
    """x in channels-last memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def test_cross_entropy_layouts():
    """Channels-last memory, transposed, strided and expanded logits; each layout with the others."""
    x = draw(3, 5, 4, 2)
    few = dict(dys=["dense"], dtypes=["float32"])
    for logits in (last(x), x[::2], x.transpose(0, 1, 3, 2), np.broadcast_to(x[:1], x.shape)):
        check_op(cross_entropy, logits, labels(logits), reduction="none", **few)
        check_op(cross_entropy, logits, probabilities(logits), **few)
        check_op(cross_entropy, logits, last(probabilities(logits)), **few)
    for matrix in (draw(6, 4).T, draw(6, 9)[::2, 1:6]):
        check_op(cross_entropy, matrix, labels(matrix), label_smoothing=0.1, **few)


@pytest.mark.parametrize("shape", [(70, 24), (3, 5000), (2, 5, 37), (2, 3, 4, 3)])
def test_nll_loss_tiles(shape):
    """Several samples a program and classes in several blocks, in every layout."""
    x, few = draw(*shape), dict(dys=["dense", "transposed"], dtypes=["float32", "float16", "bfloat16"])
    check_op(nll_loss, x, labels(x), weights(x), **few)
    few["dtypes"] = ["float32"]
    check_op(nll_loss, x, labels(x), reduction="none", **few)
    if x.size < 1000:
        for laid in (last(x), x[::2], x.swapaxes(-1, -2), np.broadcast_to(x[:1], x.shape)):
            check_op(nll_loss, laid, labels(laid), weights(laid), reduction="none", **few)


def test_nll_loss_in_several_programs():
    x = draw(1500, 3)
    check_op(nll_loss, x, labels(x), weights(x), dys=["dense"], dtypes=["float32"])
    check_op(nll_loss, x, labels(x), reduction="sum", dys=["dense"], dtypes=["float32"])


def test_labels_of_other_integers_and_all_ignored():
    x = draw(6, 4)
    for kind in (np.int32, np.uint8):
        check_op(cross_entropy, x, labels(x, ignored=False).astype(kind), **FEW)
        check_op(nll_loss, x, labels(x, ignored=False).astype(kind), **FEW)
    check_op(cross_entropy, x, np.full(6, -100), **FEW)
    check_op(nll_loss, x, np.full(6, -100), **FEW)
    check_op(cross_entropy, x, np.full(6, -100), label_smoothing=0.1, reduction="sum", **FEW)


@pytest.mark.parametrize("op", [cross_entropy, nll_loss], ids=str)
@pytest.mark.parametrize("label", [4, -1])
def test_on_a_gpu_a_wrong_label_gives_nan(label, op):
    x, t = draw(3, 4).astype(np.float32), np.array([1, label, 2])
    with arena("triton") as room:
        y, call = op.record(*map(room.put, (x, t)), needs=["x"], reduction="none")
        dx = room.get(call.backward(room.put(np.ones(3, np.float32)))[0])
        assert list(np.isnan(room.get(y))) == list(np.isnan(dx).any(1)) == [False, True, False]
        assert np.isnan(room.get(op(*map(room.put, (x, t)))))


@REDUCTIONS
def test_mse_walks(reduction):
    """One long row, rows with gaps, another order than row-major, two orders, several tiles a program."""
    x, t = draw(3, 5, 7, 2), draw(3, 5, 7, 2, seed=1)
    options = dict(reduction=reduction, dys=["dense", "transposed"])
    assert "triton" in check_op(mse, x, t, **options)
    check_op(mse, last(x), t, **options)
    check_op(mse, draw(6, 40)[:, :33], draw(6, 33), **options)
    check_op(mse, draw(70, 1100), draw(70, 1100, seed=1), reduction=reduction, dys=["dense"], dtypes=["float32"])
