"""Convolutions of all kinds find kernels, tiles and descriptors, on each architecture: nothing runs, nothing fails."""

import random
import warnings

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")
gt = pytest.importorskip("gpulayers.torch")

from torch import nn  # noqa: E402

from gpulayers.testing.null_driver import null_driver, same_memory  # noqa: E402

LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def drawn(rng: random.Random) -> tuple[nn.Module, torch.Tensor] | None:
    """A layer and its input, on no device; None for what torch refuses."""
    axes, groups = rng.choice([1, 2, 2, 2, 3]), rng.choice([1, 1, 1, 2, 4])
    channels, outputs = (groups * rng.choice([1, 3, 8, 16, 32, 64, 96, 128]) for _ in range(2))
    if rng.random() < 0.1:
        channels = outputs = groups = rng.choice([8, 24])
    each = lambda *of: [rng.choice(of) for _ in range(axes)]  # noqa: E731
    kernel, stride, dilation, padding = each(1, 1, 2, 3, 3, 5, 7), each(1, 1, 2, 3, 4), each(1, 1, 2), each(0, 1, 2, 3)
    kinds, bias = ["Conv", "Conv", "ConvTranspose"], rng.random() < 0.5
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    shape = rng.choice([0, 1, 2, 3, 8]), channels, *each(1, 2, 3, 5, 7, 8, 14, 16, 28)
    dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
    layer = getattr(nn, f"{rng.choice(kinds)}{axes}d")(channels, outputs, kernel, **options, device="meta", dtype=dtype)
    x = torch.empty(shape, dtype=dtype)
    if axes in LAST and rng.random() < 0.8:
        x = x.to(memory_format=LAST[axes])
    try:
        fits = 0 not in layer(torch.empty(max(shape[0], 1), *shape[1:], device="meta", dtype=dtype)).shape
    except RuntimeError:
        return None
    return (layer.to_empty(device="cpu"), x) if fits else None


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_convolution_is_launched(arch):
    rng, count = random.Random(arch), 0
    if torch.cuda.is_available():
        pytest.skip("the null driver would stand for the GPU's own")
    with null_driver(arch, compiled=False), same_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while count < 80:
            if (found := drawn(rng)) is None:
                continue
            layer, x = found
            gt.patch(layer)
            y = layer(x.requires_grad_())
            y.backward(torch.empty_like(y))
            assert x.grad.shape == x.shape and layer.weight.grad.shape == layer.weight.shape
            count += 1


def test_a_batch_of_few_pixels():
    """Fewer than a tile of pixels sums for the gradient of a kernel of one tap."""
    if torch.cuda.is_available():
        pytest.skip("the null driver would stand for the GPU's own")
    with null_driver(90, compiled=False), same_memory():
        for shape in ((2, 64, 2, 2), (1, 64, 1, 1), (15, 64, 1, 1)):
            layer = gt.Conv2d(64, 64, 1, dtype=torch.bfloat16)
            x = torch.empty(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
            layer(x).sum().backward()
            assert layer.weight.grad is not None


@pytest.mark.parametrize("size, forward", [(28, 1), (14, 2), (7, 2)])
def test_no_image_is_copied(size, forward):
    """Row-major images under a kernel of one tap: forward (and the weight by steps, where rows do not fill 16 bytes), dx,
    dweight and its shares' sum."""
    if torch.cuda.is_available():
        pytest.skip("the null driver would stand for the GPU's own")
    with null_driver(90, compiled=False) as driver, same_memory():
        layer = gt.Conv2d(64, 128, 1, bias=False, dtype=torch.bfloat16)
        x = torch.empty(2, 64, size, size, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3):
            first = driver.launches
            y = layer(x)
            assert driver.launches - first == forward
            y.backward(torch.empty_like(y))
            assert driver.launches - first == forward + 3
