"""Kernels compile for GPUs that aren't there, and the audit of their machine code finds each seeded fault."""

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from gpulayers.kernels.triton import _tile  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from gpulayers.testing import _launches  # noqa: E402
from gpulayers.testing.audit import Report, audit, describe  # noqa: E402
from gpulayers.testing.compiling import compiling, driving, one  # noqa: E402


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@triton.jit
def scale(x, y, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n) * factor, i < n)


@triton.jit
def scale_rows(x, y, n, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = tl.program_id(0) * stride + i
    tl.store(y + at, tl.load(x + at, i < n) * 2, i < n)


@triton.jit
def softmax(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * n + i, i < n, float("-inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + tl.program_id(0) * n + i, (e / tl.sum(e, 0)).to(y.dtype.element_ty), i < n)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * K + k[None, :], k[None, :] < K, 0.0)
        y = tl.load(b + k[:, None] * N + n[None, :], k[:, None] < K, 0.0)
        if DOT:
            acc = tl.dot(x, y, acc)
        else:
            acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), (m[:, None] < M) & (n[None, :] < N))


@triton.jit
def add_up(x, total, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total, tl.sum(tl.load(x + i).to(tl.float32)))


@triton.jit
def descriptor_matmul(a, b, c, K, BLOCK: tl.constexpr):
    m, n = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def sum_of_products(a, b, c, each, n, SURE: tl.constexpr):
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, n)
    if SURE:
        tl.assume(last > first)
    acc = tl.zeros((64, 64), tl.float32)
    for k in range(first, last):
        acc = tl.dot(a.load([k, 0, 0, 0]).reshape(64, 64).T, b.load([k * 64, 0]), acc)
    c.store([0, 0], acc.to(tl.bfloat16))


def launch_matmul(size=4096, bm=64, bn=64, bk=32, dot=True, warps=4, stages=3):
    a, b, c = meta(size, size), meta(size, size), meta(size, size)
    grid = lambda meta: (triton.cdiv(size, meta["BM"]), triton.cdiv(size, meta["BN"]))  # noqa: E731
    matmul[grid](a, b, c, size, size, size, BM=bm, BN=bn, BK=bk, DOT=dot, num_warps=warps, num_stages=stages)


def test_a_launch_finds_in_tritons_cache_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiling(90):
        launch_matmul(bm=16, bn=16)
    (compiled,) = tmp_path.iterdir()
    matmul.hash = None  # as in another process

    def launch(run, kernel, grid, args, kwargs):
        with driving(90):
            run(kernel, *args, grid=grid, warmup=True, **kwargs)

    with _launches.catching("meta", launch):
        launch_matmul(bm=16, bn=16)
    assert [*tmp_path.iterdir()] == [compiled]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_sound_matmul_has_no_faults_and_uses_the_tensor_cores(arch):
    with compiling(arch) as session:
        assert _tile.device(meta(1)) == one(arch)
        launch_matmul()
        launch_matmul()
    (compiled,) = session.compiled  # the second launch needs the same binary
    assert compiled.dtypes == ("bfloat16",) * 3 and compiled.grid == (64, 64, 1) and compiled.arch == arch
    assert compiled.constexprs["BM"] == 64 and compiled.signature["K"] == "i32"
    report = audit(compiled)
    assert report.faults(aligned=True) == []
    assert report.mix[{80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}[arch]] and 0 < report.blocks_per_sm <= 32
    assert describe(report)["spills"] == 0


@pytest.mark.parametrize("arch", [86, 89, 120])
def test_the_other_architectures_compile(arch):
    with compiling(arch) as session:
        scale[(4096,)](meta(1 << 22), meta(1 << 22), 1 << 22, 0.5, BLOCK=1024)
    assert audit(session.compiled[0]).faults(aligned=True) == []


def test_lost_tensor_cores():
    with compiling(80) as session:
        launch_matmul(bm=32, bn=32, bk=16, dot=False)
    assert any("without tensor-core" in fault for fault in audit(session.compiled[0]).faults())


def test_a_spill():
    with compiling(90) as session:
        for warps in (4, 16):
            softmax[(8,)](*[meta(8, 32768, dtype=torch.float32)] * 2, 32768, BLOCK=32768, num_warps=warps)
    spilled, sound = map(audit, session.compiled)
    assert any("spills" in fault for fault in spilled.faults()) and spilled.spills
    assert sound.faults(aligned=True) == []


def test_too_much_shared_memory():
    with compiling(80) as session:
        launch_matmul(bm=256, bn=128, bk=64, warps=8, stages=5)
    (report,) = map(audit, session.compiled)
    assert any("shared memory; sm_80 gives a block 166912" in fault for fault in report.faults())
    assert report.blocks_per_sm == 0


def test_unaligned_rows():
    """Rows of 4097 elements begin anywhere; and a tensor that begins 4 bytes into its storage is not aligned."""
    aligned, odd = meta(64, 4096, dtype=torch.float32), meta(64, 4097, dtype=torch.float32)
    with compiling(90) as session:
        scale_rows[(64,)](aligned, aligned, 4096, 4096, BLOCK=4096)
        scale_rows[(64,)](odd, odd, 4097, 4097, BLOCK=8192)
        scale_rows[(63,)](odd.view(-1)[1:], aligned, 4096, 4096, BLOCK=4096)
    good, *bad = map(audit, session.compiled)
    assert good.faults(aligned=True) == []
    assert all(any("128 bits wide" in fault for fault in report.faults(aligned=True)) for report in bad)


def test_wgmmas_that_wait_for_each_other():
    """A loop that may be empty, with an operand that comes through registers."""
    (a, b, c) = meta(64, 8, 8, 64), meta(1024, 64), meta(64, 64)
    blocks = ([1, 8, 8, 64], [64, 64], [64, 64])
    with compiling(90) as session:
        for sure in (False, True):
            given = map(TensorDescriptor.from_tensor, (a, b, c), blocks)
            sum_of_products[(4,)](*given, 4, 13, SURE=sure)
    serialized, sound = map(audit, session.compiled)
    assert serialized.faults() == ["its wgmmas are serialized by the assembler"] and sound.faults() == []


def test_floating_point_atomics():
    with compiling(90) as session:
        add_up[(64,)](meta(1 << 16), meta(1, dtype=torch.float32), BLOCK=1024)
    assert any("floating-point atomics" in fault for fault in audit(session.compiled[0]).faults())


def test_arguments_specialise_as_in_a_launch():
    """A size that 16 divides, one that it doesn't, a size of 1: three binaries. Another value of a kind: none."""
    x = meta(1 << 12)
    with compiling(80) as session:
        for n in (64, 128, 65, 1):
            scale[(1,)](x, x, n, 2.0, BLOCK=64)
    assert len(session.compiled) == 3


def test_host_side_descriptors_use_the_copy_engine():
    tensors = [TensorDescriptor.from_tensor(meta(1024, 1024), [64, 64]) for _ in range(3)]
    with compiling(90) as session:
        descriptor_matmul[(16, 16)](*tensors, 1024, BLOCK=64)
    report = audit(session.compiled[0])
    assert report.mix["UTMALDG"] and report.mix["UTMASTG"] and report.faults(aligned=True) == []


def test_errors_pass_through_and_everything_is_put_back():
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    @triton.jit
    def wrong(x):
        i = tl.arange(0, 3)
        tl.store(x + i, 0)

    before = JITFunction.run, driver._active, _tile.pretend
    with compiling(80):
        with pytest.raises(triton.CompilationError):
            wrong[(1,)](meta(4))
        with pytest.raises(ValueError, match="CUDA launches no grid"):
            scale[(1, 1 << 20)](meta(4), meta(4), 4, 1.0, BLOCK=64)
    with pytest.raises(ValueError, match="arch must be one of 80"), compiling(75):
        pass
    assert before == (JITFunction.run, driver._active, _tile.pretend)


def test_a_report_that_fits_nowhere():
    report = Report("k", 86, 32, 128, 0, 0, 0, 10, {})
    assert report.blocks_per_sm == 0 and report.faults() == []
