// Serves CUDA arrays where Triton, or torch, which Triton's launches need, is not installed: CuPy's arrays, then. Where both
// are, Triton's kernels are faster and stand first.
//
// prelu (a weight), rrelu (chance) and glu (a gate), bound by memory: packs of 16 bytes where the arrays allow it.

#include "_common.cuh"

using uint64 = unsigned long long;

// --- prelu: C channels of B neighbours each, again and again --------------------------------------------------------

// A pack of V elements from the i-th belongs to one channel; or, where B is 1, to V channels.
template <int V, class T>
__device__ void prelu_forward(const T* x, const T* weight, T* y, int64 size, int64 C, int64 B) {
    for (int64 p = thread_index(); p < size / V; p += thread_count()) {
        Pack<T, V> pack = load_pack<T, V>(x + p * V);
        int64 c = p * V / B % C;
        #pragma unroll
        for (int k = 0; k < V; ++k) {
            float v = to_acc(pack.items[k]);
            if (!(v > 0)) pack.items[k] = from_acc<T>(v * to_acc(weight[B == 1 && C > 1 ? c + k : c]));
        }
        store_pack(y + p * V, pack);
    }
}

// A block sums dweight over its part of one channel's places, (A, B) of them, and makes their dx.
template <int V, class T>
__device__ void prelu_backward_places(const T* dy, const T* x, const T* weight, T* dx, float* parts, int64 A, int64 C,
                                      int64 B, int64 each, bool want_dx) {
    int64 c = blockIdx.x % C, part = blockIdx.x / C, packs = B / V;
    int64 end = (part + 1) * each < A * packs ? (part + 1) * each : A * packs;
    float w = to_acc(weight[c]), sum = 0;
    for (int64 j = part * each + threadIdx.x; j < end; j += blockDim.x) {
        int64 at = (j / packs * C + c) * B + j % packs * V;
        Pack<T, V> g = load_pack<T, V>(dy + at), v = load_pack<T, V>(x + at);
        #pragma unroll
        for (int k = 0; k < V; ++k) {
            float slope = to_acc(v.items[k]), grad = to_acc(g.items[k]);
            if (slope > 0) continue;
            sum += slope * grad;
            g.items[k] = from_acc<T>(grad * w);
        }
        if (want_dx) store_pack(dx + at, g);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[part * C + c] = sum;
}

// The same where channels are neighbours in memory (B = 1): 32 packs of them a block, of 8 threads each.
template <int V, class T>
__device__ void prelu_backward_channels(const T* dy, const T* x, const T* weight, T* dx, float* parts, int64 A, int64 C,
                                        int64 each, bool want_dx) {
    __shared__ float shared[8][32 * V];
    int64 blocks = (C / V + 31) / 32, c = (blockIdx.x % blocks * 32 + threadIdx.x) * V, part = blockIdx.x / blocks;
    int64 end = (part + 1) * each < A ? (part + 1) * each : A;
    float sums[V] = {};
    if (c < C)
        for (int64 a = part * each + threadIdx.y; a < end; a += 8) {
            Pack<T, V> g = load_pack<T, V>(dy + a * C + c), v = load_pack<T, V>(x + a * C + c);
            #pragma unroll
            for (int k = 0; k < V; ++k) {
                float slope = to_acc(v.items[k]), grad = to_acc(g.items[k]);
                if (slope > 0) continue;
                sums[k] += slope * grad;
                g.items[k] = from_acc<T>(grad * to_acc(weight[c + k]));
            }
            if (want_dx) store_pack(dx + a * C + c, g);
        }
    #pragma unroll
    for (int k = 0; k < V; ++k) shared[threadIdx.y][threadIdx.x * V + k] = sums[k];
    __syncthreads();
    if (threadIdx.y || c >= C) return;
    for (int k = 0; k < V; ++k) {
        float sum = 0;
        for (int y = 0; y < 8; ++y) sum += shared[y][threadIdx.x * V + k];
        parts[part * C + c + k] = sum;
    }
}

// --- rrelu: Philox4x32-10 as in ops/_random.py ----------------------------------------------------------------------

struct Words {
    unsigned word[4];
};

// The words of a 64-bit counter under seed = [seed, offset].
__device__ inline Words philox(const int64* seed, uint64 counter) {
    unsigned c0 = (unsigned)counter, c1 = (unsigned)(counter >> 32);
    unsigned c2 = (unsigned)seed[1], c3 = (unsigned)((uint64)seed[1] >> 32);
    unsigned k0 = (unsigned)seed[0], k1 = (unsigned)((uint64)seed[0] >> 32);
    #pragma unroll
    for (int round = 0; round < 10; ++round) {
        uint64 p0 = (uint64)0xD2511F53u * c0, p1 = (uint64)0xCD9E8D57u * c2;
        c0 = (unsigned)(p1 >> 32) ^ c1 ^ k0;
        c1 = (unsigned)p1;
        c2 = (unsigned)(p0 >> 32) ^ c3 ^ k1;
        c3 = (unsigned)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

struct Slopes {
    float lower, upper;
    bool drawn;
    // g times the slope at x; the first 24 bits of a word are a float in [0, 1).
    __device__ float operator()(float g, float x, unsigned word) const {
        if (!drawn) return x > 0 ? g : g * ((lower + upper) / 2);
        return x <= 0 ? g * (lower + (upper - lower) * ((word >> 8) * 5.9604644775390625e-8f)) : g;
    }
};

// Row-major arrays: four neighbours share a counter, and a pack has one or two of them.
template <class T> __device__ void rrelu_packs(const T* dy, const T* x, const int64* seed, T* out, int64 size, Slopes slope) {
    constexpr int V = pack_size<T>;
    for (int64 p = thread_index(); p < size / V; p += thread_count()) {
        Pack<T> g = load_pack(dy + p * V), v = load_pack(x + p * V);
        #pragma unroll
        for (int k = 0; k < V; k += 4) {
            Words words = slope.drawn ? philox(seed, (p * V + k) / 4) : Words{};
            #pragma unroll
            for (int j = 0; j < 4; ++j)
                g.items[k + j] = from_acc<T>(slope(to_acc(g.items[k + j]), to_acc(v.items[k + j]), words.word[j]));
        }
        store_pack(out + p * V, g);
    }
}

// Memory holds (n0, n1, n2), whose axes are step0, step1, step2 elements apart row-major.
template <class T>
__device__ void rrelu_single(const T* dy, const T* x, const int64* seed, T* out, int64 size, int64 n1, int64 n2,
                             int64 step0, int64 step1, int64 step2, Slopes slope) {
    for (int64 i = thread_index(); i < size; i += thread_count()) {
        int64 element = i / n2 / n1 * step0 + i / n2 % n1 * step1 + i % n2 * step2;
        Words words = slope.drawn ? philox(seed, element / 4) : Words{};
        unsigned word = element % 4 < 2 ? words.word[element % 4 ? 1 : 0] : words.word[element % 4 == 2 ? 2 : 3];
        out[i] = from_acc<T>(slope(to_acc(dy[i]), to_acc(x[i]), word));
    }
}

// --- glu: rows of 2N in x, the halves a and b, and of N in y --------------------------------------------------------

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

template <int V, class T> __device__ void glu_forward(const T* x, T* y, int64 size, int64 N) {
    for (int64 i = thread_index() * V; i < size; i += thread_count() * V) {
        int64 at = i + i / N * N;
        Pack<T, V> a = load_pack<T, V>(x + at), b = load_pack<T, V>(x + at + N);
        #pragma unroll
        for (int k = 0; k < V; ++k) a.items[k] = from_acc<T>(to_acc(a.items[k]) * sigmoid(to_acc(b.items[k])));
        store_pack(y + i, a);
    }
}

template <int V, class T> __device__ void glu_backward(const T* dy, const T* x, T* dx, int64 size, int64 N) {
    for (int64 i = thread_index() * V; i < size; i += thread_count() * V) {
        int64 at = i + i / N * N;
        Pack<T, V> a = load_pack<T, V>(x + at), b = load_pack<T, V>(x + at + N), g = load_pack<T, V>(dy + i);
        #pragma unroll
        for (int k = 0; k < V; ++k) {
            float grad = to_acc(g.items[k]), s = sigmoid(to_acc(b.items[k])), v = to_acc(a.items[k]);
            a.items[k] = from_acc<T>(grad * s);
            b.items[k] = from_acc<T>(grad * v * s * (1 - s));
        }
        store_pack(dx + at, a);
        store_pack(dx + at + N, b);
    }
}

#define KERNELS(T, NAME, V)                                                                                            \
    extern "C" __global__ void prelu_forward_##NAME(const T* x, const T* weight, T* y, int64 size, int64 C, int64 B) { \
        prelu_forward<V>(x, weight, y, size, C, B);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void prelu_backward_places_##NAME(const T* dy, const T* x, const T* weight, T* dx,           \
                                                            float* parts, int64 A, int64 C, int64 B, int64 each,       \
                                                            bool want_dx) {                                            \
        prelu_backward_places<V>(dy, x, weight, dx, parts, A, C, B, each, want_dx);                                    \
    }                                                                                                                  \
    extern "C" __global__ void prelu_backward_channels_##NAME(const T* dy, const T* x, const T* weight, T* dx,         \
                                                              float* parts, int64 A, int64 C, int64 each,              \
                                                              bool want_dx) {                                          \
        prelu_backward_channels<V>(dy, x, weight, dx, parts, A, C, each, want_dx);                                     \
    }                                                                                                                  \
    extern "C" __global__ void glu_forward_##NAME(const T* x, T* y, int64 size, int64 N) {                             \
        glu_forward<V>(x, y, size, N);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void glu_backward_##NAME(const T* dy, const T* x, T* dx, int64 size, int64 N) {              \
        glu_backward<V>(dy, x, dx, size, N);                                                                           \
    }
#define RRELU(T, NAME)                                                                                                 \
    extern "C" __global__ void rrelu_##NAME##_packs(const T* dy, const T* x, const int64* seed, T* out, int64 size,    \
                                                    float lower, float upper, bool drawn) {                            \
        rrelu_packs(dy, x, seed, out, size, {lower, upper, drawn});                                                    \
    }                                                                                                                  \
    extern "C" __global__ void rrelu_##NAME##_single(const T* dy, const T* x, const int64* seed, T* out, int64 size,   \
                                                     float lower, float upper, bool drawn, int64 n1, int64 n2,         \
                                                     int64 step0, int64 step1, int64 step2) {                          \
        rrelu_single(dy, x, seed, out, size, n1, n2, step0, step1, step2, {lower, upper, drawn});                      \
    }
#define EACH(T, NAME) KERNELS(T, NAME##_packs, 16 / sizeof(T)) KERNELS(T, NAME##_single, 1) RRELU(T, NAME) ADD_UP(T, NAME)
EACH(float, float32)
EACH(float16, float16)
EACH(bfloat16, bfloat16)
