"""The drop-ins where torch traces, transforms, checkpoints or differentiates again: as torch.nn, or an error that says so."""

import copy
import itertools
import pickle

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
import torch.nn.utils.prune as prune  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_calls import PLAIN_CPP  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers.testing.torch_cases import (  # noqa: E402
    CASES,
    DIFFERENTIABLE,
    DOUBLE,
    LOOKUPS,
    MADE_OF_OTHERS,
    PLAIN,
    RANDOM,
    TARGETS,
    Everything,
    agree,
    both,
    first,
    layouts,
    leaf,
    loss,
)

EMPTY_IS_WRONG = (
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "InstanceNorm2d",
    "CrossEntropyLoss",
    "NLLLoss",
    "LinearCrossEntropyLoss",
    *TARGETS,
)
"""torch raises, or gives NaN, which opcheck takes for a difference."""
TRACED_AS = {"GroupNorm-2-4": {2: (3, 4), 1: (2, 4, 6, 5)}}
"""By the number of groups, shapes: single numbers, and an image in one group, since torch takes seconds for symbols of groups
of an image."""
TRACED_BESIDE = ("MaxPool2d-2", "MaxPool3d-2-1-True", "InstanceNorm1d-3")
"""Their ops are traced of one, two and three axes by others: padded and not, with indices and without, with weights and without."""
same = torch.testing.assert_close


def test_every_class_has_a_case():
    lazy = nn.modules.lazy.LazyModuleMixin
    classes = {
        n for n, c in vars(gt).items() if isinstance(c, type) and issubclass(c, nn.Module) and not issubclass(c, lazy)
    }
    classes -= set(MADE_OF_OTHERS)
    assert {c.name for c in (*CASES, *LOOKUPS)} == classes == Everything(gt).layers.keys()


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
    module = case.module(gt, x.dtype if x.is_floating_point() else torch.float32).train(training)
    x = leaf(x)
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


@pytest.mark.parametrize("case", [*CASES, *LOOKUPS], ids=str)
def test_opcheck(case):
    x, *others = case.inputs()
    for groups, shape in TRACED_AS.get(str(case), {}).items():
        other = case._replace(arguments=case.arguments | {"num_groups": groups}, shape=shape)
        check_ops(recorded(other, *other.inputs(), []))
    for number, given in enumerate(layouts(x)):
        if (not len(given) and case.name in EMPTY_IS_WRONG) or (number in (1, 2) and case.name in PLAIN):
            continue
        calls = recorded(case, given, [t[: len(given)] for t in others])
        assert case.name == "Flatten" or len(calls) >= 2
        traced = number == 0 and str(case) not in (*TRACED_AS, *TRACED_BESIDE)
        check_ops(calls, traced=traced or (number == 3 and case.name == "Conv2d"))
    half = [t.bfloat16() if t.is_floating_point() else t for t in (x, *others)]
    check_ops(recorded(case, half[0], half[1:]), traced=False)
    if case.name.startswith(("BatchNorm", "InstanceNorm2")) or case.name == "RReLU":
        check_ops(recorded(case, x, others, training=False), traced=False)


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


def test_compiled_in_training():
    """One graph of every class with dynamic sizes: a second size compiles nothing anew."""
    plain, model = everything(), everything()
    torch.compiler.reset()
    # What is left of Inductor without torch's own operations as C++ is its handling of ours.
    options = {"fallback_random": True, "fallback_by_default": True, **PLAIN_CPP}
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, options=options)
    # Numbers as symbols are below and in evaluation: torch makes them constants, and compiles it all once more.
    with torch._dynamo.config.patch(error_on_recompile=True, specialize_float=True):
        for n, size in ((5, 12), (7, 9)):
            x, labels = images(n, size)
            same(trained(model, compiled, x, labels), trained(plain, loss, x, labels))


def test_compiled_for_any_number():
    """Those that count in training alone, as symbols: torch makes them constants, and starts again."""
    layers = gt.Linear(3, 4), gt.BatchNorm1d(4, eps=0.1, momentum=0.3), gt.RReLU(0.2, 0.2), gt.Dropout(0.0)
    model, x = nn.Sequential(*layers), torch.randn(5, 3)
    plain = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    found = [(call(x), *m.buffers()) for m, call in ((model, compiled), (plain, plain))]
    same(*found)


def test_compiled_to_machine_code():
    """Between ops of ours torch's own are fused into C++."""
    model = nn.Sequential(gt.Conv2d(3, 4, 3), gt.ReLU(), nn.Flatten(), nn.Tanh(), gt.LayerNorm(4)).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, options=PLAIN_CPP)
    x = torch.randn(2, 3, 3, 3)
    with torch.no_grad():
        same(compiled(x), model(x))


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
    assert len(names) == 62  # dropout computes nothing
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


@pytest.mark.parametrize("case", [*CASES, *LOOKUPS], ids=str)
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
    for training in (True, False) if case.name.startswith(("BatchNorm", "InstanceNorm2")) else (True,):
        agree(*(lambda m=m: second(m, case.inputs(DOUBLE)) for m in both(case, training=training)))


@pytest.mark.parametrize("name", RANDOM)
def test_double_backward_of_what_is_drawn(name):
    """All are a product with numbers that were drawn, and a sum: the numbers are the gradient of y by x."""
    module = getattr(gt, name)()
    x = torch.randn({"Dropout1d": (4, 5, 2), "Dropout3d": (4, 5, 2, 1, 2)}.get(name, (4, 5, 2, 3)), dtype=DOUBLE)
    x.requires_grad_()
    torch.manual_seed(2)
    y = module(x)
    (factor,) = torch.autograd.grad(y.sum(), x)
    rest = (y - x * factor).detach()

    class Product(nn.Module):
        def forward(self, x):
            return x * factor + rest

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


NO_DUAL_DYS = (
    "Hardsigmoid",
    "MSELoss",
    "HuberLoss",
    "SoftMarginLoss",
    "MultiMarginLoss",
    "MultiLabelMarginLoss",
    "CTCLoss",
)
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
