"""The drop-ins where torch traces, transforms, checkpoints or differentiates again: as torch.nn, or an error that says so."""

import copy
import itertools
import pickle

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
import torch.nn.utils.prune as prune  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import gpulayers as gl  # noqa: E402
import gpulayers.torch as gt  # noqa: E402
from gpulayers.testing.torch_cases import CASES, PLAIN, Everything, layouts, loss  # noqa: E402
from gpulayers.torch import _op  # noqa: E402

RANDOM = ("Dropout", "RReLU")
DIFFERENTIABLE = [c for c in CASES if c.name not in RANDOM]
EMPTY_IS_WRONG = ("BatchNorm1d", "BatchNorm2d", "CrossEntropyLoss", "NLLLoss", "MSELoss")
"""torch raises, or gives NaN, which opcheck takes for a difference."""
KEEPS_ITS_INPUT = ("Tanhshrink", "CrossEntropyLoss")
"""Their backward reads the input, where torch's reads a copy that it made."""
STRIDED = ("Conv2d", "BatchNorm2d", "MaxPool2d", "PReLU", "ReflectionPad2d")
"""Traced channels last too."""
DOUBLE = torch.float64
same = torch.testing.assert_close


def test_every_class_has_a_case():
    classes = {n for n, c in vars(gt).items() if isinstance(c, type) and issubclass(c, nn.Module)}
    assert {c.name for c in CASES} == classes == Everything(gt).layers.keys()


def first(found):
    return found[0] if isinstance(found, tuple) else found


def both(case, dtype=DOUBLE, training=True):
    """(ours, torch's), equal."""
    return case.module(gt, dtype).train(training), case.module(nn, dtype).train(training)


def outcome(call):
    """What a call gives, or the type of its error."""
    try:
        return call()
    except Exception as error:
        return type(error)


def agree(ours, theirs):
    a, b = outcome(ours), outcome(theirs)
    if isinstance(b, type):
        assert isinstance(a, type) and issubclass(a, b)
    else:
        same(a, b)


# --- custom ops -------------------------------------------------------------------------------------------------------


class _Recorded(TorchDispatchMode):
    """The custom ops that are called inside, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gpulayers":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(case, x, others, training=True):
    module = case.module(gt, x.dtype).train(training)
    x = x.detach().requires_grad_()
    with _Recorded() as mode:
        y = first(module(x, *others))
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    return mode.calls


def check_ops(calls, traced=True):
    for func, args in calls:
        if traced and not func.name().endswith("_backward"):
            torch.library.opcheck(func, args)
        else:
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    x, *others = case.inputs()
    for number, given in enumerate(layouts(x)):
        if (not len(given) and case.name in EMPTY_IS_WRONG) or (number == 1 and case.name in PLAIN):
            continue
        calls = recorded(case, given, [t[: len(given)] for t in others])
        assert case.name == "Flatten" or len(calls) >= 2
        check_ops(calls, traced=number == 0 or (number == 3 and case.name in STRIDED))
    half = [t.bfloat16() if t.is_floating_point() else t for t in (x, *others)]
    check_ops(recorded(case, half[0], half[1:]), traced=False)
    if case.name.startswith("BatchNorm") or case.name == "RReLU":
        check_ops(recorded(case, x, others, training=False))


def test_soft_labels_and_weights():
    x, p = torch.randn(4, 3), torch.rand(4, 3).softmax(1)
    for weight, labels in itertools.product((None, torch.rand(3)), (torch.tensor([0, 2, -100, 1]), p)):
        with _Recorded() as mode:
            gt.CrossEntropyLoss(weight=weight)(x.requires_grad_(), labels).backward()
        check_ops(mode.calls)


# --- compilers --------------------------------------------------------------------------------------------------------


def everything():
    return Everything(gt).to(DOUBLE)


def images(n, size):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, size, size - 1, dtype=DOUBLE, generator=generator), torch.arange(n)


def trained(model, call, x, labels):
    """Outputs, gradients (the input's first) and statistics."""
    model.zero_grad()
    x.requires_grad_().grad = None
    torch.manual_seed(7)
    total, outputs = call(model, x, labels)
    total.backward()
    return outputs, [x.grad, *(p.grad for p in model.parameters())], list(model.buffers())


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_in_training(backend):
    """One graph of every class with dynamic sizes: a second size compiles nothing anew."""
    plain, model = everything(), everything()
    torch.compiler.reset()
    options = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, size in ((5, 12), (7, 9) if backend != "inductor" else (7, 12)):
            x, labels = images(n, size)
            if backend == "inductor":  # symbolic heights and widths cost it seconds
                torch._dynamo.mark_static(x, (2, 3))
            same(trained(model, compiled, x, labels), trained(plain, loss, x, labels))


def test_compiled_in_evaluation():
    plain, model = everything().eval(), everything().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for n, size in ((5, 12), (7, 9)):
            same(compiled(*images(n, size)), plain(*images(n, size)))


def test_exported():
    model = everything().eval()
    n = torch.export.Dim("n", min=2)
    exported = torch.export.export(model, images(5, 12), dynamic_shapes=({0: n}, {0: n}))
    names = {str(node.target).split(".")[1] for node in exported.graph.nodes if "gpulayers" in str(node.target)}
    assert not exported.graph_signature.buffers_to_mutate
    assert len(names) == 38  # of 39 ops; dropout computes nothing
    for count in (5, 8):
        same(exported.module()(*images(count, 12)), model(*images(count, 12)))


# --- checkpoints, copies, changed weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_replays(use_reentrant):
    """The masks of dropout and the slopes of RReLU are drawn again as they were."""
    model = nn.Sequential(
        gt.Linear(6, 8), gt.RReLU(), gt.Dropout(0.5), gt.LayerNorm(8), gt.Dropout(0.2), gt.Linear(8, 3)
    )
    x = torch.randn(16, 6)
    runs = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        given = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = call(given)
        torch.rand(3)  # other draws in between change nothing
        y.square().sum().backward()
        runs.append([y.detach(), given.grad, *(p.grad for p in model.parameters())])
    same(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies(case):
    """deepcopy, pickle, functional_call, state dicts."""
    module = case.module(gt).eval()
    inputs = case.inputs()
    y = module(*inputs)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        same(other(*inputs), y, rtol=0, atol=0)
    theirs = case.module(nn).eval()
    theirs.load_state_dict(module.state_dict())
    halves = {name: p.detach() / 2 for name, p in module.named_parameters()}
    same(
        torch.func.functional_call(module, halves, tuple(inputs)),
        torch.func.functional_call(theirs, halves, tuple(inputs)),
    )


def test_weights_that_are_made():
    """weight_norm and pruning, of what has a weight of two dimensions or more."""
    for case, change in itertools.product(
        [c for c in CASES if c.name in ("Linear", "Conv2d")],
        [parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
    ):
        ours, theirs = both(case)
        grads = []
        for module in (ours, theirs):
            change(module)
            y = module(*case.inputs(DOUBLE))
            y.square().sum().backward()
            grads.append([y.detach(), *(p.grad for p in module.parameters())])
        same(*grads)


# --- gradients of gradients, forward mode, vmap -----------------------------------------------------------------------


def second(module, inputs, mixed=True):
    """Gradients of a loss of y and of its gradients, for dy, the input and the parameters."""
    x = inputs[0].clone().requires_grad_()
    y = first(module(x, *inputs[1:]))
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape).requires_grad_()
    leaves = [x, *module.parameters()]
    grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
    loss = sum((g * torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype).reshape(g.shape)).sum() for g in grads)
    loss = loss + sum(g.square().sum() for g in grads) + (y.square().sum() if mixed else 0)
    return torch.autograd.grad(loss, [dy, *leaves], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_double_backward(case):
    for training in (True, False) if case.name.startswith("BatchNorm") else (True,):
        agree(*(lambda m=m: second(m, case.inputs(DOUBLE)) for m in both(case, training=training)))


@pytest.mark.parametrize("name", RANDOM)
def test_double_backward_of_what_is_drawn(name):
    """Both are a product with numbers that were drawn: the numbers are y / x."""
    module = getattr(gt, name)()
    x = torch.randn(4, 5, dtype=DOUBLE)
    torch.manual_seed(2)
    factor = module(x) / x

    class Product(nn.Module):
        def forward(self, x):
            return x * factor

    torch.manual_seed(2)
    same(second(module, [x]), second(Product(), [x]))


def test_second_derivative_where_traced_says_no():
    x = torch.randn(3, requires_grad=True)
    with _Recorded():
        (g,) = torch.autograd.grad(gt.functional.gelu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient of its gradient where it is traced"):
        g.sum().backward()


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_forward_mode(case):
    modules, (x, *others) = both(case), case.inputs(DOUBLE)
    t = case.inputs(DOUBLE, seed=1)[0]

    def jvp(m):
        return torch.func.jvp(lambda x: m(x, *others), (x,), (t,))

    def dual(m):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(first(m(forward_ad.make_dual(x, t), *others)))

    for by in (jvp, dual):
        agree(*(lambda m=m, by=by: by(m) for m in modules))


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_vmap_and_func(case):
    modules = both(case)
    pairs = [case.inputs(DOUBLE, seed) for seed in range(3)]
    stacked = [torch.stack(ts) for ts in zip(*pairs)]

    def squares(m, *inputs):
        return first(m(*inputs)).square().sum()

    for by in (
        lambda m: torch.func.vmap(m)(*stacked),
        lambda m: torch.func.vmap(m, randomness="different")(*stacked),
        lambda m: torch.func.grad(lambda x: squares(m, x, *pairs[0][1:]))(pairs[0][0]),
        lambda m: torch.func.vmap(torch.func.grad(lambda *xs: squares(m, *xs)))(*stacked),
        lambda m: torch.func.hessian(lambda x: squares(m, x, *pairs[0][1:]))(pairs[0][0]),
    ):
        agree(*(lambda m=m, by=by: by(m) for m in modules))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batched_dys(case):
    """is_grads_batched=True gives one row of a Jacobian for each dy; what was drawn stays drawn."""
    inputs = case.inputs(DOUBLE)
    module, x = case.module(gt, DOUBLE), inputs[0].requires_grad_()
    y = first(module(x, *inputs[1:]))
    dys = torch.randn(3, *y.shape, dtype=DOUBLE)
    leaves = [x, *module.parameters()]
    one_by_one = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    together = torch.autograd.grad(y, leaves, dys, retain_graph=True, is_grads_batched=True)
    same(together, tuple(map(torch.stack, zip(*one_by_one))))


NO_DUAL_DYS = ("Hardsigmoid", "MSELoss")
"""torch's own backward refuses them."""


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in NO_DUAL_DYS], ids=str)
def test_dual_dys(case):
    """A tangent of dy, whose gradient is linear in it, goes through a backward."""
    inputs = case.inputs(DOUBLE)
    x = inputs[0].requires_grad_()
    y = first(case.module(gt, DOUBLE)(x, *inputs[1:]))
    dy, t = torch.randn(2, *y.shape, dtype=DOUBLE)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, t), retain_graph=True)
        found = tuple(forward_ad.unpack_dual(dx))
    same(found, tuple(torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in (dy, t)))


def test_vmap_of_what_is_drawn():
    x, dropout = torch.ones(4, 200), gt.Dropout(0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(dropout)(x)
    for randomness in ("same", "different"):
        y = torch.func.vmap(dropout, randomness=randomness)(x)
        assert set(y.unique().tolist()) == {0.0, 2.0} and torch.equal(y[0], y[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="do not yet support aten::rrelu"):  # torch's own
        torch.func.vmap(gt.RReLU(), randomness="different")(x)


# --- tensors of other kinds -------------------------------------------------------------------------------------------


class Logged(torch.Tensor):
    """Writes down which functions it was given to."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_subclass_hears_of_the_call(case):
    module, (x, *others) = case.module(gt).eval(), case.inputs()
    Logged.seen = []
    y = first(module(x.as_subclass(Logged), *others))
    assert type(y) is Logged
    same(y.as_subclass(torch.Tensor), first(module(x, *others)))
    if case.name not in ("Flatten", "Dropout"):
        assert any(isinstance(f, _op.TorchOp) for f in Logged.seen)


def described(found):
    found = found if isinstance(found, tuple) else (found,)
    return [(tuple(y.shape), y.dtype, y.stride()) for y in found]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_and_meta_tensors(case):
    module, (x, *others) = case.module(gt), case.inputs()
    shadow = copy.deepcopy(module).to("meta")
    for given in layouts(x):
        if not len(given):
            continue
        real = described(module(given, *others))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(t) for t in (given, *others)]
            assert described(module(*fakes)) == real
        inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (given, *others)]
        y = first(shadow(inputs[0].requires_grad_(), *inputs[1:]))
        assert y.device.type == "meta" and described(y) == real[:1]
        y.backward(torch.ones_like(y))
        assert inputs[0].grad.shape == x.shape


def lazily_negated(x):
    """A tensor equal to ``x`` whose memory holds −x."""
    found = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert found.is_neg()
    return found


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_lazily_negated_tensors(case):
    """Their memory holds other values: not what a call with plain ones of the same strides has planned."""
    module, (x, *others) = case.module(gt).eval(), case.inputs()
    plain = torch.view_as_real(torch.complex(x, x))[..., 1]
    negated = lazily_negated(x)
    assert plain.stride() == negated.stride()
    for given in (plain, plain, plain, negated, negated):
        same(first(module(given, *others)), first(case.module(nn).eval()(x, *others)))
    grads = []
    for m in (case.module(gt), case.module(nn)):
        y = first(m(leaf := x.clone().requires_grad_(), *others))
        y.backward(lazily_negated(torch.ones_like(y)))
        grads.append([leaf.grad, *(p.grad for p in m.parameters())])
    same(*grads)


@pytest.mark.parametrize("make", ("to_sparse", "to_sparse_csr", "to_mkldnn", "nested", "jagged", "zeros"))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_plain_memory(make):
    """As torch, after calls with dense ones of the same shape too: these must not end the process."""
    x, weight, norm = torch.randn(4, 6), torch.randn(5, 6), torch.randn(6)
    other = {
        "nested": lambda: torch.nested.nested_tensor([x[:1], x[1:]]),
        "jagged": lambda: torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged),
        "zeros": lambda: torch._efficientzerotensor(4, 6),
    }.get(make, lambda: getattr(x, make)())()

    def values(y):
        return torch.cat(y.unbind()) if y.is_nested else y.to_dense() if y.layout != torch.strided else y

    for call in (
        lambda m, t: m.relu(t),
        lambda m, t: m.linear(t, weight),
        lambda m, t: m.softmax(t, -1),
        lambda m, t: m.layer_norm(t, (6,), norm, norm),
        lambda m, t: m.rms_norm(t, (6,), norm),
        lambda m, t: m.mse_loss(x, t),
    ):
        for t in (x, x, x, other, other, x):
            agree(*(lambda m=m, call=call, t=t: values(call(m, t)) for m in (gt.functional, nn.functional)))


# --- autograd in eager mode -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_changed_before_backward(case):
    """Where torch refuses, it is refused or the gradient is still the right one; elsewhere it is as torch's."""

    def changed(module, which):
        torch.manual_seed(1)
        inputs = case.inputs(DOUBLE)
        leaf = inputs[0].requires_grad_()
        x = leaf * 1
        y = first(module(x, *inputs[1:]))
        with torch.no_grad():
            for t in {"x": [x], "y": [y], "weight": module.parameters(), "nothing": ()}[which]:
                t.add_(1)
        y.sum().backward()
        return [leaf.grad, *(p.grad for p in module.parameters())]

    for which in ("x", "y", "weight"):
        ours, theirs = (outcome(lambda m=m, which=which: changed(m, which)) for m in both(case))
        right = changed(both(case)[0], "nothing")
        if ours is RuntimeError:
            assert theirs is RuntimeError or (which == "x" and case.name in KEEPS_ITS_INPUT), which
        else:
            same(ours, right)


def test_statistics_are_written_in_training_alone():
    x, norm = torch.randn(4, 3), gt.BatchNorm1d(3)
    for by in (lambda: norm(x), lambda: norm(x.as_subclass(Logged))):
        for training in (True, False):
            norm.train(training)
            before = norm.running_mean._version, norm.running_mean.clone()
            by()
            assert (norm.running_mean._version > before[0]) == training
            assert torch.equal(norm.running_mean, before[1]) != training


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_expanded_dy(case):
    def gradients(module, reduce):
        inputs = case.inputs(DOUBLE)
        x = inputs[0].requires_grad_()
        reduce(first(module(x, *inputs[1:]))).backward()
        return [x.grad, *(p.grad for p in module.parameters())]

    for reduce in (torch.sum, lambda y: y[0].sum() if y.dim() else y, lambda y: y.reshape(-1)[0]):
        same(*(gradients(m, reduce) for m in both(case)))


def test_scalars():
    """Inputs, and so dys, without dimensions."""
    for case in CASES:
        if case.shape != (3, 5) or len(case.inputs()) > 1 or case.name in RANDOM or case.arguments.get("dim") == 1:
            continue
        if list(case.module(nn).parameters()):
            continue
        runs = []
        for module in both(case):
            x = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
            y = module(x)
            y.backward()
            runs.append([y.detach(), x.grad])
        if case.name in ("Softmin", "LogSoftmax"):
            assert runs[0][1] == 0
        same(*runs, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_falls_back(case):
    """In plain eager mode gpulayers computes, in every dtype and memory order."""
    _op.fallbacks.clear()
    with gl.strict():
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            module, (x, *others) = case.module(gt, dtype), case.inputs(dtype)
            for given in layouts(x):
                if not len(given):
                    continue
                y = first(module(given.detach().requires_grad_(), *others))
                y.backward(torch.ones_like(y))
                with torch.no_grad():
                    module(given, *others)
    assert not _op.fallbacks
