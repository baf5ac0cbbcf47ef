"""What launchers choose by the number of multiprocessors, chosen as for large GPUs (an H100 has 132, a B200 148)."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch
from gpulayers.kernels._multiprocessors import Leaving
from gpulayers.kernels.cuda import _launch
from gpulayers.kernels.triton import _tile

import gpulayers as gl
from gpulayers import _policy, arrays, dispatch
from gpulayers.ops.activation import prelu
from gpulayers.ops.conv import conv, conv_transpose
from gpulayers.ops.linear import linear, linears, matmul
from gpulayers.ops.loss import linear_cross_entropy, mse, pointwise_loss
from gpulayers.ops.norm import add_rms_norm, batch_moments, batch_norm, conv_batch_norm, layer_norm, rms_norm
from gpulayers.ops.pooling import adaptive_avg_pool
from gpulayers.testing import _multiprocessors
from gpulayers.testing.arena import arena
from gpulayers.testing.emulator import emulating
from gpulayers.testing.interpreter import interpreting
from gpulayers.testing.null_driver import null_driver
from gpulayers.testing.tolerance import excess


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def half(*shape: int) -> np.ndarray:
    return draw(*shape).astype(np.float16)


CASES = {
    # what is chosen: (op, inputs, options, what gradients are for, a kernel, the programs of its first launch)
    "more partial sums than one round of their sum takes": (
        layer_norm, [draw(264, 1100), draw(1100), draw(1100)], {"normalized_shape": (1100,)}, None,
        "_norm_backward_kernel", 132,
    ),
    "one program a row": (
        rms_norm, [half(133, 16400), None], {"normalized_shape": (16400,)}, [], "_norm_forward_looped_kernel", 133,
    ),
    "a row shared by many programs": (
        layer_norm, [half(1, 2**19 + 5), None, None], {"normalized_shape": (2**19 + 5,)}, None,
        "_norm_moments_kernel", 43,
    ),
    "few long rows of sums": (
        add_rms_norm, [draw(1, 2**18 + 5), draw(1, 2**18 + 5)[:, ::-1].copy(), None],
        {"normalized_shape": (2**18 + 5,)}, [], "_norm_moments_of_sum_kernel", 22,
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
    "losses by formula": (
        pointwise_loss, [draw(300000), draw(300000)], {"loss": "l1"}, None, "_pointwise_loss_forward_kernel", 147,
    ),
    "one tile a program, and K split": (
        linear, [half(64, 4096), half(64, 4096), None], {}, None, "_matmul_tma_kernel", 16,
    ),
    "K split without descriptors": (linear, [draw(20, 1600), draw(20, 1600), None], {}, [], "_matmul_kernel", 20),
    "several products, and K split": (
        linears, [half(64, 1032), half(64, 1032), half(72, 1032)], {}, [], "_linears_kernel", 8,
    ),
    "sums of columns": (
        linear, [half(700, 64), half(64, 64), half(64)], {"activation": "relu"}, None, "_linear_backward_columns_kernel", 44,
    ),
    "smaller tiles, and pixels split": (
        conv, [half(2, 16, 24, 24), half(32, 16, 3, 3), None], {"padding": 1}, None, "_conv_kernel", 18,
    ),
    "tiles of pixels": (
        conv, [half(2, 12, 20, 32).transpose(0, 3, 1, 2), half(72, 32, 3, 3), None], {"padding": 1}, None,
        "_conv_tiles_kernel", 18,
    ),
    "windows of few channels": (
        conv, [half(2, 40, 8, 3).transpose(0, 3, 1, 2), half(32, 3, 3, 3), None], {"padding": 1, "stride": (2, 1)}, ["weight"],
        "_conv_tiles_kernel", 5,
    ),
    "sums of channels": (
        conv, [half(2, 48, 48, 16).transpose(0, 3, 1, 2), half(64, 16, 1, 1), half(64)], {}, ["bias"],
        "_channel_sums_kernel", 18,
    ),
    "pixels of a depthwise convolution": (
        conv, [draw(1, 32, 64, 64), draw(32, 1, 3, 3), None], {"padding": 1, "groups": 32}, ["weight"],
        "_depthwise_weight_kernel", 64,
    ),
    "pixels of a global mean": (
        adaptive_avg_pool, [draw(1, 2, 256, 256)], {"output_size": 1}, None, "_global_avg_pool_forward_kernel", 8,
    ),
}  # fmt: skip


def results(op, inputs, options, needs, dtype=None) -> list:
    """The output and the gradients that are asked for; dtype: computed in it, from the same numbers."""
    given = [x if x is None or x.dtype.kind == "i" else x.astype(dtype or x.dtype) for x in inputs]
    if needs == []:
        y = op(*given, **options)
        return [*y] if isinstance(y, tuple) else arrays.lists([y])
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


FOLLOWING = {
    # what launches them: (op, inputs, options, kernels that its launchers start after they asked for multiprocessors)
    "rows of pixels": (
        conv, [half(2, 64, 14, 14), half(64, 64, 1, 1), None], {}, {"_conv_first_kernel", "_conv_first_weight_kernel"},
    ),
    "a stem and its norm": (
        conv_batch_norm,
        [half(2, 12, 8, 3).transpose(0, 3, 1, 2), half(32, 3, 3, 3), None, half(32), half(32), None, None, None],
        {"padding": 1, "training": True}, {"_conv_windows_kernel"},
    ),
    "depthwise": (
        conv, [draw(1, 32, 8, 8), draw(32, 1, 3, 3), draw(32)], {"padding": 1, "groups": 32, "activation": "gelu"},
        {"_epilogue_gradient_kernel", "_depthwise_input_kernel"},
    ),
    "depthwise, transposed": (
        conv_transpose, [draw(1, 32, 8, 8), draw(32, 1, 3, 3), draw(32)], {"padding": 1, "groups": 32},
        {"_depthwise_forward_kernel"},
    ),
    "matrices in batches": (matmul, [half(2, 64, 32), half(2, 32, 64), None], {}, {"_batched_tma_kernel"}),
    "small matrices in batches": (matmul, [half(3, 5, 8), half(3, 8, 6), None], {}, {"_batched_kernel"}),
    "moments of a batch": (batch_moments, [half(40, 8, 3, 5)], {}, {"_merge_moments_kernel"}),
    "a fused loss": (
        linear_cross_entropy, [half(40, 16), half(24, 16), np.arange(40) % 24, half(24)], {},
        {"_linear_cross_entropy_kernel", "_column_sums_kernel", "_mean_kernel"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWING)
def test_what_follows_on_large_gpus(name):
    op, inputs, options, kernels = FOLLOWING[name]
    needs = None if op.differentiable else []
    with interpreting(_tile.Device(90, 132, 232448), races=False), arena("triton"):
        got = results(op, inputs, options, needs)
    truth, rough = (results(op, inputs, options, needs, dtype) for dtype in (np.float64, np.float32))
    for mine, true, near in zip(got, truth, rough):
        assert mine is None or excess(mine, true, near.astype(mine.dtype)) is None
    assert {(kernel, 132) for kernel in kernels} <= _multiprocessors.launched


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


# --- some are left free ----------------------------------------------------------------------------------------------

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")


def tensor(x: np.ndarray) -> torch.Tensor:
    """One that lies in memory as ``x`` does; of its metadata alone depends what is launched."""
    return torch.empty_strided(x.shape, [s // x.itemsize for s in x.strides], dtype=getattr(torch, x.dtype.name))


def grids(op, inputs, options, needs) -> list:
    """(kernel, grid) of every launch of a call and its backward."""
    given = [None if x is None else tensor(x) for x in inputs]

    def call() -> None:
        if needs == []:
            op(*given, **options)
        else:
            y, made = op.record(*given, needs=needs, **options)
            made.backward(torch.empty_like(y))

    with null_driver(compiled=False) as driver:
        return [(each.kernel, each.grid) for each in driver.noted(call)[1]]


@needs_no_gpu
@pytest.mark.parametrize("name", CASES)
def test_launches_leave_room(name, monkeypatch):
    """What is launched is what a smaller GPU is given: of one kernel at least, fewer programs."""
    *call, kernel, _ = CASES[name]
    whole = grids(*call)
    with gl.sms(reserve=130):
        two = grids(*call)
    with gl.sms(reserve=9999):
        one = grids(*call)
    assert grids(*call) == whole
    programs = [next(np.prod(grid) for n, grid in found if n == kernel) for found in (whole, two, one)]
    assert programs[0] >= programs[1] >= programs[2] >= 1
    assert programs[0] > programs[1] or name == "one program a row"  # there are as many rows
    for sms, found in ((2, two), (1, one)):
        monkeypatch.setattr("gpulayers.testing.compiling.one", lambda arch, sms=sms: _tile.Device(arch, sms, 232448))
        assert grids(*call) == found


SMALL = {
    "more shares than are merged at once": (batch_norm, [draw(700, 8), draw(8), draw(8)], {"training": True}, None),
    "more than 128 partial sums": (prelu, [draw(9000), draw(1)], {}, None),
    "columns of long rows": (layer_norm, [half(3, 17000), half(17000), half(17000)], CASES["columns of long rows"][2], None),
    "losses": (mse, [draw(9000), draw(9000)], {}, None),
    "pixels of a global mean": (adaptive_avg_pool, [draw(1, 2, 64, 64)], {"output_size": 1}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_multiprocessor_computes_it_all(name):
    call = SMALL.get(name, CASES[name][:4])
    with interpreting(_tile.Device(90, 132, 232448), races=False), arena("triton"), gl.sms(reserve=131):
        got = results(*call)
    for mine, true, rough in zip(got, results(*call, np.float64), results(*call, np.float32)):
        assert mine is None or excess(mine, true, rough.astype(mine.dtype)) is None


@pytest.mark.parametrize("name", CUDA)
def test_launches_leave_room_in_cuda(name, monkeypatch):
    op, inputs, options = CUDA[name]
    inputs = [inputs[0][:9000], *inputs[1:]]
    monkeypatch.setattr(_launch, "EMULATED_BLOCKS", 132)
    for reserve, most in ((128, 4), (9999, 1)):
        with emulating(races=False) as session, arena("cuda"), gl.sms(reserve=reserve):
            got = results(op, inputs, options, None)
        call = op, inputs, options, None
        for mine, true, rough in zip(got, results(*call, np.float64), results(*call, np.float32)):
            assert excess(mine, true, rough.astype(mine.dtype)) is None
        assert max(each.grid[0] for each in session.launches if "backward" in each.kernel) == most


def test_blocks_of_a_gpu_leave_room(monkeypatch):
    monkeypatch.setattr(_launch, "_sms", lambda device: 132)
    x = SimpleNamespace(device=SimpleNamespace(id=0))
    blocks = Leaving(32, _launch.resident_blocks)
    assert (blocks(x, 512), _launch.resident_blocks(x, 512)) == (200, 264)


@needs_no_gpu
def test_a_tape_of_another_room_is_not_played():
    """Each number of multiprocessors has tapes of its own."""
    op, inputs, options = CASES["losses"][:3]
    x, target = map(tensor, inputs)
    with null_driver(compiled=False) as driver:

        def programs() -> int:
            return driver.noted(lambda: op(x, target, **options))[1][0].grid[0]

        def taped() -> bool:
            return gl.explain(op, x, target, **options).taped["forward"] == "taped"

        whole = [programs() for _ in range(4)][-1]
        assert taped()
        with gl.sms(reserve=130):
            assert not taped()
            fewer = {programs() for _ in range(4)}
            assert taped() and len(fewer) == 1 and max(fewer) < whole
            with gl.sms(reserve=0):
                assert programs() == whole
        assert programs() == whole


@needs_no_gpu
def test_a_backward_leaves_its_forwards_room():
    """Autograd calls it in a thread of its own, where another policy is in force."""
    x, w, b = map(tensor, CASES["sums of columns"][1])
    found = []
    with null_driver(compiled=False) as driver:

        def backward(call) -> None:
            dy = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
            found.append({each.kernel: each.grid for each in driver.noted(lambda: call.backward(dy))[1]})

        for reserve in (130, 0):
            with gl.sms(reserve=reserve):
                call = linear.record(x, w, b, activation="relu")[1]
            thread = threading.Thread(target=backward, args=(call,))
            thread.start(), thread.join()
    fewer, whole = (noted["_linear_backward_columns_kernel"] for noted in found)
    assert np.prod(fewer) < np.prod(whole)


def test_room_is_a_whole_number():
    for wrong, error in ((-1, ValueError), (1.5, TypeError), ("8", TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"sms: reserve: the rule is a whole number ≥ 0 of multiprocessors; got"):
            gl.sms(reserve=wrong)
    with gl.sms(reserve=np.int64(3)):
        pass


def test_the_environment_leaves_room():
    code = "import numpy as np, gpulayers as gl; from gpulayers import dispatch; print(dispatch._policy.get().reserve)"
    for text, reserve in (("16", "16"), ("", "0"), (" 4 ", "4")):
        env = os.environ | {"GPULAYERS_RESERVE_SMS": text}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == reserve


@pytest.mark.parametrize("text", ["-3", "many", "1.5"])
def test_the_environment_asks_for_no_number(text, monkeypatch):
    monkeypatch.setenv("GPULAYERS_RESERVE_SMS", text)
    with (
        dispatch.policy(reserve=_policy._initial_policy().reserve),
        pytest.raises(ValueError, match=rf"GPULAYERS_RESERVE_SMS: the rule is a whole number ≥ 0 .*; got '{text}'"),
    ):
        gl.explain(mse, draw(5), draw(5))
