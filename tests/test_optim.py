import numpy as np
import pytest
import torch
from gpulayers.kernels import _updates

from gpulayers import dispatch
from gpulayers.ops.optim import adamw_update, grad_norm, optimizer_update, sgd_update
from gpulayers.testing.check_op import check_op

SHAPES = [(3, 5), (), (17,), (0, 4), (2, 3, 4)]


def draw(seed: int, shapes=SHAPES, low: float | None = None) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal(s) for s in shapes]
    return arrays if low is None else [np.asarray(np.abs(a) + low) for a in arrays]


SGD = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
]


@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_is_torchs(options):
    """Five steps in float64."""
    params = draw(0)
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    optimizer = torch.optim.SGD(theirs, lr=0.1, **options)
    momentums = [np.zeros_like(p) for p in params] if "momentum" in options else None
    for step in range(1, 6):
        grads = draw(step)
        for t, g in zip(theirs, grads):
            t.grad = torch.tensor(g)
        optimizer.step()
        sgd_update(params, [g * 8 for g in grads], momentums, lr=0.1, first=step == 1, grad_scale=0.125, **options)
        for p, t in zip(params, theirs):
            np.testing.assert_allclose(p, t.detach().numpy(), rtol=1e-13, atol=1e-14)


ADAMW = [
    {},
    {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2, "maximize": True},
    {"eps": 0.5, "weight_decay": 0},
]


@pytest.mark.parametrize("options", ADAMW, ids=str)
def test_adamw_is_torchs(options):
    """Five steps in float64."""
    params = draw(0)
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=0.05, **options)
    m, v = ([np.zeros_like(p) for p in params] for _ in range(2))
    for step in range(1, 6):
        grads = draw(step)
        for t, g in zip(theirs, grads):
            t.grad = torch.tensor(g)
        optimizer.step()
        adamw_update(params, [g * 8 for g in grads], m, v, lr=0.05, step=step, grad_scale=0.125, **options)
        for p, t in zip(params, theirs):
            np.testing.assert_allclose(p, t.detach().numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_kernels(options, first):
    momentums = draw(2) if "momentum" in options else None
    served = check_op(sgd_update, draw(0), draw(1), momentums, lr=0.1, first=first, grad_scale=0.5, **options)
    assert {"definition", "numpy", "triton"} <= set(served)


@pytest.mark.parametrize("options", ADAMW, ids=str)
def test_adamw_kernels(options):
    """An eps as large as √v shows on which side of the bias correction it stands."""
    state = draw(2), draw(3, low=0.1)
    served = check_op(adamw_update, draw(0), draw(1), *state, lr=0.1, step=3, grad_scale=0.5, **options)
    assert {"definition", "numpy", "triton"} <= set(served)


def test_adamw_of_nothing():
    check_op(adamw_update, [], [], [], [])


def test_several_chunks():
    """Arrays longer than one program's chunk, whole and with a rest."""
    shapes = [(8192,), (3, 5000), (7,)]
    check_op(adamw_update, draw(0, shapes), draw(1, shapes), draw(2, shapes), draw(3, shapes, 0.1), step=2)
    check_op(sgd_update, draw(0, shapes), draw(1, shapes), draw(2, shapes), momentum=0.9)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_mixed_dtypes(half):
    """16-bit parameters with float32 state, beside float32 parameters."""
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, half, half))
    params, grads = ([a.astype(t) for a, t in zip(draw(s), [kind, "f4", kind, kind, "f4"])] for s in (0, 1))
    m, v = ([a.astype("f4") for a in arrays] for arrays in (draw(2), draw(3, low=0.1)))
    check_op(adamw_update, params, grads, m, v, step=2, dtypes=["float32"])
    check_op(sgd_update, params, grads, m, momentum=0.9, dtypes=["float32"])


def test_layouts():
    """Parameters and gradients that lie in memory in different ways, all of them or one, and a strided parameter."""
    params = [np.asfortranarray(a) for a in draw(0, [(4, 5), (3, 4)])] + [draw(5, [(6, 8)])[0][::2, ::2]]
    rest = [draw(s, [(4, 5), (3, 4), (3, 4), *[(2, 3)] * 3], low) for s, low in ((1, None), (2, None), (3, 0.1))]
    params += draw(6, [(2, 3)] * 3)
    for state, place in ((0, 1), (0, 3), (1, 4), (2, 5)):
        rest[state][place] = np.asfortranarray(rest[state][place])
    check_op(adamw_update, params, *rest, step=2)
    check_op(sgd_update, params, *rest[:2], momentum=0.9)


def test_errors_of_rules():
    p = draw(0)
    for arguments, options, text in (
        ((), {"rule": "none"}, "rule: the rule is one of sgd, .*; got 'none'"),
        ((), {"rule": "adam", "numbers": (0.5,) * 7}, "first: the rule is a list for adam; got None"),
        ((p,), {}, "first: the rule is None for sgd; got a list"),
        ((), {"numbers": (1.0, 2.0)}, "numbers: the rule is 1 numbers for sgd; got 2"),
        ((None, None, None, p), {}, r"masters\[0\]: the rule is dtype = float32; got float64"),
        ((None,) * 4 + (np.ones(2, "f4"),), {}, r"scale: the rule is one float32 or float64 number; got float32\[2\]"),
        ((None,) * 5 + (np.ones(3, int),), {}, r"seed: the rule is int64, shape \[2\]; got int64\[3\]"),
        ((None,) * 5 + (np.ones(2, int),), {}, r"params\[0\]: the rule is dtype ∈ {bfloat16, float32} with a seed"),
    ):
        with pytest.raises((ValueError, RuntimeError, TypeError), match=f"optimizer_update: {text}"):
            optimizer_update(p, p, *arguments, **options)


def test_errors():
    p, g = draw(0), draw(1)
    with pytest.raises(RuntimeError, match=r"sgd_update: grads: the rule is one array for each parameter: 5; got 4"):
        sgd_update(p, g[:4])
    with pytest.raises(
        RuntimeError, match=r"sgd_update: grads\[1\]: the rule is grads\[1\]\.shape = params\[1\]\.shape"
    ):
        sgd_update(p, [g[0], g[0], *g[2:]])
    with pytest.raises(RuntimeError, match="sgd_update: momentums: the rule is a list where momentum"):
        sgd_update(p, g, momentum=0.9)
    with pytest.raises(ValueError, match="sgd_update: nesterov: the rule is nesterov needs momentum"):
        sgd_update(p, g, nesterov=True)
    with pytest.raises(ValueError, match="adamw_update: betas: the rule is two numbers"):
        adamw_update(p, g, g, g, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="adamw_update: weight_decay: the rule is weight_decay ≥ 0; got -1"):
        adamw_update(p, g, g, g, weight_decay=-1)


@pytest.mark.parametrize("rule", _updates.UPDATES)
def test_each_rules_kernels(rule):
    """NumPy's and Triton's follow the definition; numbers are such that each shows."""
    _, states, count = _updates.UPDATES[rule]
    state = [draw(i + 2, [(6,), (3, 4)], 0.1) for i in range(states)]
    if "centered" in rule:
        state[0] = [x + 9 for x in state[0]]  # as a variance is
    numbers = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)[:count]
    arrays = draw(0, [(6,), (3, 4)]), draw(1, [(6,), (3, 4)]), *state
    options = {"rule": rule, "numbers": numbers, "l2": 0.1, "shrink": 0.9, "grad_scale": 0.5}
    served = check_op(optimizer_update, *arrays, **options, dtypes=["float64", "float32"])
    assert {"definition", "numpy", "triton"} <= set(served)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_masters_and_a_scale_on_the_device(half):
    """Parameters and gradients of 16 bits; the masters move, and the parameters are them, rounded."""
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, half, half))
    params, grads = ([a.astype(kind) for a in draw(s)] for s in (0, 1))
    masters, m, v = ([a.astype("f4") for a in draw(s, low=low)] for s, low in ((0, None), (2, None), (3, 0.1)))
    options = {"rule": "adam", "numbers": _updates.adam_numbers(2, 0.1, (0.9, 0.99), 1e-3)[1]}
    for scale in (0.5, np.nan):
        given = masters, np.array([scale], "f4")
        check_op(optimizer_update, params, grads, m, v, None, *given, **options, dtypes=["float32"])


def test_a_scale_that_is_not_finite_writes_nothing():
    p = [np.ones(5, "f4")]
    for backend in ("definition", "numpy"):
        with dispatch.policy(backends=(backend,)):
            for value in (np.nan, np.inf, -np.inf):
                optimizer_update(p, p, *[None] * 4, np.array([value], "f4"))
    assert (p[0] == 1).all()


def by_chance(backend: str, params, grads, seed) -> list[np.ndarray]:
    import ml_dtypes

    copies = [np.array(p, ml_dtypes.bfloat16, order="K") for p in params]
    with dispatch.policy(backends=(backend,)):
        optimizer_update(copies, grads, *[None] * 5, np.array([seed, 5]), numbers=(1.0,))
    return copies


def test_rounding_by_chance():
    """The same bits from every backend, right on average, exact numbers and infinities kept."""
    import ml_dtypes

    params = [np.ones((3, 5)), np.ones(40_000), np.ones((4, 6)).T]
    grads = [np.full_like(p, 2.0**-11, "f4") for p in params]
    grads[0][0, :2] = 0.5, np.inf
    definition = by_chance("definition", params, grads, 7)
    for x, y in zip(definition, by_chance("numpy", params, grads, 7)):
        assert np.array_equal(x.view(np.uint16), y.view(np.uint16))
    assert definition[0][0, 0] == 0.5 and definition[0][0, 1] == -np.inf
    wide = definition[1].astype(np.float64)  # a step of bfloat16 below 1 is 2⁻⁸
    assert set(np.unique(wide)) == {1 - 2.0**-8, 1.0}
    assert abs((1 - wide).mean() / 2.0**-11 - 1) < 5 * np.sqrt(8 / len(wide))
    assert not np.array_equal(definition[1], by_chance("definition", params, grads, 8)[1])
    p, g = ([np.array(x, t) for x in (params[0], params[2])] for t in (ml_dtypes.bfloat16, "f4"))
    g = [x / 3000 for x in g]
    seed = np.array([7, 0, 5])[::2]
    check_op(optimizer_update, p, g, None, None, None, None, None, seed, numbers=(1.0,), dtypes=["float32"])


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_norm_of_all_gradients(max_norm):
    """Several dtypes, layouts, chunks and empty arrays; what clips is torch's."""
    grads = [*draw(0), draw(1, [(3, 4000)])[0], np.asfortranarray(draw(2, [(4, 5)])[0]), draw(3, [(6, 8)])[0][::2, ::2]]
    served = check_op(grad_norm, grads, max_norm=max_norm, grad_scale=0.25)
    assert {"definition", "numpy", "triton"} <= set(served)
    norm, factor = grad_norm(grads, max_norm=max_norm, grad_scale=0.25)
    theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads]
    for p, g in zip(theirs, grads):
        p.grad = torch.tensor(g * 0.25)
    np.testing.assert_allclose(norm[0], torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rtol=1e-12)
    np.testing.assert_allclose(grads[0] * 0.25 * factor, theirs[0].grad.numpy(), rtol=1e-12)
    mixed = [grads[0].astype("f2"), grads[2].astype("f4")]
    check_op(grad_norm, mixed, max_norm=max_norm, dtypes=["float32"])


def test_a_norm_that_is_not_finite_clips_nothing():
    for value in (np.inf, np.nan):
        for backend in ("definition", "numpy"):
            with dispatch.policy(backends=(backend,)):
                norm, factor = grad_norm([np.array([1.0, value], "f4")], max_norm=1.0)
            assert not np.isfinite(norm[0]) and factor[0] == 1
    check_op(grad_norm, [np.array([1.0, np.inf])], max_norm=1.0, dtypes=["float32"])
    with pytest.raises(ValueError, match="grad_norm: max_norm: the rule is max_norm > 0; got 0"):
        grad_norm([np.ones(2)], max_norm=0.0)
    with pytest.raises(RuntimeError, match="grad_norm: grads: the rule is at least one array; got 0"):
        grad_norm([])
    with pytest.raises(TypeError, match="grad_norm: grads: the rule is a list of arrays"):
        grad_norm(np.ones(2))
    with pytest.raises(RuntimeError, match=r"grad_norm: grads\[1\]: the rule is dtype ∈ .*; got int64"):
        grad_norm([np.ones(2), np.ones(2, int)])


def test_the_definition_in_16_bits():
    found = check_op(
        optimizer_update,
        *(draw(s, [(5,)]) for s in (0, 1)),
        numbers=(0.5,),
        backends=["definition"],
        dtypes=["float16", "bfloat16"],
    )
    assert found == ["definition"]
