"""Integers in interpreted kernels are a GPU's. Each probe says what the compiler makes of it, and the value of that."""

import re

import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.compiler.errors import CompilationError  # noqa: E402

from gpulayers.testing import interpreter  # noqa: E402
from gpulayers.testing._integers import UndefinedError  # noqa: E402
from gpulayers.testing.compiling import compiling, driving, planning  # noqa: E402
from gpulayers.testing.interpreter import interpreting  # noqa: E402
from gpulayers.testing.memory import KernelMemoryError  # noqa: E402

I8, I16, I32, I64 = np.int8, np.int16, np.int32, np.int64
U8, U32, U64, F32, F64, BOOL = np.uint8, np.uint32, np.uint64, np.float32, np.float64, np.bool_
LEAST = -(2**31)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _toys_prove_nothing(monkeypatch):
    monkeypatch.setattr(interpreter, "proven", set())


def interpreted(kernel, *args, **constants):
    with interpreting():
        kernel[(1,)](*args, **constants)


def meta(args: tuple) -> list:
    return [torch.from_numpy(a).to("meta") if isinstance(a, np.ndarray) else a for a in args]


def compiled(kernel, *args, **constants) -> dict[str, str]:
    """The kernel's text at each stage of the compiler, for sm_90."""
    with compiling(90) as session:
        kernel[(1,)](*meta(args), **constants)
    return session.compiled[0].binary.asm


def parsed(kernel, *args, **constants) -> str:
    """What the compiler begins with: each operation as the kernel states it."""
    with planning(90) as session:
        kernel[(1,)](*meta(args), **constants)
    (planned,) = session.planned
    with driving(90) as driver:
        backend, context = make_backend(driver.target), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        known = backend.get_codegen_implementation(planned.options), backend.get_module_map()
        return str(planned.source.make_ir(driver.target, planned.options, *known, context))


def operations(text: str) -> list[str]:
    """The integer operations among them, each with the type of its result, or what it compares by."""
    return [
        f"{op} {by or ty}"
        for op, by, ty in re.findall(r"= (?:arith|math|tt)\.(\w+) (?:(\w+), )?.*?(?:tensor<\d+x)?(\w+)>? loc", text)
    ]


@triton.jit
def elementwise(x, y, out, OP: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    a, b = tl.load(x + i), tl.load(y + i)
    if OP == "divide":
        r = a // b
    elif OP == "remainder":
        r = a % b
    elif OP == "ceiling":
        r = tl.cdiv(a, b)
    elif OP == "left":
        r = a << b
    elif OP == "right":
        r = a >> b
    elif OP == "add":
        r = a + b
    elif OP == "subtract":
        r = a - b
    elif OP == "multiply":
        r = a * b
    elif OP == "less":
        r = a < b
    elif OP == "minimum":
        r = tl.minimum(a, b)
    elif OP == "negative":
        r = -a
    elif OP == "magnitude":
        r = tl.abs(a)
    elif OP == "high":
        r = tl.umulhi(a, b)
    elif OP == "cast":
        r = a.to(b.dtype)
    tl.store(out + i, r)


PROBES = [
    # operation, (x's and y's type, the result's), what it compiles to, x, y, the result
    ("divide", (I32, I32, I32), "divsi i32", [-7, 7, -7, -1], [2, -2, -2, 8], [-3, -3, 3, 0]),
    ("divide", (I32, I64, I64), "extsi i64, divsi i64", [-7, LEAST, 7, -1], [2, -1, -2, 8], [-3, 2**31, -3, 0]),
    ("divide", (U32, U32, U32), "divui i32", [2**32 - 7, 7, 1, 0], [2, 2, 8, 1], [2**31 - 4, 3, 0, 0]),
    ("remainder", (I32, I32, I32), "remsi i32", [-7, 7, -7, LEAST], [2, -2, -2, 3], [-1, 1, -1, -2]),
    ("remainder", (U8, U8, U8), "remui i8", [249, 7, 1, 0], [4, 4, 4, 4], [1, 3, 1, 0]),
    ("ceiling", (I32, I32, I32), "subi i32, addi i32, divsi i32", [-5, 5, -8, 8], [4] * 4, [0, 2, -1, 2]),
    ("left", (I32, I32, I32), "shli i32", [1, -1, 3, 1], [31, 31, 30, 0], [LEAST, LEAST, -(2**30), 1]),
    ("right", (I32, I32, I32), "shrsi i32", [-7, LEAST, 7, -1], [1, 31, 1, 31], [-4, -1, 3, -1]),
    ("right", (U32, U32, U32), "shrui i32", [2**32 - 7, 2**31, 7, 1], [1, 31, 1, 1], [2**31 - 4, 1, 3, 0]),
    ("add", (I32, I32, I32), "addi i32", [2**31 - 1, LEAST, 1, 0], [1, -1, 1, 0], [LEAST, 2**31 - 1, 2, 0]),
    ("add", (I8, I32, I32), "extsi i32, addi i32", [127, -128, 1, 0], [1, -1, 1, 0], [128, -129, 2, 0]),
    ("add", (U8, I8, U8), "addi i8", [255, 128, 1, 0], [1, -1, 1, 0], [0, 127, 2, 0]),
    ("add", (BOOL, BOOL, BOOL), "addi i1", [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]),
    ("subtract", (BOOL, BOOL, BOOL), "subi i1", [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]),
    ("subtract", (U32, U32, U32), "subi i32", [0, 5, 1, 0], [1, 2, 1, 0], [2**32 - 1, 3, 0, 0]),
    ("multiply", (I32, I32, I32), "muli i32", [65536, 46341, -65536, 3], [65536, 46341, 32768, 4], [0, -2147479015, LEAST, 12]),
    ("multiply", (I32, I64, I64), "extsi i64, muli i64", [65536, -1, 2, 3], [65536, 2**40, 2, 4], [2**32, -(2**40), 4, 12]),
    ("less", (I32, U32, BOOL), "cmpi ult", [-1, 0, 5, 6], [1, 1, 5, 7], [0, 1, 0, 1]),
    ("less", (I32, I64, BOOL), "extsi i64, cmpi slt", [-1, 0, 5, 6], [1, 1, 5, 7], [1, 1, 0, 1]),
    ("minimum", (I32, U32, U32), "minui i32", [-1, 0, 5, 6], [1, 1, 4, 7], [1, 0, 4, 6]),
    ("negative", (I32, I32, I32), "subi i32", [LEAST, 1, -1, 0], [0] * 4, [LEAST, -1, 1, 0]),
    ("magnitude", (I32, I32, I32), "absi i32", [LEAST, 1, -1, 0], [0] * 4, [LEAST, 1, 1, 0]),
    ("high", (U32, U32, U32), "mulhiui i32", [2**32 - 1, 2**31, 1, 0], [2**32 - 1, 2, 1, 5], [2**32 - 2, 1, 0, 0]),
    ("cast", (I32, U8, U8), "trunci i8", [-1, 256, 255, 300], [0] * 4, [255, 0, 255, 44]),
    ("cast", (I8, U32, U32), "extsi i32", [-1, 127, -128, 0], [0] * 4, [2**32 - 1, 127, 2**32 - 128, 0]),
    ("cast", (BOOL, I32, I32), "extui i32", [1, 0, 1, 0], [0] * 4, [1, 0, 1, 0]),
    ("cast", (I32, BOOL, BOOL), "cmpi ne", [2, 0, -1, 256], [0] * 4, [1, 0, 1, 1]),
    ("cast", (I64, F32, F32), "sitofp f32", [2**24 + 1, -3, 2**62, 0], [0] * 4, [2**24, -3, 2**62, 0]),
    ("cast", (U64, F32, F32), "uitofp f32", [2**63, 3, 2**64 - 1, 0], [0] * 4, [2**63, 3, 2**64, 0]),
    ("cast", (F32, I32, I32), "fptosi i32", [-2.9, 3e9, NAN, -INF], [0] * 4, [-2, 2**31 - 1, 0, LEAST]),
    ("cast", (F32, U32, U32), "fptoui i32", [-2.9, 3e9, NAN, INF], [0] * 4, [0, 3000000000, 0, 2**32 - 1]),
    ("cast", (F32, I16, I16), "fptosi i16", [-2.9, 4e4, NAN, -INF], [0] * 4, [-2, 2**15 - 1, 0, -(2**15)]),
    ("cast", (F32, I64, I64), "fptosi i64", [-2.9, 1e30, NAN, -INF], [0] * 4, [-2, 2**63 - 1, -(2**63), -(2**63)]),
    ("cast", (F64, I32, I32), "fptosi i32", [2147483647.9, 1e30, NAN, -0.5], [0] * 4, [2**31 - 1, 2**31 - 1, LEAST, 0]),
    ("cast", (F32, U8, U8), "fptoui i8", [255.9, 1.0, 0.0, 0.5], [0] * 4, [255, 1, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize("op, types, code, x, y, result", PROBES)
def test_operations(op, types, code, x, y, result):
    kinds = [np.dtype(t) for t in types]
    arrays = [np.array(x, kinds[0]), np.array(y, kinds[1]), np.zeros(4, kinds[2])]
    interpreted(elementwise, *arrays, OP=op, B=4)
    np.testing.assert_array_equal(arrays[2], np.array(result, kinds[2]))
    assert set(code.split(", ")) <= set(operations(parsed(elementwise, *arrays, OP=op, B=4)))
    if code.startswith("fp"):  # held within the type's range
        assert "cvt.rzi." in compiled(elementwise, *arrays, OP=op, B=4)["ptx"]


@triton.jit
def halved(n):
    return n // 2


@triton.jit
def constructs(out, one, A: tl.constexpr, M: tl.constexpr):
    tl.store(out, A // 2)  # constants are Python's
    tl.store(out + 1, A % 2)
    a = A  # what has a name is a tensor
    tl.store(out + 2, a // 2)
    tl.store(out + 3, a % 2)
    b, c, d = A, 2, -A
    tl.store(out + 4, b // c + d)
    e: tl.constexpr = A // 2
    tl.store(out + 5, e)
    c //= -2
    tl.store(out + 6, (c - 2) // 2)
    tl.store(out + 7, halved(A))
    tl.store(out + 8, halved(a))
    tl.store(out + 9, -one // 2)  # an argument of 1 is a constant
    tl.store(out + 10, (A if a < 0 else 5) // 2)
    tl.store(out + 11, (A if e < 0 else 5) // 2)
    tl.store(out + 12, min(a, A - 2) // 2)
    tl.store(out + 13, max(A, A - 2) // 2)
    for k in range(-3, 0, 3):
        tl.store(out + 14, k // 2)
    for k in tl.static_range(-3, 0, 3):
        tl.store(out + 15, k // 2)
    for k in tl.range(-3, -6, -3):
        tl.store(out + 16, k // 2)
    u = 0x80000000  # needs all 32 bits, so it has no sign
    tl.store(out + 17, u // 2)
    tl.store(out + 18, u + u)
    m = M
    tl.store(out + 19, m * m)  # 32 bits
    tl.store(out + 20, M * M)
    wide = m.to(tl.int64)
    for k in range(wide, wide + 1):
        tl.store(out + 21, k * m)
    for k in range(m, m + 1):
        tl.store(out + 22, k * m)
    tl.store(out + 23, (a < 0 and a > A) or not a < 0)
    tl.store(out + 24, not (a > 0 or a < A))
    t = True
    tl.store(out + 25, t + t)
    tl.store(out + 26, A and e)


def test_python_in_a_kernel_means_what_the_compiler_makes_of_it():
    """The compiler works the values out itself: they stand in its code, in the order of the stores."""
    expected = [
        -4,
        1,
        -3,
        -1,
        4,
        -4,
        -1,
        -4,
        -3,
        -1,
        -3,
        -4,
        -4,
        -4,
        -1,
        -2,
        -1,
        2**30,
        0,
        0,
        2**32,
        2**32,
        0,
        0,
        1,
        0,
        -4,
    ]
    out = np.zeros(len(expected), np.int64)
    interpreted(constructs, out, 1, A=-7, M=65536)
    assert out.tolist() == expected
    stored = re.findall(r"\(i64 (-?\d+), ptr addrspace\(1\)", compiled(constructs, out, 1, A=-7, M=65536)["llir"])
    assert [int(n) for n in stored] == expected


@triton.jit
def blocks(out, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, (i > 0 and i < 3) or not i < B - 1)


def test_logic_on_blocks_goes_element_by_element():
    out = np.zeros(8, np.int32)
    interpreted(blocks, out, B=8)
    assert out.tolist() == [0, 1, 1, 0, 0, 0, 0, 1]
    with pytest.warns(UserWarning, match="deprecated"):
        assert {"andi i1", "ori i1", "xori i1"} <= set(operations(parsed(blocks, out, B=8)))


@triton.jit
def guarded(x, out, n, limit, B: tl.constexpr):
    i = tl.arange(0, B)
    count = tl.where(n % limit == 0, tl.maximum(n, 0), 0)
    total = tl.zeros((B,), tl.float32)
    for k in tl.range(0, count, num_stages=3):
        total += tl.load(x + (k * B + i) // count)
    tl.store(out + i, total)


def test_a_loop_that_never_runs_must_not_divide_by_zero():
    """Its first loads begin before it, so the compiler concludes that the divisor is not 0, and no longer asks n % limit."""
    x, out = torch.ones(64), torch.empty(32)
    interpreted(guarded, x, out, 4, 2, B=32)
    assert (out == 4).all()
    with pytest.raises(UndefinedError, match="division by zero") as caught:
        interpreted(guarded, x, out, 5, 2, B=32)
    assert "a loop that runs no time" in caught.value.__notes__[0]
    code = compiled(guarded, x.to("meta"), out.to("meta"), 5, 2, B=32)
    assert code["ttgir"].index("arith.divsi") < code["ttgir"].index("scf.for")
    assert "remsi" in code["ttgir"] and "rem.s32" not in code["ptx"]


UNDEFINED = [
    ("divide", I32, [1, 2, 3, 4], [1, 0, 1, 1], "integer division by zero, in 1 of 4 lanes"),
    ("remainder", U32, [1, 2, 3, 4], [0, 0, 1, 1], "integer division by zero, in 2 of 4 lanes"),
    ("divide", I32, [LEAST, 2, 3, 4], [-1, 1, 1, 1], "the least int32 divided by −1"),
    ("remainder", I32, [LEAST, 2, 3, 4], [-1, 1, 1, 1], "the least int32 divided by −1"),
    ("left", I32, [1, 2, 3, 4], [1, 32, 1, 1], "a shift of 32 bits"),
    ("right", U8, [1, 2, 3, 4], [1, 8, 1, 1], "a shift of 8 bits"),
    ("right", I64, [1, 2, 3, 4], [1, -1, 1, 1], "a shift of 64 bits"),
]


@pytest.mark.parametrize("op, kind, x, y, message", UNDEFINED)
def test_what_is_undefined_is_refused(op, kind, x, y, message):
    with pytest.raises(UndefinedError, match=message):
        interpreted(elementwise, np.array(x, kind), np.array(y, kind), np.zeros(4, kind), OP=op, B=4)


def test_a_number_beyond_8_bits_is_refused():
    """cvt has 16 bits at least: what is left of the rest depends on the code around it."""
    with pytest.raises(UndefinedError, match="a number beyond uint8"):
        interpreted(elementwise, np.full(4, 256, F32), np.zeros(4, U8), np.zeros(4, U8), OP="cast", B=4)


@triton.jit
def stepping(out, first, last, step):
    for k in range(first, last, step):
        tl.store(out + k, k)


@triton.jit
def breaking(out, n):
    for _ in range(n):
        break


@triton.jit
def chained(out, n):
    tl.store(out, 0 <= n < 5)


@triton.jit
def summing(out, n):
    tl.store(out, sum([n, n]))


@triton.jit
def deciding(out, n):
    if tl.arange(0, 2) < n:
        tl.store(out, n)


@triton.jit
def unrolling(out, n):
    for k in tl.static_range(n):
        tl.store(out + k, k)


@triton.jit
def widening(out, n):
    total = tl.zeros((1,), tl.float16)
    for k in range(n):
        total += k.to(tl.float32)
    tl.store(out + tl.arange(0, 1), total.to(tl.int32))


@pytest.mark.parametrize(
    "kernel, arguments, error, message",
    [
        (stepping, (4, 0, -2), ValueError, "step is -2: at run time it has to be positive"),
        (stepping, (2**31 - 3, 2**31 - 1, 4), OverflowError, "passes 2147483647, and never ends"),
        (breaking, (3,), SyntaxError, "break"),
        (chained, (3,), SyntaxError, "chain"),
        (summing, (3,), NameError, "Python's sum"),
        (deciding, (3,), ValueError, "neither true nor false"),
        (unrolling, (3,), TypeError, "constexprs"),
        (widening, (3,), TypeError, r"total is <\['1'\], fp16> before a loop and <\['1'\], fp32> after a round"),
    ],
)
def test_what_does_not_compile_is_refused(kernel, arguments, error, message):
    out = np.zeros(8, np.int32)
    with pytest.raises(error, match=message):
        interpreted(kernel, out, *arguments)
    if kernel is not stepping:
        with pytest.raises(CompilationError):
            parsed(kernel, out, *arguments)


@triton.jit
def offset(x, out, row, step):
    tl.store(out, tl.load(x + row * step))


def test_an_offset_of_32_bits_overflows():
    with pytest.raises(KernelMemoryError, match="out of bounds"):
        interpreted(offset, np.zeros(8, F32), np.zeros(1, F32), 2**16, 2**15)
    interpreted(offset, np.zeros(8, F32), np.zeros(1, F32), 2**16, 2**16)  # comes round to element 0
