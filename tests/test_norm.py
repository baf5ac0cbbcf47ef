import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from gpulayers.kernels.cuda import _launch
from gpulayers.kernels.triton import _batch_norm, _configs, _tile
from halves import check_op

from gpulayers.arrays import bfloat16
from gpulayers.ops.norm import batch_norm, layer_norm, rms_norm
from gpulayers.testing.arena import arena
from gpulayers.testing.emulator import emulating
from gpulayers.testing.interpreter import interpreting

torch = pytest.importorskip("torch")
F = torch.nn.functional


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape) * 2 + 1


def running(channels: int) -> tuple[np.ndarray, np.ndarray]:
    return draw(channels, seed=3), np.abs(draw(channels, seed=4)) + 0.5


def last(x: np.ndarray) -> np.ndarray:
    """x in channels-last memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


# --- the definitions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x, tail", [((3, 5), 1), ((2, 3, 4), 2), ((4,), 1), ((0, 3), 1), ((3, 0), 1), ((1, 1), 1)])
def test_rows_by_definition(x, tail):
    shape = x[-tail:]
    weights = draw(*shape, seed=1), draw(*shape, seed=2)
    check_op(layer_norm, draw(*x), *weights, normalized_shape=shape, numeric=True)
    check_op(layer_norm, draw(*x), normalized_shape=shape, eps=0.1, numeric=True)
    check_op(rms_norm, draw(*x), weights[0], normalized_shape=shape, numeric=True)
    check_op(rms_norm, draw(*x), normalized_shape=shape, eps=0.1, numeric=True)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2, 3, 2, 2), (0, 3, 2), (1, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_channels_by_definition(shape, training):
    channels = shape[1]
    x, weights = draw(*shape), (draw(channels, seed=1), draw(channels, seed=2))
    check_op(batch_norm, x, *weights, *running(channels), training=training, numeric=True)
    check_op(batch_norm, x, training=training, eps=0.1, numeric=True)
    check_op(batch_norm, last(x), weights[0], None, *running(channels), training=training, momentum=0.3)


def test_the_numpy_kernel_takes_both_memory_orders():
    x = draw(2, 3, 4, 5)
    for given in (x, last(x)):
        assert "numpy" in check_op(batch_norm, given, *running(3), dtypes=["float32"], dys=["dense"])


def test_what_torch_has_the_gradients_of():
    """Of batch norm in training, and of what batches alone tell; not of evaluation."""
    for given, training, served in ((running(3), True, True), ((), False, True), (running(3), False, False)):
        ran = check_op(batch_norm, draw(2, 3, 4, 5), None, None, *given, training=training, dtypes=["float32"])
        assert ("aten" in ran) == served
    assert "aten" in check_op(batch_norm, draw(2, 3, 4, 5), None, None, *running(3), needs=[], dtypes=["float32"])


@pytest.mark.parametrize("training", [True, False])
def test_strided_statistics(training):
    """Weights and running statistics with gaps between their elements."""
    weight, bias, mean, variance = (a.repeat(2)[::2] for a in (draw(3, seed=1), draw(3, seed=2), *running(3)))
    check_op(batch_norm, draw(4, 3, 5), weight, bias, mean, variance, training=training, dtypes=["float32"])


# --- the definitions against torch -----------------------------------------------------------------------------------


def against_torch(op, inputs, theirs, needs, **options):
    """Output, gradients and what is updated, in float64; torch's function takes the inputs."""
    tensors = [None if a is None else torch.tensor(a) for a in inputs]
    for name, t in zip(op.inputs, tensors):
        if name in needs and t is not None:
            t.requires_grad_()
    true = theirs(*tensors)
    y, call = op.record(
        *inputs, needs=[n for n, a in zip(op.inputs, inputs) if n in needs and a is not None], **options
    )
    dy = draw(*y.shape, seed=9)
    true.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, true.detach(), rtol=1e-11, atol=1e-11)
    for a, g, t in zip(inputs, call.backward(dy), tensors):
        if g is not None:
            np.testing.assert_allclose(g, t.grad, rtol=1e-9, atol=1e-10)
        elif a is not None:  # updated, or not
            np.testing.assert_allclose(a, t, rtol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_rows_are_torchs(affine):
    x, w, b = draw(3, 4, 5), draw(4, 5, seed=1), draw(4, 5, seed=2)
    given, needs = (x, w, b) if affine else (x,), ("x", "weight", "bias")
    options = dict(normalized_shape=(4, 5), eps=0.01)
    against_torch(layer_norm, given, lambda x, *p: F.layer_norm(x, (4, 5), *p, eps=0.01), needs, **options)
    against_torch(rms_norm, given[:2], lambda x, *p: F.rms_norm(x, (4, 5), *p), needs, normalized_shape=(4, 5))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_epsilon_of_rms_norm_is_torchs(dtype):
    """None is the epsilon of the dtype that is computed in, not of x's."""
    small = torch.full((1, 4), 1e-4).to(getattr(torch, dtype))
    ours = rms_norm(small, normalized_shape=4)
    torch.testing.assert_close(ours, F.rms_norm(small, (4,)), rtol=1e-2 if dtype[:5] != "float" else 1e-3, atol=0)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2, 3, 2, 2), (0, 3, 2)])
@pytest.mark.parametrize("training, tracked", [(True, True), (True, False), (False, True)])
def test_channels_are_torchs(shape, training, tracked):
    channels = shape[1]
    stats = running(channels) if tracked else (None, None)
    given = (draw(*shape), draw(channels, seed=1), draw(channels, seed=2), *stats)

    def theirs(x, w, b, m, v):
        return F.batch_norm(x, m, v, w, b, training=training, momentum=0.3)

    needs = ("x", "weight", "bias")
    against_torch(batch_norm, given, theirs, needs, training=training, momentum=0.3)


# --- the smallest rows -----------------------------------------------------------------------------------------------


def computed(backend: str, op, inputs, dy, fused=False, **options) -> list[np.ndarray]:
    """The output and the gradients of one backend; fused: products go unrounded into sums, as on a GPU."""
    with interpreting(fused=fused) if fused else contextlib.nullcontext(), arena(backend) as room:
        y, call = op.record(*room.put(inputs), **options)
        return [room.get(a) for a in (y, *call.backward(*room.put([dy])))]


WAYS = [("definition", False), ("numpy", False), ("cuda", False), ("triton", False), ("triton", True)]


@pytest.mark.parametrize("n", [768, 700])
def test_rows_in_two_pieces(n):
    """Of 512 and 256 elements, all of them there or not; more rounds of rows than one."""
    options = dict(normalized_shape=(n,), dtypes=["bfloat16"], dys=["dense"])
    with interpreting() as session:
        assert "triton" in check_op(layer_norm, draw(9, n), draw(n, seed=1), draw(n, seed=2), **options)
        check_op(rms_norm, draw(9, n), draw(n, seed=1), **options)
    launched = [each for each in session.launches if each.kernel == "_norm_backward_kernel"]
    assert {(each.constexprs["HEAD"], each.constexprs["TAIL"]) for each in launched} == {(512, 256)}


@pytest.mark.parametrize("backend, fused", WAYS)
@pytest.mark.parametrize("mean", [0, 4096])
def test_a_row_of_one_has_no_gradient(backend, fused, mean):
    """g − mean(g) is 0 only where both are one number: a product that goes unrounded into the difference is another."""
    x, weight, bias, dy = (
        a.astype(np.float32) for a in (draw(8, 1) + mean, draw(1, seed=1), draw(1, seed=2), draw(8, 1))
    )
    given = computed(backend, layer_norm, (x, weight, bias), dy, fused, normalized_shape=(1,))
    for got, true in zip(given, (np.broadcast_to(bias, (8, 1)), 0 * dy, 0 * weight, dy.sum(0))):
        np.testing.assert_allclose(got, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend, fused", WAYS)
@pytest.mark.parametrize("n", [2, 3])
def test_a_row_of_equal_numbers_is_its_mean(backend, fused, n):
    """Times 1 / n, or divided roughly, it would miss the mean by a bit, and 1 / √eps makes that much."""
    x = np.repeat(np.array([[4097.3], [0.1], [-65537.7]], np.float32), n, 1)
    weight, bias = draw(n, seed=1).astype(np.float32), draw(n, seed=2).astype(np.float32)
    y, *_ = computed(backend, layer_norm, (x, weight, bias), np.ones_like(x), fused, normalized_shape=(n,))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))


@pytest.mark.parametrize("op", [layer_norm, rms_norm, batch_norm])
@pytest.mark.parametrize("mean", [0, 4096])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_smallest_rows(op, n, mean):
    x, weights = draw(8, n) + mean, [draw(n, seed=1), draw(n, seed=2)]
    options = dict(normalized_shape=(n,))
    if op is batch_norm:
        x, weights, options = (
            np.ascontiguousarray(draw(n + 1, 8) + mean),
            [draw(8, seed=1), draw(8, seed=2)],
            dict(training=True),
        )
    given = weights[: 1 if op is rms_norm else 2]
    check_op(op, x, *given, dtypes=["float32"], dys=["dense"], **options)
    with interpreting(fused=True):
        check_op(op, x, *given, dtypes=["float32"], dys=["dense"], backends=("triton",), **options)


@pytest.mark.parametrize("op", [layer_norm, rms_norm, batch_norm])
def test_a_large_mean_costs_no_precision(op):
    """Two-pass statistics: E[x²] − E[x]² would have lost every digit here."""
    x = (draw(4, 600, seed=8) + 4096).astype(np.float32)
    options = dict(training=True) if op is batch_norm else dict(normalized_shape=(600,))
    if op is batch_norm:
        x = np.ascontiguousarray(x.T)
    check_op(op, x, dtypes=["float32"], **options)


# --- the kernels, branch by branch -----------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Names of the Triton kernels that were launched; which, depends on the multiprocessors: here on every GPU 4."""
    names, device = set(), _tile.device
    monkeypatch.setattr(_tile, "device", lambda x: device(x)._replace(sms=4))

    def note(kernel, grid, *args, **options):
        names.add(kernel.fn.__name__)
        plain(kernel, grid, *args, **options)

    plain = _tile.launch
    monkeypatch.setattr(_tile, "launch", note)
    return names


def rows(m: int, n: int, **options) -> None:
    check_op(layer_norm, draw(m, n), draw(n, seed=1), draw(n, seed=2), normalized_shape=(n,), **options)
    check_op(rms_norm, draw(m, n), draw(n, seed=1), normalized_shape=(n,), **options)


def test_short_rows(launched):
    """Several rows a program, in whole pieces, one row a program, more programs than rows, rows that 8 divides but not 16."""
    for m, n in ((70, 24), (5, 384), (3, 2100)):
        rows(m, n, dys=["dense", "transposed"])
    check_op(
        layer_norm, draw(8, 60)[::2, :24], draw(24), normalized_shape=(24,), dtypes=["float32", "float16", "bfloat16"]
    )
    ours = {"_norm_forward_kernel", "_norm_backward_kernel", "_norm_finalise_kernel"}
    assert launched == ours | {"_copy_kernel"}


@pytest.fixture
def short_blocks():
    """Every row counts as long, and is walked 32 elements at a time."""
    with contextlib.ExitStack() as stack:
        for direction in ("norm_forward", "norm_backward"):
            stack.enter_context(_configs.forced(direction, None))
            stack.enter_context(_configs.forced(f"{direction}.walked", _configs.Row(None, 32, 8)))
        yield


def test_long_rows(launched, short_blocks):
    """Enough rows for a program each."""
    rows(9, 150, dys=["dense", "transposed"])
    assert {"_norm_forward_looped_kernel", "_norm_sums_kernel", "_norm_backward_columns_kernel"} <= launched
    assert "_norm_moments_kernel" not in launched


def test_few_long_rows(launched, short_blocks):
    """Several programs share a row."""
    rows(2, 300, dys=["dense", "expanded"])
    check_op(layer_norm, draw(1, 130), normalized_shape=(130,), dys=["dense"])
    assert {"_norm_moments_kernel", "_norm_forward_split_kernel", "_norm_backward_columns_kernel"} <= launched


def test_rows_with_float32_weights():
    """Mixed precision: 16-bit x, float32 weights and their gradients."""
    w, b = draw(40, seed=1).astype(np.float32), draw(40, seed=2).astype(np.float32)
    for dtype in (np.float16, bfloat16):
        x = draw(6, 40).astype(dtype)
        assert "triton" in check_op(layer_norm, x, w, b, normalized_shape=(40,), dtypes=["float32"])
        check_op(rms_norm, x, w, normalized_shape=(40,), dtypes=["float32"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(70, 40), (3, 5, 6, 7), (40, 3, 2), (2, 3, 1200)],
    ids=["matrix", "images", "many short rows", "long rows"],
)
def test_channels(shape, training, launched):
    """Both memory orders; several programs a channel."""
    c = shape[1]
    weights = draw(c, seed=1), draw(c, seed=2)
    options = dict(training=training, dys=["dense", "transposed"])
    assert "triton" in check_op(batch_norm, draw(*shape), *weights, *running(c), **options)
    if len(shape) > 2:
        half = "float16" if training else "bfloat16"
        check_op(batch_norm, last(draw(*shape)), *weights, *running(c), **options, dtypes=["float32", half])
    assert ("_batch_norm_moments_kernel" in launched) == training
    assert "_batch_norm_sums_kernel" in launched


def test_channels_of_strided_images_with_float32_weights():
    x = draw(4, 6, 5, 3)[::2, :, 1:]
    check_op(batch_norm, x, training=True, dys=["dense"])
    w, b, m, v = (a.astype(np.float32) for a in (draw(6, seed=1), draw(6, seed=2), *running(6)))
    check_op(batch_norm, x.astype(bfloat16), w, b, m, v, training=True, dys=["dense"], dtypes=["float32"])


def test_shares_are_merged_in_blocks(monkeypatch):
    """More programs a channel than one block of partial results holds: 16 for a GPU of 5 multiprocessors."""
    monkeypatch.setattr(_tile, "device", lambda x: _tile.Device(90, 5, 232448))
    assert _batch_norm._Walk(_batch_norm.FORWARD, torch.empty(40000, 2), None).shares > 16
    check_op(batch_norm, draw(40000, 2), training=True, dtypes=["float32"], dys=["dense"])


def test_layer_norm_in_cuda(monkeypatch):
    """Packs and single elements, rows in shared memory and longer ones, more rows than blocks, float32 weights."""
    from gpulayers.kernels.cuda import norm as cuda

    def check(x, *parameters, dtypes=("float32", "float16", "bfloat16")):
        n = x.shape[-1]
        with emulating() as session:
            check_op(layer_norm, x, *parameters, normalized_shape=(n,), backends=("cuda",), dtypes=dtypes)
        return {run.kernel.split("_", 3)[3] for run in session.launches if run.kernel.startswith("layer")}

    pairs = [f"{d}_{d}" for d in ("float32", "float16", "bfloat16")]
    given = draw(24, seed=1), draw(24, seed=2)
    assert check(draw(7, 24), *given) == {f"{p}_packs" for p in pairs}
    assert check(draw(7, 37)) == {f"{p}_items" for p in pairs}
    check(draw(8, 48)[::2, :24], *given)
    check(draw(0, 8), draw(8), draw(8))
    mixed = (a.astype(np.float32) for a in given)
    # NumPy aligns to 16 bytes; packs of eight float32 weights need 32, so either may run.
    assert check(draw(7, 24).astype(bfloat16), *mixed, dtypes=["float32"]) <= {
        f"bfloat16_float32_{m}" for m in ("packs", "items")
    }
    monkeypatch.setattr(cuda, "CACHED", 100)
    check(draw(5, 300), draw(300), draw(300, seed=2))


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_any_number_of_blocks_in_cuda(blocks, monkeypatch):
    """Shares of Σ dy x̂ from as many blocks as the GPU holds; a GPU has hundreds."""
    monkeypatch.setattr(_launch, "EMULATED_BLOCKS", blocks)
    with emulating() as session:
        given = draw(11, 24), draw(24, seed=1), draw(24, seed=2)
        check_op(layer_norm, *given, normalized_shape=(24,), backends=("cuda",), dtypes=["float32"], dys=["dense"])
    assert {run.grid[0] for run in session.launches if "backward" in run.kernel} == {blocks}


def test_blocks_that_fill_a_gpu(monkeypatch):
    """As many as its multiprocessors hold: 1,024 threads each, eight blocks at most."""
    monkeypatch.setattr(_launch, "_sms", {0: 132, 1: 148}.__getitem__)
    x = SimpleNamespace(device=SimpleNamespace(id=0))
    assert [_launch.resident_blocks(x, threads) for threads in (1024, 512, 256, 64)] == [132, 264, 528, 1056]
    x.device.id = 1
    assert _launch.resident_blocks(x, 512) == 296


# --- errors ----------------------------------------------------------------------------------------------------------

X = draw(3, 4)
W = draw(4)
TAIL = dict(normalized_shape=(4,))
WRONG = {
    "tail": (layer_norm, (X,), dict(normalized_shape=(5,)), RuntimeError, "x.shape = (…, *normalized_shape) = (…, 5)"),
    "rank": (layer_norm, (W,), dict(normalized_shape=(3, 4)), RuntimeError, "= (…, 3, 4); got [4]"),
    "nothing": (layer_norm, (X,), dict(normalized_shape=()), RuntimeError, "at least one size"),
    "weight": (layer_norm, (X, W[:3]), TAIL, RuntimeError, "weight.shape = normalized_shape = [4]; got [3]"),
    "dtype": (rms_norm, (X, W.astype("f4")), TAIL, RuntimeError, "weight.dtype = x.dtype, or float32 for 16-bit x"),
    "dtypes": (
        layer_norm,
        (X.astype(bfloat16), W.astype(bfloat16), W.astype("f4")),
        TAIL,
        RuntimeError,
        "bias.dtype = weight.dtype",
    ),
    "kind": (rms_norm, (X.astype(int),), TAIL, NotImplementedError, "dtype ∈"),
    "channels": (batch_norm, (W,), {}, ValueError, "x.shape = (N, C, *spatial)"),
    "one value": (batch_norm, (X[:1],), dict(training=True), ValueError, "more than one value per channel"),
    "one statistic": (batch_norm, (X, None, None, W), {}, ValueError, "both or neither"),
    "residual": (batch_norm, (X, None, None, None, None, X[:1]), {}, RuntimeError, "residual.shape = x.shape = [3, 4]"),
    "activation": (batch_norm, (X,), dict(activation="swish"), ValueError, "activation ∈ {None, relu,"),
    "statistics": (batch_norm, (X, None, None, W[:2], W[:2]), {}, RuntimeError, "running_mean.shape = (C,) = [4]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    op, inputs, options, error, text = WRONG[case]
    with pytest.raises(error) as raised:
        op(*inputs, **options)
    assert str(raised.value).startswith(f"{op.name}: ")
    assert text in str(raised.value)
