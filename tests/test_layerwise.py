"""LARS and LAMB: the op's kernels, torch's form, the native optimizers, against their formulas in float64."""

import copy
import math
import struct

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpulayers.kernels import _updates  # noqa: E402

import gpulayers as gl  # noqa: E402
from gpulayers.arrays import FLOATS  # noqa: E402
from gpulayers.layers._weight import Weight  # noqa: E402
from gpulayers.ops.optim import layerwise_update  # noqa: E402
from gpulayers.testing.check_op import check_op  # noqa: E402
from gpulayers.torch import _layerwise, _op, optim  # noqa: E402

SHAPES = [(3, 5), (), (17,), (0, 4), (2, 3), (4,)]
ZERO = {"weights": 4, "gradients": 5}
"""Which of them is always, or at first, zero."""


def draw(seed, shapes=SHAPES, low=None, zero=()):
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal(s) for s in shapes]
    arrays = arrays if low is None else [np.abs(a) + low for a in arrays]
    return [np.asarray(0 * a if i in zero else a) for i, a in enumerate(arrays)]


def lars(w, g, state, step, lr=0.1, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, eps=1e-8):
    a, b = np.linalg.norm(w), np.linalg.norm(g)
    rate = lr * (trust_coefficient * a / (b + weight_decay * a + eps) if a > 0 and b > 0 else 1)
    state["m"] = momentum * state.get("m", 0) + rate * (g + weight_decay * w)
    return w - state["m"]


def lamb(w, g, state, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_weight_norm=math.inf):
    m = state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g**2
    r = m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps) + weight_decay * w
    a, b = np.linalg.norm(w), np.linalg.norm(r)
    return w - lr * (min(a, max_weight_norm) / b if a > 0 and b > 0 else 1) * r


OPTIONS = [
    (lars, {}),
    (lars, {"lr": 0.5, "momentum": 0.7, "weight_decay": 0.1, "trust_coefficient": 0.2, "eps": 0.3}),
    (lamb, {"weight_decay": 0.0}),
    (lamb, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.2, "weight_decay": 0.1, "max_weight_norm": 1.5}),
]


def named(value):
    """A test's name, the same in each process."""
    return getattr(value, "__name__", str(value))


BOTH = pytest.mark.parametrize("formula, options", OPTIONS, ids=named)


def wanted(formula, options, sign=1.0):
    """Four steps in float64."""
    params, states = draw(0, zero=[ZERO["weights"]]), [{} for _ in SHAPES]
    for step in range(1, 5):
        grads = draw(step, zero=[ZERO["gradients"]] if step < 3 else [])
        params = [formula(w, sign * g, s, step, **options) for w, g, s in zip(params, grads, states)]
    return params


@BOTH
@pytest.mark.parametrize("served", [True, False])
def test_torchs_form(formula, options, served):
    """By one launch's op and by torch's operations; a checkpoint between; maximize."""
    name = formula.__name__.upper()
    kind = getattr(optim, name) if served else getattr(_layerwise, f"_{name.capitalize()}")
    params = [torch.nn.Parameter(torch.tensor(p)) for p in draw(0, zero=[ZERO["weights"]])]
    optimizer, before = kind(params, **options, maximize=True), set(_op.fallbacks)
    for step in range(1, 5):
        for p, g in zip(params, draw(step, zero=[ZERO["gradients"]] if step < 3 else [])):
            p.grad = torch.tensor(g)
        assert optimizer.step(lambda: 7) == 7
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = kind(params)
            optimizer.load_state_dict(saved)
    for p, w in zip(params, wanted(formula, options, -1.0)):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-14)
    assert _op.fallbacks == before


@BOTH
def test_native(formula, options):
    mine = {str(i): Weight(str(i), p) for i, p in enumerate(draw(0, zero=[ZERO["weights"]]))}
    optimizer = getattr(gl, formula.__name__.upper())(**options)
    for step in range(1, 5):
        for w, g in zip(mine.values(), draw(step, zero=[ZERO["gradients"]] if step < 3 else [])):
            w.grad = 8 * g
        optimizer.step(mine, 0.125)
        if step == 2:
            saved = optimizer.state_dict()
            optimizer = getattr(gl, formula.__name__.upper())()
            optimizer.load_state_dict(saved, mine)
    for found, w in zip(mine.values(), wanted(formula, options)):
        np.testing.assert_allclose(found.data, w, rtol=1e-12, atol=1e-14)


def call(formula, options):
    """(rule's options, how many lists of state) of a third step."""
    options = {k: v for k, v in options.items() if k != "lr"}
    if formula is lars:
        defaults = {"momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 1e-3, "eps": 1e-8}
        rule, found = _updates.lars_numbers(**defaults | options)
    else:
        defaults = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "max_weight_norm": math.inf}
        rule, found = _updates.lamb_numbers(3, **defaults | options)
    return {"rule": rule, "lr": 0.3, **found}, _updates.LAYERWISE[rule].states


def check(formula, options, shapes, **how):
    options, states = call(formula, options)
    state = [draw(2, shapes, zero=[1]), draw(3, shapes, 0.1)][:states]
    return check_op(
        layerwise_update, draw(0, shapes, zero=[2]), draw(1, shapes, zero=[1]), *state, grad_scale=0.5, **options, **how
    )


@BOTH
def test_kernels(formula, options):
    """Norms of zeros and of nothing, too."""
    dtypes = FLOATS if options.get("lr") else ["float64", "float32"]
    found = check(formula, options, [(6,), (5,), (3, 4), (0, 2)], dtypes=dtypes)
    assert {"definition", "numpy", "triton"} <= set(found)


@pytest.mark.parametrize("formula, options", OPTIONS[1::2], ids=named)
def test_norms_of_several_chunks(formula, options):
    check(formula, options, [(3,), (8192 + 5,), (4,)], dtypes=["float32"], backends=["definition", "numpy", "triton"])


@pytest.mark.parametrize("formula", [lars, lamb], ids=named)
def test_masters_and_a_scale_on_the_device(formula):
    """16-bit parameters beside their masters, in several layouts; nothing is written where the scale is not finite."""
    import ml_dtypes

    (options, states), shapes = call(formula, {"weight_decay": 0.1}), [(3, 5), (), (7, 2)]
    for half, scale in ((np.float16, 0.5), (ml_dtypes.bfloat16, 0.5), (ml_dtypes.bfloat16, np.nan)):
        params, grads = ([a.astype(half) for a in draw(s, shapes)] for s in (0, 1))
        masters, m, v = ([a.astype("f4") for a in draw(s, shapes, low)] for s, low in ((0, None), (2, None), (3, 0.1)))
        params[2], m[2] = np.asfortranarray(params[2]), np.asfortranarray(m[2])
        given = [m, v][:states] + [None] * (2 - states) + [masters, np.array([scale], "f4")]
        check_op(layerwise_update, params, grads, *given, **options, dtypes=["float32"])


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_masters_follow_a_float32_model(name):
    half = [torch.nn.Parameter(torch.tensor(p).bfloat16()) for p in draw(0)]
    wide = [torch.nn.Parameter(p.detach().float()) for p in half]
    options = {"lr": 0.01, "weight_decay": 0.1}
    mine, plain = getattr(optim, name)(half, **options, master_weights=True), getattr(optim, name)(wide, **options)
    for step in range(1, 4):
        for p, w, g in zip(half, wide, draw(step)):
            p.grad = torch.tensor(g).bfloat16()
            w.grad = p.grad.float()
        mine.step()
        plain.step()
    for p, w in zip(half, wide):
        torch.testing.assert_close(mine.state[p]["master_param"], w.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(p, mine.state[p]["master_param"].bfloat16())


def test_native_masters():
    w = {"w": Weight("w", draw(0)[0].astype("f2"))}
    optimizer, wide, state = gl.LAMB(0.01, master_weights=True), w["w"].data.astype("f8"), {}
    for step in range(1, 4):
        w["w"].grad = g = draw(step)[0].astype("f2")
        optimizer.step(w)
        wide = lamb(wide, g.astype("f8"), state, step, lr=0.01)
    np.testing.assert_allclose(optimizer.state["w", "master"], wide, rtol=1e-5)
    assert np.array_equal(w["w"].data, optimizer.state["w", "master"].astype("f2"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
def test_numbers_come_with_each_launch(driver):
    """Under the names by which a tape finds them."""
    from gpulayers.kernels.triton import _layerwise as kernels

    options, _ = call(*OPTIONS[3])
    lists = [[torch.randn(8, 16), torch.randn(5)] for _ in range(4)]
    _, launches = driver.noted(lambda: layerwise_update(*lists, **options))
    numbers = kernels.layerwise_update_varying(**options)._asdict()
    for launch in launches[-3:]:
        names = [n for n in getattr(kernels, launch.kernel).arg_names if n in numbers]
        size = 4 * len(names)
        found = struct.unpack(f"{len(names)}f", launch.parameters[-16 - size : -16])
        assert found == pytest.approx([numbers[n] for n in names], rel=1e-6)
    assert [x.kernel for x in launches[-3:]] == ["_lengths_kernel", "_ratio_kernel", "_layerwise_kernel"]


def test_errors():
    p = draw(0)
    for arguments, options, text in (
        ((), {"rule": "sgd"}, "rule: the rule is one of lars, lamb; got 'sgd'"),
        ((), {"rule": "lamb", "numbers": (0.5,) * 7}, "second: the rule is a list for lamb; got None"),
        ((p,), {}, "second: the rule is None for lars; got a list"),
        ((), {"numbers": (1.0, 2.0)}, "numbers: the rule is 1 numbers for lars; got 2"),
        ((), {"trust": (1.0,)}, "trust: the rule is 4 numbers; got 1"),
        ((None, p), {}, r"masters\[0\]: the rule is dtype = float32; got float64"),
        ((None, None, np.ones(2, "f4")), {}, r"scale: the rule is one float32 or float64 number; got float32\[2\]"),
    ):
        with pytest.raises((ValueError, RuntimeError, TypeError), match=f"layerwise_update: {text}"):
            layerwise_update(p, p, p, *arguments, **options)
    x = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"LARS: the rule is lr, momentum, .* ≥ 0; got -1, 0.9"):
        optim.LARS([x], lr=-1)
    with pytest.raises(ValueError, match=r"LAMB: the rule is lr, .*, 0 ≤ betas < 1; got .*1.5"):
        optim.LAMB([x], betas=(0.9, 1.5))
    x.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="LAMB: the rule is dense gradients; got a sparse one"):
        optim.LAMB([x]).step()
