import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import dispatch
from gpulayers.arrays import bfloat16, float16, float32, float64
from gpulayers.inventory import backends_of
from gpulayers.ops import activation as A
from gpulayers.ops._op import Op
from gpulayers.testing.arena import arena
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.check_op import check_op
from gpulayers.testing.emulator import emulating
from gpulayers.testing.tolerance import excess

VARIANTS = [
    (A.relu, {}, F.relu),
    (A.leaky_relu, {}, F.leaky_relu),
    (A.leaky_relu, {"negative_slope": -0.2}, F.leaky_relu),
    (A.gelu, {}, F.gelu),
    (A.gelu, {"approximate": "tanh"}, F.gelu),
    (A.silu, {}, F.silu),
    (A.quick_gelu, {}, lambda x: x * torch.sigmoid(1.702 * x)),
    (A.sigmoid, {}, torch.sigmoid),
    (A.tanh, {}, torch.tanh),
    (A.softplus, {}, F.softplus),
    (A.softplus, {"beta": 2.0, "threshold": 3.0}, F.softplus),
    (A.elu, {}, F.elu),
    (A.elu, {"alpha": 0.7}, F.elu),
    (A.hardswish, {}, F.hardswish),
    (A.mish, {}, F.mish),
    (A.relu6, {}, F.relu6),
    (A.relu_squared, {}, lambda x: F.relu(x).square()),
    (A.hardtanh, {}, F.hardtanh),
    (A.hardtanh, {"min_val": -0.3, "max_val": 2.0}, F.hardtanh),
    (A.hardsigmoid, {}, lambda x: F.relu6(x + 3) / 6),  # F.hardsigmoid's own backward has its 1/6 in float32
    (A.hardshrink, {}, F.hardshrink),
    (A.hardshrink, {"lambd": -1.0}, F.hardshrink),
    (A.softshrink, {}, F.softshrink),
    (A.softshrink, {"lambd": 1.5}, F.softshrink),
    (A.threshold, {"threshold": 0.5, "value": 7.0}, F.threshold),
    (A.logsigmoid, {}, F.logsigmoid),
    (A.tanhshrink, {}, F.tanhshrink),
    (A.softsign, {}, F.softsign),
    (A.celu, {}, F.celu),
    (A.celu, {"alpha": 0.5}, F.celu),  # a power of 2: torch has 1 / alpha in float32
    (A.celu, {"alpha": -2.0}, F.celu),
    (A.selu, {}, F.selu),
]
EVERY = pytest.mark.parametrize(
    "op, options, theirs", VARIANTS, ids=[f"{o.name}{list(k.values())}" for o, k, _ in VARIANTS]
)


SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0]
WHOLE = 16
"""Copies of a point, that each lane of a kernel's vectors meets."""


def draw(*shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(list(shape)).standard_normal(shape) * 3)


pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # whenever its flags are set


@pytest.fixture(autouse=True)
def torchs_own_kernels():
    """oneDNN, which torch asks on CPUs with AVX-512, has gelu(∞) = NaN: it is no judge."""
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
        yield


def strided(x, dtype=float64):
    """A strided tensor, which torch's scalar code takes: it has the formulas of torch's CUDA kernels, but not so its
    vectors, which give 0 (hardtanh, hardshrink, softshrink) or NaN (elu, celu, selu, hardswish) at NaN."""
    return torch.tensor(np.stack([x, x], -1).astype(float64), dtype=getattr(torch, str(dtype)))[..., 0]


def in_torch(theirs, inputs, dy, dtype, options):
    """torch's value and gradients, computed in ``dtype``."""
    tensors = [strided(a, dtype).requires_grad_() for a in inputs]
    y = theirs(*tensors, **options)
    grads = torch.autograd.grad(y, tensors, strided(dy, dtype))
    return [t.detach().double().numpy() for t in (y, *grads)]


def check_torch(op, theirs, *inputs, **options):
    """Every backend's value and gradients are NaN where torch's are, and as near to float64's as torch's."""
    for dtype in (float32, float16, bfloat16):
        typed = [a.astype(dtype) for a in inputs]
        dy = np.random.default_rng(0).standard_normal(op(*typed, **options).shape).astype(dtype)
        plain, truth = (in_torch(theirs, typed, dy, work, options) for work in (dtype, float64))
        for backend in ("definition", *backends_of(op)):
            if backend == "aten" and dtype != float32:
                continue
            with arena(backend) as room:
                y, call = op.record(*room.put(typed), **options)
                results = room.get([y, *call.backward(room.put(dy))])
            for name, mine, p, t in zip(["y", *op.inputs], results, plain, truth):
                came = f"{name} on {backend} in {dtype}"
                assert np.array_equal(np.isnan(mine), np.isnan(p)), came
                assert (wrong := excess(mine, t, p)) is None, f"{came}: {wrong}"


@EVERY
def test_definition_is_torch(op, options, theirs):
    """Values and gradients in float64, at ordinary, extreme and special points (NaN, ±Inf, kinks)."""
    special = [*SPECIAL, *(s * v for v in (3.0, 0.5, 1.0, 6.0, 1e-9, 40.0, 700.0) for s in (1, -1))]
    x = np.concatenate([special, np.linspace(-12, 12, 2000)])
    dy = np.random.default_rng(0).standard_normal(x.shape)
    y, grad = in_torch(theirs, [x], dy, float64, options)
    with np.errstate(all="ignore"):
        mine, call = op.record(x, **options)
        (dx,) = call.backward(dy)
    np.testing.assert_allclose(mine, y, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(dx, grad, rtol=1e-12, atol=3e-14)


@EVERY
def test_kernels(op, options, theirs):
    """Every kind of dy, and a tile that ends inside."""
    served = check_op(op, draw(3, 5), numeric=True, **options)
    assert {"definition", "numpy", "triton", "cuda"} <= {*served} == {"definition", *backends_of(op)}


@pytest.mark.parametrize("op", [A.relu, A.gelu], ids=["keeps y", "keeps x"])
def test_sizes(op):
    """The same walk serves every activation: one element, none, 0-dim, several tiles of which the last ends inside."""
    for shape in [(), (0, 3), (1,)]:
        check_op(op, draw(*shape))
    check_op(op, draw(9, 4111), dys=["dense"])


@pytest.mark.parametrize("op", [A.relu, A.gelu], ids=lambda op: op.name)
def test_memory_orders(op):
    """A dense input keeps its order; a strided one gives a row-major output; dy in any layout."""
    check_op(op, draw(5, 4, 3).T)
    check_op(op, draw(2, 4, 5, 3).transpose(0, 3, 1, 2))  # channels last
    check_op(op, draw(6, 80)[:, 3:60])
    check_op(op, draw(6, 80)[::2, ::3])
    check_op(op, np.broadcast_to(draw(1, 7), (4, 7)))


@EVERY
def test_special_values(op, options, theirs):
    """NaN, ±Inf, ±0 and kinks give from every kernel what they give from the definition, and from torch."""
    kinks = [v for v in options.values() if not isinstance(v, str)]
    x = np.repeat([*SPECIAL, *(s * v for v in (0.5, 1, 3, 6, 20, 90, 300, 1e-6, *kinks) for s in (1, -1))], WHOLE)
    with np.errstate(all="ignore"):
        check_op(op, x, dtypes=["float32", "bfloat16"], dys=["dense"], **options)
        check_torch(op, theirs, x, **options)


def test_every_activation_is_here():
    here = {op for op, _, _ in VARIANTS} | {A.prelu, A.rrelu, A.glu, A.gated}
    assert here == {op for op in vars(A).values() if isinstance(op, Op)}


NAN_PASSES_DY = ("relu", "relu6", "hardtanh", "hardshrink", "softshrink", "threshold", "hardswish", "elu", "celu")


@EVERY
def test_gradient_at_nan(op, options, theirs):
    """What a comparison decides, NaN decides as torch's CUDA kernels do: dy passes, or a slope, or nothing does."""
    x, dy = np.full(WHOLE, np.nan, np.float32), np.full(WHOLE, 0.75, np.float32)
    slope = {"selu": 1.0507009873554805, "leaky_relu": options.get("negative_slope", 0.01), "hardsigmoid": 0.0}
    wanted = dy * np.float32(1.0 if op.name in NAN_PASSES_DY else slope.get(op.name, np.nan))
    for backend in ("definition", *backends_of(op)):
        with arena(backend) as room:
            y, call = op.record(room.put(x), **options)
            got = room.get(call.backward(room.put(dy))[0])
        assert np.isnan(room.get(y)).all()
        np.testing.assert_array_equal(got, wanted, backend)


@pytest.mark.parametrize("op", [A.hardswish, A.hardsigmoid, A.celu], ids=lambda op: op.name)
def test_float64_has_no_constant_in_float32(op):
    """The definition is right in float64 where torch is not: its CUDA kernels have the 1/6 of hardswish in float32 (its
    CPU kernels that of hardsigmoid's gradient, both the 1/alpha of celu), which is 3e-8 off; rational numbers judge."""
    x = np.linspace(-2.9, 2.9, 41)
    sixth = {
        "hardswish": lambda v: (v * (v + 3) / 6, v / 3 + Fraction(1, 2)),
        "hardsigmoid": lambda v: ((v + 3) / 6, Fraction(1, 6)),
        "celu": lambda v: (math.expm1(min(v, 0) / 3) * 3 + max(v, 0), math.exp(min(v, 0) / 3)),
    }[op.name]
    wanted = np.array([[float(v) for v in sixth(Fraction(v))] for v in x])
    y, call = op.record(x, **({"alpha": 3.0} if op is A.celu else {}))
    np.testing.assert_allclose(y, wanted[:, 0], rtol=4e-16, atol=2e-16)
    np.testing.assert_allclose(call.backward(np.ones_like(x))[0], wanted[:, 1], rtol=4e-16, atol=2e-16)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "leaky_relu", "hardswish", "rrelu"])
def test_gradients_that_are_differentiated(name):
    """With create_graph=True they are what they are without it, at NaN and for an infinite dy too, and so torch's."""
    x = strided(np.tile([*SPECIAL, -2.0, 2.0], 2)).requires_grad_()
    dy = strided(np.repeat([0.75, np.inf], 7))
    options = {"lower": -0.5, "upper": -0.25} if name == "rrelu" else {}
    grads = []
    for call in (getattr(gt.functional, name), getattr(F, name)):
        grads += [torch.autograd.grad(call(x, **options), x, dy, create_graph=again)[0] for again in (False, True)]
    for grad in grads[1:]:
        torch.testing.assert_close(grad.detach(), grads[0], equal_nan=True)


def test_slopes_that_are_drawn_again():
    """Of rrelu, whatever their sign; NaN has the slope 1 in training."""
    x = torch.tensor([-1.0] * 50 + [2.0, torch.nan], dtype=torch.float64, requires_grad=True)
    y = gt.functional.rrelu(x, -0.5, 0.5, training=True)
    grads = [torch.autograd.grad(y, x, torch.ones_like(y), create_graph=again, retain_graph=True) for again in (0, 1)]
    torch.testing.assert_close(grads[0][0], grads[1][0].detach())
    torch.testing.assert_close(grads[0][0], torch.where(x < 0, -y, 1).detach())


def test_errors():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(NotImplementedError, match="relu: x: the rule is dtype"):
        A.relu(np.ones(3, np.int64))
    with pytest.raises(RuntimeError, match=r'gelu: approximate: the rule is approximate ∈ \{"none", "tanh"\}; got'):
        A.gelu(x, approximate="erf")
    with pytest.raises(TypeError, match="leaky_relu: negative_slope: the rule is a number; got 'steep'"):
        A.leaky_relu(x, negative_slope="steep")
    with pytest.raises(TypeError, match="threshold: threshold: the rule is a number; got 'high'"):
        A.threshold(x, threshold="high", value=0.0)
    with pytest.raises(TypeError, match="threshold: option threshold is required"):
        A.threshold(x)
    with pytest.raises(
        ValueError, match=r"hardtanh: min_val: the rule is min_val ≤ max_val; got min_val 2\.0, max_val 1"
    ):
        A.hardtanh(x, min_val=2.0)
    with pytest.raises(RuntimeError, match=r"softshrink: lambd: the rule is 0 ≤ lambd < ∞; got -1"):
        A.softshrink(x, lambd=-1)
    with pytest.raises(RuntimeError, match=r"celu: alpha: the rule is alpha ≠ 0; got 0"):
        A.celu(x, alpha=0)
    with pytest.raises(
        AssertionError, match=r"Hardtanh: max_val: the rule is max_val > min_val; got min_val 1, max_val 1"
    ):
        gl.Hardtanh(1, 1)


LAYERS = [
    (gl.ReLU(), torch.nn.ReLU()),
    (gl.LeakyReLU(0.2), torch.nn.LeakyReLU(0.2)),
    (gl.GELU(), torch.nn.GELU()),
    (gl.GELU("tanh"), torch.nn.GELU("tanh")),
    (gl.SiLU(), torch.nn.SiLU()),
    (gl.Sigmoid(), torch.nn.Sigmoid()),
    (gl.Tanh(), torch.nn.Tanh()),
    (gl.Softplus(2.0, 10.0), torch.nn.Softplus(2.0, 10.0)),
    (gl.ELU(0.5), torch.nn.ELU(0.5)),
    (gl.Hardswish(), torch.nn.Hardswish()),
    (gl.Mish(), torch.nn.Mish()),
    (gl.ReLU6(), torch.nn.ReLU6()),
    (gl.Hardtanh(-2.0, 0.5), torch.nn.Hardtanh(-2.0, 0.5)),
    (gl.Hardtanh(min_value=0.0, max_value=2.0), torch.nn.Hardtanh(0.0, 2.0)),
    (gl.Hardsigmoid(), torch.nn.Hardsigmoid()),
    (gl.LogSigmoid(), torch.nn.LogSigmoid()),
    (gl.Hardshrink(0.7), torch.nn.Hardshrink(0.7)),
    (gl.Softshrink(0.7), torch.nn.Softshrink(0.7)),
    (gl.Tanhshrink(), torch.nn.Tanhshrink()),
    (gl.Softsign(), torch.nn.Softsign()),
    (gl.Threshold(0.1, 20.0), torch.nn.Threshold(0.1, 20.0)),
    (gl.CELU(0.5), torch.nn.CELU(0.5)),
    (gl.SELU(), torch.nn.SELU()),
    (gl.PReLU(init=0.3), torch.nn.PReLU(init=0.3, dtype=torch.float64)),
    (gl.PReLU(6), torch.nn.PReLU(6, dtype=torch.float64)),
    (gl.RReLU(0.1, 0.2).eval(), torch.nn.RReLU(0.1, 0.2).eval()),
    (gl.GLU(), torch.nn.GLU()),
    (gl.GLU(0), torch.nn.GLU(0)),
]


@pytest.mark.parametrize("layer, theirs", LAYERS, ids=[repr(layer) for layer, _ in LAYERS])
def test_layers(layer, theirs):
    x = draw(4, 6)
    if isinstance(layer, gl.PReLU):
        layer.to("float64")
        layer.weight.data = theirs.weight.detach().numpy()
    with gl.no_grad(), torch.no_grad():
        np.testing.assert_allclose(layer(x), theirs(torch.tensor(x)).numpy(), rtol=1e-12, atol=1e-14)


def test_layers_keep_the_contract():
    check_layer(gl.GELU(), (None, 5))
    check_layer(gl.ELU(0.5), (3, 2, 4))
    check_layer(gl.PReLU(3), (None, 3, 2))
    check_layer(gl.RReLU(), (3, 4))
    check_layer(gl.GLU(1), (None, 4, 3))
    check_layer(gl.ReLUSquared(), (None, 5))
    check_layer(gl.QuickGELU(), (None, 5))


def test_cuda_unaligned():
    """Memory that does not begin at a multiple of 16 bytes is moved element by element."""
    x = np.ascontiguousarray(draw(42), np.float32)[1:]
    with emulating() as session, arena("cuda"):
        y, call = A.silu.record(x)
        (dx,) = call.backward(x)
    with gl.only("definition"):
        truth, call = A.silu.record(x)
        (dx_truth,) = call.backward(x)
    np.testing.assert_allclose(y, truth, rtol=1e-6)
    np.testing.assert_allclose(dx, dx_truth, rtol=1e-5, atol=1e-6)
    assert {launch.kernel for launch in session.launches} == {
        "silu_forward_float32_single",
        "silu_backward_float32_single",
    }


# --- with a weight, with chance, with a gate -------------------------------------------------------------------------

SEED = np.array([2**40 + 12345, -7])
SHORT = {"dys": ["dense"], "dtypes": ["float32", "bfloat16"]}


def test_prelu_is_torch():
    """With one weight and one for each channel; at NaN, ±Inf and 0."""
    for shape, count in [((4, 3, 5), 3), ((4, 3, 5), 1), ((6, 7), 7), ((8,), 1), ((), 1)]:
        x, w = draw(*shape), draw(count)
        x.reshape(-1)[:5] = [0.0, -0.0, np.nan, np.inf, -np.inf][: x.size]
        tensors = [torch.tensor(a, requires_grad=True) for a in (x, w)]
        theirs = F.prelu(*tensors)
        dy = np.asarray(np.random.default_rng(1).standard_normal(shape))
        theirs.backward(torch.tensor(dy))
        with np.errstate(all="ignore"):
            y, call = A.prelu.record(x, w)
            grads = call.backward(dy)
        np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=1e-13)
        for mine, t in zip(grads, tensors):
            np.testing.assert_allclose(mine, t.grad.numpy(), rtol=1e-12, atol=1e-14)


def test_prelu():
    """One weight; channels far apart and next to one another in memory, in several tiles, none, and in any order."""
    served = check_op(A.prelu, draw(2, 4, 3), draw(8)[::2], numeric=True)
    assert set(served) == {"definition", "numpy", "triton", "cuda"}
    check_op(A.prelu, draw(3, 5), draw(5), dys=["dense", "strided"])
    check_op(A.prelu, draw(), draw(), **SHORT)
    check_op(A.prelu, draw(9, 3, 1031), draw(3), **SHORT)
    check_op(A.prelu, draw(70, 152), draw(152), **SHORT)
    check_op(A.prelu, draw(9, 4111), draw(1), **SHORT)
    check_op(A.prelu, draw(16, 1024), draw(1), **SHORT)
    check_op(A.prelu, draw(2, 3, 64), draw(3), **SHORT)
    for shape in [(0, 4), (2, 0, 3), (2, 3, 0)]:
        check_op(A.prelu, draw(*shape), draw(shape[1]), **SHORT)
    check_op(A.prelu, draw(2, 4, 5, 3).transpose(0, 3, 1, 2), draw(3), dys=["dense", "transposed"])
    check_op(A.prelu, draw(3, 4, 5, 2).transpose(2, 3, 0, 1), draw(2), **SHORT)
    check_op(A.prelu, draw(6, 80)[:, 3:60], draw(57), **SHORT)


@pytest.mark.parametrize("training", [False, True])
def test_rrelu(training):
    """The slope belongs to the element, wherever it lies in memory."""
    served = check_op(A.rrelu, draw(3, 5), SEED, training=training, numeric=True)
    assert set(served) == {"definition", "numpy", "triton", "cuda"}
    shapes = [draw(), draw(0, 3), draw(9, 1031), draw(6, 9)[::2, 1:8], draw(16, 64)]
    turned = [draw(5, 7).T, draw(2, 4, 5, 3).transpose(0, 3, 1, 2), draw(2, 3, 4, 5).transpose(2, 0, 3, 1)]
    for x in shapes + turned:
        check_op(A.rrelu, x, SEED, training=training, lower=-0.5, upper=2.0, **SHORT)
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf])
    check_op(A.rrelu, special, SEED, training=training, **SHORT)
    if not training:
        check_op(A.rrelu, draw(3, 5), **SHORT)
        assert np.array_equal(A.rrelu(draw(3, 5)), A.leaky_relu(draw(3, 5), negative_slope=(1 / 8 + 1 / 3) / 2))


def test_rrelu_draws_uniformly():
    """Slopes spread evenly over [lower, upper), and the gradient at −1 is the slope itself; NaN lets dy through."""
    x = np.full(1 << 18, -1.0, np.float32)
    y, call = A.rrelu.record(x, SEED, lower=0.2, upper=0.6, training=True)
    counts, _ = np.histogram(-y, 16, (0.2, 0.6))
    assert counts.sum() == x.size and abs(counts / x.size * 16 - 1).max() < 0.05
    np.testing.assert_array_equal(call.backward(np.ones_like(x))[0], -y)
    x[:] = np.nan
    _, call = A.rrelu.record(x, SEED, training=True)
    assert (call.backward(np.ones_like(x))[0] == 1).all()


def test_glu_is_torch():
    x = draw(4, 6, 2)
    x[0, :, 0], x[1, :, 0] = [np.nan, np.inf, -np.inf, 0, 2, np.inf], [0, 0, -np.inf, np.inf, -np.inf, np.nan]
    for axis in (0, 1, -1):
        t = torch.tensor(x, requires_grad=True)
        theirs = F.glu(t, axis)
        dy = np.random.default_rng(1).standard_normal(theirs.shape)
        theirs.backward(torch.tensor(dy))
        with np.errstate(all="ignore"):
            y, call = A.glu.record(x, axis=axis)
            (dx,) = call.backward(dy)
        np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=1e-13)
        np.testing.assert_allclose(dx, t.grad.numpy(), rtol=1e-12, atol=1e-15)


def test_glu():
    """Halves along any axis, next to one another and far apart in memory; long rows; no elements; any memory order."""
    served = check_op(A.glu, draw(3, 4), numeric=True)
    assert set(served) == {"definition", "numpy", "triton", "cuda"}
    check_op(A.glu, draw(2, 4, 3), axis=1)
    for x, axis in [
        (draw(4), 0),
        (draw(0, 4), 1),
        (draw(3, 0), 1),
        (draw(130, 60), 1),
        (draw(2, 40000), 1),
        (draw(8, 16), 0),
    ]:
        check_op(A.glu, x, axis=axis, **SHORT)
    image = draw(2, 4, 5, 6).transpose(0, 3, 1, 2)
    for x, axis in [(image, 1), (image, 2), (draw(6, 80)[::2, :60], 1), (draw(3, 4, 1, 2).transpose(0, 3, 1, 2), 1)]:
        check_op(A.glu, x, axis=axis, dys=["dense", "transposed"], dtypes=["float32", "float16"])


def test_glu_of_long_rows_in_numpy(monkeypatch):
    """Rows of which a block holds a part, and blocks of several rows."""
    from gpulayers.kernels.numpy import _blocks

    monkeypatch.setattr(_blocks, "CHAIN", 16)
    for shape, axis in [((3, 260), 1), ((2, 74), 1), ((7, 6), 1), ((4, 5, 7), 0)]:
        check_op(A.glu, draw(*shape), axis=axis, backends=("numpy",), **SHORT)


def test_special_values_of_gates():
    """At NaN, ±Inf and 0, every kernel is torch: prelu's weights too, and glu's halves at every pair of points."""
    x = np.repeat([*SPECIAL, -3.0, 3.0], WHOLE)
    pairs = np.concatenate([np.tile(x, 7), np.repeat(x[::WHOLE], x.size)])
    with np.errstate(all="ignore"):
        check_torch(A.prelu, F.prelu, x, np.array([-0.25]))
        check_torch(A.prelu, F.prelu, x.reshape(1, -1, WHOLE), draw(7))
        check_torch(A.prelu, F.prelu, x.reshape(-1, WHOLE).T, draw(7))
        check_torch(A.rrelu, F.rrelu, x, lower=-0.5, upper=1.0)
        check_torch(A.glu, lambda x, axis: F.glu(x, axis), pairs, axis=0)


def test_errors_of_weights_seeds_and_halves():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(
        RuntimeError, match=r"prelu: weight: the rule is weight.shape = \[1\] or \[x.shape\[1\]\] = \[3\]; got \[2\]"
    ):
        A.prelu(x, np.ones(2, np.float32))
    with pytest.raises(RuntimeError, match=r"prelu: weight: .*; got \[3, 1\]"):
        A.prelu(x, np.ones((3, 1), np.float32))
    with pytest.raises(RuntimeError, match=r"prelu: weight: the rule is weight\.dtype = x\.dtype"):
        A.prelu(x, np.ones(3))
    with pytest.raises(RuntimeError, match="prelu: weight"):
        A.prelu(np.ones((), np.float32), np.ones(3, np.float32))
    with pytest.raises(
        RuntimeError, match=r"rrelu: lower, upper: the rule is −∞ < lower ≤ upper < ∞; got lower 0\.5, upper 0\.1"
    ):
        A.rrelu(x, lower=0.5, upper=0.1)
    with pytest.raises(TypeError, match="rrelu: seed: the rule is dtype = int64 in training; got None"):
        A.rrelu(x, training=True)
    with pytest.raises(RuntimeError, match=r"rrelu: seed: the rule is seed = \[seed, offset\]"):
        A.rrelu(x, np.zeros(3, np.int64), training=True)
    with pytest.raises(
        RuntimeError, match=r"glu: x: the rule is x.shape\[1\] even: x is two halves, a and b; got \[2, 3\]"
    ):
        A.glu(x)
    with pytest.raises(RuntimeError, match="glu: x: the rule is at least one axis"):
        A.glu(np.ones(()))
    with pytest.raises(IndexError, match="glu: axis"):
        A.glu(x, axis=2)


@pytest.mark.parametrize("backend", ["numpy", "definition"])
def test_gelu_tanh_of_large_numbers(backend):
    """Where tanh is ±1 its slope is 0, and nothing beside it may overflow before it is."""
    x = np.array([1e6, 2e13, 1e19, -1e6, -2e13, -1e19], np.float32)
    with dispatch.only(backend), np.errstate(all="ignore"):
        y, call = A.gelu.record(x, approximate="tanh")
        (dx,) = call.backward(np.ones_like(x))
    np.testing.assert_array_equal(y, np.where(x > 0, x, 0))
    np.testing.assert_array_equal(dx, np.where(x > 0, 1, 0))
