"""A gradient has its input's memory layout: layer by layer, and through whole models in channels_last, where a step costs
the launches that its layers need and no copy beside them."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers import dispatch  # noqa: E402
from gpulayers.arrays import layout  # noqa: E402
from gpulayers.testing.interpreter import interpreting  # noqa: E402
from gpulayers.testing.torch_cases import CASES, layouts  # noqa: E402

LAST = torch.channels_last


def strides(x):
    """What its gradient must have; where an axis is of size 1, any stride will do."""
    dense = layout(tuple(x.shape), x.stride())[1]
    return significant(x if dense else torch.empty(x.shape))


def significant(x):
    return [step for step, n in zip(x.stride(), x.shape) if n != 1]


# --- layer by layer ---------------------------------------------------------------------------------------------------


class Traced(TorchDispatchMode):
    """Sends drop-ins by the road of what is traced."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def gradients_like(y):
    """In every layout: row-major, transposed, channels last, with gaps, expanded."""
    dy = torch.randn(y.shape, dtype=y.dtype)
    yield dy
    if not y.dim():
        return
    yield dy.transpose(0, -1).contiguous().transpose(0, -1)
    if y.dim() == 4:
        yield dy.contiguous(memory_format=LAST)
    yield torch.stack([dy, dy], -1)[..., 0]
    yield dy.reshape(-1)[0].expand(y.shape)


def check_gradients(case, dtype=torch.float32):
    x, *others = case.inputs(dtype)
    for given in layouts(x):
        module = case.module(gt, dtype)
        if given.dim() == 4 and given.is_contiguous(memory_format=LAST):
            module.to(memory_format=LAST)
        leaves = [given.detach().requires_grad_(), *module.parameters()]
        if not given.numel():
            continue
        y = module(leaves[0], *others)
        y = y[0] if isinstance(y, tuple) else y
        for dy in gradients_like(y):
            grads = torch.autograd.grad(y, leaves, dy, retain_graph=True)
            assert [significant(g) for g in grads] == [strides(t) for t in leaves], (given.stride(), dy.stride())


COMPUTE = [c for c in CASES if c.name != "Flatten"]  # a view, whose gradient is a view


@pytest.mark.parametrize("case", COMPUTE, ids=str)
def test_layers(case):
    with dispatch.only("numpy", "definition"):
        check_gradients(case)
        check_gradients(case, torch.float64)
    with Traced():
        check_gradients(case)


@pytest.mark.parametrize("name", ["Linear", "LayerNorm", "BatchNorm2d", "Softmax2d", "ReLU", "MaxPool2d", "Conv2d"])
def test_layers_of_triton(name):
    with dispatch.policy(backends=("triton",), simulate=("triton",)), interpreting(races=False):
        check_gradients(next(c for c in CASES if c.name == name))


# --- whole models -----------------------------------------------------------------------------------------------------


def conv(inside, outside, kernel=3, act=nn.ReLU, inplace=True, **options):
    layers = [nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outside)]
    return nn.Sequential(*layers, *([] if act is None else [act(inplace=inplace)]))


class Bottleneck(nn.Module):
    """He et al., 2015, with a stride."""

    def __init__(self, inplace):
        super().__init__()
        self.main = nn.Sequential(
            conv(8, 4, 1, inplace=inplace), conv(4, 4, 3, inplace=inplace, stride=2), conv(4, 16, 1, None)
        )
        self.shortcut = conv(8, 16, 1, None, stride=2)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x):
        y = self.main(x)
        y += self.shortcut(x)
        return self.act(y)


class UNet(nn.Module):
    """Ronneberger et al., 2015: one step down and up, and what was before put beside what comes back."""

    def __init__(self, inplace):
        super().__init__()
        self.before = conv(8, 8, act=nn.ELU, inplace=inplace)
        self.below = nn.Sequential(nn.MaxPool2d(2), conv(8, 16, act=nn.LeakyReLU, inplace=inplace), nn.Dropout(0.0))
        self.up, self.pad = nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1)
        self.after = nn.Conv2d(24, 8, 3)

    def forward(self, x):
        x = self.before(x)
        return self.after(self.pad(torch.cat([x, self.up(self.below(x))], 1)))


class InvertedResidual(nn.Module):
    """Howard et al., 2019, with squeeze and excitation."""

    def __init__(self, inplace):
        super().__init__()
        self.expand = conv(8, 16, 1, nn.Hardswish, inplace)
        self.depthwise = conv(16, 16, 3, nn.ReLU6, inplace, groups=16)
        squeeze, excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(inplace), excite, nn.Hardsigmoid(inplace))
        self.project = conv(16, 8, 1, None)

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.scale(y))


MODELS = (Bottleneck, UNet, InvertedResidual)


def of_kind(kind, inplace, dtype=torch.float32):
    torch.manual_seed(0)
    return kind(inplace).to(dtype=dtype, memory_format=LAST)


def image(dtype=torch.float32):
    return torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(1)).to(dtype, memory_format=LAST)


def step(model, x, dy):
    """Output and gradients."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def ours(model):
    return [m for m in model.modules() if type(m).__module__.startswith("gpulayers")]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_every_gradient_of_a_model(kind, inplace):
    """In the layout of its activation, whatever that of the last one is; values as torch's."""
    plain, model, x = of_kind(kind, inplace, torch.float64), of_kind(kind, inplace, torch.float64), image(torch.float64)
    gt.patch(model)
    found = {}

    def watch(module, xs, y):
        layout = significant(y)
        y.register_hook(lambda g: found.update({module: (g, layout)}))

    hooks = [m.register_forward_hook(watch) for m in ours(model)]
    dy = torch.randn(plain(x).shape, dtype=torch.float64)  # row-major
    mine = step(model, x, dy)
    for hook in hooks:
        hook.remove()
    plain = of_kind(kind, inplace, torch.float64)
    torch.testing.assert_close(mine, step(plain, x, dy))
    assert len(found) == len(ours(model))
    wrong = [m for m, (g, layout) in found.items() if significant(g) != layout and g.data_ptr() != dy.data_ptr()]
    assert not [m for m in wrong if not isinstance(m, nn.Upsample)]  # its dy is a part of what torch.cat's is given
    assert [significant(g) for g in mine[1:]] == [strides(t) for t in (x, *model.parameters())]


COPIES = ("aten::copy_", "aten::zero_", "aten::fill_")
THEIRS = ("aten::upsample_nearest2d_backward", "aten::sum")
"""torch's own functions, which copy and fill inside."""


def counted(run):
    """(launches of Triton, passes of torch that do nothing but copy or fill)"""
    with (
        dispatch.policy(backends=("triton",), simulate=("triton",)),
        interpreting(races=False) as session,
        profile(activities=[ProfilerActivity.CPU]) as found,
    ):
        run()
    launched = sorted(launch.kernel for launch in session.launches)
    return launched, sum(e.name in COPIES and not within(e, THEIRS) for e in found.events())


def within(event, names):
    while event is not None and event.name not in names:
        event = event.cpu_parent
    return event is not None


KEEPS_A_COPY = ("ELU", "Hardswish", "ReLU6", "Hardsigmoid")
"""In place, their gradients need the input as it was."""


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_the_launches_of_a_step(kind, inplace):
    """A step launches what its layers launch one by one, on inputs and gradients in channels_last; and nothing is copied but
    the inputs that layers in place need again."""
    model, x = of_kind(kind, inplace), image()
    gt.patch(model)
    given, made = {}, {}
    hooks = [m.register_forward_pre_hook(lambda m, xs: given.update({m: xs[0].detach().clone()})) for m in ours(model)]
    hooks += [m.register_forward_hook(lambda m, xs, y: made.update({m: y.detach().clone()})) for m in ours(model)]
    y = model(x).detach()
    for hook in hooks:
        hook.remove()
    alone = []
    for module in ours(model):

        def one(module=module):
            leaf = given[module].requires_grad_()
            torch.autograd.grad(module(-leaf), [leaf, *module.parameters()], made[module])

        alone += counted(one)[0]
    launched, copied = counted(lambda: step(model, x, y))
    assert launched == sorted(alone)
    assert copied == (sum(type(m).__name__ in KEEPS_A_COPY for m in ours(model)) if inplace else 0)


# --- parts of arrays --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "images, size, kernel, stride, groups, skipped",
    [(2, 4, 3, 1, 1, 0), (2, 8, 3, 2, 1, 1), (3, 5, 1, 1, 1, 0), (3, 5, 1, 1, 1, 1), (16, 3, 3, 1, 1, 0), (2, 4, 3, 1, 32, 1)],
    ids=["3×3", "a stride", "a product", "a product of rows", "one pixel of many images", "depthwise"],
)  # fmt: skip
def test_parts_are_read_where_they_are(images, size, kernel, stride, groups, skipped, dtype):
    """Some channels, or some rows too, as torch.cat's gradients are: not copied, and the same bits as of whole arrays."""
    torch.manual_seed(0)
    out = size // stride
    x, dy = torch.randn(images, 48, size + skipped, size), torch.randn(images, 64, out + skipped, out)
    x, dy = (t.to(dtype, memory_format=LAST) for t in (x, dy))
    layer = gt.Conv2d(32, 32, kernel, stride, kernel // 2, groups=groups, dtype=dtype).to(memory_format=LAST)
    parts = x[:, 8:40, skipped:], dy[:, 16:48, skipped:]
    found, launched = [], []
    for given, of_dy in (parts, [t.contiguous(memory_format=LAST) for t in parts]):
        leaf = given.detach().requires_grad_()

        def step(leaf=leaf, of_dy=of_dy):
            y = layer(leaf)
            found.append([y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], of_dy)])

        launched += counted(step)[0]
    assert not {"_nhwc_kernel", "_copy_kernel"} & {*launched}
    torch.testing.assert_close(*found, rtol=0, atol=0)
