"""Interpreted kernels compute what a GPU would: bfloat16 arithmetic, dots, random numbers, reductions, libdevice."""

import re

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from gpulayers.kernels.triton import _tile  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402
from triton.language.math import exp2 as exp2_by_name  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from gpulayers.testing import interpreter  # noqa: E402
from gpulayers.testing.compiling import compiling  # noqa: E402
from gpulayers.testing.interpreter import Launch, interpreting, register_inline_asm  # noqa: E402

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _toys_prove_nothing(monkeypatch):
    """The kernels below are toys: keep them out of the record of what was proven."""
    monkeypatch.setattr(interpreter, "proven", set())


@triton.jit
def binary(x, y, out, BLOCK: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    if OP == "add":
        r = a + b
    elif OP == "sub":
        r = a - b
    elif OP == "mul":
        r = a * b
    elif OP == "max":
        r = tl.maximum(a, b)
    elif OP == "less":
        r = tl.where(a < b, a, -b)
    elif OP == "half":
        r = (a * 0.5).to(out.dtype.element_ty)
    tl.store(out + i, r)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "max", "less", "half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_arithmetic_equals_torch_bit_for_bit(op, dtype):
    torch.manual_seed(0)
    x, y, out = (torch.randn(1024).to(dtype) for _ in range(3))
    reference = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "max": lambda: torch.maximum(x, y),
        "less": lambda: torch.where(x < y, x, -y),
        "half": lambda: x * 0.5,
    }[op]()
    with interpreting():
        binary[(1,)](x, y, out, BLOCK=1024, OP=op)
    assert torch.equal(out.view(torch.int16), reference.view(torch.int16))


@triton.jit
def convert(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float64, *FLOATS])
@pytest.mark.parametrize("target", [torch.float64, *FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
def test_conversions_round_as_torch_does(source, target):
    torch.manual_seed(1)
    x = (torch.randn(4096, dtype=torch.float64) * 10 ** (torch.rand(4096, dtype=torch.float64) * 4 - 3)).to(source)
    out = torch.empty(4096, dtype=target)
    with interpreting():
        convert[(1,)](x, out, BLOCK=4096)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[out.element_size()]
    limit = min(torch.finfo(source).max, torch.finfo(target).max)
    assert torch.equal(out.view(bits), x.clamp(-limit, limit).to(target).view(bits))


@triton.jit
def softmax(x, y, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + i, i < n, float("-inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * n + i, (e / tl.sum(e, 0)).to(y.dtype.element_ty), i < n)


@triton.jit
def layer_norm(x, y, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = 0.0
    for start in range(0, n, BLOCK):
        total += tl.sum(tl.load(x + row * n + start + i, start + i < n, 0.0).to(tl.float32))
    mean = total / n
    square = 0.0
    for start in range(0, n, BLOCK):
        v = tl.load(x + row * n + start + i, start + i < n, mean).to(tl.float32)
        square += tl.sum((v - mean) * (v - mean))
    scale = tl.rsqrt(square / n + eps)
    for start in range(0, n, BLOCK):
        v = tl.load(x + row * n + start + i, start + i < n, 0.0).to(tl.float32)
        tl.store(y + row * n + start + i, ((v - mean) * scale).to(y.dtype.element_ty), start + i < n)


@triton.jit
def matmul(a, b, c, M, N, K, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(a + m[:, None] * K + k[None, :], (m[:, None] < M) & (k[None, :] < K), 0.0)
        y = tl.load(b + k[:, None] * N + n[None, :], (k[:, None] < K) & (n[None, :] < N), 0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), (m[:, None] < M) & (n[None, :] < N))


@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax_layer_norm_and_matmul(dtype):
    torch.manual_seed(2)
    x = torch.randn(6, 50).to(dtype)
    y = torch.empty_like(x)
    exact = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    with interpreting():
        softmax[(6,)](x, y, 50, 50, BLOCK=64, num_warps=4)
        torch.testing.assert_close(y, x.softmax(-1), rtol=exact, atol=1e-6)
        layer_norm[(6,)](x, y, 50, 1e-5, BLOCK=16)
        torch.testing.assert_close(y, torch.layer_norm(x, (50,)), rtol=exact, atol=exact)
        a, b = torch.randn(40, 70).to(dtype), torch.randn(70, 33).to(dtype)
        c = torch.empty(40, 33)
        matmul[lambda meta: (triton.cdiv(40, meta["BLOCK"]), triton.cdiv(33, meta["BLOCK"]))](
            a, b, c, 40, 33, 70, BLOCK=32, PRECISION="ieee"
        )
        torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_a_float32_dot_is_tf32_unless_the_kernel_says_otherwise():
    torch.manual_seed(3)
    a, b, c = torch.randn(32, 32), torch.randn(32, 32), torch.empty(32, 32)
    errors = {}
    with interpreting():
        for precision in (None, "ieee", "tf32x3"):
            matmul[(1, 1)](a, b, c, 32, 32, 32, BLOCK=32, PRECISION=precision)
            errors[precision] = (c.double() - a.double() @ b.double()).abs().max().item()
    assert errors["ieee"] < 1e-5 and errors["tf32x3"] < 1e-5 < 1e-4 < errors[None] < 3e-2


def test_a_dot_too_small_for_the_tensor_cores_is_refused():
    @triton.jit
    def small(a, c, K: tl.constexpr):
        m, k = tl.arange(0, 16), tl.arange(0, K)
        x = tl.load(a + m[:, None] * K + k[None, :])
        tl.store(c + m[:, None] * 16 + m[None, :], tl.dot(x, tl.trans(x), input_precision="ieee"))

    c = torch.empty(16, 16)
    with interpreting():
        small[(1,)](torch.ones(16, 16), c, K=16)
        assert (c == 16).all()
        with pytest.raises(AssertionError, match="K >= 16") as caught:
            small[(1,)](torch.ones(16, 8), c, K=8)
    assert "program (0, 0, 0) of the grid (1, 1, 1) of small" in caught.value.__notes__[0]


def philox(seed, counter):
    """The first word of Philox4x32-10."""
    c = [np.asarray(counter, np.uint64), *(np.zeros(len(counter), np.uint64),) * 3]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
        c = [(p1 >> shift) ^ c[1] ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c[0].astype(np.uint32)


def test_random_numbers_are_philox():
    @triton.jit
    def draw(seed, ints, floats, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        s = tl.load(seed)
        tl.store(ints + i, tl.randint(s, i).to(tl.int64))
        tl.store(floats + i, tl.rand(s, i))

    seed = 0x1234567890ABCD
    ints, floats = torch.zeros(256, dtype=torch.int64), torch.zeros(256)
    with interpreting():
        draw[(1,)](torch.tensor([seed]), ints, floats, BLOCK=256)
    np.testing.assert_array_equal(ints.numpy().astype(np.uint32), philox(seed, np.arange(256)))
    assert 0.4 < floats.mean() < 0.6 and floats.min() >= 0 and floats.max() < 1


@triton.jit
def _welford(mean1, m1, n1, mean2, m2, n2):
    n = n1 + n2
    d = mean2 - mean1
    return mean1 + d * (n2 / n), m1 + m2 + d * d * (n1 * n2 / n), n


@triton.jit
def _linear(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


def test_reductions_and_scans_with_functions_of_ones_own():
    @triton.jit
    def kernel(x, mean, var, scan, top, BLOCK: tl.constexpr):
        r, i = tl.arange(0, 4), tl.arange(0, BLOCK)
        v = tl.load(x + r[:, None] * BLOCK + i[None, :])
        mu, m, n = tl.reduce((v, tl.zeros_like(v), tl.zeros_like(v) + 1), 1, _welford)
        tl.store(mean + r, mu)
        tl.store(var + r, m / n)
        _, h = tl.associative_scan((tl.zeros_like(v) + 0.5, v), 1, _linear)
        tl.store(scan + r[:, None] * BLOCK + i[None, :], h)
        tl.store(top + r, tl.argmax(v, 1))

    x = torch.randn(4, 32)
    mean, var, top, scan = torch.empty(4), torch.empty(4), torch.empty(4, dtype=torch.int32), torch.empty(4, 32)
    with interpreting():
        kernel[(1,)](x, mean, var, scan, top, BLOCK=32)
    torch.testing.assert_close(mean, x.mean(1))
    torch.testing.assert_close(var, x.var(1, correction=0))
    assert torch.equal(top, x.argmax(1).int())
    h = torch.zeros(4)
    for t in range(32):
        h = 0.5 * h + x[:, t]
        torch.testing.assert_close(scan[:, t], h)


def test_libdevice_erf_builtins_by_name_and_inline_assembly():
    register_inline_asm("tanh.approx.f32 $0, $1;", np.tanh)

    @triton.jit
    def kernel(x, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = tl.load(x + i)
        asm: tl.constexpr = "tanh.approx.f32 $0,  $1;"
        t = tl.inline_asm_elementwise(asm, "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
        tl.store(out + i, t)
        tl.store(out + BLOCK + i, libdevice.tanh(v))
        tl.store(out + 2 * BLOCK + i, tl.erf(v))
        tl.store(out + 3 * BLOCK + i, exp2_by_name(v))
        tl.store(out + 4 * BLOCK + i, libdevice.pow(tl.abs(v), 1.5))

    x, out = torch.randn(64), torch.empty(5, 64)
    with interpreting():
        kernel[(1,)](x, out, BLOCK=64)
    expected = torch.stack([x.tanh(), x.tanh(), x.erf(), x.exp2(), x.abs() ** 1.5])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_arguments_are_typed_as_a_launch_types_them():
    """A float argument is a float32 tensor, so it widens bfloat16; bool, None, tuples and NumPy arrays work too."""

    @triton.jit
    def kernel(x, out, scale, flag, nothing, pair, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = tl.load(x + i) * scale
        if flag:
            v = v + pair[1]
        if nothing is None:
            tl.store(out + i, v + tl.load(pair[0] + i))

    x = np.array([1, 2, 3, 4], ml_dtypes.bfloat16)
    out, other = np.zeros(4, np.float32), np.ones(4, np.float32)
    with interpreting():
        kernel[(1,)](x, out, 1 / 3, True, None, (other, 2), BLOCK=4)
    np.testing.assert_array_equal(out, x.astype(np.float32) * np.float32(1 / 3) + 2 + 1)


def test_host_side_descriptors():
    @triton.jit
    def double(source, target, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK
        target.store([at, 0], source.load([at, 0]) * 2)

    for dtype in FLOATS:
        x = torch.randn(20, 16).to(dtype)
        y = torch.zeros_like(x)
        with interpreting():
            double[(2,)](*(TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, y)), BLOCK=16)
        assert torch.equal(y, x * 2)


def test_other_zero_of_a_scalar_load_is_used():
    @triton.jit
    def kernel(x, y, n):
        tl.store(y, tl.load(x, n > 0, other=0.0))

    y = torch.ones(1)
    with interpreting():
        kernel[(1,)](torch.ones(1), y, 0)
    assert y.item() == 0


def test_what_ran_is_recorded_and_everything_is_put_back():
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, JITFunction.__call__, tl.load, tl.tensor.__init__, tl.core.reduce, _tile.pretend
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with interpreting() as outer:
        assert _tile.device(x) == (90, 4, 232448)
        with interpreting(_tile.Device(80, 2, 1024)) as inner:
            assert _tile.device(x).arch == 80
            softmax[(2,)](x, torch.empty(2, 8), 8, 8, BLOCK=8)
        assert _tile.device(x).arch == 90
        with pytest.raises(KeyError, match="num_wraps"):
            softmax[(2,)](x, torch.empty(2, 8), 8, 8, BLOCK=8, num_wraps=4)
        with pytest.raises(ValueError, match="CUDA launches no grid"):
            softmax[(1, 65536)](x, torch.empty(2, 8), 8, 8, BLOCK=8)
    launch = Launch("softmax", ("bfloat16", "float32"), {"BLOCK": 8}, (2, 1, 1))
    assert inner.launches == outer.launches == [launch]
    assert ("softmax", "bfloat16 float32") in interpreter.proven
    assert before == (
        JITFunction.run,
        JITFunction.__call__,
        tl.load,
        tl.tensor.__init__,
        tl.core.reduce,
        _tile.pretend,
    )


def test_autotuned_kernels_take_the_first_configuration_left():
    @triton.autotune([triton.Config({"BLOCK": b}, num_warps=4) for b in (16, 32)], key=["n"])
    @triton.jit
    def kernel(x, y, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i, i < n), i < n)

    x, y = torch.randn(40), torch.zeros(40)
    with interpreting() as session:
        kernel[lambda meta: (triton.cdiv(40, meta["BLOCK"]),)](x, y, 40)
    assert torch.equal(x, y) and session.launches[0].constexprs == {"BLOCK": 16}


@triton.jit
def one_masked_lane(x, y):
    i = tl.arange(0, 1)
    tl.store(y + i, tl.load(x + i, i < 0, other=0.0))
    tl.store(y + 1, tl.load(x, i.shape[0] > 1, other=0.0))


def test_other_of_zero_stands_in_for_a_single_lane():
    y = torch.ones(2)
    with interpreting():
        one_masked_lane[(1,)](torch.full((1,), 7.0), y)
    assert y.tolist() == [0, 0]


@triton.jit
def gathered(x, at, y):
    i = tl.arange(0, 4)
    tl.store(y + i, tl.gather(tl.load(x + i), tl.load(at + i), 0))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_gather_reaches_no_further_than_its_block(wrong):
    x, y = torch.arange(4.0), torch.zeros(4)
    with interpreting():
        gathered[(1,)](x, torch.tensor([3, 0, 0, 2]), y)
        assert y.tolist() == [3, 0, 0, 2]
        with pytest.raises(IndexError, match=r"tl\.gather: the rule is 0 ≤ index < 4 along axis 0; got"):
            gathered[(1,)](x, torch.tensor([3, 0, wrong, 2]), y)


@triton.jit
def rounded(x, y, pair, out):
    a, b = tl.load(x), tl.load(x + 1)
    tl.store(out, a * b - tl.load(y))
    tl.store(out + 1, tl.fma(a, b, 0.0) - tl.load(y))
    tl.store(out + 2, tl.load(pair + 1) / tl.load(pair))
    tl.store(out + 3, tl.div_rn(tl.load(pair + 1), tl.load(pair)))


@pytest.mark.parametrize("fused", [False, True])
def test_products_in_sums_and_quotients_round_as_compiled(fused):
    """Fused: x · y − z rounds once, and x / y is x · (1 / y), unless the kernel asks for each rounding."""
    x = torch.full((2,), 1 + 2**-12)
    pair, out = torch.tensor([41.0, 41.0]), torch.empty(4)
    with interpreting(fused=fused):
        rounded[(1,)](x, x[:1] * x[1:], pair, out)
        with interpreting():  # inherits
            rounded[(1,)](x, x[:1] * x[1:], pair, again := torch.empty(4))
    assert out.tolist() == again.tolist()
    assert out.tolist()[1::2] == [0, 1]
    assert out.tolist()[::2] == ([2**-24, 1 - 2**-24] if fused else [0, 1])
    with compiling(90) as session:
        rounded[(1,)](*(t.to("meta") for t in (x, x, pair, out)))
    ptx = session.compiled[0].binary.asm["ptx"]
    assert all(name in ptx for name in ("div.full.f32", "div.rn.f32"))
    assert ptx.count("fma.rn.f32") == 2 and re.search(r"sub(\.rn)?\.f32", ptx)
