import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpulayers.bench.judging import predicted_linear
from gpulayers.kernels.triton import _matmul, _tile
from halves import check_op

import gpulayers as gl
from gpulayers.ops.activation import ACTIVATIONS
from gpulayers.ops.linear import linear
from gpulayers.testing.arena import arena
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.interpreter import interpreting

THEIRS = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "relu6": F.relu6,
    "relu_squared": lambda z: F.relu(z).square(),
    "hardtanh": F.hardtanh,
    "hardsigmoid": lambda z: F.relu6(z + 3) / 6,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "celu": F.celu,
    "selu": F.selu,
}
EVERY = pytest.mark.parametrize("activation", THEIRS)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def test_every_activation_is_known():
    assert set(THEIRS) == {None, *ACTIVATIONS}


@EVERY
def test_definition_is_torch(activation):
    x, w, b, dy = draw(2, 3, 5), draw(4, 5), draw(4), draw(2, 3, 4)
    y, call = linear.record(x, w, b, activation=activation)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, w, b)]
    theirs = THEIRS[activation](F.linear(*tensors))
    theirs.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=1e-12, atol=1e-14)
    for mine, t in zip(call.backward(dy), tensors):
        np.testing.assert_allclose(mine, t.grad.numpy(), rtol=1e-12, atol=1e-14)


@EVERY
def test_activations(activation):
    served = check_op(linear, draw(3, 5), draw(4, 5), draw(4), activation=activation, numeric=True)
    assert {"definition", "numpy", "triton"} <= set(served)


def test_shapes():
    """No leading dimension, several, none of a kind, one element; without bias."""
    for shape in [(5,), (2, 1, 3, 5), (0, 5), (3, 0, 5)]:
        check_op(linear, draw(*shape), draw(4, 5), draw(4))
    check_op(linear, draw(3, 5), draw(4, 5), None)
    check_op(linear, draw(3, 0), draw(4, 0), draw(4), dys=["dense"])
    check_op(linear, draw(3, 5), draw(0, 5), draw(0), dys=["dense"])
    check_op(linear, draw(1, 1), draw(1, 1), draw(1))


def test_layouts():
    """Transposed and strided x and weight."""
    check_op(linear, draw(5, 7).T, draw(5, 4).T, draw(4), activation="silu")
    check_op(linear, draw(8, 14)[::2, ::2], draw(4, 14)[:, :7], draw(8)[::2])
    check_op(linear, draw(2, 5, 3).transpose(0, 2, 1), draw(4, 5), draw(4))


def test_split_products():
    """Few tiles and a long K: partial sums and a second stage, with the epilogue there, in every gradient too."""
    short = {"dys": ["dense"], "dtypes": ["float32", "float16", "bfloat16"]}
    check_op(linear, draw(8, 700), draw(5, 700), draw(5), activation="mish", **short)
    check_op(linear, draw(700, 8), draw(5, 8), draw(5), activation="relu", **short)


@pytest.mark.parametrize("arch, shared", [(90, 232448), (80, 166912), (89, 101376)])
def test_large_tiles(arch, shared):
    """Aligned shapes: TMA on sm_90, pointers before it; more tiles than programs; the activation in parts of a tile."""
    device = _tile.Device(arch, 3, shared)
    with interpreting(device) as session:
        check_op(
            linear, draw(2, 72, 96), draw(288, 96), draw(288), activation="silu",
            backends=["triton"], dtypes=["float16", "bfloat16"], dys=["dense"],
        )  # fmt: skip
    kernels = {launch.kernel for launch in session.launches}
    assert ("_matmul_tma_kernel" if arch >= 90 else "_matmul_kernel") in kernels


@pytest.mark.parametrize("wide, first", [(104, 0), (100, 0), (97, 0), (104, 1)])
def test_tma_takes_aligned_rows_only(wide, first):
    """TMA's rows start at multiples of 16 bytes: not where x is a part of rows of 200 bytes, or starts within one."""
    x = torch.tensor(draw(144, wide)).half()[:, first : first + 96]
    weight = torch.tensor(draw(80, 96)).half()
    with interpreting(_tile.Device(90, 3, 232448)) as session, arena("triton"):
        y = linear(x, weight, None)
    aligned = wide == 104 and first == 0
    assert {run.kernel for run in session.launches} == {"_matmul_tma_kernel" if aligned else "_matmul_kernel"}
    torch.testing.assert_close(y, F.linear(x.float(), weight.float()).half(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("columns", [81, 88])
def test_rows_that_descriptors_do_not_store(columns):
    """Of a length that is no multiple of 16 bytes: they are stored through pointers."""
    x, w, b = draw(72, 72), draw(columns, 72), draw(columns)
    with interpreting(_tile.Device(90, 3, 232448)) as session:
        check_op(linear, x, w, b, activation="silu", backends=["triton"], dtypes=["float16", "bfloat16"], dys=["dense"])
    stored = {
        run.constexprs["STORED"]
        for run in session.launches
        if run.constexprs.get("ACTIVATION") and "STORED" in run.constexprs
    }
    assert stored == {columns == 88}


def test_tma_takes_no_empty_rows():
    """A sum of nothing: rows of no elements, a multiple of 16 bytes apart, are no tensor that a descriptor describes."""
    x, weight = torch.ones(144, 8).half()[:, :0], torch.ones(80, 8).half()[:, :0]
    with interpreting(_tile.Device(90, 3, 232448)) as session, arena("triton"):
        y = linear(x, weight, None)
    assert {run.kernel for run in session.launches} == {"_matmul_kernel"} and (y == 0).all() and y.shape == (144, 80)


@pytest.mark.parametrize("rows, turned, splits", [(200, False, 1), (2000, False, 4), (200, True, 1)])
def test_dbias_comes_with_dweight(rows, turned, splits):
    """Its product sums dy's columns in passing, also where K is split; an activation's dz brings them by itself."""
    x, w, b, dy = (torch.tensor(draw(*shape)).bfloat16() for shape in ((rows, 72), (80, 72), (80,), (rows, 80)))
    with interpreting(_tile.Device(90, 8, 232448)) as session, arena("triton"):
        call = linear.record(x, w, b)[1]
        del session.launches[:]
        found = call.backward(dy.T.contiguous().T if turned else dy)
    finishes = ["_finish_kernel"] if splits > 1 else []
    assert [run.kernel for run in session.launches] == ["_matmul_tma_kernel"] * 2 + finishes
    for mine, theirs in zip(found, (dy.double() @ w.double(), dy.double().T @ x.double(), dy.double().sum(0))):
        torch.testing.assert_close(mine.double(), theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    "m, n, k, tile, splits",
    [(16384, 2304, 768, (128, 256), 1), (3072, 768, 16384, (128, 256), 5), (768, 768, 16384, (128, 256), 7), (64, 64, 256, (64, 128), 1)],
)  # fmt: skip
def test_the_quickest_cut(m, n, k, tile, splits):
    """K is split where tiles leave multiprocessors idle, as long as its partial sums cost less than that."""
    found = _matmul.HALF_TMA(_tile.Device(90, 132, 232448), m, n, k, 2, True, True)
    assert (found.tile[:2], found.splits) == (tile, splits)


def test_predicted_times():
    lines = predicted_linear.table(predicted_linear.HEAD, predicted_linear.lines()).splitlines()
    assert len(lines) == 2 + len(predicted_linear.LAYERS)
    for layer in predicted_linear.LAYERS:
        assert all(time > predicted_linear.limit(layer) for time in predicted_linear.predicted(layer))


def test_float32_tiles():
    check_op(linear, draw(160, 40), draw(144, 40), draw(144), activation="gelu", dtypes=["float32"], dys=["dense"])


def test_layer():
    """Weights, names and results as torch.nn.Linear's; the input size may come from the first input."""
    layer, theirs = gl.Linear(5, 3), torch.nn.Linear(5, 3)
    layer.load_state_dict(theirs.state_dict())
    x = draw(4, 5).astype(np.float32)
    np.testing.assert_allclose(layer(x), theirs(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert max(abs(layer.weight.data).max(), abs(layer.bias.data).max()) <= 5**-0.5
    check_layer(gl.Linear(5, 3, activation="gelu"), (None, 5))
    check_layer(gl.Linear(None, 3, bias=False), (2, 7, 5))
    assert gl.Sequential(gl.Linear(None, 4), gl.ReLU(), gl.Linear(None, 2)).output_shape((None, 7)) == (None, 2)


def test_errors():
    x, w, b = draw(3, 5), draw(4, 5), draw(4)
    with pytest.raises(RuntimeError, match=r"linear: x: the rule is x.shape = \[..., in\] = \[3, 5\]; got \[3, 6\]"):
        linear(draw(3, 6), w, b)
    with pytest.raises(RuntimeError, match=r"linear: bias: the rule is bias.shape = \[out\] = \[4\]; got \[5\]"):
        linear(x, w, draw(5))
    with pytest.raises(RuntimeError, match=r"linear: weight: the rule is weight\.shape"):
        linear(x, draw(5), b)
    with pytest.raises(RuntimeError, match=r"linear: x: the rule is x.shape = \[..., in\]"):
        linear(draw(), w, b)
    with pytest.raises(RuntimeError, match=r"linear: weight: the rule is weight\.dtype = x\.dtype"):
        linear(x, w.astype(np.float32), b)
    with pytest.raises(ValueError, match=r"linear: activation: the rule is activation ∈ \{None, relu"):
        linear(x, w, b, activation="swishy")
    with pytest.raises(NotImplementedError, match="linear: x: the rule is dtype"):
        linear(np.ones((3, 5), np.int64), w, b)


@pytest.fixture
def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def test_tf32_where_torch_allows_it(tf32):
    """The tensor cores compute float32 products only if torch's own setting says so."""
    with interpreting() as session, arena("triton"):
        x, w = draw(3, 5).astype(np.float32), draw(4, 5).astype(np.float32)
        _, call = linear.record(x, w)
        call.backward(draw(3, 4).astype(np.float32))
    assert {run.constexprs["PRECISION"] for run in session.launches if run.kernel != "_copy_kernel"} == {"tf32"}
