import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
from gpulayers.kernels.numpy import _segments
from halves import check_op

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import dispatch
from gpulayers.definition import KindError, LabelError, ShapeError, UnsupportedTypeError
from gpulayers.ops.embedding import embedding
from gpulayers.testing.check_torch import check_torch
from gpulayers.testing.interpreter import interpreting
from gpulayers.testing.torch_cases import agree


def table(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng([rows, width]).standard_normal((rows, width))


def draw(*shape: int, high: int, dtype: str = "int64") -> np.ndarray:
    return np.random.default_rng([high, *shape]).integers(0, high, shape).astype(dtype)


CALLS = [
    (table(7, 4), draw(3, 5, high=7), {"padding_idx": -1}),
    (table(3, 40)[:, 1:], draw(11, high=3, dtype="int32")[::2], {"scale_grad_by_freq": True}),
    (np.asfortranarray(table(5, 6)), draw(2, 1, 3, high=5).T, {}),
    (table(4, 3), np.array(2), {}),
    (table(4, 8), np.zeros((0, 3), int), {"padding_idx": 0}),
]


@pytest.mark.parametrize("weight, indices, options", CALLS)
def test_every_backend(weight, indices, options):
    served = check_op(embedding, weight, indices, numeric=not options, **options)
    assert {"definition", "numpy", "triton"} <= set(served)


def often(n: int, high: int, share: float, row: int = 3) -> np.ndarray:
    """Indices, one of them in a share of all places."""
    return np.where(np.random.default_rng(n).random(n) < share, row, draw(n, high=high))


LONG = [
    (table(70, 5), often(390, 70, 0.7), {"scale_grad_by_freq": True}),  # two digits, several programs, whole chunks
    (table(12, 24), np.full(130, 11), {"padding_idx": 3}),
]


@pytest.mark.parametrize("weight, indices, options", LONG)
def test_frequent_rows_and_long_tables(weight, indices, options):
    kinds = ["float32", "bfloat16"] if len(weight) == 70 else ["float16"]
    served = check_op(embedding, weight, indices, dtypes=kinds, dys=["gapped"], **options)
    assert {"definition", "numpy", "triton"} <= set(served)


@pytest.mark.parametrize("factors", [None, np.random.default_rng(1).random(401)])
def test_sums_over_runs_of_any_length(factors):
    """Short runs are products of matrices, long ones are added pair by pair."""
    source, counts = table(50, 7), np.array([1, 3, 64, 65, 1, 200, 64, 2, 1])
    rows, to, found, wanted = (
        draw(401, high=50),
        np.array([8, 2, 0, 4, 9, 1, 3, 7, 5]),
        np.zeros((10, 7)),
        np.zeros((10, 7)),
    )
    _segments.add_up(source, rows, factors, counts, found, to)
    np.add.at(wanted, np.repeat(to, counts), source[rows] * (1 if factors is None else factors[:, None]))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13)


def test_rows_that_several_threads_copy():
    weight, indices = table(90, 300).astype(np.float32), draw(4001, high=90)
    with gl.only("numpy"):
        np.testing.assert_array_equal(embedding(weight, indices), weight[indices])


def test_no_term_spoils_another_row():
    """What is NaN or infinite stays in its row, and out of the padding's."""
    dy = np.ones((200, 3), np.float32)
    indices = often(200, 8, 0.5)
    dy[np.flatnonzero(indices == 3)[::7]] = np.nan
    dy[indices == 5] = np.inf
    for backend in ("definition", "numpy"):
        with gl.only(backend):
            _, call = embedding.record(table(8, 3).astype(np.float32), indices, padding_idx=5)
            dweight, _ = call.backward(dy)
        assert np.isnan(dweight[3]).all() and not dweight[5].any()
        others = [0, 1, 2, 4, 6, 7]
        np.testing.assert_array_equal(dweight[others, 0], [(indices == v).sum() for v in others])


WRONG = [
    ((table(4, 3), np.ones(3)), {}, ShapeError, "indices: the rule is an integer dtype; got float64"),
    ((np.ones(4), np.ones(3, int)), {}, ShapeError, "weight.shape = (num_embeddings, embedding_dim)"),
    ((table(4, 3), np.array([0, 4])), {}, LabelError, "indices: the rule is 0 ≤ index < num_embeddings = 4; got 4"),
    ((table(4, 3), np.array([0, -1])), {}, LabelError, "got -1"),
    ((table(4, 3), np.array([0])), {"padding_idx": 4}, ShapeError, "-4 ≤ padding_idx < num_embeddings = 4; got 4"),
    ((table(4, 3), np.array([0])), {"padding_idx": 1.0}, KindError, "padding_idx: the rule is an integer or None"),
    ((np.ones((4, 3), int), np.array([0])), {}, UnsupportedTypeError, "weight: the rule is dtype"),
]


@pytest.mark.parametrize("inputs, options, error, text", WRONG)
def test_errors(inputs, options, error, text):
    with pytest.raises(error) as raised:
        embedding(*inputs, **options)
    assert text in str(raised.value) and str(raised.value).startswith("embedding: ")


def test_a_gpu_answers_with_nan_where_a_cpu_raises():
    with interpreting(), gl.only("triton"), dispatch.policy(simulate=("triton",)):
        weight, indices = torch.from_numpy(table(4, 3)).float(), torch.tensor([1, 4, -1, 3])
        y, call = embedding.record(weight, indices)
        dweight, _ = call.backward(torch.ones(4, 3))
    assert torch.isnan(y).all(1).tolist() == [False, True, True, False]
    assert dweight[:, 0].tolist() == [0, 1, 0, 1]


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": -2}, {"scale_grad_by_freq": True, "padding_idx": 0}, {"max_norm": 1.0, "norm_type": 1.0}],
)
def test_the_drop_in_is_torchs(dtype, options):
    for shape in ((3, 7), (), (0, 2)):
        ours, theirs = (m.Embedding(9, 5, **options).to(dtype) for m in (gt, nn))
        ours.load_state_dict(theirs.state_dict())
        assert not check_torch(ours, theirs, [torch.from_numpy(np.asarray(draw(*shape, high=9, dtype="int32")))])
    if "max_norm" in options:  # rows that were looked up are short in both, and the others as they were
        indices = torch.tensor([1, 1, 4])
        ours(indices), theirs(indices)
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
        assert float(ours.weight[1].detach().abs().sum()) < 1.02


def test_what_is_left_to_torch():
    """Sparse gradients; and wrong calls raise what torch raises."""
    layer = gt.Embedding(4, 3, sparse=True)
    layer(torch.tensor([1, 1])).sum().backward()
    assert layer.weight.grad.is_sparse
    dense = gt.Embedding(4, 3)
    for wrong in (torch.tensor([4]), torch.tensor([1.0]), "1"):
        agree(lambda w=wrong: dense(w), lambda w=wrong: nn.Embedding(4, 3)(w))
    with pytest.raises(IndexError):
        dense(torch.tensor([4]))


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x))

    theirs = Tied()
    ours = copy.deepcopy(theirs)
    assert set(gt.patch(ours).replaced) == {"table", "head"} and ours.head.weight is ours.table.weight
    x = torch.tensor([[1, 5, 1]])
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours.table.weight.grad, theirs.table.weight.grad)
    assert [n for n, _ in ours.named_parameters()] == ["table.weight"]


# --- layers ----------------------------------------------------------------------------------------------------------


def test_a_model_of_words_learns(tmp_path):
    """Integers in, of any shape; saved, loaded, and with a torch.nn.Embedding's weights."""
    x = draw(40, 6, high=12)
    y = x[:, 0] % 3
    model = gl.Sequential(gl.Embedding(12, 8, padding_idx=0), gl.Flatten(), gl.Linear(48, 3))
    assert model[0](np.array([[0]]))[0, 0].any() == 0 and model[0].output_shape((None, 6)) == (None, 6, 8)
    history = model.fit(x, y, epochs=30, loss=gl.CrossEntropyLoss(), optimizer=gl.AdamW(lr=0.02), progress=False)
    assert history["loss"][-1] < 0.3 * history["loss"][0] and not model[0].weight.data[0].any()
    gl.save(model, tmp_path / "words")
    np.testing.assert_array_equal(gl.load(tmp_path / "words")(x), model(x))
    theirs = nn.Embedding(12, 8)
    model[0].load_state_dict(theirs.state_dict())
    np.testing.assert_allclose(model[0](x), theirs(torch.from_numpy(x)).detach(), rtol=1e-6)
    with pytest.raises(LabelError, match="num_embeddings = 12; got 12"):
        model(np.full((1, 6), 12))


def test_tied_layers():
    """A table that is the head's weight, too: its gradient is both's."""
    table, head = gl.Embedding(5, 3), gl.Linear(3, 5, bias=False)
    head.weight = table.weight
    model = gl.Sequential(table, head)
    y = model(np.array([[1, 1, 4]]))
    model.backward(np.ones_like(y))
    assert len(model.weights) == 1 and model.weights[0].grad[0].any() and model.weights[0].grad[1].any()
