"""Inputs in any order in memory, and with gaps in it."""

import importlib
import pkgutil

import numpy as np
import pytest
from small_calls import CALLS, FURTHER

import gpulayers.ops
from gpulayers.definition import Definition
from gpulayers.testing.check_op import check_op

EVERY = CALLS | FURTHER


def turned(x: np.ndarray) -> np.ndarray:
    """Its first axis is the innermost, the others stay in order."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0)


def gapped(x: np.ndarray) -> np.ndarray:
    """In Fortran's order, each second number of memory."""
    wide = np.full((*x.shape[::-1], 2), np.nan if x.dtype.kind == "f" else 2**30, x.dtype)
    wide[..., 0] = x.T
    return wide[..., 0].T


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("order, dtype", [(turned, "float16"), (np.asfortranarray, "bfloat16"), (gapped, "float32")])
def test_order(order, dtype, name):
    op, given, options = EVERY[name]
    given = [order(x) if isinstance(x, np.ndarray) and x.ndim else x for x in given]
    check_op(op, *given, dtypes=[dtype], dys=["dense"], **options)


def test_each_op_is_among_them():
    """But those of single numbers, which know no axis, and those that return nothing."""
    names = [m.name for m in pkgutil.iter_modules(gpulayers.ops.__path__) if m.name not in ("activation", "optim")]
    modules = [importlib.import_module(f"gpulayers.ops.{name}") for name in names if name[0] != "_"]
    ops = {op.name for module in modules for op in vars(module).values() if isinstance(op, Definition)}
    assert ops - {op.name for op, _, _ in EVERY.values()} == {"kv_append", "one_hot", "rotary_append"}
