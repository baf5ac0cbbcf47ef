// The time loop of an LSTM, GRU or RNN as one cooperative launch, forward and backward.
//
// A block owns `units` hidden units and keeps their slice of the weights in shared memory through all steps. Each step it
// multiplies the state of the step before (from L2) by the slice and finishes its units. Backward is the same with rows of
// Wᵀ and with dz for the state. float32 runs on FMA, 16 bits on tensor cores with float32 sums; the order of all sums is
// fixed. How a block knows that the state is there, two ways with the same bits:
// - a grid barrier a step (fence, counter, poll, read: three trips to L2), or
// - by data: y (backward: dz) is filled with 0xff before the launch, each element is written once and never with that NaN,
//   and whoever reads it reads until it is something else (one trip and a half).

#include "_common.cuh"
#include "_blocks.cuh"
#include "_mma.cuh"

constexpr int WARPS = 8;                      // they share the sum over k
constexpr int BATCH = 16, ROWS = 32;          // the tile of a pass: batch x rows of the slice
using Parts = float[WARPS][BATCH][ROWS + 1];  // each warp's share of the tile
enum Mode { LSTM, GRU, RNN_TANH, RNN_RELU };
enum Flag { BY_DATA = 1, REVERSE = 2, HAS_BIAS = 4, HAS_LENGTHS = 8, SAVES = 16, HAS_DY = 32, HAS_DH = 64, HAS_DC = 128 };

struct Sizes {
    int steps, batch, hidden, units, mode, flags;
    __device__ int gates() const { return mode == LSTM ? 4 : mode == GRU ? 3 : 1; }
    __device__ bool has(int flag) const { return flags & flag; }
    __device__ int step(int i) const { return has(REVERSE) ? steps - 1 - i : i; }  // the i-th that is computed
};

// Stores what other blocks wait for; a NaN is never all ones.
template <class T> __device__ void publish(T* p, T x, bool by_data) {
    float v = to_acc(x);
    if (by_data) store_strong(p, v == v ? x : from_acc<T>(__uint_as_float(0x7fc00000)));
    else *p = x;
}
__device__ inline bool unwritten(float x) { return __float_as_uint(x) == ~0u; }
template <class T> __device__ bool unwritten(T x) { return x.bits == 0xffff; }

// --- One tile: parts[warp][b][r] = the warp's share of Σ_k x[b, k] w[r, k] -----------------------------------------------

template <class T> __device__ int row_stride(int n) {  // of w in shared memory: no bank conflicts between rows
    int whole = (n + 31) / 32 * 32;
    return sizeof(T) == 4 ? whole + 4 : whole + (whole % 64 ? 0 : 32);
}

// How a warp takes STEP of k: a lane's j-th pack of x is at row xb(j), offset xk(j); its j-th sum of 8 rows is (b(j), r(j)).
// A pack is eight k of one row, of x and of w alike, so which k a position of the mma stands for doesn't matter.
template <class T> struct Tile {
    static constexpr int STEP = 32, LOADS = 2;
    static __device__ int lane() { return threadIdx.x % 32; }
    static __device__ int xb(int j) { return lane() / 4 + 8 * j; }
    static __device__ int xk(int) { return lane() % 4 * 8; }
    static __device__ int b(int j) { return lane() / 4 + 8 * (j / 2); }
    static __device__ int r(int j) { return lane() % 4 * 2 + j % 2; }
    static __device__ void add(float (&sums)[4], const Pack<T> (&x)[LOADS], const T* w, int stride) {
        unsigned a[2][4], v[4];
        memcpy(a, x, sizeof a);
        Pack<T> pack = load_pack(w + lane() / 4 * stride + xk(0));
        memcpy(v, &pack, sizeof v);
        mma(sums, {a[0][0], a[1][0], a[0][1], a[1][1]}, v, T{});
        mma(sums, {a[0][2], a[1][2], a[0][3], a[1][3]}, v + 2, T{});
    }
};
template <> struct Tile<float> {
    static constexpr int STEP = 8, LOADS = 8;
    static __device__ int lane() { return threadIdx.x % 32; }
    static __device__ int xb(int j) { return lane() / 8 * 4 + j % 4; }
    static __device__ int xk(int j) { return j / 4 * 4; }
    static __device__ int b(int j) { return xb(j); }
    static __device__ int r(int) { return lane() % 8; }
    static __device__ void add(float (&sums)[4], const Pack<float> (&x)[LOADS], const float* w, int stride) {
        #pragma unroll
        for (int j = 0; j < LOADS; ++j) {
            Pack<float> v = load_pack(w + r(0) * stride + xk(j));
            #pragma unroll
            for (int e = 0; e < 4; ++e) sums[j % 4] += x[j].items[e] * v.items[e];
        }
    }
};

// x: (batch, n). All threads of the block; the tile is complete after it. wait: other blocks are writing x now.
template <class T>
__device__ void multiply(Parts& parts, const T* x, const T* w, int stride, int b0, int batch, int n, int rows, bool wait) {
    constexpr int N = pack_size<T>, LOADS = Tile<T>::LOADS, GROUP = 8 / LOADS, EACH = WARPS * Tile<T>::STEP;
    int warp = threadIdx.x / 32;
    float sums[ROWS / 8][4] = {};
    for (int k0 = warp * Tile<T>::STEP; k0 < n; k0 += GROUP * EACH) {
        Pack<T> state[GROUP][LOADS] = {};
        bool again;
        do {  // all loads are under way before the first is looked at
            again = false;
            #pragma unroll
            for (int i = 0; i < 8; ++i) {
                int b = b0 + Tile<T>::xb(i % LOADS), k = k0 + i / LOADS * EACH + Tile<T>::xk(i % LOADS);
                if (b >= batch || k >= n) continue;
                const T* from = x + (int64)b * n + k;
                Pack<T>& pack = state[i / LOADS][i % LOADS];
                if (n % N == 0) pack = load_strong((const Pack<T>*)from);
                else for (int e = 0; e < N && k + e < n; ++e) pack.items[e] = load_strong(from + e);
            }
            if (wait)
                #pragma unroll
                for (int i = 0; i < 8 * N; ++i) again |= unwritten(state[i / N / LOADS][i / N % LOADS].items[i % N]);
        } while (again);
        __syncwarp();
        #pragma unroll
        for (int s = 0; s < GROUP; ++s)
            #pragma unroll
            for (int i = 0; i < ROWS / 8; ++i)
                if (8 * i < rows && k0 + s * EACH < n) Tile<T>::add(sums[i], state[s], w + 8 * i * stride + k0 + s * EACH, stride);
    }
    #pragma unroll
    for (int i = 0; i < ROWS / 2; ++i)
        if (i / 4 * 8 < rows) parts[warp][Tile<T>::b(i % 4)][i / 4 * 8 + Tile<T>::r(i % 4)] = sums[i / 4][i % 4];
    __syncthreads();
}
__device__ inline float add_parts(const Parts& parts, int b, int r) {
    float sum = 0;
    for (int warp = 0; warp < WARPS; ++warp) sum += parts[warp][b][r];
    return sum;
}

// w[r, k] = at(r, k); zeros where there is no such weight.
template <class T, class F> __device__ void fill(T* w, int rows, int n, F at) {
    int stride = row_stride<T>(n);
    for (int i = threadIdx.x; i < (rows + 7) / 8 * 8 * stride; i += blockDim.x)
        w[i] = i / stride < rows && i % stride < n ? at(i / stride, i % stride) : from_acc<T>(0);
    __syncthreads();
}
__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// --- The two loops -----------------------------------------------------------------------------------------------------

// x (steps, batch, gates H); y (steps, batch, H). Saved: gates (steps, batch, 4 H), after activation, and an LSTM's cells
// (steps, batch, H); not saved, cells are of one step.
template <class T>
__device__ void forward(const T* x, const T* weight, const T* bias, const T* h0, const T* c0, const int64* lengths, T* y, T* gates,
                        float* cells, T* h_n, T* c_n, unsigned* arrived, Sizes s, T* w) {
    __shared__ Parts parts;
    bool by_data = s.has(BY_DATA), saves = s.has(SAVES);
    unsigned phase = 0;
    int hidden = s.hidden, first = blockIdx.x * s.units, stride = row_stride<T>(hidden), G = s.gates();
    int64 size = (int64)s.batch * hidden;
    int units = min(s.units, hidden - first), each = G == 1 ? 16 : 8;  // units of a pass
    fill(w, G * units, hidden, [&](int r, int k) { return weight[((int64)(r % G) * hidden + first + r / G) * hidden + k]; });
    for (int step = 0; step < s.steps; ++step) {
        int t = s.step(step), earlier = step ? s.step(step - 1) : 0;
        const T* before = step ? y + earlier * size : h0;
        for (int b0 = 0; b0 < s.batch; b0 += BATCH)
            for (int u0 = 0; u0 < units; u0 += each) {  // rows: G unit + gate
                int b = threadIdx.x / each, u = threadIdx.x % each;
                bool mine = b < BATCH && b0 + b < s.batch && u0 + u < units;
                int64 at = (int64)(b0 + b) * hidden + first + u0 + u;
                int64 of_x = G * t * size + at + (G - 1) * (int64)(b0 + b) * hidden;
                float a[4], z[4] = {}, c = 0;
                if (mine) {  // what needs no other block is under way before the product; the next step's comes to L2
                    #pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (i >= G) continue;
                        a[i] = to_acc(x[of_x + (int64)i * hidden]);
                        if (s.has(HAS_BIAS)) z[i] = to_acc(bias[i * hidden + first + u0 + u]);
                        if (step + 1 < s.steps) prefetch(x + of_x + G * (s.step(step + 1) - t) * size + (int64)i * hidden);
                    }
                    if (s.mode == LSTM) c = step ? cells[(saves ? earlier * size : 0) + at] : to_acc(c0[at]);
                }
                multiply(parts, before, w + G * u0 * stride, stride, b0, s.batch, hidden, G * min(each, units - u0), by_data && step);
                if (mine) {
                    #pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (i < G) z[i] += add_parts(parts, b, G * u + i);
                    bool there = !s.has(HAS_LENGTHS) || lengths[b0 + b] > t;
                    T held = before[at];  // this block's own, or h0
                    float h = to_acc(held), carried = c, kept[4] = {};
                    if (s.mode == LSTM) {
                        #pragma unroll
                        for (int i = 0; i < 4; ++i) kept[i] = i == 2 ? tanhf(a[i] + z[i]) : sigmoid(a[i] + z[i]);
                        c = kept[1] * c + kept[0] * kept[2];
                        h = kept[3] * tanhf(c);
                    } else if (s.mode == GRU) {
                        kept[0] = sigmoid(a[0] + z[0]), kept[1] = sigmoid(a[1] + z[1]), kept[3] = z[2];
                        kept[2] = tanhf(a[2] + kept[0] * z[2]);
                        h = kept[2] + kept[1] * (h - kept[2]);
                    } else {
                        h = a[0] + z[0];
                        h = s.mode == RNN_TANH ? tanhf(h) : h <= 0 ? 0 : h;
                    }
                    T now = there ? from_acc<T>(h) : held;
                    publish(y + t * size + at, now, by_data);  // first: the others wait for it
                    c = there ? c : carried;
                    if (s.mode == LSTM) cells[(saves ? t * size : 0) + at] = c;
                    if (saves && G > 1)
                        #pragma unroll
                        for (int i = 0; i < 4; ++i) gates[4 * t * size + at + (3 * (int64)(b0 + b) + i) * hidden] = from_acc<T>(kept[i]);
                    if (step + 1 == s.steps) {
                        h_n[at] = now;
                        if (s.mode == LSTM) c_n[at] = from_acc<T>(c);
                    }
                }
                __syncthreads();  // the next tile writes `parts` again
            }
        if (!by_data && step + 1 < s.steps) grid_barrier(arrived, phase);
    }
}

// What one unit of one sequence gives at a step: dz and, of a GRU, dx; what goes on in dc and directly.
template <class T> struct Gradient {
    T dx[3] = {}, dz[4] = {};
    float direct = 0;
};
template <class T>
__device__ Gradient<T> cell_gradient(int mode, float dh, float& dc, float y, const float (&a)[4], float h, float c, float before) {
    Gradient<T> found;
    if (mode == LSTM) {
        float tanh_c = tanhf(c), d = dh * a[3] * (1 - tanh_c * tanh_c) + dc;
        found.dz[0] = from_acc<T>(d * a[2] * a[0] * (1 - a[0]));
        found.dz[1] = from_acc<T>(d * before * a[1] * (1 - a[1]));
        found.dz[2] = from_acc<T>(d * a[0] * (1 - a[2] * a[2]));
        found.dz[3] = from_acc<T>(dh * tanh_c * a[3] * (1 - a[3]));
        dc = d * a[1];
    } else if (mode == GRU) {
        float d = dh * (1 - a[1]) * (1 - a[2] * a[2]);
        found.dz[0] = found.dx[0] = from_acc<T>(d * a[3] * a[0] * (1 - a[0]));
        found.dz[1] = found.dx[1] = from_acc<T>(dh * (h - a[2]) * a[1] * (1 - a[1]));
        found.dz[2] = from_acc<T>(d * a[0]), found.dx[2] = from_acc<T>(d);
        found.direct = dh * a[1];
    } else {
        found.dz[0] = from_acc<T>(mode == RNN_TANH ? dh * (1 - y * y) : y > 0 ? dh : 0);
    }
    return found;
}

// dz (steps, batch, gates H) is dx, but of a GRU. carry, dc (batch, H): room of float32. dW and db are made of dz afterwards.
template <class T>
__device__ void backward(const T* dy, const T* dh_n, const T* dc_n, const T* weight, const T* y, const T* gates, const float* cells,
                         const T* h0, const T* c0, const int64* lengths, T* dx, T* dz, T* dh0, T* dc0, float* carry, float* dc,
                         unsigned* arrived, Sizes s, T* w) {
    __shared__ Parts parts;
    bool by_data = s.has(BY_DATA);
    unsigned phase = 0;
    int hidden = s.hidden, first = blockIdx.x * s.units, G = s.gates(), n = G * hidden, stride = row_stride<T>(n);
    int64 size = (int64)s.batch * hidden;
    int units = min(s.units, hidden - first);
    fill(w, units, n, [&](int r, int k) { return weight[(int64)k * hidden + first + r]; });
    for (int step = s.steps - 1; step >= -1; --step) {  // at -1 only dh0 is left
        bool last = step + 1 == s.steps;
        int t = s.step(step < 0 ? 0 : step), after = last ? 0 : s.step(step + 1), earlier = step > 0 ? s.step(step - 1) : 0;
        for (int b0 = 0; b0 < s.batch; b0 += BATCH)
            for (int u0 = 0; u0 < units; u0 += ROWS) {
                if (!last) multiply(parts, dz + G * after * size, w + u0 * stride, stride, b0, s.batch, n, min(ROWS, units - u0), by_data);
                for (int item = threadIdx.x; item < BATCH * ROWS; item += blockDim.x) {
                    int b = item / ROWS, u = item % ROWS;
                    if (b0 + b >= s.batch || u0 + u >= units) continue;
                    int64 at = (int64)(b0 + b) * hidden + first + u0 + u, now = t * size + at, row = (int64)(b0 + b) * hidden;
                    float dh = last ? (s.has(HAS_DH) ? to_acc(dh_n[at]) : 0) : add_parts(parts, b, u) + carry[at];
                    if (step < 0) {
                        dh0[at] = from_acc<T>(dh);
                        continue;
                    }
                    if (s.has(HAS_DY)) dh += to_acc(dy[now]);
                    float a[4] = {}, h = to_acc(step ? y[earlier * size + at] : h0[at]), c = 0, before = 0, d = 0;
                    #pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (G > 1) a[i] = to_acc(gates[4 * t * size + at + 3 * row + (int64)i * hidden]);
                    if (s.mode == LSTM) {
                        c = cells[now], before = step ? cells[earlier * size + at] : to_acc(c0[at]);
                        d = last ? (s.has(HAS_DC) ? to_acc(dc_n[at]) : 0) : dc[at];
                    }
                    bool there = !s.has(HAS_LENGTHS) || lengths[b0 + b] > t;
                    float d_after = d;
                    Gradient<T> g = cell_gradient<T>(s.mode, dh, d, to_acc(y[now]), a, h, c, before);
                    T zero = from_acc<T>(0);
                    int64 to = G * t * size + at + (G - 1) * row;
                    #pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (i >= G) continue;
                        publish(dz + to + (int64)i * hidden, there ? g.dz[i] : zero, by_data);
                        if (s.mode == GRU && i < 3) dx[to + (int64)i * hidden] = there ? g.dx[i] : zero;
                    }
                    carry[at] = there ? g.direct : dh;
                    if (s.mode == LSTM) dc[at] = d = there ? d : d_after;
                    if (s.mode == LSTM && !step) dc0[at] = from_acc<T>(d);
                    if (step && s.has(HAS_DY)) prefetch(dy + earlier * size + at);
                    for (int i = 0; i < 4 && step && G > 1; ++i) prefetch(gates + 4 * earlier * size + at + 3 * row + (int64)i * hidden);
                }
                __syncthreads();
            }
        if (!by_data && step >= 0) grid_barrier(arrived, phase);
    }
}

#define LOOPS(T, NAME)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) recurrent_forward_##NAME(                                         \
        const T* x, const T* weight, const T* bias, const T* h0, const T* c0, const int64* lengths, T* y, T* gates,            \
        float* cells, T* h_n, T* c_n, unsigned* arrived, int steps, int batch, int hidden, int units, int mode, int flags) {   \
        extern __shared__ __align__(16) unsigned char slice[];                                                                 \
        forward<T>(x, weight, bias, h0, c0, lengths, y, gates, cells, h_n, c_n, arrived,                                       \
                   {steps, batch, hidden, units, mode, flags}, (T*)slice);                                                     \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) recurrent_backward_##NAME(                                        \
        const T* dy, const T* dh_n, const T* dc_n, const T* weight, const T* y, const T* gates, const float* cells,            \
        const T* h0, const T* c0, const int64* lengths, T* dx, T* dz, T* dh0, T* dc0, float* carry, float* dc,                 \
        unsigned* arrived, int steps, int batch, int hidden, int units, int mode, int flags) {                                 \
        extern __shared__ __align__(16) unsigned char slice[];                                                                 \
        backward<T>(dy, dh_n, dc_n, weight, y, gates, cells, h0, c0, lengths, dx, dz, dh0, dc0, carry, dc, arrived,            \
                    {steps, batch, hidden, units, mode, flags}, (T*)slice);                                                    \
    }
// What a loop waits for, before it: every byte of an array 0xff, and the counter of barriers 0.
extern "C" __global__ void recurrent_begin(unsigned char* bytes, unsigned* arrived, int64 n, int by_data) {
    if (thread_index() == 0) *arrived = 0;
    for (int64 i = thread_index() * 16; i < n && by_data; i += thread_count() * 16) {
        if (i + 16 <= n) {
            Pack<unsigned> ones = {{~0u, ~0u, ~0u, ~0u}};
            store_pack((unsigned*)(bytes + i), ones);
        } else {
            for (int64 k = i; k < n; ++k) bytes[k] = 0xff;
        }
    }
}

// --- dW = Σ dzᵀ h before, over all steps and the batch; db = Σ dz ----------------------------------------------------------

constexpr int SIDE = 64, DEEP = 32;  // the tile of an output, and how much of the sum is in shared memory at a time

// to[k][j] = the matrix's row k0 + k, column j0 + j; zeros outside.
template <class T, class F> __device__ void stage(T (&to)[DEEP][SIDE + 8], int64 k0, int64 rows, int j0, int columns, F row) {
    int64 k = k0 + threadIdx.x / 8;
    int j = threadIdx.x % 8 * 8;
    const T* from = k < rows ? row(k) : nullptr;
    for (int e = 0; e < 8; e += pack_size<T>) {
        Pack<T> pack;
        bool whole = columns % pack_size<T> == 0 && k < rows && j0 + j + e < columns;
        if (whole) pack = load_pack(from + j0 + j + e);
        else
            for (int i = 0; i < pack_size<T>; ++i)
                pack.items[i] = k < rows && j0 + j + e + i < columns ? from[j0 + j + e + i] : from_acc<T>(0);
        for (int i = 0; i < pack_size<T>; ++i) to[threadIdx.x / 8][j + e + i] = pack.items[i];
    }
}
// A warp's 16 rows of the tile, 32 columns; or a thread's 4 x 4 of float32.
template <class T> __device__ void add_products(float (&sums)[16], const T (&a)[DEEP][SIDE + 8], const T (&b)[DEEP][SIDE + 8]) {
    if constexpr (sizeof(T) == 4) {
        int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16 * 4;
        for (int k = 0; k < DEEP; ++k)
            #pragma unroll
            for (int i = 0; i < 16; ++i) sums[i] += a[k][m + i / 4] * b[k][n + i % 4];
    } else {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = warp / 2 * 16 + lane / 4, n = warp % 2 * 32 + lane / 4;
        auto pair = [](const T(&x)[DEEP][SIDE + 8], int k, int j) { return x[k][j].bits | (unsigned)x[k + 1][j].bits << 16; };
        #pragma unroll
        for (int k = lane % 4 * 2; k < DEEP; k += 16) {
            unsigned of_a[4] = {pair(a, k, m), pair(a, k, m + 8), pair(a, k + 8, m), pair(a, k + 8, m + 8)};
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                unsigned of_b[2] = {pair(b, k, n + 8 * i), pair(b, k + 8, n + 8 * i)};
                mma(*(float(*)[4])(sums + 4 * i), of_a, of_b, T{});
            }
        }
    }
}
// dz (steps · batch, M), y and h0 rows of N, out (M, N).
template <class T>
__device__ void weights(const T* dz, const T* y, const T* h0, T* out, int64 rows, int batch, int M, int N, bool reverse) {
    __shared__ T a[DEEP][SIDE + 8], b[DEEP][SIDE + 8];
    int m0 = blockIdx.y * SIDE, n0 = blockIdx.x * SIDE;
    float sums[16] = {};
    auto before = [&](int64 k) {  // the state before row k's step
        int64 from = reverse ? k + batch : k - batch;
        return from < 0 ? h0 + k * N : from >= rows ? h0 + (from - rows) * N : y + from * N;
    };
    for (int64 k = 0; k < rows; k += DEEP) {
        stage(a, k, rows, m0, M, [&](int64 row) { return dz + row * M; });
        stage(b, k, rows, n0, N, before);
        __syncthreads();
        add_products(sums, a, b);
        __syncthreads();
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 16; ++i) {
        int m = m0 + (sizeof(T) == 4 ? threadIdx.x / 16 * 4 + i / 4 : warp / 2 * 16 + lane / 4 + i % 4 / 2 * 8);
        int n = n0 + (sizeof(T) == 4 ? threadIdx.x % 16 * 4 + i % 4 : warp % 2 * 32 + i / 4 * 8 + lane % 4 * 2 + i % 2);
        if (m < M && n < N) out[(int64)m * N + n] = from_acc<T>(sums[i]);
    }
}
// A block has 32 columns of dz; 8 threads share each, then add up in order.
template <class T> __device__ void biases(const T* dz, T* out, int64 rows, int n) {
    __shared__ float parts[8][33];
    int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (column < n)
        for (int64 row = threadIdx.y; row < rows; row += 8) sum += to_acc(dz[row * n + column]);
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= n) return;
    for (int k = 1; k < 8; ++k) sum += parts[k][threadIdx.x];
    out[column] = from_acc<T>(sum);
}
#define OF_ALL_STEPS(T, NAME)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) recurrent_weights_##NAME(                                  \
        const T* dz, const T* y, const T* h0, T* out, int64 rows, int batch, int M, int N, bool reverse) {       \
        weights<T>(dz, y, h0, out, rows, batch, M, N, reverse);                                                  \
    }                                                                                                            \
    extern "C" __global__ void recurrent_biases_##NAME(const T* dz, T* out, int64 rows, int n) {                 \
        biases<T>(dz, out, rows, n);                                                                             \
    }
using float32 = float;
#define OF_DTYPE(T) LOOPS(T, T) OF_ALL_STEPS(T, T)

#ifdef ONLY  // one dtype compiles in a third of the time
OF_DTYPE(ONLY)
#else
OF_DTYPE(float32)
OF_DTYPE(float16)
OF_DTYPE(bfloat16)
#endif
