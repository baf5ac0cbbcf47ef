"""Recurrent layers: the definition, its kernels, errors."""

import numpy as np
import pytest
from halves import check_op

import gpulayers as gl
from gpulayers.ops.recurrent import GATES, recurrent
from gpulayers.testing.check_layer import check_layer

torch = pytest.importorskip("torch")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape) * 0.8


def call(
    mode: str, steps: int, batch: int, hidden: int, out: int = 0, bias: bool = True, lengths: bool = False
) -> list:
    """The op's inputs."""
    rows, p = GATES[mode] * hidden, out or hidden
    several = np.arange(batch) % steps + (steps > 1) if lengths else None
    return [
        draw(steps, batch, rows), draw(rows, p, seed=1), draw(batch, p, seed=2),
        draw(batch, hidden, seed=3) if mode == "lstm" else None, draw(rows, seed=4) if bias else None,
        draw(p, hidden, seed=5) if out else None, several,
    ]  # fmt: skip


CALLS = [
    ("lstm", 3, 2, 4, 0, True, False),
    ("lstm", 4, 3, 3, 2, False, True),
    ("lstm", 1, 1, 2, 0, False, True),
    ("gru", 3, 2, 3, 0, True, True),
    ("gru", 2, 1, 1, 0, False, False),
    ("rnn_tanh", 3, 3, 2, 0, True, True),
    ("rnn_relu", 2, 2, 3, 0, False, False),
]


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_by_definition(case):
    reverse = bool(case[3] % 2)
    check_op(recurrent, *call(*case), mode=case[0], reverse=reverse, numeric=True, backends=("definition",))


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_in_kernels(case):
    reverse = bool(case[2] % 2)
    half = ["float16", "bfloat16"][CALLS.index(case) % 2]
    options = dict(mode=case[0], reverse=reverse, dtypes=["float32", half], dys=["transposed"])
    check_op(recurrent, *call(*case), **options, backends=("triton", "numpy"))


def test_empty_and_strided():
    """No sequence; inputs of other strides."""
    options = dict(dys=["dense"], backends=("triton", "numpy"))
    check_op(recurrent, *call("gru", 2, 0, 3), mode="gru", dtypes=["float32"], **options)
    x, *rest = call("rnn_tanh", 3, 4, 3)
    turned = [a if a is None else np.ascontiguousarray(a.T).T for a in rest]
    x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, 1)), 1, 0)
    check_op(recurrent, x, *turned, mode="rnn_tanh", dtypes=["bfloat16"], **options)


WRONG = {
    "mode": (lambda a: a, {"mode": "lstn"}, ValueError, "mode: the rule is one of lstm, gru"),
    "no step": (lambda a: [a[0][:0], *a[1:]], {}, RuntimeError, "x.shape = [T ≥ 1, B, gates · H]"),
    "weight": (lambda a: [a[0], a[1][:-1], *a[2:]], {}, RuntimeError, "weight.shape = [gates · H, P]"),
    "state": (lambda a: [*a[:2], a[2][:1], *a[3:]], {}, RuntimeError, "h0.shape = [B, P]"),
    "no cell": (lambda a: [*a[:3], None, *a[4:]], {}, ValueError, "c0: the rule is given where mode"),
    "lengths": (lambda a: [*a[:6], np.ones(2, np.int32)], {}, RuntimeError, "lengths.dtype = int64"),
    "projected": (lambda a: [*a[:3], None, a[4], a[1], None], {"mode": "gru"}, ValueError, "projection: the rule is None"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    change, options, error, text = WRONG[case]
    with pytest.raises(error) as raised:
        recurrent(*change(call("lstm", 3, 2, 4)), **{"mode": "lstm"} | options)
    assert text in str(raised.value)


def test_layers_are_whole():
    check_layer(gl.GRU(2, 1, 2, bidirectional=True, bias=False, dropout=0.5), (None, 1, 2))
