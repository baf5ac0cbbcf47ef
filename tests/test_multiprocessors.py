"""What launchers choose by the number of multiprocessors, chosen as for large GPUs (an H100 has 132, a B200 148)."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

from gpulayers.kernels.cuda import _launch
from gpulayers.kernels.triton import _tile

from gpulayers.ops.activation import prelu
from gpulayers.ops.conv import conv2d
from gpulayers.ops.linear import linear
from gpulayers.ops.loss import mse
from gpulayers.ops.norm import batch_norm, layer_norm, rms_norm
from gpulayers.ops.pooling import adaptive_avg_pool2d
from gpulayers.testing import _multiprocessors
from gpulayers.testing.arena import arena
from gpulayers.testing.emulator import emulating
from gpulayers.testing.interpreter import interpreting
from gpulayers.testing.tolerance import excess


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def half(*shape: int) -> np.ndarray:
    return draw(*shape).astype(np.float16)


CASES = {
    # what is chosen: (op, inputs, options, what gradients are for, a kernel, the programs of its first launch)
    "more partial sums than one round of their sum takes": (
        layer_norm, [draw(132, 1100), draw(1100), draw(1100)], {"normalized_shape": (1100,)}, None,
        "_norm_backward_kernel", 132,
    ),
    "one program a row": (
        rms_norm, [half(133, 16400), None], {"normalized_shape": (16400,)}, [], "_norm_forward_looped_kernel", 133,
    ),
    "a row shared by many programs": (
        layer_norm, [half(1, 2**19 + 5), None, None], {"normalized_shape": (2**19 + 5,)}, None,
        "_norm_moments_kernel", 43,
    ),
    "columns of long rows": (
        layer_norm, [half(12, 17000), half(17000), half(17000)], {"normalized_shape": (17000,)}, None,
        "_norm_backward_columns_kernel", 60,
    ),
    "more shares than are merged at once": (
        batch_norm, [draw(20000, 8), draw(8), draw(8)], {"training": True}, None, "_batch_norm_moments_kernel", 40,
    ),
    "more than 128 partial sums": (prelu, [draw(270000), draw(1)], {}, None, "_prelu_backward_kernel", 132),
    "losses": (mse, [draw(300000), draw(300000)], {}, None, "_mse_sum_kernel", 147),
    "one tile a program, and K split": (
        linear, [half(64, 4096), half(64, 4096), None], {}, None, "_matmul_tma_kernel", 16,
    ),
    "K split without descriptors": (linear, [draw(20, 1600), draw(20, 1600), None], {}, [], "_matmul_kernel", 20),
    "sums of columns": (
        linear, [half(700, 64), half(64, 64), half(64)], {}, None, "_linear_backward_columns_kernel", 44,
    ),
    "smaller tiles, and pixels split": (
        conv2d, [half(2, 16, 24, 24), half(32, 16, 3, 3), None], {"padding": 1}, None, "_conv2d_kernel", 18,
    ),
    "sums of channels": (
        conv2d, [half(2, 48, 48, 16).transpose(0, 3, 1, 2), half(64, 16, 1, 1), half(64)], {}, ["bias"],
        "_channel_sums_kernel", 18,
    ),
    "pixels of a depthwise convolution": (
        conv2d, [draw(1, 32, 64, 64), draw(32, 1, 3, 3), None], {"padding": 1, "groups": 32}, ["weight"],
        "_depthwise_weight_kernel", 64,
    ),
    "pixels of a global mean": (
        adaptive_avg_pool2d, [draw(1, 2, 256, 256)], {"output_size": 1}, None, "_global_avg_pool2d_forward_kernel", 8,
    ),
}  # fmt: skip


def results(op, inputs, options, needs, dtype=None) -> list:
    """The output and the gradients that are asked for; dtype: computed in it, from the same numbers."""
    given = [None if x is None else x.astype(dtype or x.dtype) for x in inputs]
    if needs == []:
        return [op(*given, **options)]
    y, call = op.record(*given, needs=needs, **options)
    dy = np.empty_like(y)
    dy[...] = draw(*y.shape).astype(inputs[0].dtype) if y.ndim else 1
    return [y, *call.backward(dy)]


@pytest.mark.parametrize("name", CASES)
def test_large_gpus(name):
    op, inputs, options, needs, kernel, programs = CASES[name]
    call = op, inputs, options, needs
    with interpreting(_tile.Device(90, 132, 232448), races=False) as session, arena("triton"):
        got = results(*call)
    for mine, true, rough in zip(got, results(*call, np.float64), results(*call, np.float32)):
        assert mine is None or excess(mine, true, rough.astype(mine.dtype)) is None
    first = next(each for each in session.launches if each.kernel == kernel)
    assert np.prod(first.grid) == programs
    assert (kernel, 132) in _multiprocessors.launched


CUDA = {
    "layer_norm": (layer_norm, [draw(140, 12), draw(12), draw(12)], {"normalized_shape": (12,)}),
    "prelu": (prelu, [draw(270000), draw(1)], {}),
}


@pytest.mark.parametrize("name", CUDA)
def test_large_gpus_in_cuda(name, monkeypatch):
    """More blocks, and so more partial sums, than the emulator's 3."""
    op, inputs, options = CUDA[name]
    monkeypatch.setattr(_launch, "EMULATED_BLOCKS", 132)
    with emulating(races=False) as session, arena("cuda"):
        got = results(op, inputs, options, None)
    call = op, inputs, options, None
    for mine, true, rough in zip(got, results(*call, np.float64), results(*call, np.float32)):
        assert excess(mine, true, rough.astype(mine.dtype)) is None
    assert 128 < max(each.grid[0] for each in session.launches if "backward" in each.kernel) <= 132


def test_what_asks_for_multiprocessors_is_noted(monkeypatch):
    """A launcher's own question and those of what it calls; not the ones of others."""
    monkeypatch.setattr(_multiprocessors, "launched", noted := set())
    with interpreting(_tile.Device(90, 7, 232448)), arena("triton"):
        results(mse, [draw(5), draw(5)], {}, [])
        results(mse, [draw(5), draw(5)], {"reduction": "none"}, [])
    assert noted == {("_mse_sum_kernel", 7), ("_reduce_kernel", 7)}


def test_the_figures_of_a_device(monkeypatch):
    asked = {"major": 8, "minor": 6, "multi_processor_count": 84, "shared_memory_per_block_optin": 101376}
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(index=index, **asked))
    assert _tile.real_device.__wrapped__(0) == _tile.Device(86, 84, 101376)
