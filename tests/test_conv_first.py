"""Convolutions of one tap over NCHW images as products that TMA loads, against the definition; none copies an image."""

import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from gpulayers.kernels.triton import _configs, _conv_first, _tile  # noqa: E402

from gpulayers.ops.conv import conv, conv_transpose  # noqa: E402
from gpulayers.testing.check_op import check_op  # noqa: E402
from gpulayers.testing.interpreter import interpreting  # noqa: E402


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def checked(*inputs, op=conv, arch=90, **options) -> list[str]:
    options = {"dtypes": ["bfloat16"], "dys": ["dense"], "backends": ["triton"]} | options
    with interpreting(_tile.Device(arch, 4, 232448)) as session:
        check_op(op, *inputs, **options)
    return [launch.kernel for launch in session.launches]


CASES = {
    # x, channels out; all but the first have pixels in rows that no descriptor knows
    "whole rows of 16 bytes": ((2, 40, 6, 8), 72),
    "two channels a row": ((2, 40, 6, 6), 72),
    "four": ((1, 32, 5, 10), 24),
    "eight": ((2, 72, 7, 5), 16),
    "a sequence": ((2, 16, 38), 16),
    "a volume": ((1, 16, 3, 4, 11), 8),
}


@pytest.mark.parametrize("name", CASES)
def test_products(name):
    """Forward, with a bias, and both gradients, of channels next to others that are not finite."""
    (n, c, *size), o = CASES[name]
    x, weight = draw(n, c, *size), draw(o, c, *[1] * len(size))
    kernels = checked(x, weight, draw(o), dtypes=[("bfloat16", "float16")[len(name) % 2]])
    assert {"_conv_first_kernel", "_conv_first_weight_kernel"} <= set(kernels)
    assert not {"_nhwc_kernel", "_conv_kernel", "_conv_weight_kernel"} & set(kernels)


@pytest.mark.parametrize("size", [(7, 7), (6, 6)])
def test_what_is_not_finite_stays_where_it_is(size):
    """A box reads the next channel's pixels, and the next image's, behind the last of its own."""
    x, weight = draw(2, 16, *size), draw(16, 16, 1, 1)
    x[1, 0, 0, 0], x[0, 3, 0, 1], x[1, 15, -1, -1] = np.inf, np.nan, -np.inf
    checked(x, weight, None, needs=["x"] if size == (7, 7) else ["x", "weight"])
    weight[3, 8, 0, 0] = np.inf
    checked(abs(draw(2, 16, *size)), abs(weight), None, needs=[])


def test_transposed_convolutions():
    assert "_conv_first_kernel" in checked(draw(2, 16, 6, 6), draw(16, 24, 1, 1), draw(24), op=conv_transpose)


@pytest.mark.parametrize("entry", _configs.CHOICES["conv_first.half"].entries(90))
def test_every_tile(entry):
    """Both ways of storing, of more tiles than programs, that overhang."""
    with _configs.forced("conv_first.half", entry):
        for size in ((20, 14), (17, 17)):
            assert "_conv_first_kernel" in checked(draw(1, 40, *size), draw(72, 40, 1, 1), None, needs=[])


@pytest.mark.parametrize("entry", _configs.CHOICES["conv_first_weight.half"].entries(90))
def test_every_tile_of_weights(entry):
    with _configs.forced("conv_first_weight.half", entry), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_conv_first, "LEAST_STEPS", 1)
        given = draw(3, 40, 6, 6), draw(72, 40, 1, 1), None
        assert "_conv_first_weight_kernel" in checked(*given, needs=["weight"])


REFUSED = {
    # x, groups, arch, dtype
    "more than one tap or group": ((1, 16, 6, 7), 2, 90, torch.bfloat16),
    "fewer than 33 pixels": ((1, 16, 4, 8), 1, 90, torch.bfloat16),
    "no multiple of 8": ((1, 20, 6, 7), 1, 90, torch.bfloat16),
    "begin at multiples": ((1, 16, 6, 7), 1, 90, torch.bfloat16),
    "operands of 32 bits": ((1, 16, 6, 7), 1, 90, torch.float32),
    "came with sm_90": ((1, 16, 6, 7), 1, 80, torch.bfloat16),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_takes_pointers(why):
    shape, groups, arch, dtype = REFUSED[why]
    odd = why == "begin at multiples"
    x = torch.empty(int(np.prod(shape)) + odd, dtype=dtype)[int(odd) :].view(shape).unsqueeze(2)
    with interpreting(_tile.Device(arch, 4, 166912)):
        assert why in _conv_first.refusal(x, x, True, groups)
        assert (
            "one tap" in _conv_first.refusal(*[torch.empty(1, 16, 1, 6, 7, dtype=torch.float16)] * 2, False, 1)
            or arch == 80
        )


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("size", [(3, 7, 7), (2, 14, 7)])
def test_pointers_copy_no_image_either(arch, size):
    """Channels that no descriptor steps over, or no descriptors."""
    n, *size = size
    kernels = checked(draw(n, 20, *size), draw(12, 20, 1, 1), draw(12), arch=arch, dtypes=["float16"])
    assert {"_conv_kernel", "_conv_weight_kernel"} <= set(kernels) and "_nhwc_kernel" not in kernels
