"""Tensors of other kinds through the drop-ins (subclasses, fake, lazily negated, sparse, nested), and what autograd does to
plain ones: as torch.nn, or an error that says so."""

import copy

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import gpulayers as gl  # noqa: E402
import gpulayers.torch as gt  # noqa: E402
from gpulayers.testing.torch_cases import (  # noqa: E402
    CASES,
    DIFFERENTIABLE,
    DOUBLE,
    LOOKUPS,
    RANDOM,
    agree,
    both,
    first,
    layouts,
    leaf,
    outcome,
)
from gpulayers.torch import _op  # noqa: E402

KEEPS = {"Tanhshrink": "x", "CrossEntropyLoss": "x", "PairwiseDistance": "x"}
KEEPS |= dict.fromkeys(("L1Loss", "KLDivLoss", "PoissonNLLLoss", "GaussianNLLLoss"), "x")
KEEPS |= dict.fromkeys(
    ("HingeEmbeddingLoss", "MarginRankingLoss", "TripletMarginLoss", "TripletMarginWithDistanceLoss"), "x"
)
KEEPS |= {f"InstanceNorm{n}d": "weight" for n in (1, 2, 3)} | {f"LPPool{n}d": "y" for n in (1, 2, 3)}
"""What their backward reads, where torch's reads a copy that it made."""
same = torch.testing.assert_close


class Logged(torch.Tensor):
    """Writes down which functions it was given to."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("case", [*CASES, *LOOKUPS], ids=str)
def test_a_subclass_hears_of_the_call(case):
    module, (x, *others) = case.module(gt).eval(), case.inputs()
    Logged.seen = []
    y = first(module(x.as_subclass(Logged), *others))
    assert type(y) is Logged
    same(y.as_subclass(torch.Tensor), first(module(x, *others)))
    if case.name != "Flatten" and "Dropout" not in case.name:
        assert any(isinstance(f, _op.TorchOp) for f in Logged.seen)


def described(found):
    """Shapes, dtypes, and steps along axes of more than one element."""
    found = found if isinstance(found, tuple) else (found,)
    steps = lambda y: [s for s, n in zip(y.stride(), y.shape) if n != 1]  # noqa: E731
    return [(tuple(y.shape), y.dtype, steps(y)) for y in found]


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
            assert theirs is RuntimeError or which == KEEPS.get(case.name), which
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
        if list(case.module(nn).parameters()) or "InstanceNorm" in case.name:
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


@pytest.mark.parametrize("case", [*CASES, *LOOKUPS], ids=str)
def test_nothing_falls_back(case):
    """In plain eager mode gpulayers computes, in every dtype and memory order."""
    _op.fallbacks.clear()
    with gl.strict():
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            module, (x, *others) = case.module(gt, dtype), case.inputs(dtype)
            for given in layouts(x):
                if not len(given):
                    continue
                y = first(module(leaf(given), *others))
                y.backward(torch.ones_like(y))
                with torch.no_grad():
                    module(given, *others)
    assert not _op.fallbacks


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_what_is_remembered_is_bounded():
    """Shapes without end take little memory; the ones in use stay known, however many others come between."""
    from gpulayers.torch import linear

    op, used, x = linear._linear, gt.Linear(3, 2), torch.ones(2, 3)
    op._known.clear(), op._latest.clear()
    used(x), used(x)
    known = op._latest[id(used.weight)]
    for n in range(3, 3 * _op._MOST_KNOWN):
        used(torch.ones(n, 3)), used(torch.ones(n, 3))
        if n % 50 == 0:
            used(x)
    assert len(op._known) == _op._MOST_KNOWN and known in op._known.values()
    layers = [gt.Linear(3, 2) for _ in range(_op._MOST_LATEST + 9)]
    for layer in layers:
        layer(x), layer(x)
    assert len(op._latest) == _op._MOST_LATEST and id(layers[-1].weight) in op._latest
    assert id(layers[0].weight) not in op._latest


def test_options_that_change_are_no_new_calls():
    """An annealed p, in place too."""
    from gpulayers.torch import dropout

    x = torch.ones(2, 3)
    for op in (dropout._dropout, dropout._dropout.in_place):
        op._known.clear()
    for step in range(20):
        gt.functional.dropout(x, 0.1 + step / 100)
        gt.functional.dropout(x.clone(), 0.1 + step / 100, inplace=True)
    assert len(dropout._dropout._known) == len(dropout._dropout.in_place._known) == 1
