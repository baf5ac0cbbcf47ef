"""Muon: Newton and Schulz's iteration, the native optimizer, torch's drop-in."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gpulayers as gl  # noqa: E402
from gpulayers.layers._weight import Weight  # noqa: E402
from gpulayers.ops import _newton_schulz  # noqa: E402
from gpulayers.ops._newton_schulz import COEFFICIENTS, newton_schulz  # noqa: E402
from gpulayers.torch import _op, optim  # noqa: E402

NEAR = 0.1
"""Each step magnifies a small singular value up to 3.44 times, and with it the 2⁻⁹ that rounding to bfloat16 moved it."""
SHAPES = [(6, 4), (4, 6), (6, 4), (5, 5)]


def polynomial(x, steps):
    """The same by singular values, in float64."""
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s, (a, b, c) = s / np.linalg.norm(s, axis=-1, keepdims=True), COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ v


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 5, 7), (1, 4, 4)])
def test_newton_schulz_is_a_polynomial_of_singular_values(shape, monkeypatch):
    x = np.random.default_rng(0).standard_normal(shape).astype("f4")
    np.testing.assert_allclose(newton_schulz(x, COEFFICIENTS, 5, 1e-7), polynomial(x, 5), atol=2e-5)
    got = newton_schulz(torch.from_numpy(x), COEFFICIENTS, 5, 1e-7)
    np.testing.assert_allclose(got.float().numpy(), polynomial(x, 5), atol=NEAR)
    monkeypatch.setattr(_newton_schulz, "_plain", _newton_schulz.products)  # as on a GPU, by the linear kernels
    got = newton_schulz(x, COEFFICIENTS, 5, 1e-7)
    assert 1e-4 < np.abs(got - polynomial(x, 5)).max() < NEAR
    assert not newton_schulz(np.zeros(shape, "f4"), COEFFICIENTS, 5, 1e-7).any()


OPTIONS = [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}, {"ns_steps": 3, "momentum": 0.8, "lr": 0.02}]


def train(optimizer, first=1, last=20):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator)
            p.grad = None if (step, i) == (2, 1) else g
        optimizer.step()
    return [p.detach() for p in params]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_torchs_muon(options):
    """Twenty steps, as near as bfloat16's products allow; state and checkpoints both ways; one launch for a shape."""
    _op.fallbacks.clear()
    mine, plain = (kind(parameters(), **options) for kind in (optim.Muon, torch.optim.Muon))
    start, wanted = [p.detach() for p in parameters()], train(plain)
    near = {"rtol": 0, "atol": 0.02 * max((w - s).abs().max().item() for w, s in zip(wanted, start))}
    torch.testing.assert_close(train(mine), wanted, **near)
    states = [o.state_dict() for o in (mine, plain)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=1e-5, atol=1e-6)
    for kinds in ((optim.Muon, torch.optim.Muon), (torch.optim.Muon, optim.Muon)):
        params = parameters()
        a = kinds[0](params, **options)
        train(a, last=3)
        b = kinds[1](params, **options)
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        torch.testing.assert_close(train(b, first=4), wanted, **near)
    assert not any(name == "Muon" for name, _ in _op.fallbacks)
    with pytest.raises(ValueError, match="Muon only supports 2D"):
        optim.Muon([torch.nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_native_muon_is_its_formula_and_adamw_for_the_rest(adjust):
    random = np.random.default_rng(1)
    shapes = {"table.weight": (5, 4), "in.weight": (6, 4), "out.weight": (6, 4), "out.bias": (6,)}
    mine = {n: Weight(n, random.standard_normal(s).astype("f4")) for n, s in shapes.items()}
    wanted = {n: w.data.astype("f8") for n, w in mine.items() if n.startswith(("in", "out.w"))}
    momentum = {n: 0 for n in wanted}
    rest = {n: torch.nn.Parameter(torch.tensor(mine[n].data)) for n in shapes if n not in wanted}
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = gl.Muon(**options, adjust_lr_fn=adjust, others=("table",), adamw_lr=0.5)
    reference = torch.optim.AdamW(rest.values(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(5):
        for n, w in mine.items():
            w.grad = random.standard_normal(w.shape).astype("f4")
            if n in rest:
                rest[n].grad = torch.tensor(w.grad)
            else:
                momentum[n] = 0.95 * momentum[n] + 0.05 * w.grad
                u = polynomial(0.95 * momentum[n] + 0.05 * w.grad, 5)
                rate = 0.02 * (0.2 * 6**0.5 if adjust else 1.5**0.5)
                wanted[n] = wanted[n] * (1 - 0.02 * 0.1) - rate * u
        optimizer.step(mine)
        reference.step()
        if step == 2:
            state = optimizer.state_dict()
            optimizer = gl.Muon(**options, adjust_lr_fn=adjust, others=("table",), adamw_lr=0.5)
            optimizer.load_state_dict(state, mine)
    for n, w in mine.items():
        truth = wanted[n] if n in wanted else rest[n].detach().numpy()
        np.testing.assert_allclose(w.data, truth, rtol=1e-4, atol=1e-5, err_msg=n)
    with pytest.raises(ValueError, match="Muon: adjust_lr_fn: the rule is original or match_rms_adamw; got 'x'"):
        gl.Muon(adjust_lr_fn="x")


def test_a_scale_that_is_not_finite_leaves_muon_where_it_is():
    w = {"w": Weight("w", np.ones((3, 2), "f4"))}
    w["w"].grad = np.ones((3, 2), "f4")
    optimizer = gl.Muon()
    optimizer.step(w, scale=np.array([np.nan], "f4"))
    assert (w["w"].data == 1).all() and not optimizer.state["w", "momentum_buffer"].any()
    optimizer.step(w, scale=np.array([1.0], "f4"))
    assert (w["w"].data < 1).all()
