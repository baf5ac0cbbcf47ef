"""Whose array it is, its memory order, and views between libraries that copy nothing."""

import contextlib

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpulayers import arrays, transfer
from gpulayers.arrays import Spec, bfloat16


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "bool"])
def test_torch_views_share_memory(dtype):
    t = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype)).t()
    a = transfer.torch_to_numpy(t)
    assert a.dtype == arrays.dtype(dtype) and a.strides == tuple(s * t.element_size() for s in t.stride())
    assert a.__array_interface__["data"][0] == t.data_ptr()
    with pytest.raises(ValueError, match=r"read-only"):
        a[0, 0] = 1
    writeable = transfer.torch_to_numpy(t, writeable=True)
    writeable[1, 2] = 0
    assert not t[1, 2]
    back = transfer.numpy_to_torch(writeable)
    assert back.data_ptr() == t.data_ptr() and back.dtype == t.dtype


def test_a_view_leaves_the_storage_resizable():
    t = torch.zeros(4)
    transfer.torch_to_numpy(t)
    t.untyped_storage().resize_(0)  # FSDP does this


def test_read_only_memory_is_copied_outward_and_lent_inward():
    a = np.broadcast_to(np.float32(3), (2, 5))
    assert transfer.numpy_to_torch(a).stride() == (5, 1)
    lent = transfer.lend_to_torch(a)
    assert lent.stride() == (0, 0) and lent.data_ptr() == a.__array_interface__["data"][0]


@pytest.mark.parametrize(
    "shape, strides, order, dense",
    [
        ((2, 3), (3, 1), None, True),
        ((2, 3), (1, 2), (1, 0), True),
        ((2, 3, 4, 5), (60, 1, 15, 3), (0, 2, 3, 1), True),
        ((2, 3), (6, 2), None, False),
        ((2, 3), (0, 1), None, False),
        ((1, 3), (99, 1), None, True),
        ((2, 1, 4, 5), (20, 1, 5, 1), None, True),
        ((1, 3, 1, 1), (3, 1, 3, 3), None, True),
        ((0, 3), (7, 9), None, True),
        ((), (), None, True),
    ],
)
def test_layout(shape, strides, order, dense):
    assert arrays.layout(shape, strides) == (order, dense)


def test_spec_strides_are_those_of_empty():
    for order in (None, (0, 2, 3, 1), (3, 1, 0, 2)):
        spec = Spec((2, 3, 4, 5), bfloat16, order)
        made = arrays.empty_numpy(spec)
        assert made.shape == spec.shape and tuple(s // 2 for s in made.strides) == spec.strides
        assert arrays.TORCH.empty(spec, "cpu").stride() == spec.strides


def test_arranged():
    x = np.arange(24.0).reshape(2, 3, 4)
    y = arrays.arranged(x, (2, 0, 1))
    assert np.array_equal(x, y) and arrays.spec(y).order == (2, 0, 1)
    assert arrays.arranged(x, None) is x


def test_dtype_names():
    assert arrays.dtype("bfloat16") == arrays.dtype(torch.bfloat16) == np.dtype(ml_dtypes.bfloat16)
    assert arrays.dtype(np.float16) == np.float16
    with pytest.raises(TypeError, match=r"unknown dtype 'float17'.*float64, float32"):
        arrays.dtype("float17")


def test_not_an_array():
    with pytest.raises(TypeError, match=r"expected a NumPy, CuPy or torch array, got builtins.str"):
        arrays.library("x")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
def test_poison_comes_from_no_host(dtype):
    """A value that is assigned to a 0-dim tensor is a tensor on the CPU first: a CUDA graph takes no copy of it."""
    ran = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for home, backend in ((arrays.TORCH, "triton"), (arrays.NUMPY, "triton"), (arrays.NUMPY, "cuda")):
        empty = transfer.Bridge(home, backend, "cpu").extra["empty"]
        with transfer.poisoned(), Listening() if home is arrays.TORCH else contextlib.nullcontext():
            zero, image = empty((), dtype), empty((2, 3, 4, 5), dtype, (0, 2, 3, 1))
        for x in map(transfer.to_numpy, (zero, image)):
            assert np.isnan(x).all() if "float" in dtype else (x == arrays.dtype(dtype).type(101)).all()
    assert {*ran} <= {"empty", "empty_strided", "fill_"}
