import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpulayers.kernels.triton import _tile
from halves import check_op

import gpulayers.torch as gt
from gpulayers.ops.linear import linears
from gpulayers.testing.arena import arena
from gpulayers.testing.interpreter import interpreting

EACH = ["float64", "float32", "float16", "bfloat16"]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape)


def theirs(x, *given):
    return [F.linear(x, w, b) for w, b in zip(given[:3], given[3:]) if w is not None]


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)])
def test_definition_is_torch(used):
    """Also where outputs are left: their weights' gradients are 0."""
    given = [draw(2, 3, 5), draw(4, 5), draw(6, 5), draw(7, 5), draw(4), None, draw(7)]
    ys, call = linears.record(*given)
    tensors = [None if a is None else torch.tensor(a, requires_grad=True) for a in given]
    wanted = theirs(*tensors)
    dys = [draw(*y.shape) if i in used else None for i, y in enumerate(ys)]
    sum((y * torch.tensor(dy)).sum() for y, dy in zip(wanted, dys) if dy is not None).backward()
    for y, t in zip(ys, wanted):
        np.testing.assert_allclose(y, t.detach().numpy(), rtol=1e-12, atol=1e-14)
    for grad, t in zip(call.backward(*dys), tensors):
        if t is None:
            assert grad is None
        else:
            np.testing.assert_allclose(
                grad, np.zeros(t.shape) if t.grad is None else t.grad.numpy(), rtol=1e-12, atol=1e-14
            )


def test_check_op():
    served = check_op(
        linears, draw(3, 5), draw(4, 5), draw(6, 5), draw(7, 5), draw(4), draw(6), draw(7), numeric=True, dtypes=EACH
    )
    assert {"definition", "numpy", "triton"} <= set(served)
    check_op(linears, draw(2, 3, 5), draw(4, 5), draw(6, 5), None, None, draw(6), dys=["dense"])


def test_shapes():
    """No rows, no leading dimension, nothing to sum, a weight of no rows; transposed and strided weights."""
    short = {"dys": ["dense"]}
    for x, w, v in [
        ((0, 5), (4, 5), (3, 5)),
        ((5,), (4, 5), (3, 5)),
        ((3, 0), (4, 0), (2, 0)),
        ((3, 5), (0, 5), (2, 5)),
    ]:
        check_op(linears, draw(*x), draw(*w), draw(*v), None, draw(w[0]), **short)
    check_op(linears, draw(5, 7).T, draw(5, 4).T, draw(4, 10)[:, ::2], **short)


def halves(*shapes):
    return [None if s is None else torch.tensor(draw(*s)).bfloat16() for s in shapes]


CASES = {
    "queries, keys and values": ((72, 72), (136, 72), (72, 72), (64, 72), (136,), None, (64,)),
    "a unit's halves": ((72, 72), (72, 72), (136, 72), None, None, (136,), None),
    "K split": ((64, 1032), (264, 1032), (264, 1032), None, (264,), None, None),
    "rows split": ((1100, 64), (64, 64), (64, 64), None, (64,), (64,), None),
}


@pytest.mark.parametrize("case", CASES)
def test_one_launch(case):
    """Forward, dx and the weights' gradients with those of biases: one product each, and a second stage where it is split."""
    given = halves(*CASES[case])
    with interpreting(_tile.Device(90, 132, 232448)) as session, arena("triton"):
        ys, call = linears.record(*given)
        dys = [torch.tensor(draw(*y.shape)).bfloat16() for y in ys]
        grads = call.backward(*dys)
    found = [run.kernel for run in session.launches]
    assert found.count("_linears_kernel") == 3 and set(found) == {"_linears_kernel"} | (
        {"_finish_kernel"} if "split" in case else set()
    )
    doubles = [None if t is None else t.double().requires_grad_() for t in given]
    wanted = theirs(*doubles)
    torch.autograd.backward(wanted, [dy.double() for dy in dys])
    for mine, right in zip((*ys, *grads), (*wanted, *(None if t is None else t.grad for t in doubles))):
        assert (mine is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(mine.double(), right.detach(), rtol=2**-7, atol=2**-6)


def test_rows_that_no_descriptor_knows():
    """A launch for each weight, and one sum for dx, rounded once."""
    x, w, v = halves((72, 64), (68, 64), (72, 64))
    with interpreting(_tile.Device(90, 8, 232448)) as session, arena("triton"):
        ys, call = linears.record(x, w, v)
        dx = call.backward(*ys)[0]
    assert "_linears_kernel" not in {run.kernel for run in session.launches}
    right = sum(y.double() @ each.double() for y, each in zip(ys, (w, v)))
    torch.testing.assert_close(dx.double(), right, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)])
def test_torch_on_a_cpu(used):
    """torch's own products, of parts of one weight and outputs that are left, too."""
    x, whole, b = (torch.tensor(draw(*s)).float().requires_grad_() for s in ((2, 3, 5), (12, 5), (4,)))
    found = []
    for of in (gt.functional.linears, lambda x, w, b: theirs(x, *w, *b)):
        ys = of(x, whole.split([4, 6, 2]), [b, None, None])
        found.append(
            [
                *ys,
                *torch.autograd.grad(sum((ys[i] * ys[i].detach()).sum() for i in used), (x, whole), retain_graph=True),
            ]
        )
        found[-1].append(torch.autograd.grad(sum((y * y.detach()).sum() for y in ys), b)[0])
    torch.testing.assert_close(*found)
    ys, call = linears.record(x, *whole.split([4, 6, 2]), b)  # by dispatch alone
    grads = call.backward(*(y if i in used else None for i, y in enumerate(ys)))
    assert call.plan.backend == "aten"
    torch.testing.assert_close([grads[0], torch.cat(grads[1:4])], found[0][3:5])


def test_function():
    """Gradients, and gradients of them; bad numbers of weights and biases."""
    x, w, v, b = (torch.tensor(draw(*s), requires_grad=True) for s in ((3, 5), (4, 5), (6, 5), (6,)))
    found, right = gt.functional.linears(x, [w, v], [None, b]), [F.linear(x, w), F.linear(x, v, b)]
    for y, z in zip(found, right, strict=True):
        torch.testing.assert_close(y, z)
    twice = []
    for one, other in (found, right):
        (dx,) = torch.autograd.grad(one.tanh().sum() + other.tanh().sum(), x, create_graph=True)
        twice.append([dx, *torch.autograd.grad(dx.sin().sum(), (x, w, v, b))])
    torch.testing.assert_close(*twice)
    with pytest.raises(ValueError, match=r"linears: weights: the rule is two or three weights, .*; got 1 and none"):
        gt.functional.linears(x, [w])
    with pytest.raises(ValueError, match=r"linears: weights: .*; got 2 and 1"):
        gt.functional.linears(x, [w, v], [None])


def test_errors():
    x, w, v = draw(3, 5), draw(4, 5), draw(6, 5)
    with pytest.raises(
        RuntimeError, match=r"linears: weight_2: the rule is weight_2.shape = \[out, in\] .* = \[6, 5\]; got \[6, 4\]"
    ):
        linears(x, w, v[:, :4])
    with pytest.raises(RuntimeError, match=r"linears: weight_3: the rule is weight_3.shape = \[out, in\]; got \[5\]"):
        linears(x, w, v, draw(5))
    with pytest.raises(RuntimeError, match=r"linears: bias_3: the rule is a bias_3 comes with a weight_3; got \[4\]"):
        linears(x, w, v, None, None, None, draw(4))
    with pytest.raises(RuntimeError, match=r"linears: bias_2: the rule is bias_2.shape = \[out\] = \[6\]; got \[5\]"):
        linears(x, w, v, None, None, draw(5))
    with pytest.raises(RuntimeError, match=r"linears: weight_2: the rule is weight_2.dtype = x.dtype"):
        linears(x, w, v.astype(np.float32))
    with pytest.raises(RuntimeError, match=r"linears: x: the rule is x.shape = \[..., in\]"):
        linears(draw(), w, v)
