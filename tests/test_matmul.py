import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from gpulayers.kernels.triton import _tile

import gpulayers.torch as gt
from gpulayers.ops.linear import matmul
from gpulayers.testing.check_op import check_op
from gpulayers.testing.interpreter import interpreting

ours = gt.functional


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


BATCHES = [
    ((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (3, 4, 2)),
    ((2, 1, 3, 4), (1, 5, 4, 2)),
]  # fmt: skip


@pytest.mark.parametrize("a, b", BATCHES)
def test_batches(a, b):
    y = (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])
    served = check_op(matmul, draw(*a), draw(*b), None, numeric=True, dys=["dense", "expanded"])
    assert {"definition", "numpy", "aten", "triton"} == set(served)
    check_op(matmul, draw(*a), draw(*b), draw(*y), alpha=0.5, dys=["strided"], dtypes=["float32", "bfloat16"])


def test_shapes():
    for a, b in [
        ((0, 3, 4), (0, 4, 5)),
        ((2, 3, 0), (2, 0, 5)),
        ((2, 0, 4), (4, 5)),
        ((2, 1, 1), (2, 1, 1)),
        ((0, 3, 4), (4, 5)),
    ]:
        check_op(matmul, draw(*a), draw(*b), None, dys=["dense"])


def test_layouts():
    """Turned, gapped and repeated matrices, and a batch whose axes are not in order."""
    check_op(matmul, draw(2, 4, 3).swapaxes(1, 2), draw(2, 5, 4).swapaxes(1, 2), None)
    check_op(matmul, draw(2, 3, 4, 3).transpose(0, 2, 1, 3), draw(4, 6)[:3, ::2], None)
    check_op(matmul, draw(2, 3, 2, 2, 3, 2).transpose(3, 1, 2, 0, 4, 5), draw(2, 1, 2, 1, 2, 3), None, dys=["dense"])
    check_op(matmul, draw(2, 3, 2, 4, 5), draw(1, 3, 1, 5, 6), None, dys=["dense"])
    check_op(matmul, draw(3, 2, 4, 5).swapaxes(0, 1), np.broadcast_to(draw(5, 6), (2, 3, 5, 6)), None)


@pytest.mark.parametrize("arch, shared", [(90, 232448), (80, 166912)])
def test_large_tiles(arch, shared):
    """Descriptors on sm_90, of turned operands, too, and of one matrix for all; addresses before it."""
    short = dict(backends=["triton"], dys=["dense"])
    with interpreting(_tile.Device(arch, 3, shared)) as session:
        check_op(matmul, draw(2, 72, 40), draw(2, 40, 64), draw(2, 72, 64), dtypes=["float16"], **short)
        turned = draw(2, 64, 40).swapaxes(1, 2)
        check_op(matmul, draw(64, 40), turned, None, alpha=2.0, dtypes=["bfloat16"], **short)
    kernels = {launch.kernel for launch in session.launches}
    assert ("_batched_tma_kernel" in kernels) == (arch >= 90) and kernels & {"_batched_kernel", "_batched_tma_kernel"}


def test_a_batch_of_rows_is_one_product():
    with interpreting() as session:
        check_op(matmul, draw(2, 3, 8), draw(8, 4), None, backends=["triton"], dtypes=["float16"], dys=["dense"])
    assert not any("batched" in launch.kernel for launch in session.launches)


def test_parts_of_a_sum_are_added_to_c():
    with interpreting(_tile.Device(90, 132, 232448)) as session:
        check_op(
            matmul, draw(16, 4096), draw(4096, 64), draw(16, 64), backends=["triton"], dtypes=["float16"], dys=["dense"]
        )
    assert "_finish_kernel" in {launch.kernel for launch in session.launches}


def test_errors():
    with pytest.raises(
        RuntimeError, match=r"matmul: b: the rule is a\.shape = \(…, M, K\), b\.shape = \(…, K, N\); got \[5, 4\]"
    ):
        matmul(draw(3, 4), draw(5, 4))
    with pytest.raises(RuntimeError, match="matmul: b: the rule is batches that broadcast"):
        matmul(draw(2, 3, 4), draw(3, 4, 5))
    with pytest.raises(RuntimeError, match=r"matmul: c: the rule is c\.shape = y\.shape = \[3, 5\]; got \[5\]"):
        matmul(draw(3, 4), draw(4, 5), draw(5))


# --- torch's functions ------------------------------------------------------------------------------------------------


def compare(theirs, mine, *shapes):
    xs = [torch.tensor(draw(*s, seed=i), requires_grad=True) for i, s in enumerate(shapes)]
    runs = []
    for function in (theirs, mine):
        y = function(*xs)
        runs.append((y, *torch.autograd.grad(y.square().sum(), xs)))
    torch.testing.assert_close(*runs)


VECTORS = [
    ((3,), (3,)),
    ((3,), (3, 4)),
    ((2, 3), (3,)),
    ((2, 5, 3), (3,)),
    ((3,), (2, 3, 4)),
    ((2, 1, 4, 3), (5, 3, 2)),
]


def test_functions():
    for a, b in VECTORS:
        compare(torch.matmul, ours.matmul, a, b)
    compare(torch.bmm, ours.bmm, (2, 3, 4), (2, 4, 5))
    for how in ({}, {"beta": 0.5, "alpha": 2}, {"beta": 0}):
        for c in ((5,), (2, 3, 5))[: 1 if how.get("beta") == 0 else 2]:
            theirs, mine = (lambda *x, f=f, how=how: f(*x, **how) for f in (torch.baddbmm, ours.baddbmm))
            if how.get("beta") == 0:  # what is not looked at may be NaN, and has the gradient 0
                x, a, b = torch.full((5,), torch.nan), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
                torch.testing.assert_close(theirs(x, a, b), mine(x, a, b))
            else:
                compare(theirs, mine, c, (2, 3, 4), (2, 4, 5))
    compare(torch.addmm, ours.addmm, (3, 1), (3, 4), (4, 5))


EQUATIONS = [
    ("ij,jk->ik", (2, 3), (3, 4)), ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)), ("i,j->ij", (3,), (4,)),
    ("ij,ij->", (2, 3), (2, 3)), ("abc,cd,de->abe", (2, 3, 4), (4, 5), (5, 6)), ("ij->ji", (2, 3)), ("ijk->j", (2, 3, 4)),
    ("ij,jk", (2, 3), (3, 4)), ("ij,kl->", (2, 3), (3, 4)), ("...ij,...jk->...ik", (2, 3, 4), (2, 4, 5)), ("ii->i", (3, 3)),
    ("bij,bj,bi->b", (2, 3, 4), (2, 4), (2, 3)), ("ij, kj -> ki", (2, 3), (4, 3)),
]  # fmt: skip


@pytest.mark.parametrize("equation, shapes", [(e, s) for e, *s in EQUATIONS])
def test_einsum(equation, shapes):
    compare(lambda *x: torch.einsum(equation, *x), lambda *x: ours.einsum(equation, *x), *shapes)


def test_errors_are_torchs():
    calls = {
        "matmul": [(2, 3), (4, 5)], "bmm": [(2, 3, 4), (3, 4, 5)], "addmm": [(7,), (2, 3), (3, 5)],
        "baddbmm": [(5,), (2, 3, 4), (2, 5, 5)],
    }  # fmt: skip
    for name, shapes in calls.items():
        messages = []
        for function in (getattr(torch, name), getattr(ours, name)):
            with pytest.raises(RuntimeError) as caught:
                function(*(torch.ones(s) for s in shapes))
            messages.append(str(caught.value).splitlines()[0])
        assert messages[0] == messages[1]
    for equation in ("ij,jk->il", "ij,jk->ii", "ij,jkl->ik"):
        for function in (torch.einsum, ours.einsum):
            with pytest.raises(RuntimeError):
                function(equation, torch.ones(2, 3), torch.ones(3, 4))


def test_bilinear():
    compare(F.bilinear, ours.bilinear, (2, 3, 4), (2, 3, 5), (6, 4, 5), (6,))
    compare(lambda *x: F.bilinear(*x), lambda *x: ours.bilinear(*x), (3, 4), (3, 5), (6, 4, 5))
    with pytest.raises(RuntimeError) as theirs:
        nn.Bilinear(4, 5, 6)(torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(RuntimeError) as mine:
        gt.Bilinear(4, 5, 6)(torch.ones(3, 4), torch.ones(3, 4))
    assert str(mine.value).splitlines()[0] == str(theirs.value).splitlines()[0]
