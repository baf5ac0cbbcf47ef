import numpy as np
import pytest
import torch

from gpulayers.ops.optim import adamw_update, sgd_update
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
