"""gpulayers.torch.optim's classes by rules, against torch.optim."""

import copy
import functools

import pytest

torch = pytest.importorskip("torch")

from gpulayers.torch import _op, optim  # noqa: E402

SHAPES = [(3, 5), (), (17,), (0, 4), (2, 3, 4, 4)]
OPTIONS = [
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2, "maximize": True}),
    ("NAdam", {"lr": torch.tensor(0.05, dtype=torch.float64), "weight_decay": 0.1, "momentum_decay": 0.1}),
    ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True}),
    ("RAdam", {"betas": (0.9, 0.99), "weight_decay": 0.1}),
    ("RAdam", {"lr": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True}),
    ("Adamax", {"weight_decay": 0.1, "maximize": True}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "maximize": True}),
    ("RMSprop", {"weight_decay": 0.1, "maximize": True}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
]
WITHOUT = {(1, 0), (3, 0), (2, 2)}
"""(step, parameter) that has no gradient."""


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]
    params[-1] = params[-1].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(p) for p in params]


def train(optimizer, first=1, last=20):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = None if (step, i) in WITHOUT else torch.empty_like(p).copy_(drawn).detach()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.fixture(autouse=True)
def _served(request):
    """No group is left to torch, but where the test says so."""
    before = set(_op.fallbacks)
    _op.fallbacks.clear()
    yield
    left = {f for f in _op.fallbacks if hasattr(optim, f[0])}
    _op.fallbacks |= before
    assert bool(left) == ("left" in request.node.name), left


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_twenty_steps_and_checkpoints_both_ways(name, options):
    """In float64; late gradients; then three steps with the one and the rest with the other."""
    mine, plain = (getattr(m, name)(parameters(), **options) for m in (optim, torch.optim))
    wanted = train(plain)
    torch.testing.assert_close(train(mine), wanted, rtol=1e-10, atol=1e-12)
    states, others = (o.state_dict() for o in (mine, plain))
    assert states["param_groups"] == others["param_groups"]
    for state, other in zip(states["state"].values(), others["state"].values(), strict=True):
        assert list(state) == list(other)
        for t, u in zip(state.values(), other.values()):
            assert (t.dtype, t.shape, t.stride()) == (u.dtype, u.shape, u.stride())
            torch.testing.assert_close(t, u, rtol=1e-6, atol=1e-9)
    wanted, *found = (
        reloaded(name, options, *way) for way in ((torch.optim,) * 2, (optim, torch.optim), (torch.optim, optim))
    )
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=1e-10, atol=1e-12)


def reloaded(name, options, first, second):
    """Three steps with the one, whose state the other goes on from (torch's NAdam rounds otherwise then)."""
    params = parameters()
    a = getattr(first, name)(params, **options)
    train(a, last=3)
    b = getattr(second, name)(params, **options)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    return train(b, first=4, last=8)


@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop"])
def test_differentiable_steps_are_left_to_torch(name):
    slopes = []
    for module in (optim, torch.optim):
        start = torch.ones(3, requires_grad=True)
        p = start.clone()
        p.grad = torch.full((3,), 0.5)
        getattr(module, name)([p], lr=0.1, differentiable=True).step()
        slopes += torch.autograd.grad((p * p).sum(), (start,))
    assert torch.equal(*slopes) and slopes[0].all()


def test_a_group_with_amsgrad_is_left_to_torch_alone():
    """The other group has its launch; both are torch's in float64."""
    found = []
    for module in (optim, torch.optim):
        params = parameters()
        groups = [{"params": params[:2], "amsgrad": True}, {"params": params[2:]}]
        found.append(train(module.Adam(groups), last=3))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def lion(p, g, m, lr, betas, decay):
    p, u = p * (1 - lr * decay), betas[0] * m + (1 - betas[0]) * g
    return p - lr * torch.sign(u), betas[1] * m + (1 - betas[1]) * g


def test_lion():
    """By its paper's algorithm; the plain class, to which unserved tensors are left, is the same."""
    options = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    mine, plain = (kind(parameters(), **options) for kind in (optim.Lion, optim.Lion.__mro__[2]))
    p, m = torch.randn(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    ours = torch.nn.Parameter(p.clone())
    single = optim.Lion([ours], **options)
    for step in range(5):
        g = torch.sin(torch.arange(4.0, dtype=torch.float64) + step)
        p, m = lion(p, g, m, 0.01, (0.8, 0.95), 0.1)
        ours.grad = g
        single.step()
        torch.testing.assert_close(ours.detach(), p, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(train(mine), train(plain), rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="Lion: the rule is lr, weight_decay ≥ 0"):
        optim.Lion(parameters(), lr=-1)


HALF = functools.partial(parameters, torch.bfloat16)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_masters_follow_a_float32_model(name):
    """The masters are a float32 model's parameters to the bit; the parameters are them, rounded; a checkpoint too."""
    params = HALF()
    mine = getattr(optim, name)(params, lr=1e-3, weight_decay=0.1, master_weights=True)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    plain = getattr(optim, name)(wide, lr=1e-3, weight_decay=0.1)
    for last in (5, 9):
        for step in range(last - 4, last + 1):
            for i, (p, w) in enumerate(zip(params, wide)):
                generator = torch.Generator().manual_seed(100 * step + i)
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
                w.grad = p.grad.float()
            mine.step()
            plain.step()
        for p, w in zip(params, wide):
            state = mine.state[p]
            torch.testing.assert_close(state["master_param"], w.detach(), rtol=1e-6, atol=1e-7)
            assert torch.equal(p, state["master_param"].bfloat16()) and state["exp_avg"].dtype == torch.float32
        saved = copy.deepcopy(mine.state_dict())
        mine = getattr(optim, name)(params, lr=1e-3, weight_decay=0.1, master_weights=True)
        mine.load_state_dict(saved)
    torchs = getattr(torch.optim, name)(params)
    torchs.load_state_dict(saved)
    assert torchs.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    mine.load_state_dict(torchs.state_dict())  # one without float32 copies: they begin as the parameters
    mine.step()


def test_small_updates_are_kept_by_chance_and_lost_without():
    """5,000 parameters at 1 that should lose 2⁻¹² in each of 8 steps: a step of bfloat16 there is 2⁻⁸."""
    moved = []
    for options in ({"bf16_stochastic_round": True}, {}, {"master_weights": True}):
        torch.manual_seed(3)
        p = torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
        optimizer = optim.AdamW([p], lr=2.0**-12, weight_decay=0, **options)
        for _ in range(8):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved.append((1 - p.detach().double()).mean().item() * 2**9)
    assert moved[0] == pytest.approx(1, abs=0.1) and moved[1] == 0.0


def test_what_masters_cannot_do():
    with pytest.raises(ValueError, match="at the same time"):
        optim.Adam(HALF(), master_weights=True, bf16_stochastic_round=True)
    with pytest.raises(ValueError, match="master_weights does not support amsgrad"):
        optim.AdamW(HALF(), master_weights=True, amsgrad=True)
    optimizer = optim.AdamW(HALF(), bf16_stochastic_round=True)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises((RuntimeError, AssertionError), match="capturable"):
        train(optimizer, last=1)


def test_averaged_models():
    """torch's AveragedModel takes it; the average is torch's."""
    found = []
    for module in (optim, torch.optim.swa_utils):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
        averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=module.get_ema_multi_avg_fn(0.9))
        for _ in range(5):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p))
            averaged.update_parameters(model)
        found.append([*averaged.parameters()])
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-14)
    with pytest.raises(ValueError, match="Invalid decay value 2"):
        optim.get_ema_multi_avg_fn(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{"max_norm": 0.5}, {"max_norm": 1e4}, {"max_norm": 0.5, "norm_type": 1.0}], ids=str
)
def test_clipping_is_torchs(options, dtype):
    found = []
    for clip in (optim.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        params = parameters(dtype)
        for p in params[1:]:
            p.grad = (p.detach() * 2).clone()
        norm = clip(iter(params), **options)
        found.append([norm, *(p.grad for p in params[1:])])
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(*found, rtol=near, atol=near)


def test_clipping_what_is_not_finite_or_not_there_is_torchs():
    assert optim.clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0) == 0
    for value in (float("inf"), float("nan")):
        found = []
        for clip in (optim.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            p = torch.nn.Parameter(torch.ones(2))
            p.grad = torch.tensor([1.0, value])
            found.append((clip(p, 1.0), p.grad))
        torch.testing.assert_close(*found, equal_nan=True)
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
