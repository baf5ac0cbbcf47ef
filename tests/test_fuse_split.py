"""Layers that no one kernel computes: where they are cut, what runs between, and whether it is right."""

import copy
import warnings

import numpy as np
import pytest
from check_fuse import judged_in_pieces
from fused_layers import Gated, Placed, Product, Swish
from test_fuse import OTHERS, cache, made, module_of, shapes_and_dtypes, triton  # noqa: F401

import gpulayers as gl
from gpulayers import arrays, dispatch
from gpulayers.arrays import Spec, bfloat16, float32
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing import FusionError, by_hand, fuse, fusion
from gpulayers.testing import audit_op, check_op
from gpulayers.testing.cupy_like import unwrap, wrap
from gpulayers.testing.interpreter import interpreting

SPLIT = ["Dense", "Drop", "Halving", "Standard"]
SPLIT += [f"gallery.{name}" for name in ("DynamicFilter", "KAN", "LinearAttention", "Maxout", "SqueezeExcitation")]


def moved(layer: gl.Layer, shapes: list) -> gl.Layer:
    """With weights away from where they start."""
    rng = np.random.default_rng(0)
    layer.ensure_built(*((None, *s[1:]) for s in shapes))
    for w in layer.weights:
        w.data = (w.data + 0.3 * np.abs(rng.standard_normal(w.shape))).astype(np.float32)
    return layer


def on_kernels():
    """Triton's kernels are interpreted; what else runs is the library's, and array code."""
    return dispatch.policy(simulate=("triton",), backends=("triton", "numpy", "definition"))


def step(layer: gl.Layer, x: np.ndarray, dy: np.ndarray) -> list:
    """Output, gradients and weights after a step of a copy, from one state of the random numbers."""
    layer = copy.deepcopy(layer)
    gl.random.seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing
        y = layer(x)
        dx = layer.backward(dy.astype(y.dtype))
    return [y, dx, *(w.grad for w in layer.weights if w.trainable), *(w.data for w in layer.weights)]


def error(got, want) -> float:
    """Of the largest number."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    assert got.shape == want.shape
    return np.abs(got - want).max(initial=0) / max(1e-9, np.abs(want).max(initial=0))


@pytest.mark.parametrize(("name", "training"), [*((n, True) for n in SPLIT), ("Drop", False), ("Standard", False)])
def test_pieces_give_what_the_array_code_gives(name, training):
    """And the same bits each time; inputs and gradients with gaps."""
    ((shape,), _), rng = shapes_and_dtypes(OTHERS[name][1]), np.random.default_rng(1)
    layer = moved(made(name), [shape])
    layer.training = training
    fused = fuse(copy.deepcopy(layer), (None, *shape[1:]))
    for dtype, batch, close in (("float32", 3, 1e-6), ("bfloat16", 5, 2e-2), ("float32", 0, 0)):
        x = rng.standard_normal((2 * batch, *shape[1:])).astype(arrays.dtype(dtype))[::2]
        (_, *out) = layer.output_shape(x.shape)
        dy = rng.standard_normal((batch, *out, 2), np.float32)[..., 0]
        want = step(layer, x, dy)
        with interpreting() as session, on_kernels():
            once, again = step(fused, x, dy), step(fused, x, dy)
        assert session.launches or not batch
        assert [a.dtype for a in once] == [a.dtype for a in want]
        assert max(map(error, once, want)) <= close, (dtype, batch)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(once, again))


@pytest.mark.parametrize("name", sorted(set(SPLIT) - {"Drop"}))  # its numbers come from NumPy
def test_what_runs_between_runs_on_cupy(name):
    pytest.importorskip("cupy")
    ((shape,), _), rng = shapes_and_dtypes(OTHERS[name][1]), np.random.default_rng(3)
    layer = moved(made(name), [shape])
    split = fusion(layer, (None, *shape[1:]))
    weights = {name: wrap(w.data) for name, w in layer.named_weights().items()}
    for dtype, close in (("float32", 1e-6), ("bfloat16", 2e-2)):
        x, dy = (
            rng.standard_normal((3, *s[1:])).astype(arrays.dtype(dtype)) for s in (shape, layer.output_shape(shape))
        )
        with gl.only("definition"):
            (y,), _, kept = split.run_forward([wrap(x)], weights)
            (dx,), _ = split.run_backward(kept, [wrap(dy)], [True])
        assert max(map(error, map(unwrap, (y, dx)), step(layer, x, dy))) <= close


def test_between_two_products_stands_one_kernel():
    layer = fusion(Gated(), (None, 4))
    forward = [step.name if hasattr(step, "op") and hasattr(step, "program") else step.what for step in layer.forward]
    assert [what for what in forward if what != "a view"] == ["linear", "linear", "gated_v16", "gated_y"]
    assert "    v8 = linear    # a, b = x @ self.v, x @ self.w\n" in layer.text


@pytest.mark.parametrize("batch", [3, 0])
def test_a_table_of_positions(batch):
    """It comes again with each of the batch; its gradient is a sum over the batch alone."""
    layer, rng = moved(Placed(), [(2, 5, 6)]), np.random.default_rng(0)
    split = fusion(layer, (None, 5, 6))
    assert "table_ptr + row % 5 * table_row + n" in split.text
    assert [part.name for part in split.parts] == ["placed_y", "placed_dx", "placed_dtable"]
    x, dy = rng.standard_normal((2, batch, 5, 6), np.float32)
    want = step(layer, x, dy)
    with interpreting(), on_kernels():
        got = step(fuse(copy.deepcopy(layer), (None, 5, 6)), x, dy)
    assert max(map(error, got, want)) <= 1e-6


def test_an_expanded_gradient():
    layer = moved(Gated(), [(3, 4)])
    x, dy = np.random.default_rng(0).standard_normal((3, 4), np.float32), np.broadcast_to(np.float32(1), (3, 6))
    dy = dy + np.arange(3, dtype=np.float32)[:, None]
    want = step(layer, x, dy)
    with interpreting(), on_kernels():
        got = step(fuse(copy.deepcopy(layer), (None, 4)), x, np.broadcast_to(dy[:, :1], (3, 6)))
    assert max(map(error, got, want)) <= 1e-6


@pytest.mark.parametrize("name", ["Standard", "gallery.SqueezeExcitation"])
def test_each_piece_is_an_op(name):
    ((shape,), _), rng = shapes_and_dtypes(OTHERS[name][1]), np.random.default_rng(2)
    split = fusion(made(name), (None, *shape[1:]))
    for part in split.parts:
        xs = [rng.standard_normal(at_batch(n.shape, 3)) for n in part.loads]
        assert check_op(part.op, *xs, backends=["definition", "triton"], dtypes=["float32", "bfloat16"])


def test_machine_code_of_pieces():
    split = fusion(Gated(), (None, 512))
    for part in split.parts:
        specs = [Spec(at_batch(n.shape, 1024), bfloat16 if len(n.shape) > 1 else float32) for n in part.loads]
        for report in audit_op(part.op, *specs, archs=[90]):
            assert not report.spills


def test_explain_lists_the_pieces():
    layer = fuse(moved(Gated(), [(2, 4)]), (None, 4))
    x = np.ones((2, 4), np.float32)
    found = gl.explain(layer, x)
    assert [(e.direction, e.name, e.backend) for e in found][:3] == [
        ("forward", "linear", "numpy"),
        ("forward", "linear", "numpy"),
        ("forward", "gated_v16", "definition"),
    ]
    assert found[0].line == "a, b = x @ self.v, x @ self.w" and "CUDA" in found[2].reasons["triton"]
    assert {e.direction for e in found} == {"forward", "backward"}
    assert [e.name for e in gl.explain(fuse(Swish(), (None, 4)), x)] == ["swish_forward", "swish_backward"]
    with pytest.raises(TypeError, match=r"gl\.fuse"):
        gl.explain(Product(), x)


def test_array_code_is_refused_where_the_policy_says_so(triton):  # noqa: F811
    layer = fuse(moved(made("gallery.LinearAttention"), [(2, 3, 4)]), (None, 3, 4))
    y = layer(np.ones((2, 3, 4), np.float32))
    with pytest.raises(dispatch.Refused, match="array code is not permitted"):
        layer.backward(y)


def test_nothing_to_fuse():
    with pytest.raises(FusionError, match="matmul"):
        fuse(Product(), (None, 4))
    with pytest.raises(FusionError, match="too little"):
        fuse(made("gallery.BlurPool"), (None, 2, 5, 4))


def test_launchers_by_hand(tmp_path, triton):  # noqa: F811
    """One for each piece; what they compute is what the pieces' ops do."""
    split, rng = fusion(made("gallery.SqueezeExcitation"), (None, 4, 3, 3)), np.random.default_rng(0)
    torch = pytest.importorskip("torch")
    path = tmp_path / "squeeze_by_hand.py"
    path.write_text(by_hand(split))
    module = module_of(path)
    for part in split.parts:
        xs = [rng.standard_normal(at_batch(n.shape, 3), np.float32) for n in part.loads]
        launch = getattr(module, f"launch_{part.name}")
        got = launch(*map(torch.from_numpy, xs), empty=lambda shape, dtype: torch.empty(shape, dtype=torch.float32))
        assert error(got.numpy(), part.op(*xs)) <= 1e-6


@pytest.mark.parametrize("seed", [6, 12, 41])
def test_random_layers(seed, tmp_path):
    said = judged_in_pieces(seed, tmp_path)
    assert said == "cut" or "too little" in said


def test_in_torch():
    torch = pytest.importorskip("torch")
    gltorch = pytest.importorskip("gpulayers.torch")
    layer = moved(Gated(), [(3, 4)])
    module, own = gltorch.wrap(copy.deepcopy(layer), (None, 4), fuse=True), gltorch.wrap(layer, (None, 4))
    xs = [torch.linspace(-2, 2, 12).reshape(3, 4).requires_grad_() for _ in range(2)]
    with interpreting() as session, on_kernels():
        y = torch.utils.checkpoint.checkpoint(module, xs[0], use_reentrant=False)
        y.square().sum().backward()
    assert session.launches
    own(xs[1]).square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    for a, b in zip(module.parameters(), own.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
