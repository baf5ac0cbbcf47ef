import numpy as np
import pytest

from gpulayers.arrays import Spec, bfloat16, float16, float32
from gpulayers.ops.softmax import log_softmax, softmax
from gpulayers.testing.audit_op import audit_op
from gpulayers.testing.check_op import check_op

OPS = pytest.mark.parametrize("op", [softmax, log_softmax], ids=lambda op: op.name)


def draw(*shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(list(shape)).standard_normal(shape) * 3)


@OPS
@pytest.mark.parametrize("shape, axis", [((3, 5), -1), ((2, 3, 4), 0), ((), -1), ((4,), 0), ((0, 3), 1), ((3, 0), 1)])
def test_definition(op, shape, axis):
    check_op(op, draw(*shape), axis=axis, numeric=True)


@OPS
def test_rows_in_registers(op):
    """Several short rows a program, and one long row a program; strided input."""
    assert "triton" in check_op(op, draw(7, 130))
    check_op(op, draw(2, 2500))
    check_op(op, draw(6, 80)[::2, :60])


@OPS
def test_walked_rows_and_columns(op, monkeypatch):
    """Rows longer than the registers hold, and axes that are not the last."""
    check_op(op, draw(3, 37, 5), axis=1)
    check_op(op, draw(40, 70), axis=0)
    check_op(op, draw(2, 40000), dys=["dense"], dtypes=["float32", "float16", "bfloat16"])


@OPS
@pytest.mark.parametrize("dtype", [float32, float16, bfloat16], ids=str)
def test_machine_code(op, dtype):
    """The largest configuration of each branch."""
    audit_op(op, Spec((4096, 32768), dtype), needs=())
    audit_op(op, Spec((4096, 16384), dtype))  # the longest row that backward holds
    audit_op(op, Spec((4096, 1000), dtype), archs=(90,))  # 16 does not divide it, 8 does
    audit_op(op, Spec((64, 131072), dtype))
    audit_op(op, Spec((32, 1024, 4096), dtype), axis=1)
