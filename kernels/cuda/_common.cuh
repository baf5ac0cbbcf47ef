// What all CUDA kernels share: number types, 16-byte packs, reductions. `_launch.py` puts this text where a kernel file
// says #include "_common.cuh", so no include path is needed; nor are CUDA's headers, which NVRTC may not find.
//
// A kernel is a template over its element type T, instantiated for each dtype by a macro:
//
//     template <class T> __device__ void scale(const T* x, T* y, float factor, int64 n) { … }
//     #define SCALE(T, NAME) \
//         extern "C" __global__ void scale_##NAME(const T* x, T* y, float factor, int64 n) { scale<T>(x, y, factor, n); }
//     FOR_EACH_DTYPE(SCALE)

using int64 = long long;

struct alignas(2) float16 {
    unsigned short bits;
};
struct alignas(2) bfloat16 {
    unsigned short bits;
};

#define FOR_EACH_DTYPE(MACRO) MACRO(float, float32) MACRO(float16, float16) MACRO(bfloat16, bfloat16) MACRO(double, float64)

// --- The type that T is computed in: float, except that double stays double ------------------------------------------

template <class T> struct Accumulator {
    using type = float;
};
template <> struct Accumulator<double> {
    using type = double;
};
template <class T> using acc_t = typename Accumulator<T>::type;

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

#ifdef GPULAYERS_EMULATED
__device__ inline float to_acc(float16 x) { return emu::half_to_float(x.bits); }
__device__ inline unsigned short half_bits(float x) { return emu::float_to_half(x); }
__device__ inline unsigned short bfloat16_bits(float x) { return emu::float_to_bfloat16(x); }
#else
__device__ inline float to_acc(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ inline unsigned short half_bits(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ inline unsigned short bfloat16_bits(float x) {
    unsigned short y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif

// Rounds to nearest, ties to even.
template <class T> __device__ T from_acc(acc_t<T> x);
template <> __device__ inline float from_acc<float>(float x) { return x; }
template <> __device__ inline double from_acc<double>(double x) { return x; }
template <> __device__ inline float16 from_acc<float16>(float x) { return {half_bits(x)}; }
template <> __device__ inline bfloat16 from_acc<bfloat16>(float x) { return {bfloat16_bits(x)}; }

// --- 16 bytes at a time ----------------------------------------------------------------------------------------------

// N elements that move as one access; the pointer must be a multiple of the pack's size.
template <class T, int N = 16 / sizeof(T)> struct alignas(sizeof(T) * N) Pack {
    T items[N];
};
template <class T> constexpr int pack_size = 16 / sizeof(T);

template <class T, int N = pack_size<T>> __device__ Pack<T, N> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
}
#ifdef GPULAYERS_EMULATED
template <class T, int N> __device__ void store_pack(T* p, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
}
#else
// To global memory, in PTX: nvcc splits the store of a struct into one for each of its members.
template <class T, int N> __device__ void store_pack(T* p, const Pack<T, N>& pack) {
    if constexpr (sizeof(pack) % 16 == 0) {
        unsigned words[sizeof(pack) / 4];
        memcpy(words, &pack, sizeof pack);
        #pragma unroll
        for (int i = 0; i < sizeof(pack) / 4; i += 4)
            asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global((char*)p + 4 * i)),
                         "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3])
                         : "memory");
    } else if constexpr (sizeof(pack) == 8) {
        unsigned words[2];
        memcpy(words, &pack, sizeof pack);
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(words[0]), "r"(words[1])
                     : "memory");
    } else {
        *reinterpret_cast<Pack<T, N>*>(p) = pack;
    }
}
#endif

// --- Reductions: every thread gets the result; the order is fixed, so the bits are the same in every run ------------

struct Sum {
    template <class A> __device__ A operator()(A a, A b) const { return a + b; }
};
struct Max {  // NaN wins, as in torch
    template <class A> __device__ A operator()(A a, A b) const { return a > b || a != a ? a : b; }
};

template <class A, class Op> __device__ A warp_reduce(A value, Op op) {
    for (int lane = 16; lane; lane >>= 1) value = op(value, __shfl_xor_sync(0xffffffffu, value, lane));
    return value;
}

// All threads of the block must call it; their number (x only) is a multiple of 32.
template <class A, class Op> __device__ A block_reduce(A value, Op op, A identity) {
    __shared__ A parts[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    value = warp_reduce(value, op);
    if (lane == 0) parts[warp] = value;
    __syncthreads();
    value = lane < blockDim.x / 32 ? parts[lane] : identity;
    value = warp_reduce(value, op);
    __syncthreads();  // the next reduction writes `parts` again
    return value;
}

template <class A> __device__ A warp_sum(A value) { return warp_reduce(value, Sum()); }
template <class A> __device__ A warp_max(A value) { return warp_reduce(value, Max()); }
template <class A> __device__ A block_sum(A value) { return block_reduce(value, Sum(), A(0)); }
template <class A> __device__ A block_max(A value) { return block_reduce(value, Max(), A(-1.0 / 0.0)); }

// This thread's place among all threads of a one-dimensional grid, and how many there are.
__device__ inline int64 thread_index() { return (int64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline int64 thread_count() { return (int64)gridDim.x * blockDim.x; }

// --- The second stage of sums over rows ------------------------------------------------------------------------------

// sums[column] = Σ over the rows of partials. A block has 32 columns; 8 threads share each.
template <class W> __device__ void add_up(const float* partials, W* sums, int64 rows, int64 n) {
    __shared__ float parts[8][33];
    int64 column = (int64)blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (column < n)
        for (int64 row = threadIdx.y; row < rows; row += 8) sum += partials[row * n + column];
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= n) return;
    for (int k = 1; k < 8; ++k) sum += parts[k][threadIdx.x];
    sums[column] = from_acc<W>(sum);
}
#define ADD_UP(W, NAME)                                                                              \
    extern "C" __global__ void add_up_##NAME(const float* partials, W* sums, int64 rows, int64 n) { \
        add_up<W>(partials, sums, rows, n);                                                          \
    }
