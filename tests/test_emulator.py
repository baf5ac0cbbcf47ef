"""CUDA kernels run on the CPU and compile without a driver; seeded faults are found, the correct twins pass."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from gpulayers.kernels.cuda import _launch

from gpulayers.testing import emulator
from gpulayers.testing.emulator import KernelBarrierError, KernelRaceError, Launch, emulating
from gpulayers.testing.memory import KernelMemoryError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

SOURCE = r"""
#include "_common.cuh"

template <class T> __device__ void layer_norm(const T* x, T* y, int n, float eps) {
    extern __shared__ __align__(16) char buffer[];
    acc_t<T>* row = (acc_t<T>*)buffer;
    const T* in = x + (int64)blockIdx.x * n;
    acc_t<T> sum = 0;
    for (int i = threadIdx.x * pack_size<T>; i < n; i += blockDim.x * pack_size<T>) {
        Pack<T> pack = load_pack(in + i);
        #pragma unroll
        for (int k = 0; k < pack_size<T>; ++k) {
            row[i + k] = to_acc(pack.items[k]);
            sum += row[i + k];
        }
    }
    acc_t<T> mean = block_sum(sum) / n, square = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) square += (row[i] - mean) * (row[i] - mean);
    acc_t<T> scale = 1 / sqrt(block_sum(square) / n + eps);
    T* out = y + (int64)blockIdx.x * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = from_acc<T>((row[i] - mean) * scale);
}
#define LAYER_NORM(T, NAME) \
    extern "C" __global__ void layer_norm_##NAME(const T* x, T* y, int n, float eps) { layer_norm<T>(x, y, n, eps); }
FOR_EACH_DTYPE(LAYER_NORM)

template <class T> __device__ void convert(const float* x, T* y, int64 n) {
    for (int64 i = thread_index(); i < n; i += thread_count()) y[i] = from_acc<T>(x[i]);
}
#define CONVERT(T, NAME) \
    extern "C" __global__ void convert_##NAME(const float* x, T* y, int64 n) { convert<T>(x, y, n); }
CONVERT(float16, float16)
CONVERT(bfloat16, bfloat16)

extern "C" __global__ void __launch_bounds__(256)
matmul(const float* a, const float* b, float* c, int M, int N, int K) {
    __shared__ float A[16][17], B[16][17];
    int m = blockIdx.y * 16 + threadIdx.y, n = blockIdx.x * 16 + threadIdx.x;
    float acc = 0;
    for (int k = 0; k < K; k += 16) {
        A[threadIdx.y][threadIdx.x] = m < M && k + threadIdx.x < K ? a[m * K + k + threadIdx.x] : 0.f;
        B[threadIdx.y][threadIdx.x] = k + threadIdx.y < K && n < N ? b[(k + threadIdx.y) * N + n] : 0.f;
        __syncthreads();
        for (int t = 0; t < 16; ++t) acc += A[threadIdx.y][t] * B[t][threadIdx.x];
        __syncthreads();
    }
    if (m < M && n < N) c[m * N + n] = acc;
}

extern "C" __global__ void lanes(const float* x, float* y) {
    float v = x[threadIdx.x];
    float up = __shfl_up_sync(~0u, v, 1), down = __shfl_down_sync(~0u, v, 1, 16);
    y[threadIdx.x] = up + 100 * __shfl_sync(~0u, v, 3, 8) + 1e4f * down;
    unsigned votes = __ballot_sync(~0u, v > 15);
    if (threadIdx.x == 0) y[32] = __popc(votes);
    float4 four = make_float4(1, 2, 3, 4);
    if (threadIdx.x == 0) *(float4*)(y + 36) = four;
}

extern "C" __global__ void copy(const float* x, float* y, int64 n, bool masked) {
    int64 i = thread_index();
    if (!masked || i < n) y[i] = x[i];
}
extern "C" __global__ void copy_strided(const float* x, float* y, int rows, int columns, int stride) {
    int i = threadIdx.x;
    if (i < rows * columns) y[i] = x[i / columns * stride + i % columns];
}
extern "C" __global__ void copy4(const float* x, float* y, int first) {
    ((float4*)y)[threadIdx.x] = ((const float4*)(x + first))[threadIdx.x];
}
extern "C" __global__ void backwards(const float* x, float* y, int first) {
    y[threadIdx.x] = x[first - (int)threadIdx.x];
}

extern "C" __global__ void divergent(float* y, int n) {
    if (threadIdx.x < n) __syncthreads();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void left_out(float* y) { y[threadIdx.x] = __shfl_sync(0xffffu, y[threadIdx.x], 0); }

extern "C" __global__ void neighbour(const float* x, float* y, bool barrier) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void in_warp(const float* x, float* y, bool barrier) {
    __shared__ float s[32];
    s[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncwarp();
    y[threadIdx.x] = s[31 - threadIdx.x];
}
extern "C" __global__ void meet(float* y, int kind) {
    int b = blockIdx.x;
    if (kind == 0) y[b] = b;
    if (kind == 1) y[0] = b;
    if (kind == 2) y[b] = b ? y[b - 1] : 0;
    if (kind == 3) y[b] = y[b + 1];
}
extern "C" __global__ void count(int* c, const int* x, bool atomic) {
    int* place = c + x[threadIdx.x];
    if (atomic) atomicAdd(place, 1); else *place += 1;
}
extern "C" __global__ void fused(const float* x, float* y) { y[1] = x[0] * x[1] - y[0]; }
extern "C" __global__ void rounded(const float* x, float* y) { y[2] = __fmul_rn(x[0], x[1]) - y[0]; }
extern "C" __global__ void unset(float* y) {
    __shared__ float s[4];
    extern __shared__ float d[];
    y[0] = s[1], y[1] = d[1];
}
"""


@pytest.fixture(autouse=True)
def family(monkeypatch):
    text = "".join(map(_launch._included, SOURCE.splitlines(keepends=True)))
    monkeypatch.setattr(_launch, "source", lambda family: text)
    monkeypatch.setattr(emulator, "proven", set())  # these toys are no proof of a kernel


def launch(name, grid, block, *args, shared=0, races=True):
    with emulating(races=races) as session:
        _launch.launch("toy", name, (grid,) if isinstance(grid, int) else grid, np.atleast_1d(block), args, shared)
    return session


@pytest.mark.skipif(not emulator.fuses(), reason="the processor has no fused multiply-add")
def test_products_go_unrounded_into_sums():
    x = np.array([1 + 2**-12, 1 + 2**-12], np.float32)
    y = np.array([x[0] * x[1], np.nan, np.nan], np.float32)
    launch("fused", 1, 1, x, y)
    launch("rounded", 1, 1, x, y)
    assert y[1:].tolist() == [2**-24, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_layer_norm_in_every_dtype(dtype):
    x = np.random.default_rng(0).standard_normal((6, 512)).astype(dtype)
    y = np.full_like(x, np.nan)
    name = f"layer_norm_{np.dtype(dtype).name}"
    session = launch(name, 6, 128, x, y, np.int32(512), 1e-5, shared=512 * 8)
    d = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    expected = d / np.sqrt((d * d).mean(-1, keepdims=True) + np.float32(1e-5))
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=float(2 * ml_dtypes.finfo(dtype).eps), atol=1e-6)
    assert session.launches == [Launch(name, (np.dtype(dtype).name,) * 2, (6, 1, 1), (128, 1, 1), 4096)]
    assert (name, f"{np.dtype(dtype)} {np.dtype(dtype)}") in emulator.proven


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_rounding_is_to_nearest_even(dtype):
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 5000, dtype=np.uint32)
    special = np.array([0, -0.0, np.inf, 65504, 65519, 65520, 1e-8, 3e-8], np.float32)
    x = np.concatenate([bits.view(np.float32), (2.0 ** rng.uniform(-27, 17, 5000)).astype(np.float32), special])
    x = x[~np.isnan(x)]
    y = np.empty(x.shape, dtype)
    launch(f"convert_{np.dtype(dtype).name}", 4, 256, x, y, len(x))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y.view(np.uint16), x.astype(dtype).view(np.uint16))


def test_matmul_with_tiles_in_shared_memory():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((40, 30), np.float32), rng.standard_normal((30, 21), np.float32)
    c = np.full((40, 21), np.nan, np.float32)
    launch("matmul", (2, 3), (16, 16), a, b, c, *map(np.int32, (40, 21, 30)))
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-5)


def test_shuffles_votes_and_vectors():
    x, y = np.arange(32, dtype=np.float32), np.zeros(40, np.float32)
    launch("lanes", 1, 32, x, y)
    i = np.arange(32)
    expected = np.maximum(i - 1, 0) + 100 * (i // 8 * 8 + 3) + 1e4 * np.where(i % 16 == 15, i, i + 1)
    np.testing.assert_array_equal(y[:32], expected.astype(np.float32))
    assert y[32] == 16 and y[36:].tolist() == [1, 2, 3, 4]


def test_out_of_bounds():
    x, y = np.ones(100, np.float32), np.zeros(100, np.float32)
    launch("copy", 2, 64, x, y, 100, True)
    assert (y == 1).all()
    with pytest.raises(KernelMemoryError, match=r"block \(1, 0, 0\), thread \(36, 0, 0\): load .*'0' .*element 100"):
        launch("copy", 2, 64, x, y, 100, False)
    with pytest.raises(KernelMemoryError, match=r"store out of bounds of argument 1"):
        launch("copy", 1, 64, x, y[:40], 64, True)
    launch("backwards", 1, 8, x, y, np.int32(7))
    with pytest.raises(KernelMemoryError, match="element -1"):
        launch("backwards", 1, 8, x, y, np.int32(6))


def test_gaps_of_strided_views_and_misalignment():
    wide, y = np.ones((4, 8), np.float32), np.zeros(32, np.float32)
    launch("copy_strided", 1, 32, wide[:, :6], y, *map(np.int32, (4, 6, 8)))
    with pytest.raises(KernelMemoryError, match=r"element 6, in a gap"):
        launch("copy_strided", 1, 32, wide[:, :6], y, *map(np.int32, (4, 7, 8)))
    x = np.arange(40, dtype=np.float32)
    launch("copy4", 1, 8, x, y, np.int32(4))
    np.testing.assert_array_equal(y, x[4:36])
    with pytest.raises(KernelMemoryError, match="16-byte access that is misaligned, at element 5"):
        launch("copy4", 1, 8, x, y, np.int32(5))


def test_divergent_barriers():
    y = np.zeros(64, np.float32)
    launch("divergent", 1, 64, y, np.int32(64))
    with pytest.raises(KernelBarrierError, match=r"block \(0, 0, 0\): 16 of 64 threads wait"):
        launch("divergent", 1, 64, y, np.int32(16))
    with pytest.raises(RuntimeError, match="leaves out the lane itself"):
        launch("left_out", 1, 32, y)


@pytest.mark.parametrize(("kernel", "threads"), [("neighbour", 64), ("in_warp", 32)])
def test_missing_barriers_are_races(kernel, threads):
    x, y = np.arange(threads, dtype=np.float32), np.zeros(threads, np.float32)
    launch(kernel, 1, threads, x, y, True)
    np.testing.assert_array_equal(y, x[::-1])
    with pytest.raises(KernelRaceError, match=r"(read-after-write|write-after-read).*shared memory"):
        launch(kernel, 1, threads, x, y, False)


@pytest.mark.parametrize(
    ("kind", "hazard"), [(1, "write-after-write"), (2, "read-after-write"), (3, "write-after-read")]
)
def test_hazards_between_blocks(kind, hazard):
    y = np.zeros(5, np.float32)
    launch("meet", 4, 1, y, np.int32(0))
    with pytest.raises(KernelRaceError, match=hazard):
        launch("meet", 4, 1, y, np.int32(kind))
    launch("meet", 4, 1, y, np.int32(kind), races=False)


def test_atomics_may_meet():
    counts, x = np.zeros(3, np.int32), np.array([0, 2, 2, 2], np.int32)
    launch("count", 2, 4, counts, x, True)
    assert counts.tolist() == [2, 0, 6]
    with pytest.raises(KernelRaceError):
        launch("count", 1, 4, counts, x, False)
    with pytest.raises(KernelMemoryError, match="atomic out of bounds of argument 0"):
        launch("count", 1, 4, counts, x + np.int32(1), True)


def test_shared_memory_begins_as_nan():
    y = np.zeros(2, np.float32)
    launch("unset", 1, 1, y, shared=16)
    assert np.isnan(y).all()
    with pytest.raises(KernelMemoryError, match="out of bounds"):
        launch("unset", 1, 1, y, shared=4)


def test_wrong_launches_are_refused():
    x = np.zeros(64, np.float32)
    with pytest.raises(TypeError, match=r"copy, argument 0: .* \*f4, what came is \*f8"):
        launch("copy", 1, 64, x.astype(np.float64), x, 64, True)
    with pytest.raises(TypeError, match=r"argument 2: .* i8, what came is i4"):
        launch("copy", 1, 64, x, x, np.int32(64), True)
    with pytest.raises(TypeError, match="takes 4 arguments, not 3"):
        launch("copy", 1, 64, x, x, 64)
    with pytest.raises(ValueError, match="no kernel swim; the file has layer_norm_float32"):
        launch("swim", 1, 64, x)
    with pytest.raises(ValueError, match="CUDA launches no grid"):
        launch("copy", 1, 2048, x, x, 64, True)
    launch("copy", 0, 64, x, x, 64, True)  # an empty grid is no launch
    assert _launch.emulate is None


def test_without_a_compiler_or_with_a_wrong_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("GPULAYERS_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)refused the kernel.*undeclared_name"):
        emulator.build.__wrapped__('extern "C" __global__ void k(float* y) { *y = undeclared_name; }')
    monkeypatch.setattr(emulator, "COMPILER", "no-such-compiler")
    with pytest.raises(RuntimeError, match="needs no-such-compiler"):
        emulator.build.__wrapped__("")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_same_source_compiles_for_gpus_without_one(arch):
    pytest.importorskip("cupy_backends")
    pytest.importorskip("triton")  # its disassembler
    from gpulayers.testing.nvrtc import audit_cuda, compile_source

    reports = audit_cuda("toy", arch, warps=8, shared=4096)
    assert set(reports) == set(emulator.kernel_names(_launch.source("toy")))
    report = reports["layer_norm_bfloat16"]
    assert report.mix["LDG.128"] and report.mix["BAR"] and report.faults() == [] and report.blocks_per_sm
    assert 2 * 16 * 17 * 4 <= reports["matmul"].shared < 4096 + 1024
    assert reports["count"].mix["ATOM"] and reports["count"].faults() == []
    with pytest.raises(RuntimeError, match="undeclared_name"):
        compile_source('extern "C" __global__ void k(float* y) { *y = undeclared_name; }', arch)


def test_the_shared_header_is_part_of_every_source():
    assert "_common.cuh" not in _launch._included('#include "_common.cuh"\n').splitlines()[0]
    assert "struct Pack" in _launch.source("toy") or "alignas(sizeof(T) * N) Pack" in _launch.source("toy")
