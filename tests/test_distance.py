import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers.ops.distance import cosine_similarity, normalize, pairwise_distance, pdist
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.check_op import check_op

NORMS = (0.0, 0.5, 1.0, 2.0, 3.0, math.inf)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


@pytest.mark.parametrize("p", NORMS)
def test_kernels(p):
    for op, xs in (
        (pairwise_distance, (draw(5, 7), draw(5, 7, seed=1))),
        (normalize, (draw(2, 5, 3),)),
        (pdist, (draw(5, 3),)),
    ):
        assert "triton" in check_op(op, *xs, p=p, numeric=p != 0, dys=["strided"] if p else None)


@pytest.mark.parametrize("axis", (0, 1, -1))
def test_along_each_axis(axis):
    a, b = draw(3, 5, 7), draw(3, 5, 7, seed=1)
    check_op(cosine_similarity, a, b, axis=axis, numeric=True)
    check_op(normalize, a, axis=axis, p=1.0)


def test_many_blocks():
    """Rows longer than a program's block, more rows than a program has, and their columns."""
    long = draw(2, 2500), draw(2, 2500, seed=1)
    only = dict(dtypes=["float32", "bfloat16"], dys=["dense"])
    for op, xs, options in (
        (pairwise_distance, long, {"p": math.inf}),
        (cosine_similarity, long, {"axis": 1}),
        (cosine_similarity, tuple(x.reshape(50, 100) for x in long), {"axis": 0}),
        (normalize, (draw(70, 40),), {"axis": 1, "p": math.inf}),
        (pdist, (draw(70, 3),), {}),
    ):
        check_op(op, *xs, **options, **only)
    check_op(pdist, draw(3, 70), **only)


def test_shapes():
    for shape in ((0, 3), (3, 0), (1, 1), (4,)):
        check_op(pairwise_distance, draw(*shape), draw(*shape, seed=1))
        check_op(normalize, draw(*shape), axis=-1)
        check_op(cosine_similarity, draw(*shape), draw(*shape, seed=1), axis=-1)
    for shape in ((0, 3), (1, 3), (3, 0), (2, 1)):
        check_op(pdist, draw(*shape))
    check_op(cosine_similarity, np.array(2.0), np.array(-3.0), axis=0)
    check_op(normalize, np.array(2.0), axis=0)
    check_op(normalize, draw(6, 9)[::2, 1:8], axis=1)
    check_op(pairwise_distance, draw(7, 5).T, draw(5, 14)[:, ::2])


TIES = np.array([[3.0, -3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, -2.0]])


@pytest.mark.parametrize("p", NORMS)
def test_zeros_and_ties_as_torchs(p):
    """Gradients where a norm has none: torch's choice."""
    x = torch.tensor(TIES, requires_grad=True)
    runs = []
    for library in (F, gt.functional):
        ys = library.normalize(x, p), library.pairwise_distance(x, torch.zeros_like(x), p, 0.0), library.pdist(x, p)
        grads = [torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)[0] for y in ys]
        runs.append([torch.zeros_like(x) if g is None else g for g in grads] + [*ys])
    torch.testing.assert_close(*runs)
    check_op(pdist, TIES, p=p, dys=["dense"])
    with np.errstate(over="ignore"):  # dx = dy / eps, which float16 does not hold
        check_op(normalize, TIES, p=p, dys=["dense"])
    check_op(normalize, TIES * 1e-13, p=p, dys=["dense"], dtypes=["float32"])
    check_op(cosine_similarity, TIES, TIES[::-1].copy(), axis=1)


def test_special_values():
    x = np.array([[np.nan, 1.0, 2.0], [np.inf, 1.0, -2.0], [1.0, 0.0, 2.0]])
    with np.errstate(all="ignore"):
        for p in (1.0, 2.0, math.inf):
            check_op(normalize, x, p=p, axis=1, dys=["dense"])
            check_op(pairwise_distance, x, x[::-1].copy(), p=p, dys=["dense"])
        check_op(cosine_similarity, x, x[::-1].copy(), axis=1, dys=["dense"])


def test_layers():
    x = draw(4, 5).astype("f")
    check_layer(gl.PairwiseDistance(), x, draw(4, 5, seed=1).astype("f"))
    check_layer(gl.CosineSimilarity(), x, draw(4, 5, seed=1).astype("f"))
    check_layer(gl.Normalize(), x)


BROADCAST = [((4, 5), (5,)), ((3, 1, 5), (2, 5)), ((4, 5), (1, 5))]


@pytest.mark.parametrize("shapes", BROADCAST)
def test_torch_broadcasts(shapes):
    a, b = (torch.tensor(draw(*s, seed=i), requires_grad=True) for i, s in enumerate(shapes))
    runs = []
    for library in (torch.nn, gt):
        found = [library.PairwiseDistance(3.0, keepdim=True)(a, b), library.CosineSimilarity(-1)(a, b.float())]
        runs.append([*found, *torch.autograd.grad(sum(y.square().sum() for y in found), (a, b))])
    torch.testing.assert_close(*runs)


def test_errors():
    with pytest.raises(RuntimeError, match=r"pairwise_distance: x2: the rule is x2\.shape, dtype = x1\.shape, dtype"):
        pairwise_distance(draw(3, 4), draw(3, 5))
    with pytest.raises(ValueError, match="normalize: p: the rule is p ≥ 0; got -1"):
        normalize(draw(3, 4), p=-1)
    with pytest.raises(RuntimeError, match=r"pdist: x: the rule is x.shape = \(N, D\); got \[3\]"):
        pdist(draw(3))
    with pytest.raises(RuntimeError, match="p = ∞ has no norm of no numbers"):
        normalize(draw(3, 0), p=math.inf)
    for call in (
        lambda f: f.pairwise_distance(torch.ones(3, 4), torch.ones(3, 5)),
        lambda f: f.cosine_similarity(torch.ones(3, 4), torch.ones(3, 4), 2),
        lambda f: f.pdist(torch.ones(3)),
        lambda f: f.pdist(torch.ones(3, 2), -1.0),
    ):
        with pytest.raises(Exception) as theirs:
            call(F)
        with pytest.raises(type(theirs.value)) as ours:
            call(gt.functional)
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]
    x = torch.tensor(TIES)
    torch.testing.assert_close(gt.functional.pairwise_distance(x, x + 1, -1.0), F.pairwise_distance(x, x + 1, -1.0))
