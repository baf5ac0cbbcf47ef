import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpulayers.kernels.triton import _grid_sample
from halves import check_op

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import dispatch
from gpulayers.arrays import Spec, float32
from gpulayers.definition import KindError, ShapeError, UnsupportedTypeError
from gpulayers.ops.resize import grid_sample
from gpulayers.testing.interpreter import interpreting

MODES, PADDINGS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")


def draw(*shape: int, last: bool = False) -> np.ndarray:
    """Random values; ``last``: channels-last in memory."""
    x = np.random.default_rng(list(shape)).standard_normal(shape)
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, -1, *range(1, x.ndim - 1)) if last else x


def places(n: int, *size: int) -> np.ndarray:
    """On the image and beside it."""
    return np.random.default_rng([n, *size]).uniform(-1.8, 1.8, (n, *size, len(size)))


CALLS = [
    ((2, 3, 4, 5), (3, 4), {}),
    ((1, 2, 4, 3), (2, 3), {"mode": "bicubic", "padding_mode": "reflection"}),
    ((1, 2, 1, 3), (2, 3), {"mode": "bicubic", "padding_mode": "border", "align_corners": True}),
    ((1, 2, 4, 3), (3, 2), {"mode": "nearest", "padding_mode": "reflection"}),
    ((1, 2, 2, 3, 4), (2, 2, 2), {"padding_mode": "border", "align_corners": True}),
    ((1, 2, 2, 1, 4), (1, 2, 3), {"mode": "nearest", "padding_mode": "reflection", "align_corners": True}),
    ((0, 2, 3, 4), (2, 2), {}),
]


@pytest.mark.parametrize("shape, size, options, last", [(*call, i % 2 == 1) for i, call in enumerate(CALLS)])
def test_every_backend(shape, size, options, last):
    """Channels-first and channels-last in turn."""
    numeric = not last and options.get("mode") != "nearest" and 0 < np.prod(shape) < 30
    given = draw(*shape, last=last), places(shape[0], *size)
    served = check_op(grid_sample, *given, numeric=numeric, dys=["dense"], **options)
    assert served == ["aten"] * (0 not in shape) + ["definition", "numpy", "triton"]


def test_edges_and_halves():
    """Of a pixel on the edge no gradient comes from beyond it; halves go to the even pixel; channels end within a tile."""
    at = np.array([-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1])  # every half pixel of five
    grid = np.stack(np.broadcast_arrays(at[None, :], at[:, None]), -1)[None]
    for padding, mode in (("border", "bilinear"), ("reflection", "bicubic"), ("zeros", "nearest")):
        options = {"padding_mode": padding, "mode": mode, "align_corners": True}
        check_op(grid_sample, draw(1, 3, 5, 5, last=True), grid, dtypes=["float32"], dys=["dense"], **options)


def test_several_tiles():
    """Runs of pixels and blocks of places: some of which do not meet."""
    rows = np.linspace(-1, 1, 9)
    smooth = np.stack(np.broadcast_arrays(rows[None, :], rows[:, None] ** 3), -1)[None]
    check_op(grid_sample, draw(1, 36, 9, 15), smooth, dtypes=["float32", "bfloat16"], dys=["transposed"])
    check_op(grid_sample, draw(2, 3, 5, 9)[:, ::2, :, 1:], places(2, 4, 6)[:, ::2], dtypes=["float16"], dys=["strided"])


@pytest.mark.parametrize("shape, size", [((2, 5, 2, 3), (8, 17)), ((2, 3, 2, 1, 2), (4, 5, 7))])
def test_many_places_of_a_pixel(shape, size, monkeypatch):
    """More than a program adds side by side, whole chunks of one pixel among them, and images sorted on their own."""
    grid = places(shape[0], *size)
    grid[0] = -0.9
    for at_once in (1 << 24, 1):
        monkeypatch.setattr(_grid_sample, "AT_ONCE", at_once)
        check_op(grid_sample, draw(*shape), grid, dtypes=["float32"], dys=["dense"], backends=("triton",))


def test_what_is_refused():
    """Of sizes that 32 bits don't count, x's gradient."""
    x, grid = Spec((1, 1, 2**16, 2**15), float32), Spec((1, 2**15, 2**14, 2), float32)
    few = x._replace(shape=(1, 1, 9, 9)), grid._replace(shape=(1, 9, 9, 2))
    for given, refused in (((x, few[1]), True), ((few[0], grid), True), (few, False)):
        for needs in (("x",), ("grid",)):
            reason = _grid_sample.grid_sample_refuses(*given, needs=needs, mode="bilinear")
            assert (reason == _grid_sample.REFUSALS["many"]) == (refused and "x" in needs)


SHAPES = [((2, 3, 4, 5), (3, 6)), ((1, 2, 1, 3), (4, 2)), ((2, 2, 3, 4, 2), (2, 3, 2))]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_it_is_torchs(mode, padding):
    for (shape, size), align in itertools.product(SHAPES, (False, True)):
        if mode == "bicubic" and len(size) == 3:
            continue
        x, grid, options = draw(*shape), places(shape[0], *size), {"mode": mode, "padding_mode": padding}
        tensors = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, grid)]
        expected = F.grid_sample(*tensors, align_corners=align, **options)
        y, record = grid_sample.record(x, grid, align_corners=align, **options)
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-11, atol=1e-11)
        dy = draw(*y.shape)
        expected.backward(torch.from_numpy(dy))
        for mine, tensor in zip(record.backward(dy), tensors):
            np.testing.assert_allclose(mine, tensor.grad.numpy(), rtol=1e-10, atol=1e-10)


def test_infinities_stay_with_their_neighbours():
    """A gradient that is NaN reaches the pixels that its place looks at, and no others; no number is a place outside."""
    grid = places(1, 2, 3)
    grid[0, 0, 0], grid[0, 1, 2] = (np.nan, 0.1), (0.1, 0.2)
    x, dy = draw(1, 2, 4, 5), draw(1, 2, 2, 3)
    with gl.only("definition"):
        y, record = grid_sample.record(x, grid)
        clean = record.backward(dy)[0]
        dy[0, :, 1, 2] = np.nan
        spoilt = record.backward(dy)[0]
    assert not y[0, :, 0, 0].any() and np.isfinite(clean).all()
    assert 0 < np.isnan(spoilt[0, 0]).sum() <= 4
    np.testing.assert_array_equal(spoilt[~np.isnan(spoilt)], clean[~np.isnan(spoilt)])
    check_op(grid_sample, x, places(1, 2, 3), dtypes=["float32"], backends=("triton",), dys=["dense"])


def test_the_drop_in_is_torchs():
    for shape, size in (((2, 3, 4, 5), (3, 6)), ((1, 2, 3, 4, 2), (2, 3, 2))):
        tensors = [torch.from_numpy(a).float().requires_grad_() for a in (draw(*shape), places(shape[0], *size))]
        theirs, ours = (f(*tensors, "bilinear", "border", True) for f in (F.grid_sample, gt.functional.grid_sample))
        torch.testing.assert_close(ours, theirs)
        dy = torch.randn_like(ours)
        for a, b in zip(*(torch.autograd.grad(y, tensors, dy) for y in (ours, theirs))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="align_corners=False"):
        gt.functional.grid_sample(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 1, 2))
    for wrong in (torch.zeros(1, 3, 3, 3), torch.zeros(2, 3, 3, 2), torch.zeros(1, 3, 3, 2).double()):
        with pytest.raises(RuntimeError):
            gt.functional.grid_sample(torch.ones(1, 1, 2, 2), wrong, align_corners=False)


def test_no_number_is_a_place_outside_to_torchs_kernel():
    x, grid = torch.ones(1, 1, 3, 4, requires_grad=True), torch.tensor([np.nan, np.inf, -np.inf]).repeat(2, 1).T
    grid = grid.reshape(1, 1, 3, 2).requires_grad_()
    for padding in PADDINGS:
        y = gt.functional.grid_sample(x, grid, "bilinear", padding, False)
        dx, dgrid = torch.autograd.grad(y.sum(), [x, grid])
        assert y.sum() == dx.sum() == (0 if padding == "zeros" else 3) and not dgrid.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_no_number_is_the_same_place_to_all(mode, padding):
    """As torch's CUDA kernels have it; its CPU kernels may write anywhere for it."""
    x, grid, dy = (a.astype(np.float32) for a in (draw(1, 2, 3, 4), places(1, 2, 3), draw(1, 2, 2, 3)))
    grid[0, 0, :, 0], grid[0, 1, 0, 1] = (np.nan, np.inf, -np.inf), np.nan
    if padding != "reflection":
        grid[0, 1, 1] = 3e12, -3e12
    found = {}
    for backend in ("definition", "numpy", "triton", "aten"):
        given = [torch.from_numpy(a.copy()) if backend == "aten" else a.copy() for a in (x, grid, dy)]
        with interpreting(), dispatch.policy(simulate=("triton",)), gl.only(backend):
            y, record = grid_sample.record(*given[:2], mode=mode, padding_mode=padding)
            found[backend] = [np.asarray(a) for a in (y, *record.backward(given[2]))]
    y, dx, dgrid = found["definition"]
    for backend, outcome in found.items():
        for mine, theirs in zip(outcome, (y, dx, dgrid)):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=backend)
    wrong = np.array([[True] * 3, [True, False, False]])
    for of_place in (y[0, 0], dgrid[0, ..., 0], dgrid[0, ..., 1]):
        np.testing.assert_array_equal(np.isnan(of_place), wrong & (mode == "bicubic"))
    assert np.isfinite(dx).all()
    if mode != "bicubic":
        assert not dgrid[0, 0, :, 0].any() and dgrid[0, 1, 0, 1] == 0
        assert (padding == "zeros") == (not y[0][:, wrong].any())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_compiled_for_any_size(kind):
    """By torch's kernel, and as one op."""
    step = torch.compile(gt.functional.grid_sample, fullgraph=True, dynamic=True, backend="eager")
    for n, size in (2, 3), (3, 5):
        x, grid = torch.randn(n, 2, 4, size, dtype=kind), torch.rand(n, size, 3, 2, dtype=kind)
        same = F.grid_sample(x, grid, align_corners=False)
        torch.testing.assert_close(step(x, grid, align_corners=False), same)


@pytest.mark.parametrize(
    "shapes, options, error, text",
    [
        (((2, 3, 4), (2, 3, 1)), {}, ShapeError, "x.shape = (N, C, H, W) or (N, C, D, H, W)"),
        (((2, 3, 4, 5), (2, 3, 4, 3)), {}, ShapeError, "grid.shape = (N, *sizes of y, 2)"),
        (((2, 3, 4, 5), (1, 3, 4, 2)), {}, ShapeError, "grid.shape = (N, *sizes of y, 2)"),
        (((2, 3, 4, 5), (2, 3, 4, 2)), {"mode": "linear"}, UnsupportedTypeError, "one of bilinear, nearest, bicubic"),
        (
            ((2, 3, 4, 5), (2, 3, 4, 2)),
            {"padding_mode": "wrap"},
            UnsupportedTypeError,
            "one of zeros, border, reflection",
        ),
        (((2, 3, 4, 5), (2, 3, 4, 2)), {"align_corners": None}, KindError, "True or False"),
        (((1, 1, 2, 3, 4), (1, 2, 2, 2, 3)), {"mode": "bicubic"}, ShapeError, "bilinear or nearest for volumes"),
    ],
)
def test_errors(shapes, options, error, text):
    with pytest.raises(error) as raised:
        grid_sample(*map(np.ones, shapes), **options)
    assert text in str(raised.value) and str(raised.value).startswith("grid_sample: ")
