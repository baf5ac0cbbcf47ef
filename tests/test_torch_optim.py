"""gpulayers.torch.optim against torch.optim."""

import copy
import functools
import pickle

import pytest

torch = pytest.importorskip("torch")

import gpulayers as gl  # noqa: E402
from gpulayers.testing.tolerance import excess  # noqa: E402
from gpulayers.torch import _op, optim  # noqa: E402
from gpulayers.torch.optim import SGD, AdamW  # noqa: E402
from gpulayers.transfer import torch_to_numpy  # noqa: E402

SHAPES = [(3, 5), (), (17,), (0, 4), (2, 3, 4, 4)]
tensor = functools.partial(torch.tensor, dtype=torch.float64)
"""For hyperparameters: torch computes with a float32 one in float32, even for float64 parameters."""
OPTIONS = [
    (SGD, {}),
    (SGD, {"lr": tensor(0.05), "weight_decay": 0.1, "maximize": True, "foreach": False}),
    (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": tensor(0.01)}),
    (SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02, "foreach": True}),
    (AdamW, {}),
    (
        AdamW,
        {
            "lr": tensor([0.05]),
            "betas": (0.8, 0.95),
            "eps": 1e-3,
            "weight_decay": 0.2,
            "maximize": True,
        },
    ),
    (AdamW, {"betas": (tensor(0.8), tensor(0.95)), "foreach": False}),
    (AdamW, {"lr": 0.01, "fused": True}),
]
WITHOUT = {(1, 0), (3, 0), (2, 2)}
"""(step, parameter) that has no gradient."""


def torchs(kind):
    return getattr(torch.optim, kind.__name__)


def draw(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def parameters(dtype=torch.float32):
    params = draw(0, dtype)
    params[-1] = params[-1].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(p) for p in params]


def train(optimizer, first=1, last=5, dtype=torch.float32):
    """Updates with gradients that are rounded to ``dtype``; the parameters after each."""
    params, history = [p for group in optimizer.param_groups for p in group["params"]], []
    for step in range(first, last + 1):
        for i, (p, g) in enumerate(zip(params, draw(step, dtype))):
            # In the parameter's memory order, as autograd gives them.
            p.grad = None if (step, i) in WITHOUT else torch.empty_like(p).copy_(g).detach()
        optimizer.step()
        history += [p.detach().clone() for p in params]
    return history


def check(mine, plain, truth):
    """Mine are as near to the truth as torch's are, by the derived bound."""
    for m, p, t in zip(mine, plain, truth, strict=True):
        assert not (wrong := excess(*map(torch_to_numpy, (m, t, p)))), wrong


@pytest.fixture(autouse=True)
def _served(request):
    """No group is left to torch, but where the test says so."""
    _op.fallbacks.clear()
    yield
    left = [f for f in _op.fallbacks if f[0] in ("SGD", "AdamW")]
    assert bool(left) == ("left" in request.node.name), left


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, options", OPTIONS, ids=str)
def test_steps_are_torchs(kind, options, dtype):
    """Five steps, some parameters without a gradient in some of them; then the state's names, layouts, dtypes."""
    exact = [torch.nn.Parameter(p.detach().double()) for p in parameters(dtype)]
    mine, plain = kind(parameters(dtype), **options), torchs(kind)(parameters(dtype), **options)
    check(train(mine, dtype=dtype), train(plain, dtype=dtype), train(torchs(kind)(exact, **options), dtype=dtype))
    for state, other in zip(mine.state_dict()["state"].values(), plain.state_dict()["state"].values(), strict=True):
        assert list(state) == list(other)
        for t, u in zip(state.values(), other.values()):
            assert (t.dtype, t.shape, t.device, t.stride()) == (u.dtype, u.shape, u.device, u.stride())
    assert mine.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


def test_left_to_torch(logged):
    """What the op does not serve is torch's own step, to the bit, with a reason; an error in strict mode."""
    mine, plain = (kind(parameters(), amsgrad=True) for kind in (AdamW, torch.optim.AdamW))
    assert all(map(torch.equal, train(mine), train(plain)))
    assert any("AdamW runs on torch's own step (amsgrad=True)" in r.getMessage() for r in logged)
    with pytest.raises(gl.Refused, match=r"strict mode forbids torch's own step"), gl.strict():
        mine.step()
    capturable = AdamW(parameters(), capturable=True)
    with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be on"):
        train(capturable)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_differentiable_steps_are_left_to_torch(kind):
    slopes = []
    for optimizer in (kind, torchs(kind)):
        start = torch.ones(3, requires_grad=True)
        p, grad = start.clone(), torch.full((3,), 0.5, requires_grad=True)
        p.grad = grad
        optimizer([p], lr=0.1, weight_decay=0.5, differentiable=True).step()
        slopes += [torch.autograd.grad((p * p).sum(), (start, grad))]
    assert all(map(torch.equal, *slopes)) and slopes[0][0].all()


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_one_launch_for_a_group(kind, monkeypatch):
    launches = []
    real = optim._Launch.__call__
    monkeypatch.setattr(optim._Launch, "__call__", lambda self: launches.append(self.plan) or real(self))
    params = [torch.nn.Parameter(p) for p in draw(0)]
    optimizer = kind(params)
    for p in params:
        p.grad = torch.ones_like(p)
    pointers = [p.data_ptr() for p in params]
    versions = [p._version for p in params]
    optimizer.step()
    assert len(launches) == 1 and len(launches[0].inputs[0]) == len(SHAPES)
    assert [p.data_ptr() for p in params] == pointers  # written where they are
    assert [p._version for p in params] == [v + 1 for v in versions]  # and autograd knows
    params[1].data, params[1].grad = params[1].data.double(), None
    params[1].grad = torch.ones_like(params[1])
    optimizer.state.pop(params[1], None)
    optimizer.step()
    assert sorted(str(p.inputs[0][0].dtype) for p in launches[1:]) == ["float32", "float64"]


@pytest.mark.parametrize("kind, options", [(SGD, {"momentum": 0.9}), (AdamW, {})], ids=str)
def test_state_dicts_both_ways(kind, options):
    """Three steps with the one, then two with the other, are five with either."""
    whole = train(torchs(kind)(parameters(torch.float64), **options))[-len(SHAPES) :]
    for first, second in ((kind, torchs(kind)), (torchs(kind), kind)):
        params = parameters(torch.float64)
        a = first(params, **options)
        train(a, last=3)
        b = second(params, **options)
        b.load_state_dict(pickle.loads(pickle.dumps(a.state_dict())))
        torch.testing.assert_close(train(b, first=4)[-len(SHAPES) :], whole, rtol=1e-13, atol=1e-14)


def test_param_groups_closures_hooks_copies():
    params, seen = parameters(), []
    optimizer = AdamW([{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.0}])
    before = [p.detach().clone() for p in params]
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params)
        loss.backward()
        seen.append("closure")
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == pytest.approx(sum((p * p).sum().item() for p in before))
    assert seen == ["before", "closure", "after"]
    moved = [(b - p).abs().max().item() for b, p in zip(before, params) if p.numel()]
    assert min(moved[:2]) > 0.4 and max(moved[2:]) < 0.002
    again = copy.deepcopy(optimizer)
    assert type(again) is AdamW and again.param_groups[0]["lr"] == 0.5
    assert type(pickle.loads(pickle.dumps(SGD(params)))) is SGD
    assert isinstance(optimizer, torch.optim.AdamW)


def test_schedulers():
    for scheduler in (torch.optim.lr_scheduler.CosineAnnealingLR, torch.optim.lr_scheduler.LinearLR):
        rates = []
        for kind in (SGD, torch.optim.SGD):
            optimizer = kind(parameters(), lr=0.1)
            plan = scheduler(optimizer, 0.1 if scheduler is torch.optim.lr_scheduler.LinearLR else 10)
            for step in range(1, 4):
                train(optimizer, step, step)
                plan.step()
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["params"][2].sum().item()))
        assert rates[0] == pytest.approx(rates[1], rel=1e-6)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind, options", [(SGD, {"momentum": 0.9, "dampening": 0.5}), (AdamW, {})], ids=str)
def test_grad_scaler(kind, options, fused):
    """Steps whose gradients are not finite change nothing; fused optimizers get the scale and leave it undone."""
    found = []
    for optimizer in (kind, torchs(kind)):
        params = parameters()
        optimizer = optimizer(params, fused=fused, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for step in range(1, 5):
            optimizer.zero_grad()
            loss = sum((p * g).sum() for p, g in zip(params, draw(step)))
            # torch's fused SGD leaves a momentum unwritten where its first step is skipped.
            scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        states = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        found.append([*(p.detach() for p in params), *states, *(p.grad for p in params), scaler.get_scale()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_a_first_step_that_is_skipped():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=1.0, momentum=0.5, dampening=0.5, fused=True)
    p.grad, optimizer.found_inf = torch.ones(3), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    del optimizer.found_inf
    optimizer.step()
    assert torch.equal(p, torch.zeros(3))  # the first momentum is the whole gradient


def test_sparse_and_complex_are_left():
    """AdamW raises for sparse gradients as torch's does; what torch's SGD takes, ours takes."""
    found = []
    for kind in (SGD, torch.optim.SGD):
        embedding = torch.nn.Embedding(5, 3, sparse=True)
        torch.nn.init.ones_(embedding.weight)
        embedding(torch.tensor([1, 3, 3])).sum().backward()
        kind(embedding.parameters(), lr=0.5).step()
        found.append(embedding.weight.detach())
    assert torch.equal(*found)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        AdamW(embedding.parameters()).step()
    z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    z.grad = torch.full((2,), 1j)
    AdamW([z], lr=0.1).step()
    assert z[0].imag < -0.09


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1.0},
        {"lr": torch.ones(2)},
        {"weight_decay": -1},
        {"nesterov": True},
        {"momentum": -0.1},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, torch.tensor(0.9))},
        {"eps": -1},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
        {"colour": 1},
    ],
    ids=str,
)
def test_errors_are_torchs(arguments):
    for kind in (SGD, AdamW):
        messages = []
        for optimizer in (kind, torchs(kind)):
            with pytest.raises((ValueError, RuntimeError, TypeError)) as error:
                optimizer(parameters(), **arguments)
            messages.append((error.type, str(error.value).replace("got an", "").split("()")[-1]))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", ("SGD", "AdamW"))
def test_lazily_negated_gradients_are_left(kind):
    """Complex arithmetic leaves them: their memory holds −grad."""
    found = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.arange(3.0))
        optimizer = getattr(module, kind)([p], lr=0.1)
        p.grad = torch.complex(p.detach(), p.detach() - 1).conj().imag
        assert p.grad.is_neg()
        optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found)


def test_what_the_rule_refuses_is_left_to_torch():
    """A hyperparameter set by hand that torch takes."""
    mine, plain = SGD(parameters(), lr=0.1), torch.optim.SGD(parameters(), lr=0.1)
    for optimizer in (mine, plain):
        optimizer.param_groups[0]["weight_decay"] = -0.5
    assert all(map(torch.equal, train(mine), train(plain)))


def test_compiled_steps_trace_torchs_own():
    """torch.compile makes its own kernels of torch's formulas."""
    mine, plain = AdamW(parameters()), torch.optim.AdamW(parameters())
    for optimizer, step in ((mine, torch.compile(mine.step, backend="eager")), (plain, plain.step)):
        for p, g in zip(optimizer.param_groups[0]["params"], draw(1)):
            p.grad = g
        step()
    torch.testing.assert_close(mine.param_groups, plain.param_groups)
