"""The terms on which definitions run on CuPy: what CuPy refuses is refused, and what it does otherwise is noticed."""

import numpy as np
import pytest

pytest.importorskip("cupy")

from gpulayers.arrays import arranged, bfloat16, float32, namespace, spec
from gpulayers.definition import Rule
from gpulayers.inventory import ops
from gpulayers.ops._op import Op
from gpulayers.testing.check_op import CheckError, check_op
from gpulayers.testing.cupy_like import unwrap, wrap

X = np.arange(6, dtype=np.float32).reshape(2, 3)
REFUSED = {
    "a condition that is no array": lambda xp, x: xp.where(True, x, 0),
    "numbers alone under a mask: float16 there": lambda xp, x: xp.where(x > 0, 1.5, 0.0),
    "a mask times a number: float16 there": lambda xp, x: (x > 0) * 1.5,
    "a difference of masks": lambda xp, x: (x > 0) - (x > 1),
    "a NumPy array": lambda xp, x: x + X,
    "a NumPy array that is written": lambda xp, x: x.__setitem__(0, X[1]),
    "a list": lambda xp, x: xp.add(x, [1.0, 2.0, 3.0]),
    "a list that is written": lambda xp, x: x.__setitem__(0, [1.0, 2.0, 3.0]),
    "conversion to NumPy": lambda xp, x: np.asarray(x),
    "a method of NumPy's ufunc": lambda xp, x: np.add.at(x, 0, 1.0),
    "no array at all": lambda xp, x: xp.exp(1.0),
    "bfloat16 under a mask": lambda xp, x: xp.where(x > 0, x.astype(bfloat16), x.astype(bfloat16)),
    "a product of bfloat16": lambda xp, x: xp.matmul(x.astype(bfloat16), x.astype(bfloat16).T),
    "a keyword of NumPy's": lambda xp, x: xp.sum(x, where=x > 0),
    "a method's keyword of NumPy's": lambda xp, x: x.sum(initial=1.0),
    "a ufunc's keyword": lambda xp, x: xp.exp(x, where=x > 0),
    "a name": lambda xp, x: xp.frompyfunc(abs, 1, 1)(x),
    "an attribute": lambda xp, x: x.ctypes,
    "a truth value": lambda xp, x: x if x.sum() else None,
    "a number of an array": lambda xp, x: float(x.sum()),
    "an index of an array": lambda xp, x: [0, 1][x.astype(int)[0, 0]],
    "an item": lambda xp, x: x.item(0),
    "elements under a mask": lambda xp, x: x[x > 0],
    "places of a mask": lambda xp, x: xp.nonzero(x),
    "a sequence of NumPy arrays": lambda xp, x: xp.concatenate([X, X]),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_refused(call):
    x = wrap(X)
    with pytest.raises((TypeError, AttributeError)):
        call(namespace(x), x)


def test_computed():
    """What both have gives NumPy's values; what is new is row-major, what is a view stays one."""
    x = wrap(X.T)
    xp = namespace(x)
    for mine, its in [
        (x * 2 + 1, X.T * 2 + 1),
        (xp.where(x > 2, x, 0), np.where(X.T > 2, X.T, 0)),
        (x.sum(0, keepdims=True), X.T.sum(0, keepdims=True)),
        (1 / (1 + x), 1 / (1 + X.T)),
        (x.sum(), X.sum()),
        (np.exp(x), np.exp(X.T)),  # CuPy's functions serve NumPy's names
        (np.float32(2) * np.concatenate([x, x], 1), 2 * np.concatenate([X.T, X.T], 1)),
        (xp.concatenate([x, x], 1), np.concatenate([X.T, X.T], 1)),
    ]:
        np.testing.assert_array_equal(unwrap(mine), its)
        assert unwrap(mine).flags.c_contiguous and unwrap(mine).dtype == float32
    x[0] += 1
    assert unwrap(x)[0, 0] == 1 and unwrap(x.T).flags.c_contiguous and unwrap(x.astype(float)).flags.f_contiguous


def _op(forward, backward):
    def double_rule(x, *, needs=()):
        return Rule({"y": x.like()}, {})

    def double_forward(x, *, needs=()):
        return (forward(x),), {}

    def double_backward(dys, saved, *, inputs, needs):
        return (backward(dys[0], inputs[0]),)

    return Op(double_rule, double_forward, double_backward)


def _kept(y, x):
    return arranged(y, x.like().order)


def _truth_value(x):
    total = x.sum()
    return _kept(x * 2 if total else x + x, spec(x))


WRONG = {
    "an order that NumPy's arithmetic kept": (lambda x: x * 2, "on CuPy's terms .*: output y is .* in order None"),
    "a name that CuPy lacks": (
        lambda x: _kept(namespace(x).vecdot(x[..., None], x[..., None] * 0 + 2), spec(x)),
        "cupy has no",
    ),
    "a truth value": (_truth_value, "bool of a CuPy array waits for the GPU"),
}


@pytest.mark.parametrize("forward, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_definitions_are_noticed(forward, message):
    """They are right on NumPy's arrays, and those of its memory orders."""
    with pytest.raises((CheckError, TypeError, AttributeError), match=message):
        check_op(_op(forward, lambda dy, x: _kept(dy * 2, x)), X.T.astype(np.float64), backends=["definition"])


@pytest.mark.parametrize(
    ("name", "shapes", "options", "dtype"),
    [
        ("conv_transpose", ((2, 3, 4), (3, 2, 2)), {"stride": 2}, "float64"),
        ("adaptive_max_pool", ((2, 3, 5),), {"output_size": 2}, "float64"),
        ("lp_pool", ((2, 3, 5),), {"norm_type": 2, "kernel_size": 2}, "float64"),
        ("pixel_unshuffle", ((2, 1, 4, 6),), {"downscale_factor": 2}, "bfloat16"),
    ],
)
def test_definitions_that_other_tests_take_in_other_dtypes(name, shapes, options, dtype):
    (op,) = (op for op in ops() if op.name == name)
    xs = map(np.random.default_rng(0).standard_normal, shapes)
    assert check_op(op, *xs, backends=["definition"], dtypes=[dtype], **options) == ["definition"]
