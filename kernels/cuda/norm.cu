// Serves CUDA arrays where Triton, or torch, which Triton's launches need, is not installed: CuPy's arrays, then. Where both
// are, Triton's kernels are faster and stand first.
//
// Layer norm. A block has a row; its threads move packs of V elements (16 bytes where rows are aligned, else one).
//
// Backward runs as many blocks as keep the GPU busy, each over many rows: a thread owns its columns, so the block's share
// of Σ dy x̂ and Σ dy needs no barrier, and a second kernel adds the shares in a fixed order.

#include "_common.cuh"

// f(i) for the first column of each pack of this thread.
template <int V, class F> __device__ void for_each_pack(int64 n, F f) {
    for (int64 i = (int64)threadIdx.x * V; i < n; i += (int64)blockDim.x * V) f(i);
}

// T: x and y. W: weight and bias. `cached`: the row fits in shared memory; otherwise it is read again, from L2.
template <class T, class W, int V>
__device__ void forward(
    const T* x, const W* weight, const W* bias, T* y, float* mean, float* rstd, int64 n, float eps, bool weighted,
    bool biased, bool save, bool cached, float* row) {
    x += blockIdx.x * n;
    y += blockIdx.x * n;
    float sum = 0;
    for_each_pack<V>(n, [&](int64 i) {
        Pack<T, V> pack = load_pack<T, V>(x + i);
        #pragma unroll
        for (int k = 0; k < V; ++k) {
            float v = to_acc(pack.items[k]);
            if (cached) row[i + k] = v;  // read by this thread only
            sum += v;
        }
    });
    int64 count = n ? n : 1;  // a row of nothing has mean 0
    float m = block_sum(sum) / count;
    auto centred = [&](int64 i, float (&d)[V]) {
        if (cached) {
            #pragma unroll
            for (int k = 0; k < V; ++k) d[k] = row[i + k] - m;
            return;
        }
        Pack<T, V> pack = load_pack<T, V>(x + i);
        #pragma unroll
        for (int k = 0; k < V; ++k) d[k] = to_acc(pack.items[k]) - m;
    };
    float square = 0;
    for_each_pack<V>(n, [&](int64 i) {
        float d[V];
        centred(i, d);
        #pragma unroll
        for (int k = 0; k < V; ++k) square += d[k] * d[k];
    });
    float r = 1 / sqrtf(block_sum(square) / count + eps);
    for_each_pack<V>(n, [&](int64 i) {
        float d[V];
        centred(i, d);
        #pragma unroll
        for (int k = 0; k < V; ++k) d[k] *= r;
        if (weighted) {
            Pack<W, V> w = load_pack<W, V>(weight + i);
            #pragma unroll
            for (int k = 0; k < V; ++k) d[k] *= to_acc(w.items[k]);
        }
        if (biased) {
            Pack<W, V> b = load_pack<W, V>(bias + i);
            #pragma unroll
            for (int k = 0; k < V; ++k) d[k] += to_acc(b.items[k]);
        }
        Pack<T, V> out;
        #pragma unroll
        for (int k = 0; k < V; ++k) out.items[k] = from_acc<T>(d[k]);
        store_pack(y + i, out);
    });
    if (save && threadIdx.x == 0) {
        mean[blockIdx.x] = m;
        rstd[blockIdx.x] = r;
    }
}

// dweights and dbiases hold one row of partial sums for each block; they are wanted where `sum_w`, `sum_b`.
template <class T, class W, int V>
__device__ void backward(
    const T* dy, const T* x, const W* weight, const float* mean, const float* rstd, T* dx, float* dweights,
    float* dbiases, int64 rows, int64 n, bool weighted, bool want_dx, bool sum_w, bool sum_b) {
    dweights += blockIdx.x * n;
    dbiases += blockIdx.x * n;
    bool first = true;
    for (int64 row = blockIdx.x; row < rows; row += gridDim.x, first = false) {
        const T *in = x + row * n, *grad = dy + row * n;
        float m = mean[row], r = rstd[row], sum = 0, dot = 0;
        for_each_pack<V>(n, [&](int64 i) {
            Pack<T, V> px = load_pack<T, V>(in + i), pg = load_pack<T, V>(grad + i);
            Pack<W, V> pw;
            if (weighted) pw = load_pack<W, V>(weight + i);
            Pack<float, V> dw, db;
            if (sum_w && !first) dw = load_pack<float, V>(dweights + i);
            if (sum_b && !first) db = load_pack<float, V>(dbiases + i);
            #pragma unroll
            for (int k = 0; k < V; ++k) {
                float g = to_acc(pg.items[k]), xhat = (to_acc(px.items[k]) - m) * r;
                dw.items[k] = (first || !sum_w ? 0 : dw.items[k]) + g * xhat;
                db.items[k] = (first || !sum_b ? 0 : db.items[k]) + g;
                if (weighted) g = __fmul_rn(g, to_acc(pw.items[k]));  // the same number here and below: a row of 1 has dx 0
                sum += g;
                dot += g * xhat;
            }
            if (sum_w) store_pack(dweights + i, dw);
            if (sum_b) store_pack(dbiases + i, db);
        });
        if (!want_dx) continue;
        sum = block_sum(sum) / n;
        dot = block_sum(dot) / n;
        for_each_pack<V>(n, [&](int64 i) {  // x and dy come from L1 or L2 now
            Pack<T, V> px = load_pack<T, V>(in + i), pg = load_pack<T, V>(grad + i), out;
            Pack<W, V> pw;
            if (weighted) pw = load_pack<W, V>(weight + i);
            #pragma unroll
            for (int k = 0; k < V; ++k) {
                float g = to_acc(pg.items[k]), xhat = (to_acc(px.items[k]) - m) * r;
                if (weighted) g = __fmul_rn(g, to_acc(pw.items[k]));
                out.items[k] = from_acc<T>(r * (g - sum - xhat * dot));
            }
            store_pack(dx + row * n + i, out);
        });
    }
}

#define LAYER_NORM(T, W, NAME, V)                                                                                      \
    extern "C" __global__ void layer_norm_forward_##NAME(                                                              \
        const T* x, const W* weight, const W* bias, T* y, float* mean, float* rstd, int64 n, float eps, bool weighted, \
        bool biased, bool save, bool cached) {                                                                         \
        extern __shared__ __align__(16) float cache[];                                                                 \
        forward<T, W, V>(x, weight, bias, y, mean, rstd, n, eps, weighted, biased, save, cached, cache);               \
    }                                                                                                                  \
    extern "C" __global__ void layer_norm_backward_##NAME(                                                             \
        const T* dy, const T* x, const W* weight, const float* mean, const float* rstd, T* dx, float* dweights,        \
        float* dbiases, int64 rows, int64 n, bool weighted, bool want_dx, bool sum_w, bool sum_b) {                    \
        backward<T, W, V>(                                                                                             \
            dy, x, weight, mean, rstd, dx, dweights, dbiases, rows, n, weighted, want_dx, sum_w, sum_b);               \
    }
LAYER_NORM(float, float, float32_float32_packs, 4)
LAYER_NORM(float, float, float32_float32_items, 1)
LAYER_NORM(float16, float16, float16_float16_packs, 8)
LAYER_NORM(float16, float16, float16_float16_items, 1)
LAYER_NORM(float16, float, float16_float32_packs, 8)
LAYER_NORM(float16, float, float16_float32_items, 1)
LAYER_NORM(bfloat16, bfloat16, bfloat16_bfloat16_packs, 8)
LAYER_NORM(bfloat16, bfloat16, bfloat16_bfloat16_items, 1)
LAYER_NORM(bfloat16, float, bfloat16_float32_packs, 8)
LAYER_NORM(bfloat16, float, bfloat16_float32_items, 1)

ADD_UP(float, float32)
ADD_UP(float16, float16)
ADD_UP(bfloat16, bfloat16)
