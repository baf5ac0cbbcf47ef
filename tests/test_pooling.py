import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op
from pooling_calls import compare_with_torch, draw

import gpulayers as gl
from gpulayers.arrays import FLOATS, Spec, float32
from gpulayers.definition import KindError, ShapeError, UnsupportedTypeError
from gpulayers.inventory import backends_of
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.testing.arena import arena
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.emulator import emulating
from gpulayers.testing.interpreter import interpreting

WINDOWS = [
    ((2, 3, 6, 6), {"kernel_size": 2}),
    ((2, 3, 7, 6), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 2, 7, 9), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "ceil_mode": True}),
    (
        (1, 2, 6, 6),
        {"kernel_size": 3, "stride": (2, 4), "padding": (1, 0), "ceil_mode": True},
    ),  # beyond the padding, too
    ((1, 2, 5, 7), {"kernel_size": 3, "stride": 3, "padding": 1, "ceil_mode": True}),
    # A last window would start where the padding behind the image does, and hangs over it before that.
    ((1, 1, 4, 5), {"kernel_size": 2, "stride": (2, 3), "padding": (0, 1), "ceil_mode": True}),
    ((1, 1, 3, 6), {"kernel_size": 4, "stride": (4, 3), "padding": (1, 2), "ceil_mode": True}),
]
DILATED = [((1, 2, 8, 9), {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (2, 3), "padding": 1})]
AVERAGED = [{}, {"count_include_pad": False}, {"divisor_override": 5}]


@pytest.mark.parametrize("shape, options", WINDOWS + DILATED)
def test_max_pool_definition(shape, options):
    check_op(max_pool, draw(*shape), numeric=True, backends=("definition",), **options)
    check_op(max_pool, draw(*shape, last=True), backends=("definition",), **options)


@pytest.mark.parametrize("more", AVERAGED)
@pytest.mark.parametrize("shape, options", WINDOWS)
def test_avg_pool_definition(shape, options, more):
    check_op(avg_pool, draw(*shape), numeric=True, backends=("definition",), **options, **more)
    check_op(avg_pool, draw(*shape, last=True), backends=("definition",), **options, **more)


PARTS = [
    ((2, 3, 4, 5), 1),
    ((0, 3, 4, 5), 1),
    ((2, 0, 4, 5), 1),
    ((2, 3, 0, 5), 1),  # means of nothing
    ((2, 3, 6, 8), (3, 2)),  # a plain average
    ((2, 3, 5, 7), (3, None)),  # windows that overlap
    ((1, 2, 3, 4), (5, 7)),  # more windows than pixels
    ((0, 3, 5, 7), (3, 2)),
    ((2, 3, 5, 7), (0, 2)),
]


@pytest.mark.parametrize("shape, size", PARTS)
def test_adaptive_avg_pool_definition(shape, size):
    numeric = 0 not in shape
    check_op(adaptive_avg_pool, draw(*shape), output_size=size, numeric=numeric, backends=("definition",))
    check_op(adaptive_avg_pool, draw(*shape, last=True), output_size=size, backends=("definition",))


# --- kernels ---------------------------------------------------------------------------------------------------------

NARROW = ("float32", "float16", "bfloat16")
GPU = ("triton", "cuda")


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape, options", WINDOWS + DILATED)
def test_max_pool(shape, options, last):
    served = check_op(max_pool, draw(*shape, last=last), dtypes=NARROW, dys=["dense", "expanded"], **options)
    by_torch = ["aten"] * (not options.get("ceil_mode") and options.get("dilation", 1) == 1)
    assert served == [*by_torch, "cuda", "definition", "numpy", "triton"]
    x = np.round(draw(*shape, last=last))  # ties
    x[np.random.default_rng(0).random(shape) < 0.2] = np.nan
    x[np.random.default_rng(1).random(shape) < 0.4] = -np.inf
    check_op(max_pool, x, dtypes=["float32"], dys=["dense"], return_indices=True, **options)


@pytest.mark.parametrize("more", AVERAGED)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape, options", WINDOWS)
def test_avg_pool(shape, options, last, more):
    x = draw(*shape, last=last)
    assert len(check_op(avg_pool, x, dtypes=["float16", "bfloat16"], dys=["dense", "strided"], **options, **more)) == 4


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "shape, size", [*PARTS, ((3, 3, 6, 8), 1), ((1, 3, 70, 250), 1), ((2, 70, 5, 5), 1), ((1, 70, 5, 6), (3, 4))]
)
def test_adaptive_avg_pool(shape, size, last):
    """Several tiles of channels, and an image whose pixels are split over programs."""
    x, options = draw(*shape, last=last), {"dtypes": NARROW, "dys": ["dense", "expanded"], "output_size": size}
    assert len(check_op(adaptive_avg_pool, x, **options)) == 4


def test_a_pixel_of_many_windows():
    """Sums of 300 equal gradients of 16 bits, in float32: in bfloat16 the last of them would not count."""
    options = {"dtypes": ["bfloat16"], "dys": ["expanded"]}
    check_op(adaptive_avg_pool, draw(1, 1, 2, 1), output_size=(601, 1), **options)


def test_cuda_leaves_huge_images():
    from gpulayers.kernels.cuda import pooling

    for side, refused in ((1 << 15, True), ((1 << 15) - 1, False)):
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool"):
            reason = getattr(pooling, f"{name}_refuses")(
                Spec((1, 1, side, 1 << 15), float32), needs=(), output_size=(1, 1)
            )
            assert (reason == pooling.REFUSALS["image"]) == refused


def test_wide_parts():
    """They divide the image, but are too wide to unroll."""
    x = draw(1, 2, 3, 66)
    with interpreting() as session:
        check_op(adaptive_avg_pool, x, output_size=(1, 2), backends=("triton",), dtypes=["float32"], dys=["dense"])
    assert {run.kernel for run in session.launches} == {"_adaptive_avg_pool_kernel"}


def test_packs_of_channels():
    """NHWC with 16 bytes of channels: the CUDA kernels move them at once, in both directions."""
    x = draw(2, 16, 7, 8, last=True)
    options = {"backends": GPU, "dtypes": NARROW, "dys": ["dense"]}
    with emulating() as session:
        check_op(max_pool, x, kernel_size=3, stride=2, padding=1, return_indices=True, **options)
        check_op(avg_pool, x, kernel_size=3, stride=2, padding=1, **options)
        check_op(adaptive_avg_pool, x, output_size=1, **options)
        check_op(adaptive_avg_pool, x, output_size=3, **options)
    ran = {run.kernel for run in session.launches}
    for dtype in NARROW:
        for name in ("max_pool_forward_{}_int8", "max_pool_backward_{}_int8", "avg_pool_forward_{}"):
            assert f"{name.format(dtype)}_packs" in ran
        assert {f"{kind}avg_pool_backward_{dtype}_packs" for kind in ("", "global_", "adaptive_")} <= ran
        assert f"adaptive_avg_pool_forward_{dtype}_packs" in ran


def test_any_strides():
    x = draw(3, 5, 9, 24)[:, ::2, 1:, ::3]
    for op, options in [
        (max_pool, {"kernel_size": 2, "stride": 1}),
        (avg_pool, {"kernel_size": 2, "stride": 1}),
        (adaptive_avg_pool, {"output_size": 1}),
        (adaptive_avg_pool, {"output_size": (3, 4)}),
    ]:
        check_op(op, x, dtypes=NARROW, dys=["transposed"], **options)
        check_op(op, draw(2, 3, 5, 4).transpose(0, 1, 3, 2), dtypes=["float32"], dys=["dense"], **options)
    last = draw(2, 3, 4, 65).transpose(0, 3, 1, 2)  # one channel more than a tile has
    check_op(adaptive_avg_pool, last, output_size=1, dtypes=["float32"], dys=["dense"])


def test_many_taps_and_empty_batches():
    options = {"dtypes": ["float32"], "dys": ["dense"], "return_indices": True}
    check_op(max_pool, draw(1, 1, 24, 24), kernel_size=12, stride=1, **options)  # int16
    check_op(max_pool, draw(0, 2, 3, 4), kernel_size=2, **options)
    for op in (max_pool, avg_pool):
        assert len(check_op(op, draw(0, 2, 3, 4), kernel_size=2, dtypes=NARROW)) == 4


def test_a_window_without_a_pixel():
    """A dilated window may step over the whole image: −∞, and no gradient (torch writes out of bounds there)."""
    options = {"kernel_size": 2, "dilation": 3, "padding": 1, "stride": 1}
    y, record = max_pool.record(draw(1, 1, 2, 2), **options)
    assert y.shape == (1, 1, 1, 1) and y.item() == -np.inf
    assert not record.backward(np.ones_like(y))[0].any()
    assert max_pool(draw(1, 1, 2, 2), return_indices=True, **options)[1].item() == -1
    check_op(max_pool, draw(1, 1, 2, 2), dtypes=NARROW, return_indices=True, **options)


def test_numpy_blocks(monkeypatch):
    from gpulayers.kernels.numpy import _blocks

    monkeypatch.setattr(_blocks, "BYTES", 1 << 9)
    for last in (False, True):
        x = draw(7, 3, 9, 8, last=last)
        check_op(max_pool, x, kernel_size=3, stride=2, padding=1, return_indices=last, backends=("numpy",))
        check_op(avg_pool, x, kernel_size=3, stride=2, padding=1, backends=("numpy",), dtypes=NARROW)
        check_op(adaptive_avg_pool, x, output_size=(4, 3), backends=("numpy",), dtypes=NARROW)
        check_op(adaptive_avg_pool, x, output_size=1, backends=("numpy",), dtypes=NARROW)


CASES = [
    (max_pool, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (avg_pool, {"kernel_size": 2}),
    (adaptive_avg_pool, {"output_size": 1}),
    (adaptive_avg_pool, {"output_size": 6}),
]


# --- against torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, options", WINDOWS + DILATED)
def test_max_pool_is_torchs(shape, options):
    x = draw(*shape)
    compare_with_torch(max_pool, F.max_pool2d, x, **options)
    compare_with_torch(max_pool, F.max_pool2d, np.round(x), **options)  # ties
    x[np.random.default_rng(0).random(shape) < 0.3] = np.nan
    x[np.random.default_rng(1).random(shape) < 0.5] = -np.inf
    compare_with_torch(max_pool, F.max_pool2d, x, **options)
    indices = F.max_pool2d(torch.from_numpy(x), return_indices=True, **options)[1].numpy()
    for backend in ("definition", "numpy"):
        with gl.only(backend):
            np.testing.assert_array_equal(max_pool(x, return_indices=True, **options)[1], indices)


@pytest.mark.parametrize("more", AVERAGED)
@pytest.mark.parametrize("shape, options", WINDOWS)
def test_avg_pool_is_torchs(shape, options, more):
    compare_with_torch(avg_pool, F.avg_pool2d, draw(*shape), **options, **more)


@pytest.mark.parametrize("shape, size", [p for p in PARTS if 0 not in p[0][:2] and p[1] != (0, 2)])
def test_adaptive_avg_pool_is_torchs(shape, size):
    x = draw(*shape)
    compare_with_torch(adaptive_avg_pool, F.adaptive_avg_pool2d, x, output_size=size)
    x[np.random.default_rng(0).random(shape) < 0.1] = np.inf
    x[np.random.default_rng(1).random(shape) < 0.1] = np.nan
    compare_with_torch(adaptive_avg_pool, F.adaptive_avg_pool2d, x, output_size=size)


def test_adaptive_sizes_are_torchs():
    for last in (torch.contiguous_format, torch.channels_last):
        for shape, size in [
            ((0, 3, 4, 5), (3, None)),
            ((2, 0, 4, 5), 3),
            ((2, 3, 4, 5), (0, 2)),
            ((2, 3, 4, 5), [3, 2]),
        ]:
            x = torch.randn(shape).to(memory_format=last)
            y, expected = adaptive_avg_pool(x, output_size=size), F.adaptive_avg_pool2d(x, size)
            assert y.shape == expected.shape and (not y.numel() or y.stride() == expected.stride())
    assert adaptive_avg_pool.rule(Spec((None, 3, None, 8), float32), output_size=(None, 2)).outputs["y"].shape == (
        *(None, 3, None, 2),
    )


@pytest.mark.parametrize(
    "op, shape, options, error, text",
    [
        (max_pool, (2, 4, 5, 5), {"kernel_size": 3, "padding": 2}, ShapeError, "padding ≤ kernel_size / 2"),
        (max_pool, (2, 4, 5, 5), {"kernel_size": 7}, ShapeError, "OH = ⌊(H + 2 · 0 − 1 · (7 − 1) − 1) / 7⌋ + 1 ≥ 1"),
        (max_pool, (2, 4, 5, 5), {"kernel_size": 0}, ShapeError, "kernel_size = (height, width), both ≥ 1; got 0"),
        (max_pool, (2, 4, 5, 5), {"kernel_size": 2.5}, KindError, "an integer or a pair of integers; got 2.5"),
        (max_pool, (2, 4, 5, 5), {"kernel_size": 2, "stride": 0}, ShapeError, "stride"),
        (max_pool, (2, 4, 5, 5), {"kernel_size": 2, "dilation": 0}, ShapeError, "dilation"),
        (max_pool, (2, 4, 5, 5), {"kernel_size": 2, "padding": -1}, ShapeError, "padding"),
        (max_pool, (5, 5), {"kernel_size": 2}, ShapeError, "x.shape = (N, C, *sizes) with one to three sizes"),
        (max_pool, (2, 0, 5, 5), {"kernel_size": 2}, ShapeError, "C, H, W ≥ 1"),
        (avg_pool, (2, 4, 5, 5), {"kernel_size": 2, "padding": 2}, ShapeError, "padding ≤ kernel_size / 2"),
        (avg_pool, (2, 4, 5, 5), {"kernel_size": 2, "divisor_override": 0}, ShapeError, "divisor_override ≠ 0"),
        (avg_pool, (2, 4, 5, 5), {"kernel_size": 7}, ShapeError, "OH = "),
        (adaptive_avg_pool, (2, 3, 0, 4), {"output_size": 3}, ShapeError, "H, W ≥ 1 where output_size is not 1"),
        (adaptive_avg_pool, (3, 4), {"output_size": 3}, ShapeError, "x.shape = (N, C, *sizes)"),
        (adaptive_avg_pool, (2, 3, 4, 4), {"output_size": (1, -1)}, ShapeError, "(height, width), both ≥ 0"),
        (adaptive_avg_pool, (2, 3, 4, 4), {"output_size": (1, 2, 3)}, ShapeError, "output_size"),
        (
            adaptive_avg_pool,
            (2, 3, 4, 4),
            {"output_size": 2.5},
            KindError,
            "an integer or a pair of integers; got 2.5",
        ),
        (adaptive_avg_pool, (2, 3, 4, 4), {"output_size": None}, KindError, "output_size"),
        (adaptive_avg_pool, (2, 3, 4, 4), {"output_size": (True, 2)}, KindError, "output_size"),
    ],
)
def test_errors(op, shape, options, error, text):
    with pytest.raises(error) as raised:
        op(draw(*shape), **options)
    assert text in str(raised.value) and str(raised.value).startswith(f"{op.name}: ")
    expected = TypeError if error is KindError else RuntimeError
    assert isinstance(raised.value, expected)
    with pytest.raises(expected):
        getattr(F, f"{op.name}2d")(torch.from_numpy(draw(*shape)), **options)


def test_other_errors():
    for op, options in CASES:
        with pytest.raises(UnsupportedTypeError):
            op(np.ones((1, 1, 2, 2), np.int64), **options)


@pytest.mark.parametrize(
    "layer",
    [
        gl.MaxPool2d(2),
        gl.MaxPool2d(3, 1, return_indices=True),
        gl.AvgPool2d(3, 2, 1),
        gl.GlobalAvgPool2d(),
        gl.AdaptiveAvgPool2d((4, 3)),
    ],
    ids=str,
)
def test_layer(layer):
    check_layer(layer, (2, 3, 6, 5))


def test_layers_are_torchs():
    x = draw(2, 3, 7, 8).astype(np.float32)
    for name, arguments in [
        ("MaxPool2d", (3, 2, 1)),
        ("AvgPool2d", (3, 2, 1, True, False)),
        ("AdaptiveAvgPool2d", (1,)),
        ("AdaptiveAvgPool2d", ([3, None],)),
    ]:
        ours, theirs = getattr(gl, name)(*arguments), getattr(torch.nn, name)(*arguments)
        np.testing.assert_allclose(ours(x), theirs(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)
        assert ours.output_shape((None, 3, 7, 8)) == (None, *ours(x).shape[1:])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["row-major", "channels-last"])
def test_gradient_of_a_padded_average(order):
    """Each pixel lies under four windows of four taps: its gradient is 1 in any memory order and on every backend.

    torch's CUDA kernel for channels-last gradients left the padding out of its coordinates until 2026 (0 at an edge).
    """
    x = np.ascontiguousarray(np.zeros((1, 2, 4, 3), np.float64).transpose(order)).transpose(np.argsort(order))
    for dtype, backend in itertools.product(FLOATS, ("definition", *backends_of(avg_pool))):
        if dtype == np.float64 and backend in ("triton", "cuda", "numpy"):
            continue  # left to the definition
        with arena(backend) as room:
            y, call = avg_pool.record(room.put(x.astype(dtype)), kernel_size=2, stride=1, padding=1)
            dy = room.put(np.ones(y.shape, dtype))
            np.testing.assert_array_equal(room.get(call.backward(dy)[0]), np.ones(x.shape, dtype))
