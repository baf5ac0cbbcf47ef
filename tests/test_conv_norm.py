"""Convolution, batch norm, + residual and activation as one op, against its definition; and what its launches save."""

import numpy as np
import pytest
from test_norm import draw, running

from gpulayers.arrays import bfloat16
from gpulayers.ops.conv import conv
from gpulayers.ops.norm import batch_norm, conv_batch_norm
from gpulayers.testing.arena import arena
from gpulayers.testing.check_op import check_op

pytest.importorskip("triton")
torch = pytest.importorskip("torch")
from gpulayers.kernels.triton import _tile  # noqa: E402

from gpulayers.testing.interpreter import interpreting  # noqa: E402

C = 4
HOPPER = _tile.Device(90, 2, 232448)


def given(
    added: bool, *, x: tuple = (2, 3, 3, 4), channels: int = C, kernel: tuple = (2, 1), order=lambda a: a
) -> list:
    """x, weight, bias, gamma, beta, running statistics and residual, where the convolution keeps x's sizes but one."""
    sizes = [n + 2 - k + 1 if k > 1 else n for n, k in zip(x[2:], kernel)]
    residual = order(draw(x[0], channels, *sizes, seed=5)) if added else None
    vectors = draw(channels, seed=1), draw(channels, seed=2), draw(channels, seed=3) - 1
    return [order(draw(*x)), order(draw(channels, x[1], *kernel)), *vectors, *running(channels), residual]


PADDING = {"padding": (1, 0)}


@pytest.mark.parametrize("activation, added", [("relu", True), ("silu", True), (None, False)])
@pytest.mark.parametrize("training", [True, False])
def test_by_definition(activation, added, training):
    options = dict(training=training, activation=activation, backends=("definition",), dys=["dense"], **PADDING)
    check_op(conv_batch_norm, *given(added), numeric=True, dtypes=["float64", "float16"], **options)
    x, weight, *_, residual = given(added)
    none = [None] * 5
    check_op(conv_batch_norm, x, weight, *none, residual, dtypes=["bfloat16"], **options)


@pytest.mark.parametrize("shape, kernel, options", [((2, 2, 5), (2,), {"stride": 2}), ((1, 2, 2, 3, 2), (1, 2, 1), {})])
def test_other_axes_and_options(shape, kernel, options):
    """A sequence and a volume; each by the batch's own statistics."""
    weight = draw(C, 1, *kernel)
    options = dict(groups=2, dtypes=["float32"], dys=["dense"], activation="relu", **options)
    ran = check_op(conv_batch_norm, draw(*shape), weight, None, draw(C), None, training=True, **options)
    assert {"aten", "numpy", "triton", "definition"} == set(ran)


@pytest.mark.parametrize("training", [True, False])
def test_in_kernels(training):
    """Both memory orders; float32 gamma, beta and statistics with 16-bit images."""
    options = dict(training=training, activation="relu", dys=["dense"], **PADDING)
    ran = check_op(conv_batch_norm, *given(True), dtypes=["float32", "bfloat16" if training else "float16"], **options)
    assert {"aten", "numpy", "triton", "definition"} == set(ran)
    x, weight, bias, *vectors, residual = given(True, order=_last)
    half = [a.astype(bfloat16) for a in (x, weight, bias)]
    wide = [a.astype(np.float32) for a in vectors]
    check_op(conv_batch_norm, *half, *wide, residual.astype(bfloat16), dtypes=["float32"], **options)


def test_a_gradient_that_is_added_to_dx():
    """Of what else read x; on every backend, and where the wrong number of them came."""
    x, weight, *rest = given(True, order=_last)
    options = dict(training=True, activation="relu", joined=True, dys=["dense"], needs=["x", "gamma"], **PADDING)
    ran = check_op(conv_batch_norm, x, weight, *rest, dtypes=["float32", "float16"], **options)
    assert {"aten", "numpy", "triton", "definition"} == set(ran)
    y, call = conv_batch_norm.record(x, weight, needs=["x"], training=True, **PADDING)
    (plain, *_), (both, *_) = call.backward(np.ones_like(y)), call.backward(np.ones_like(y), x)
    assert np.array_equal(both, plain + x)
    for wrong in ((), (y, x, x), (y, y)):
        with pytest.raises(RuntimeError, match=r"backward takes one dy|dy of x"):
            call.backward(*wrong)


def _last(a: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)


@pytest.mark.parametrize("half, activation, added", [("bfloat16", "relu", True), ("float16", "silu", False)])
def test_on_tiles(half, activation, added):
    """Where the convolution takes the moments along, nothing else reads its result for them."""
    x, weight, *vectors, residual = given(added, x=(3, 32, 3, 3), channels=40, kernel=(1, 1), order=_last)
    options = dict(training=True, activation=activation, backends=["triton"], dtypes=[half], dys=["dense"])
    needs = ["x", "gamma", "residual"] if added else ["weight", "beta"]
    with interpreting(HOPPER) as session:
        check_op(conv_batch_norm, x, weight / 8, *vectors, residual, needs=needs, **options)
    names = [launch.kernel for launch in session.launches]
    assert "_conv_tiles_kernel" in names and "_batch_norm_moments_kernel" not in names


def statistics(op_of_both: bool, backend: str, arrays: list, **options) -> list:
    """Running mean and variance after one call of the op, or of conv and then batch_norm."""
    with arena(backend) as room:
        x, weight, bias, *vectors, residual = room.put([None if a is None else a.copy(order="K") for a in arrays])
        if op_of_both:
            conv_batch_norm(x, weight, bias, *vectors, residual, training=True, activation="relu", **options)
        else:
            batch_norm(conv(x, weight, bias, **options), *vectors, residual, training=True, activation="relu")
        return [room.get(a) for a in vectors[2:]]


@pytest.mark.parametrize("backend", ["definition", "numpy", "triton"])
def test_running_statistics_are_those_of_both_ops(backend):
    """Bit for bit."""
    arrays = [None if a is None else a.astype(np.float32) for a in given(True)]
    both, apart = (statistics(which, backend, arrays, **PADDING) for which in (True, False))
    assert [a.tobytes() for a in both] == [a.tobytes() for a in apart] != [a.tobytes() for a in arrays[5:7]]


def test_running_statistics_of_tiles():
    """In 16 bits on sm_90 the same rounded numbers are summed, tile by tile in the place of row by row: float32 rounding
    alone tells them from batch norm's, and it is within the bound that holds for those."""
    x, weight, *vectors, residual = given(True, x=(5, 32, 5, 5), channels=40, kernel=(1, 1), order=_last)
    half = [a.astype(bfloat16) for a in (x, weight / 8, vectors[0] + 30)]
    arrays = [*half, *[a.astype(np.float32) for a in vectors[1:]], residual.astype(bfloat16)]
    with interpreting(HOPPER) as session:
        both, apart = (statistics(which, "triton", arrays) for which in (True, False))
    assert [run.kernel for run in session.launches].count("_batch_norm_moments_kernel") == 1
    with interpreting(HOPPER), arena("triton") as room:
        c = room.get(conv(*room.put(half))).astype(np.float64)
    mean, var = c.mean((0, 2, 3)), c.var((0, 2, 3), ddof=1)
    eps = np.finfo(np.float32).eps
    for found in (both, apart):
        for running_now, before, batch, size in zip(found, arrays[5:7], (mean, var), (abs(mean), var)):
            assert (abs(running_now - (0.9 * before + 0.1 * batch)) <= 4 * eps * (abs(before) + size)).all()


def test_what_a_frozen_convolution_saves():
    """Neither x nor the weight, of which no gradient hangs."""
    arrays = given(False)
    for needs, kept in ((["gamma"], set()), (["x"], {"x", "weight"}), (["bias"], {"x", "weight", "bias"})):
        _, call = conv_batch_norm.record(*arrays, needs=needs, training=True, **PADDING)
        assert set(call.saved) == kept | {"conv", "mean", "rstd", "gamma"}


@pytest.mark.parametrize(
    "wrong, argument",
    [
        ({"gamma": (3,)}, "gamma"),
        ({"beta": (5,)}, "beta"),
        ({"residual": (2, C, 1, 1)}, "residual"),
        ({"bias": (3,)}, "bias"),
    ],
)
def test_errors_name_our_arguments(wrong, argument):
    names = conv_batch_norm.inputs
    arrays = [np.ones(wrong[n]) if n in wrong else a for n, a in zip(names, given(True))]
    with pytest.raises(RuntimeError, match=f"^conv_batch_norm: {argument}: the rule is"):
        conv_batch_norm(*arrays, training=True, **PADDING)


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_a_bias(training):
    """In training 0, which is what it is; by running statistics gamma · rstd · Σ dz. As launched for a large GPU."""
    arrays = [None if a is None else a.astype(np.float32) for a in given(False)]
    with interpreting(_tile.Device(90, 132, 232448), races=False), arena("triton") as room:
        there = room.put(arrays)
        y, call = conv_batch_norm.record(*there, needs=["bias"], training=training, **PADDING)
        (dbias,) = (room.get(g) for g in call.backward(np.ones(y.shape, np.float32)) if g is not None)
    wanted = 0 if training else arrays[3] / np.sqrt(arrays[6] + 1e-5) * (y.size / C)
    np.testing.assert_allclose(dbias, wanted, rtol=1e-5)
