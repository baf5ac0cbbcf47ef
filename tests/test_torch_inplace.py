"""Drop-ins that work in place: written by the kernel itself, told to autograd, and refused where torch refuses."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers import dispatch  # noqa: E402
from gpulayers.testing.arena import arena  # noqa: E402
from gpulayers.testing.emulator import emulating  # noqa: E402
from gpulayers.testing.interpreter import interpreting  # noqa: E402
from gpulayers.torch import _op  # noqa: E402

DOUBLE = torch.float64
CALLS = {
    "ReLU": {},
    "ReLU6": {},
    "LeakyReLU": {},
    "LeakyReLU, negative": {"negative_slope": -0.5},
    "Hardtanh": {"min_val": -0.3, "max_val": 0.7},
    "Hardsigmoid": {},
    "Hardswish": {},
    "Threshold": {"threshold": 0.1, "value": 2.0},
    "SiLU": {},
    "ELU": {"alpha": 0.7},
    "CELU": {"alpha": 0.7},
    "SELU": {},
    "Mish": {},
    "RReLU": {},
    "RReLU, drawn": {},
    "Dropout": {},
    "AlphaDropout": {},
    "Dropout2d": {},
    "Dropout3d": {},
    "FeatureAlphaDropout": {},
}
DROPOUTS = tuple(name for name in CALLS if "Dropout" in name)
DRAWN = ("RReLU, drawn", *DROPOUTS)
NEGATIVE = "LeakyReLU, negative"
LENIENT = (NEGATIVE, "ELU", "CELU", "SELU")
"""torch keeps their output, and refuses a backward that ours gets right from a copy of the input."""
COPIES = set(CALLS) - {"ReLU", "LeakyReLU", "RReLU", "RReLU, drawn", *DROPOUTS}
"""Their gradients need the input as it was."""
same = torch.testing.assert_close


def module(library, name, inplace=True):
    made = getattr(library, name.partition(",")[0])(**CALLS[name], inplace=inplace)
    return made.train(name in DRAWN)


def test_every_class_with_the_argument_is_called():
    classes = {n for n, c in vars(gt).items() if isinstance(c, type) and issubclass(c, nn.Module)}
    inplace = {n for n in classes if "inplace" in getattr(nn, n).__init__.__code__.co_varnames}
    inplace.remove("Dropout1d")  # of rows: test_torch_modules.py
    assert inplace == {name.partition(",")[0] for name in CALLS}


def numbers(seed=0, shape=(2, 4, 3, 5), dtype=DOUBLE):
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- what autograd allows, and how it refuses -------------------------------------------------------------------------


def of_a_view(m, leaf, x):
    whole = x.clone(memory_format=torch.channels_last)
    part = whole[1:]
    m(part)
    return whole


def of_a_slice(m, leaf, x):
    """The memory of the view has gaps."""
    whole = x * 1
    m(whole[..., 1:4])
    return whole


def of_a_view_of_a_view(m, leaf, x):
    whole = x * 1
    m(whole.transpose(0, 1)[1:, 0])
    return whole * whole


def under_no_grad(m, leaf, x):
    with torch.no_grad():
        m(leaf)
        m(x[1:])
        view = x[:1]
    m(view.detach())
    return leaf * x


def in_inference_mode(m, leaf, x):
    with torch.inference_mode():
        made = x.clone()
        m(made), m(x)
        return made.clone()


def y_is_changed(m, leaf, x):
    y = m(x * 1)
    with torch.no_grad():
        y.mul_(2)
    return y


def what_was_saved(m, leaf, x):
    saved = x.sigmoid()
    m(saved)
    return saved


def twice(m, leaf, x):
    return m(m(x * 1) - 0.1)


def an_alias(m, leaf, x):
    y = x * 1
    m(y.detach())
    return y * x


def a_view_made_without_gradients(m, leaf, x):
    whole = x * 1
    with torch.no_grad():
        view = whole[0]
    m(view)
    return whole


def made_in_inference_mode(m, leaf, x):
    with torch.inference_mode():
        made = x.clone()
    return m(made)


SITUATIONS = {
    "a tensor": lambda m, leaf, x: m(x * 1) * x,
    "channels last": lambda m, leaf, x: m(x.clone(memory_format=torch.channels_last)),
    "a leaf": lambda m, leaf, x: m(leaf),
    "a view of a leaf": lambda m, leaf, x: m(leaf[0]),
    "one of several views": lambda m, leaf, x: m((x * 1).chunk(2)[0]),
    "one of several views without gradients": lambda m, leaf, x: m(x.detach().clone().chunk(2)[0]),
    "expanded": lambda m, leaf, x: m(x[:1].expand(2, 4, 3, 5)),
    "expanded without gradients": lambda m, leaf, x: m(x.detach()[:1].expand(2, 4, 3, 5)),
    "empty": lambda m, leaf, x: m((x * 1)[:0]),
    "integers": lambda m, leaf, x: m((x.detach() * 3).long()),
    "no tensor": lambda m, leaf, x: m([1.0, -1.0]),
    **{
        f.__name__.replace("_", " "): f
        for f in (
            *(of_a_view, of_a_slice, of_a_view_of_a_view, under_no_grad, in_inference_mode, y_is_changed),
            *(what_was_saved, twice, an_alias, a_view_made_without_gradients, made_in_inference_mode),
        )
    },
}


def outcome(name, library, situation):
    """(error and its first words, or what is returned; the leaf and its version; its gradient)"""
    m, leaf = module(library, name), numbers().requires_grad_()
    torch.manual_seed(0)
    x, error, y = leaf * 1 if situation != "under no grad" else leaf.detach().clone(), None, torch.zeros(())
    try:
        y = SITUATIONS[situation](m, leaf, x)
        if y.requires_grad:
            (y * torch.arange(1, y.shape[-1] + 1)).sum().backward()
    except Exception as caught:
        error = type(caught), str(caught)[:60]
    return error, (y.detach(), leaf.detach(), x.detach(), leaf.grad), (leaf._version, x._version)


@pytest.mark.parametrize("name", [n for n in CALLS if n not in DRAWN])
def test_as_torch(name):
    """Values, gradients, versions and errors, the first time and when the call is known; where torch raises before it
    writes, nothing is written."""
    for situation in SITUATIONS:
        theirs = outcome(name, nn, situation)
        for _ in range(3):
            ours = outcome(name, gt, situation)
            if name == NEGATIVE and theirs[0] is not None and "backward calculation" in theirs[0][1]:
                continue  # torch has no such gradient
            if theirs[0] is not None and ours[0] is None:
                assert name in LENIENT and situation == "y is changed", situation
                continue
            assert ours[0] == theirs[0] and ours[2] == theirs[2], situation
            same(ours[1], theirs[1], msg=lambda text, situation=situation: f"{situation}: {text}")


@pytest.mark.parametrize("name", CALLS)
def test_the_input_is_what_comes_back(name):
    """The same object and memory; the gradient is the one out of place, and in the memory order of the input."""
    for order in (torch.contiguous_format, torch.channels_last):
        runs = []
        for inplace in (True, False):
            leaf = numbers().requires_grad_()
            x = leaf.clone(memory_format=order)
            grads = []
            x.register_hook(grads.append)
            torch.manual_seed(1)
            before, m = x.data_ptr(), module(gt, name, inplace)
            y = m(x)
            assert (y is x) == inplace and x.data_ptr() == before and y.stride() == x.stride()
            y.backward(numbers(2).contiguous(memory_format=torch.channels_last))
            assert [g.stride() for g in grads] == [x.stride()]
            runs.append((y.detach(), leaf.grad))
        same(*runs)


@pytest.mark.parametrize("name", [n for n in CALLS if n != "Hardsigmoid"])  # torch has none
def test_gradients_of_gradients(name):
    """As out of place: the terms that come through the input as it was, too."""

    def second(inplace):
        torch.manual_seed(3)
        leaf, dy = numbers().requires_grad_(), numbers(1).requires_grad_()
        x = leaf * leaf
        y = module(gt, name, inplace)(x - 0.5)
        (g,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
        return torch.autograd.grad(g.square().sum() + y.detach().sum(), (leaf, dy))

    same(second(True), second(False))


# --- who writes -------------------------------------------------------------------------------------------------------


def copies(run, *args):
    """How often torch copied memory meanwhile."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run(*args)
    return sum(e.count for e in found.key_averages() if e.key in ("aten::copy_", "aten::zero_", "aten::fill_"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_one_launch(name, dtype):
    """Forward is one launch into the input's memory, and one copy of the input where the gradient needs it; backward is
    one launch."""
    m, out_of_place = module(gt, name), module(gt, name, inplace=False)
    for order in (torch.contiguous_format, torch.channels_last):
        x = numbers(dtype=dtype).contiguous(memory_format=order)
        dy = numbers(1, dtype=dtype).contiguous(memory_format=order)
        # Without an arena, which poisons memory.
        with dispatch.policy(backends=("triton",), simulate=("triton",)), interpreting() as session:
            leaf = x.clone().requires_grad_()
            torch.manual_seed(0)
            y = out_of_place(leaf)
            y.backward(dy)
            begin = len(session.launches)
            with torch.no_grad():
                given = x.clone()
                torch.manual_seed(0)
                assert copies(m, given) == 0 and torch.equal(given, y)
            assert len(session.launches) == begin + 1
            other = (-x).requires_grad_()
            hidden = -other
            torch.manual_seed(0)
            assert copies(m, hidden) == (name in COPIES)
            assert len(session.launches) == begin + 2 and torch.equal(hidden, y)
            assert copies(hidden.backward, dy) == 0
            assert len(session.launches) == begin + 3 and torch.equal(-other.grad, leaf.grad)


ELSEWHERE = [(n, b) for n in ("ReLU", "SiLU", "RReLU, drawn", "Dropout") for b in ("definition", "numpy", "cuda")]


@pytest.mark.parametrize("name, backend", [pair for pair in ELSEWHERE if pair != ("Dropout", "cuda")])  # there is none
def test_every_backend(name, backend):
    """The same values as out of place, in memory with gaps and in another order too."""
    m, out_of_place = module(gt, name), module(gt, name, inplace=False)
    dtype = torch.float16 if backend == "cuda" else torch.bfloat16
    wide = numbers(shape=(2, 4, 3, 5, 2), dtype=dtype)
    with emulating(), arena(backend):
        for given in (wide[..., 0], wide.transpose(0, 2).contiguous().transpose(0, 2), wide[:0]):
            x = given.clone(memory_format=torch.preserve_format) if given.numel() else given.clone()
            runs = []
            for call in (out_of_place, m):
                leaf = x.detach().clone().requires_grad_()
                torch.manual_seed(0)
                y = call(leaf * 1)
                y.backward(torch.ones_like(y))
                runs.append((y.detach(), leaf.grad))
            same(*runs, rtol=0, atol=0)
            torch.manual_seed(0)
            strided = wide.clone()[..., 0] if given is not wide and given.stride() == wide[..., 0].stride() else x
            assert m(strided) is strided and torch.equal(strided, runs[0][0])


# --- where torch traces -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, library, name, inplace=True):
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 4, 3, padding=1), module(library, name, inplace)

    def forward(self, x):
        h = self.first(x)
        y = self.act(h)
        return h + y if self.act.inplace else y + y


def step(net, call, x):
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(2)
    y = call(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("name", ["ReLU", "SiLU", "RReLU, drawn", "Dropout"])
def test_compiled(name):
    """One graph, with the values of eager mode out of place."""
    torch.manual_seed(0)
    net = Net(gt, name).to(memory_format=torch.channels_last)
    other = Net(gt, name, inplace=False)
    other.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(net, backend=backend, fullgraph=True)
        same(step(net, compiled, x), step(other, other, x))


@pytest.mark.parametrize("name", CALLS)
def test_traced_and_transformed(name):
    """Exported, under a dispatch mode, as fake tensors, in forward mode and under torch.func."""
    net, x = Net(gt, name).eval(), torch.randn(2, 3, 5, 4)
    y = net(x)
    exported = torch.export.export(net, (x,))
    same(exported.module()(x), y)
    act = module(gt, name).eval()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x).requires_grad_()
        hidden = fake.contiguous(memory_format=torch.channels_last) * 1
        found = act(hidden)
        found.sum().backward()
        assert found is hidden and hidden.stride() == (60, 1, 12, 3) and fake.grad.shape == x.shape
    if name in DRAWN:
        return
    plain = module(nn, name, inplace=False).eval()

    def through(m):
        return lambda t: m(t * 1)

    same(torch.func.jvp(through(act), (x,), (x,)), torch.func.jvp(through(plain), (x,), (x,)))
    if name != "RReLU":  # torch has none
        same(torch.func.vmap(through(act))(x), plain(x))
    same(torch.func.grad(lambda t: through(act)(t).sum())(x), torch.func.grad(lambda t: plain(t).sum())(x))


def test_autocast_casts_nothing():
    for name in CALLS:
        with torch.autocast("cpu", torch.bfloat16):
            x = numbers(dtype=torch.float32)
            assert module(gt, name)(x) is x and x.dtype is torch.float32


def test_nothing_falls_back():
    _op.fallbacks.clear()
    for name in CALLS:
        m = module(gt, name)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            m(numbers(dtype=dtype))
            m(numbers(dtype=dtype).requires_grad_() * 1).sum().backward()
    assert not _op.fallbacks


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [lambda: gt.Conv2d(4, 4, 1), lambda: gt.GroupNorm(2, 4), lambda: gt.LayerNorm(5)])
def test_what_a_layer_gives_may_be_written_into(make, order):
    """``y += identity``: it is no view, whichever way a kernel made it."""
    layer, x = make(), torch.randn(2, 4, 5, 5).contiguous(memory_format=order).requires_grad_()
    y = layer(x)
    expected = torch.autograd.grad((y + x).sin().sum(), x, retain_graph=True)
    y += x
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x), expected)
