"""Convolutions on tiles of pixels that TMA loads, against the definition; and which calls take kernels of pointers."""

import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from gpulayers.kernels.triton import _configs, _conv_tiles, _conv_tiles_weight, _tile  # noqa: E402
from gpulayers.kernels.triton._conv import Walk  # noqa: E402
from gpulayers.kernels.triton._conv_tiles_weight import BOXED, EVEN, STACKED  # noqa: E402
from gpulayers.kernels.triton._epilogue import Epilogue  # noqa: E402

from gpulayers.ops.conv import conv, conv_transpose  # noqa: E402
from gpulayers.testing.audit import audit  # noqa: E402
from gpulayers.testing.check_op import check_op  # noqa: E402
from gpulayers.testing.compiling import compiling  # noqa: E402
from gpulayers.testing.interpreter import interpreting  # noqa: E402


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def last(n, c, *sizes: int) -> np.ndarray:
    """Channels-last in memory."""
    return np.moveaxis(draw(n, *sizes, c), -1, 1)


def checked(*inputs, op=conv, **options) -> set[str]:
    """The kernels that forward and dx launched, which were right."""
    options = {"dtypes": ["bfloat16"], "dys": ["dense"], "needs": ["x"]} | options
    with interpreting() as session:
        check_op(op, *inputs, backends=["triton"], **options)
    return {launch.kernel for launch in session.launches} - {"_copy_kernel", "_nhwc_kernel"}


TILES = {"_conv_tiles_kernel"}
CASES = {
    # x, weight, options
    "overhanging pixels and channels": ((2, 40, 5, 6), (72, 40, 3, 2), {"padding": 1}),
    "few channels": ((1, 24, 5, 6), (16, 24, 3, 3), {"padding": 1}),
    "a stride": ((2, 32, 5, 6), (32, 32, 3, 3), {"padding": 1, "stride": 2}),
    "each side, each axis its own": (
        (1, 32, 7, 5), (40, 32, 2, 3), {"padding": ((1, 0), (2, 1)), "stride": (2, 1), "dilation": (1, 3)},
    ),
    "phases without a tap": ((2, 32, 4, 5), (32, 32, 1, 1), {"stride": 2}),
    "a kernel larger than the image": ((1, 32, 3, 2), (32, 32, 5, 3), {"padding": (1, 2), "dilation": (1, 2)}),
    "a row in steps of four": ((1, 32, 1, 21), (32, 32, 1, 5), {"padding": (0, 7), "stride": (1, 4)}),
    "taps in one view": ((1, 32, 9, 7), (32, 32, 3, 2), {"padding": (1, 0), "stride": 2, "dilation": 2}),
    "groups": ((1, 128, 3, 4), (128, 64, 1, 2), {"padding": (0, 1), "groups": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tiles(name):
    x, weight, options = CASES[name]
    half = ("bfloat16", "float16")[len(name) % 2]
    assert checked(last(*x), last(*weight), draw(weight[0]), dtypes=[half], **options) == TILES


def test_transposed_convolutions():
    """Their forward is dx, with a bias, and their dx is forward."""
    given = last(1, 32, 3, 4), last(32, 40, 3, 2), draw(40)
    assert checked(*given, op=conv_transpose, stride=2, padding=1, output_padding=(1, 0)) == TILES


@pytest.mark.parametrize(
    "x, weight, options",
    [
        ((2, 32, 3, 2, 3), (32, 32, 2, 1, 2), {"padding": (1, 0, 1), "stride": (2, 1, 1), "dilation": (2, 1, 1)}),
        ((1, 32, 4, 3, 3), (40, 32, 3, 2, 1), {"padding": ((0, 2), (1, 0), (0, 0)), "stride": (1, 2, 1)}),
        ((2, 32, 3, 2, 2), (32, 32, 1, 2, 1), {}),  # each frame is an image
    ],
)
def test_frames(x, weight, options):
    """Those before and after a clip are zeros, not the next clip's."""
    assert checked(last(*x), last(*weight), None, dtypes=[("bfloat16", "float16")[x[0] % 2]], **options) == TILES


WEIGHTS = {
    # x, weight, options, (how boxes lie in dy, taps at once)
    "one pixel of many images": ((25, 40, 3, 3), (72, 40, 2, 3), {"padding": 1, "dilation": (2, 1)}, (STACKED, 3)),
    "few channels": ((4, 16, 4, 4), (24, 16, 3, 3), {"padding": 1}, (EVEN, 3)),
    "rows": ((2, 32, 4, 8), (32, 32, 3, 3), {"padding": (1, 1)}, (EVEN, 3)),
    "boxes of steps": ((2, 32, 12, 8), (40, 32, 3, 2), {"padding": (1, 0), "stride": 2}, (BOXED, 3)),
    "a product": ((3, 32, 5, 5), (136, 32, 1, 1), {}, (EVEN, 1)),
    "frames": (
        (2, 32, 3, 4, 8),
        (32, 32, 2, 1, 2),
        {"padding": ((1, 0), (0, 0), (1, 0)), "stride": (2, 1, 1)},
        (EVEN, 3),
    ),
    "groups": ((2, 128, 1, 16), (128, 64, 1, 2), {"padding": (0, 0), "stride": (1, 2), "groups": 2}, (EVEN, 1)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name):
    """Programs end within blocks of the result, and take several."""
    x, weight, options, how = WEIGHTS[name]
    half = ("bfloat16", "float16")[len(name) % 2]
    for sms in (1, 4):
        device = _tile.Device(90, sms, 232448)
        options = {"dtypes": [half], "needs": ["weight"], "dys": ["dense"], "backends": ["triton"]} | options
        with interpreting(device) as session, pytest.MonkeyPatch.context() as patch:
            patch.setattr(_conv_tiles_weight, "LEAST_STEPS", 1)
            check_op(conv, last(*x), last(*weight), None, **options)
        run = next(launch for launch in session.launches if launch.kernel == "_conv_tiles_weight_kernel")
        assert (run.constexprs["WAY"], run.constexprs["TAPS"]) == how


WINDOWS = {
    "a stem": ((2, 3, 7, 7), (32, 3, 3, 5), {"padding": ((2, 1), (3, 2)), "stride": 2}),
    "channels enough": ((1, 8, 4, 3), (32, 8, 2, 2), {"padding": 1, "dilation": (2, 1), "stride": (1, 1)}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_few_channels_in_windows(name):
    """Forward and weights, which are zero for no pixel that a window does not see."""
    x, weight, options = WINDOWS[name]
    x = last(*x)
    x[0, 0, 0, 0], x[-1, 1, 3, 2] = np.inf, np.nan
    half = ("bfloat16", "float16")[len(name) % 2]
    kernels = checked(x, last(*weight), draw(32), dtypes=[half], needs=["weight", "bias"], **options)
    assert {"_conv_tiles_kernel", "_conv_tiles_weight_kernel", "_conv_windows_kernel"} <= kernels
    assert "_conv_kernel" not in kernels


PATCHES = {
    "patches": ((2, 3, 16, 32), (40, 3, 8, 8), {"stride": 8}, TILES),
    "rows and columns of their own": ((4, 8, 6, 9), (16, 8, 3, 2), {"stride": (3, 4)}, {"_conv_kernel"}),
    "frames": ((1, 8, 2, 6, 20), (24, 8, 1, 3, 5), {"stride": (1, 3, 5)}, TILES),
    "a sequence": ((4, 8, 40), (24, 8, 10), {"stride": 10}, TILES),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches(name):
    """Forward, dx and weights; a pixel that is not finite stays in its patch."""
    x, weight, options, of_dx = PATCHES[name]
    images = last(*x)
    images[0, 1, *(0,) * (len(x) - 2)] = np.inf
    kernels = checked(images, last(*weight), draw(weight[0]), needs=["weight", "bias"], **options)
    served = {"_conv_tiles_kernel", "_conv_tiles_weight_kernel"}
    assert served <= kernels and not {"_conv_kernel", "_conv_windows_kernel"} & kernels
    assert checked(last(*x), last(*weight), None, dtypes=["float16"], **options) - TILES == of_dx - TILES


def test_transposed_patches():
    """Each pixel of a patch has its channel's bias."""
    assert checked(last(2, 16, 3, 2), last(16, 8, 4, 3), draw(8), op=conv_transpose, stride=(4, 3)) == TILES


@pytest.mark.parametrize("arch", [80, 90])
def test_one_tap_is_a_matrix_product(arch):
    """Whatever refuses descriptors of tiles."""
    options = {"dtypes": ["float16"], "dys": ["dense"], "backends": ["triton"]}
    with interpreting(_tile.Device(arch, 4, 166912)) as session:
        check_op(conv, last(2, 36, 5, 4), last(40, 36, 1, 1), draw(40), **options)
    assert not {launch.kernel for launch in session.launches if "conv" in launch.kernel}


def test_what_is_not_finite_stays_where_it_is_in_weights():
    """Boxes hang over images alone."""
    x = last(13, 32, 5, 3)
    x[-1, 5, 4, 2] = np.inf
    options = {"dtypes": ["bfloat16"], "needs": ["weight"], "dys": ["dense"], "backends": ["triton"]}
    with interpreting() as session:
        check_op(conv, x, last(32, 32, 2, 2), None, stride=2, **options)
    assert "_conv_tiles_weight_kernel" in {launch.kernel for launch in session.launches}


@pytest.mark.parametrize(
    "pixels, images, found",
    [
        (64, (128, 56, 56), ((64, 1, 1), STACKED)),
        (64, (2, 56, 56), ((1, 8, 8), BOXED)),
        (64, (2, 40, 64), ((1, 1, 64), EVEN)),
        (64, (2, 16, 16), ((1, 4, 16), EVEN)),
        (64, (9, 4, 8), ((2, 4, 8), EVEN)),
        (32, (13, 7, 2), ((16, 1, 2), BOXED)),
        (64, (6, 7, 7), None),
    ],
)
def test_boxes_that_divide_images(pixels, images, found):
    assert _conv_tiles_weight.whole_box(pixels, *images) == found


@pytest.mark.parametrize("size", [(3, 7, 6), (6, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_come_along(size, dtype):
    """Those of the rounded results, without cancellation: their mean is large beside what they differ by."""
    n, h, w = size
    x = torch.tensor(last(n, 32, h, w)).to(dtype).unsqueeze(2)
    taps = torch.tensor(last(72, 32, 1, 1) / 64).to(dtype).unsqueeze(2)
    bias, y = torch.full((72,), 100.0, dtype=dtype), torch.empty(n, 1, h, w, 72, dtype=dtype).permute(0, 4, 1, 2, 3)
    walk = Walk((1, 1, 1), (0, 0, 0), (1, 1, 1), 1)

    def empty(shape, dtype):
        return torch.full(shape, np.nan)

    tile = _configs.Tile(64, 64, 64, 4, 4)
    with interpreting(_tile.Device(90, 2, 232448)), _configs.forced("conv_tiles.half", tile):
        assert _conv_tiles.forward(x, taps, Epilogue(bias), y, walk, False) == []
        before = y.clone()
        count, mean, squares = (t.double() for t in _conv_tiles.forward(x, taps, Epilogue(bias), y, walk, False, empty))
    assert len(count) == 2 and torch.equal(y, before)
    true, total = y.double(), count.sum(0)
    merged = (count * mean).sum(0) / total
    spread = (squares + count * (mean - merged) ** 2).sum(0) / total
    assert (total == n * h * w).all()
    torch.testing.assert_close(merged, true.mean((0, 2, 3, 4)), rtol=1e-6, atol=0)
    torch.testing.assert_close(spread, true.var((0, 2, 3, 4), correction=0), rtol=1e-3, atol=1e-6)


def test_moments_cost_no_spills():
    """Nor do the products wait for each other; both operands come from shared memory."""

    def empty(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y = (empty(128, 1, 56, 56, 64).permute(0, 4, 1, 2, 3) for _ in range(2))
    taps = empty(64, 1, 3, 3, 64).permute(0, 4, 1, 2, 3)
    with compiling(90) as session:
        _conv_tiles.forward(
            x, taps, Epilogue(), y, Walk((1, 1, 1), (0, 1, 1), (1, 1, 1), 1), False,
            lambda shape, dtype: empty(*shape, dtype=torch.float32),
        )  # fmt: skip
    report = audit(session.compiled[0])
    assert report.faults(aligned=True) == [] and report.tensor_core == "HGMMA" and "LDSM" not in report.mix
    assert report.mix["UTMALDG"] and report.mix["UTMASTG"]


def test_moments_by_another_road():
    x = torch.empty(1, 32, 1, 4, 4, dtype=torch.bfloat16)
    with interpreting(_tile.Device(100, 3, 232448)):
        assert "sm_100's compiler" in _conv_tiles.moments_refusal(x, 1)
    with interpreting(_tile.Device(90, 3, 232448)):
        assert _conv_tiles.moments_refusal(x, 1) is None and "groups" in _conv_tiles.moments_refusal(x, 2)


@pytest.mark.parametrize("entry", _configs.CHOICES["conv_tiles.half"].entries(90))
def test_every_tile(entry):
    """A matrix product of pixels, overhanging, more tiles than programs."""
    with _configs.forced("conv_tiles.half", entry):
        assert checked(last(5, 64, 15, 15), draw(136, 64, 1, 1), None, needs=[]) == TILES


def test_what_is_not_finite_stays_where_it_is():
    """Padding and overhanging blocks of channels multiply zeros, and with nothing that is not there."""
    x, weight = abs(last(1, 40, 6, 5)), abs(last(32, 40, 3, 3))
    x[0, 7, 0, 0], x[0, 39, 5, 4] = np.inf, np.nan
    assert checked(x, weight, None, padding=1) == TILES
    weight[3, 5, 1, 1] = np.inf
    assert checked(x, weight, None, needs=[]) == TILES


def test_boxes_divide_images_where_they_can():
    assert _conv_tiles.box(256, 128, 56, 56) == (4, 8, 8)
    assert _conv_tiles.box(128, 128, 14, 14) == (32, 2, 2)
    assert _conv_tiles.box(128, 128, 7, 7) == (128, 1, 1)
    assert _conv_tiles.box(64, 1, 1, 700) == (1, 1, 64)


BOTH = (1, 1)
REFUSED = {
    # x, weight, (stride, dilation, groups), why
    "thin": ((1, 36, 4, 4), (32, 36, 3, 3), (BOTH, BOTH, 1), "no multiple of 8"),
    "few": ((1, 32, 4, 4), (8, 32, 3, 3), (BOTH, BOTH, 1), "fewer than 16 channels"),
    "grouped": ((1, 96, 4, 4), (96, 48, 3, 3), (BOTH, BOTH, 2), "into the next group"),
    "small": ((1, 32, 1, 4), (32, 32, 3, 3), ((2, 1), BOTH, 1), "smaller than its stride"),
    "far": ((1, 32, 6, 6), (32, 32, 2, 2), ((3, 3), BOTH, 1), "more than 4 views"),
    "empty": ((0, 32, 6, 6), (32, 32, 2, 2), (BOTH, BOTH, 1), "nothing to compute"),
    "first": ((1, 32, 4, 5), (32, 32, 3, 3), (BOTH, BOTH, 1), "not neighbours in memory"),
    "odd": ((1, 32, 4, 4), (32, 32, 3, 3), (BOTH, BOTH, 1), "do not begin at multiples of 16 bytes"),
    "single": ((1, 32, 4, 4), (32, 32, 3, 3), (BOTH, BOTH, 1), "operands of 32 bits"),
    "Ampere": ((1, 32, 4, 4), (32, 32, 3, 3), (BOTH, BOTH, 1), "came with sm_90"),
    "served": ((1, 32, 4, 4), (32, 32, 3, 3), (BOTH, BOTH, 1), None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_pointers(name):
    """Each with its reason, forward and in dx."""
    (n, c, h, w), (o, c_group, kh, kw), (stride, dilation, groups), why = REFUSED[name]
    dtype = torch.float32 if name == "single" else torch.bfloat16

    def rows(*shape: int) -> torch.Tensor:
        memory = torch.empty(int(np.prod(shape)) + (name == "odd"), dtype=dtype)
        return memory[int(name == "odd") :].view(shape)

    x, taps = (t.permute(0, 4, 1, 2, 3) for t in (rows(n, 1, h, w, c), rows(o, 1, kh, kw, c_group)))
    y = rows(n, 1, -(-(h + 3 - kh) // stride[0]), -(-(w + 3 - kw) // stride[1]), o).permute(0, 4, 1, 2, 3)
    if name == "first":
        x, y = x.contiguous(), y.contiguous()
    with interpreting(_tile.Device(80 if name == "Ampere" else 90, 4, 166912)):
        walk = Walk((1, *stride), (0, 1, 1), (1, *dilation), groups)
        found = _conv_tiles.refusal(x, taps, y, walk), _conv_tiles.refusal(y, taps, x, walk, turned=True)
    assert all(reason == why or why in reason for reason in found)


def test_predicted_times_are_those_measured():
    """Of four layers, by the model that makes the table of all."""
    from gpulayers.bench.judging import predicted

    for (c, size), seconds in predicted.MEASURED.items():
        assert abs(predicted.predicted(c, size, c, 3, 1).forward / seconds - 1) < 0.15
    lines = predicted.table().splitlines()
    assert len(lines) == 1 + 23 + 12 + 4 + 1 + 4 and all(len(line.split()) >= 5 for line in lines[1:])
