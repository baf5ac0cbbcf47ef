import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from gpulayers.kernels.triton import embedding as _triton
from halves import check_op

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import arrays
from gpulayers.arrays import Spec
from gpulayers.definition import ArgumentError, LabelError, ShapeError, UnsupportedTypeError
from gpulayers.ops.embedding import embedding_bag
from gpulayers.testing.arena import arena
from gpulayers.testing.check_torch import check_torch
from gpulayers.testing.interpreter import interpreting


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def draw(*shape: int, high: int, dtype: str = "int64") -> np.ndarray:
    return np.random.default_rng([high, *shape]).integers(0, high, shape).astype(dtype)


OFFSETS = np.array([0, 3, 3, 9])
CALLS = {
    "sums": ([normal(6, 4), draw(11, high=6), OFFSETS], {"mode": "sum"}),
    "by factors": ([normal(6, 4), draw(2, 5, high=6, dtype="int32"), None, normal(2, 5)], {"mode": "sum"}),
    "factors of bags": (
        [normal(5, 19)[:, 1:], draw(12, high=5), np.array([0, 3, 3, 10]), normal(12)],
        {"mode": "sum", "include_last_offset": True, "padding_idx": 2},
    ),
    "strided factors": ([normal(6, 4), draw(7, high=6), OFFSETS[:3], normal(7, 2)[:, 0]], {"mode": "sum"}),
    "means": ([normal(6, 4), draw(11, high=6), OFFSETS.astype("int32")], {"padding_idx": -3}),
    "means of rows": ([normal(9, 7).T, draw(3, 6, high=7)], {"scale_grad_by_freq": True}),
    "maxima": ([normal(6, 4), draw(11, high=6), OFFSETS], {"mode": "max", "padding_idx": 1}),
    "ties": ([np.repeat(normal(1, 4), 3, 0), draw(5, 4, high=3)], {"mode": "max"}),
    "nothing": ([normal(4, 3), np.zeros(0, int), np.array([0, 0])], {"mode": "max"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_backend(name):
    inputs, options = CALLS[name]
    numeric = name in ("sums", "by factors", "maxima")
    kinds = ["transposed"] if name == "factors of bags" else ["expanded"] if name == "ties" else ["dense"]
    served = check_op(embedding_bag, *inputs, numeric=numeric, dys=kinds, **options)
    assert {"definition", "numpy", "triton"} <= set(served)


def test_long_bags_of_few_rows():
    """Whole chunks of a row's terms, in every mode."""
    weight, indices = normal(3, 8), np.where(draw(150, high=9) < 7, 1, draw(150, high=3))
    for mode, dtype in (("sum", "bfloat16"), ("max", "float16")):
        given = [weight, indices, np.array([0, 70, 149])] + ([normal(150)] if mode == "sum" else [])
        check_op(embedding_bag, *given, dtypes=[dtype], dys=["dense"], mode=mode)


def test_on_a_gpu_what_lies_before_the_first_bag_belongs_to_none():
    """Where nobody looks at offsets first."""
    weight, indices = normal(6, 4).astype("f4"), draw(7, high=6)
    for mode in ("sum", "mean"):
        with interpreting(), arena("triton"):
            y, call = embedding_bag.record(weight, indices, np.array([2, 5]), mode=mode)
            dweight, *_ = call.backward(np.ones_like(y))
        true, call = embedding_bag.record(weight, indices[2:], np.array([0, 3]), mode=mode)
        np.testing.assert_allclose(y, true, rtol=1e-5)
        np.testing.assert_allclose(dweight, call.backward(np.ones_like(y))[0], rtol=1e-5)


def test_what_is_refused():
    """Gradients of tables, or with indices, that 32 bits don't count."""
    few = Spec((4, 2), arrays.float32), Spec((3, 5), arrays.dtype("int64"))
    for weight, indices, many in (
        (*few, False),
        (few[0]._replace(shape=(2**31, 2)), few[1], True),
        (few[0], few[1]._replace(shape=(2**16, 2**15)), True),
    ):
        for refuses in (_triton.embedding_refuses, _triton.embedding_bag_refuses):
            for needs in ((), ("weight",)):
                assert (refuses(weight, indices, needs=needs) == _triton.REFUSALS["sorted"]) == (many and needs != ())


SHAPES = [((4, 3), None), ((11,), [0, 3, 3, 8]), ((6,), [0, 2, 2, 6])]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_drop_in_is_torchs(mode, dtype):
    for (shape, offsets), padding in itertools.product(SHAPES, (None, 2)):
        options = {"mode": mode, "padding_idx": padding, "include_last_offset": shape == (6,), "max_norm": 2.0}
        ours, theirs = (m.EmbeddingBag(5, 3, **options).to(dtype) for m in (gt, nn))
        ours.load_state_dict(theirs.state_dict())
        given = [torch.from_numpy(draw(*shape, high=5)), None if offsets is None else torch.tensor(offsets)]
        if mode == "sum":
            given.append(torch.randn(shape, dtype=dtype))
        assert not check_torch(ours, theirs, given)


def test_a_rows_gradient_by_how_often_it_occurs():
    """Held against embedding: torch's own embedding_bag counts another row on the CPU."""
    weight, indices = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.from_numpy(draw(4, 3, high=5))
    dy = torch.randn(4, 3, dtype=torch.float64)
    bags = gt.functional.embedding_bag(indices, weight, mode="mean", scale_grad_by_freq=True)
    rows = F.embedding(indices, weight, scale_grad_by_freq=True).mean(1)
    torch.testing.assert_close(bags, rows)
    torch.testing.assert_close(*(torch.autograd.grad(y, weight, dy)[0] for y in (bags, rows)))


WRONG = [
    ((normal(4, 3), np.zeros(3, int)), {}, ArgumentError, "offsets.shape = (B,) where indices.shape = (N,)"),
    ((normal(4, 3), np.zeros((3, 2), int), OFFSETS), {}, ArgumentError, "None where indices.shape = (B, L)"),
    ((normal(4, 3), np.zeros((3, 2, 1), int)), {}, ArgumentError, "indices.shape = (N,) with offsets, or (B, L)"),
    ((normal(4, 3), np.zeros(3, int), np.ones(1)), {}, ShapeError, "offsets: the rule is an integer dtype"),
    (
        (normal(4, 3), np.zeros(3, int), np.array([1])),
        {},
        ShapeError,
        "0 = offsets[0] ≤ offsets[1] ≤ … ≤ N = 3; got [1]",
    ),
    ((normal(4, 3), np.zeros(3, int), np.array([0, 4])), {}, ShapeError, "got [0, 4]"),
    ((normal(4, 3), np.zeros(3, int), np.array([0, 2, 1])), {}, ShapeError, "got [0, 2, 1]"),
    ((normal(4, 3), np.full(3, 4), np.array([0])), {}, LabelError, "0 ≤ index < num_embeddings = 4; got 4"),
    ((normal(4, 3), np.zeros((2, 2), int)), {"mode": "min"}, ArgumentError, "one of sum, mean, max"),
    (
        (normal(4, 3), np.zeros((2, 2), int), None, normal(2, 2)),
        {},
        UnsupportedTypeError,
        'None where mode is not "sum"',
    ),
    ((normal(4, 3), np.zeros((2, 2), int), None, normal(4)), {"mode": "sum"}, ShapeError, "= indices.shape = [2, 2]"),
    ((normal(4, 3), np.zeros((2, 2), int)), {"mode": "max", "scale_grad_by_freq": True}, ArgumentError, 'is "max"'),
    ((normal(4, 3), np.zeros((2, 2), int)), {"include_last_offset": True}, ArgumentError, "False where"),
    ((normal(4, 3), np.zeros(2, int), np.zeros(0, int)), {"include_last_offset": True}, ShapeError, "(B + 1,)"),
]


@pytest.mark.parametrize("inputs, options, error, text", WRONG)
def test_errors(inputs, options, error, text):
    with pytest.raises(error) as raised:
        embedding_bag(*inputs, **options)
    assert text in str(raised.value) and str(raised.value).startswith("embedding_bag: ")


def test_a_layer_of_bags(tmp_path):
    """Rows of bags, and offsets with factors; torch's names of weights; saved and loaded."""
    layer, theirs = gl.EmbeddingBag(6, 3, "sum", 1, include_last_offset=True), nn.EmbeddingBag(6, 3)
    assert not layer.weight.data[1].any() and layer.output_shape((None, 4)) == (None, 3)
    layer.load_state_dict(theirs.state_dict())
    x, offsets, factors = np.array([0, 1, 5, 5]), np.array([0, 3, 4]), normal(4).astype("float32")
    rows = theirs.weight.detach().numpy()[x] * np.where(x == 1, 0, factors)[:, None]
    y = layer(x, offsets, factors)
    np.testing.assert_allclose(y, [rows[:3].sum(0), rows[3]], rtol=1e-6)
    assert layer.output_shape((4,), (3,)) == y.shape
    found = layer.backward(np.ones_like(y))
    assert found[:2] == (None, None)
    np.testing.assert_allclose(found[2], theirs.weight.detach().numpy()[x].sum(1) * (x != 1), rtol=1e-5)
    np.testing.assert_allclose(layer.weight.grad[5], factors[2:].sum().repeat(3), rtol=1e-6)
    model = gl.Sequential(gl.EmbeddingBag(12, 8, "max"), gl.Linear(8, 3))
    x = draw(20, 4, high=12)
    history = model.fit(x, x.max(1) % 3, epochs=20, optimizer=gl.AdamW(lr=0.05), progress=False)
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    gl.save(model, tmp_path / "bags")
    again = gl.load(tmp_path / "bags")
    np.testing.assert_array_equal(again(x), model(x))
    assert repr(again[0]) == repr(model[0])
