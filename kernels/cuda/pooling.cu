// Serves CUDA arrays where Triton, or torch, which Triton's launches need, is not installed: CuPy's arrays, then. Where both
// are, Triton's kernels are faster and stand first.
//
// Pooling. In NHWC a thread makes a pack of 16 bytes of neighbouring channels, in NCHW one pixel; so the accesses of a warp
// join in either order, and windows that overlap meet in the L1 cache. Inputs of any strides are read as they are.
//
// Backward gathers: each pixel of x looks up the windows it lies under, so nothing is added to in turn.

#include "_common.cuh"

// What is walked: every element of the result; `other` is the image that it is made from.
struct Walk {
    int64 images;
    int channels, height, width, other_height, other_width;
    int64 in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w;
};
#define WALK                                                                                                       \
    int64 images, int channels, int height, int width, int other_height, int other_width, int64 in_n, int64 in_c, \
        int64 in_h, int64 in_w, int64 out_n, int64 out_c, int64 out_h, int64 out_w
#define WALK_OF \
    { images, channels, height, width, other_height, other_width, in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w }

struct Window {
    int kh, kw, sh, sw, top, left, dh, dw;
};
#define WINDOW int kh, int kw, int sh, int sw, int top, int left, int dh, int dw
#define WINDOW_OF \
    { kh, kw, sh, sw, top, left, dh, dw }

// make(image, first channel, row, column) for each pack of V channels of the result, or for each of its pixels where
// PIXELS are neighbours in memory. Threads run along what is neighbouring; images (or planes) along the grid's y.
template <bool PIXELS, int V, class F> __device__ void for_each(const Walk& walk, F make) {
    int packs = walk.channels / V;
    int64 outers = PIXELS ? walk.images * walk.channels : walk.images;
    int inner = PIXELS ? walk.height * walk.width : walk.height * walk.width * packs;
    for (int64 o = (int64)blockIdx.y * blockDim.y + threadIdx.y; o < outers; o += (int64)gridDim.y * blockDim.y) {
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < inner; i += gridDim.x * blockDim.x) {
            int pixel = PIXELS ? i : i / packs;
            int64 n = PIXELS ? o / walk.channels : o;
            int c = PIXELS ? (int)(o - n * walk.channels) : (i - pixel * packs) * V;
            int row = pixel / walk.width;
            make(n, c, row, pixel - row * walk.width);
        }
    }
}

// --- max_pool ------------------------------------------------------------------------------------------------------

template <class T, class I, bool PIXELS, int V>
__device__ void max_forward(const T* x, T* y, I* tap, int64* indices, bool save, bool indexed, Walk walk, Window win) {
    for_each<PIXELS, V>(walk, [&](int64 n, int c, int i, int j) {
        const T* in = x + n * walk.in_n + c * walk.in_c;
        acc_t<T> best[V];
        int won[V];
        for (int k = 0; k < V; ++k) best[k] = -1.0f / 0.0f, won[k] = -1;
        for (int r = 0; r < win.kh; ++r) {
            int h = i * win.sh - win.top + r * win.dh;
            if (h < 0 || h >= walk.other_height) continue;
            for (int q = 0; q < win.kw; ++q) {
                int w = j * win.sw - win.left + q * win.dw;
                if (w < 0 || w >= walk.other_width) continue;
                Pack<T, V> pack = load_pack<T, V>(in + h * walk.in_h + w * walk.in_w);
                #pragma unroll
                for (int k = 0; k < V; ++k) {
                    acc_t<T> v = to_acc(pack.items[k]);
                    if (v > best[k] || v != v || won[k] < 0) best[k] = v, won[k] = r * win.kw + q;
                }
            }
        }
        Pack<T, V> out;
        Pack<I, V> which;
        #pragma unroll
        for (int k = 0; k < V; ++k) out.items[k] = from_acc<T>(best[k]), which.items[k] = (I)won[k];
        int64 at = n * walk.out_n + c * walk.out_c + i * walk.out_h + j * walk.out_w;
        store_pack(y + at, out);
        if (save) store_pack(tap + at, which);
        if (!indexed) return;
        constexpr int PAIR = V < 2 ? V : 2;  // 16 bytes
        #pragma unroll
        for (int k = 0; k < V; k += PAIR) {
            Pack<int64, PAIR> places;
            #pragma unroll
            for (int l = 0; l < PAIR; ++l) {
                int t = won[k + l];
                int h = i * win.sh - win.top + t / win.kw * win.dh, w = j * win.sw - win.left + t % win.kw * win.dw;
                places.items[l] = t < 0 ? -1 : (int64)h * walk.other_width + w;
            }
            store_pack(indices + at + k, places);
        }
    });
}

template <class T, class I, bool PIXELS, int V>
__device__ void max_backward(const T* dy, const I* tap, T* dx, int64 tap_n, int64 tap_c, int64 tap_h, int64 tap_w,
                             Walk walk, Window win) {
    for_each<PIXELS, V>(walk, [&](int64 n, int c, int h, int w) {
        const T* g = dy + n * walk.in_n + c * walk.in_c;
        const I* won = tap + n * tap_n + c * tap_c;
        acc_t<T> sum[V];
        for (int k = 0; k < V; ++k) sum[k] = 0;
        h += win.top, w += win.left;
        int reach_h = win.dh * (win.kh - 1), reach_w = win.dw * (win.kw - 1);
        for (int i = h / win.sh; i >= 0 && h - i * win.sh <= reach_h; --i) {
            int down = h - i * win.sh;
            if (i >= walk.other_height || down % win.dh) continue;
            for (int j = w / win.sw; j >= 0 && w - j * win.sw <= reach_w; --j) {
                int right = w - j * win.sw;
                if (j >= walk.other_width || right % win.dw) continue;
                int wanted = down / win.dh * win.kw + right / win.dw;
                Pack<I, V> which = load_pack<I, V>(won + i * tap_h + j * tap_w);
                Pack<T, V> pack = load_pack<T, V>(g + i * walk.in_h + j * walk.in_w);
                #pragma unroll
                for (int k = 0; k < V; ++k) sum[k] += which.items[k] == wanted ? to_acc(pack.items[k]) : 0;
            }
        }
        Pack<T, V> out;
        #pragma unroll
        for (int k = 0; k < V; ++k) out.items[k] = from_acc<T>(sum[k]);
        int64 at = n * walk.out_n + c * walk.out_c + (h - win.top) * walk.out_h + (w - win.left) * walk.out_w;
        store_pack(dx + at, out);
    });
}

#define MAX_POOL(T, NAME, I, INDEX, LAYOUT, PIXELS, V)                                                                  \
    extern "C" __global__ void max_pool_forward_##NAME##_##INDEX##_##LAYOUT(                                            \
        const T* x, T* y, I* tap, int64* indices, bool save, bool indexed, WALK, WINDOW) {                                \
        max_forward<T, I, PIXELS, V>(x, y, tap, indices, save, indexed, Walk WALK_OF, Window WINDOW_OF);                  \
    }                                                                                                                     \
    extern "C" __global__ void max_pool_backward_##NAME##_##INDEX##_##LAYOUT(                                           \
        const T* dy, const I* tap, T* dx, int64 tap_n, int64 tap_c, int64 tap_h, int64 tap_w, WALK, WINDOW) {             \
        max_backward<T, I, PIXELS, V>(dy, tap, dx, tap_n, tap_c, tap_h, tap_w, Walk WALK_OF, Window WINDOW_OF);           \
    }

// --- avg_pool ------------------------------------------------------------------------------------------------------

struct Divisor {
    float override_by;  // 0: count the pixels
    bool include_pad;

    // Rows (or columns) that count in window i.
    __device__ int covered(int i, int size, int taps, int stride, int pad) const {
        int start = i * stride - pad, end = min(start + taps, size + pad);
        return include_pad ? end - start : min(end, size) - max(start, 0);
    }
    __device__ float of(int i, int j, int height, int width, const Window& win) const {
        if (override_by != 0) return override_by;
        return (float)covered(i, height, win.kh, win.sh, win.top) * covered(j, width, win.kw, win.sw, win.left);
    }
};

template <class T, bool PIXELS, int V>
__device__ void avg_forward(const T* x, T* y, Divisor divisor, Walk walk, Window win) {
    for_each<PIXELS, V>(walk, [&](int64 n, int c, int i, int j) {
        const T* in = x + n * walk.in_n + c * walk.in_c;
        acc_t<T> sum[V];
        for (int k = 0; k < V; ++k) sum[k] = 0;
        for (int r = 0; r < win.kh; ++r) {
            int h = i * win.sh - win.top + r;
            if (h < 0 || h >= walk.other_height) continue;
            for (int q = 0; q < win.kw; ++q) {
                int w = j * win.sw - win.left + q;
                if (w < 0 || w >= walk.other_width) continue;
                Pack<T, V> pack = load_pack<T, V>(in + h * walk.in_h + w * walk.in_w);
                #pragma unroll
                for (int k = 0; k < V; ++k) sum[k] += to_acc(pack.items[k]);
            }
        }
        float by = divisor.of(i, j, walk.other_height, walk.other_width, win);
        Pack<T, V> out;
        #pragma unroll
        for (int k = 0; k < V; ++k) out.items[k] = from_acc<T>(sum[k] / by);
        store_pack(y + n * walk.out_n + c * walk.out_c + i * walk.out_h + j * walk.out_w, out);
    });
}

template <class T, bool PIXELS, int V>
__device__ void avg_backward(const T* dy, T* dx, Divisor divisor, Walk walk, Window win) {
    for_each<PIXELS, V>(walk, [&](int64 n, int c, int h, int w) {
        const T* g = dy + n * walk.in_n + c * walk.in_c;
        acc_t<T> sum[V];
        for (int k = 0; k < V; ++k) sum[k] = 0;
        h += win.top, w += win.left;
        for (int i = h / win.sh; i >= 0 && h - i * win.sh < win.kh; --i) {
            if (i >= walk.other_height) continue;
            for (int j = w / win.sw; j >= 0 && w - j * win.sw < win.kw; --j) {
                if (j >= walk.other_width) continue;
                float by = divisor.of(i, j, walk.height, walk.width, win);
                Pack<T, V> pack = load_pack<T, V>(g + i * walk.in_h + j * walk.in_w);
                #pragma unroll
                for (int k = 0; k < V; ++k) sum[k] += to_acc(pack.items[k]) / by;
            }
        }
        Pack<T, V> out;
        #pragma unroll
        for (int k = 0; k < V; ++k) out.items[k] = from_acc<T>(sum[k]);
        int64 at = n * walk.out_n + c * walk.out_c + (h - win.top) * walk.out_h + (w - win.left) * walk.out_w;
        store_pack(dx + at, out);
    });
}

// --- adaptive_avg_pool ---------------------------------------------------------------------------------------------

// The i-th of so many parts of `size`: [first, last). They overlap where they do not divide it. With pixels and windows
// exchanged: the windows that pixel i lies in.
struct Part {
    int first, last;
    __device__ Part(int i, int parts, int size)
        : first((int)((int64)i * size / parts)), last((int)(((int64)(i + 1) * size + parts - 1) / parts)) {}
    __device__ float length() const { return (float)(last - first); }
};

// y: the means of parts of x. GRAD: y is dx, x is dy, and each term is divided by the pixels of its own window.
template <class T, bool GRAD, bool PIXELS, int V> __device__ void adaptive_avg(const T* x, T* y, Walk walk) {
    for_each<PIXELS, V>(walk, [&](int64 n, int c, int i, int j) {
        const T* in = x + n * walk.in_n + c * walk.in_c;
        Part rows(i, walk.height, walk.other_height), columns(j, walk.width, walk.other_width);
        acc_t<T> sum[V];
        for (int k = 0; k < V; ++k) sum[k] = 0;
        for (int h = rows.first; h < rows.last; ++h) {
            float tall = GRAD ? Part(h, walk.other_height, walk.height).length() : 1;
            for (int w = columns.first; w < columns.last; ++w) {
                float by = GRAD ? tall * Part(w, walk.other_width, walk.width).length() : 1;
                Pack<T, V> pack = load_pack<T, V>(in + h * walk.in_h + w * walk.in_w);
                #pragma unroll
                for (int k = 0; k < V; ++k) sum[k] += GRAD ? to_acc(pack.items[k]) / by : to_acc(pack.items[k]);
            }
        }
        float by = GRAD ? 1 : rows.length() * columns.length();
        Pack<T, V> out;
        #pragma unroll
        for (int k = 0; k < V; ++k) out.items[k] = from_acc<T>(sum[k] / by);
        store_pack(y + n * walk.out_n + c * walk.out_c + i * walk.out_h + j * walk.out_w, out);
    });
}

// One window, the whole image. One block for each image and each blockDim.x channels; blockDim.y threads share a
// channel's pixels. (1, y) for NCHW.
template <class T>
__device__ void global_avg_forward(const T* x, T* y, int channels, int pixels, int width, int64 x_n, int64 x_c, int64 x_h,
                                   int64 x_w) {
    extern __shared__ float parts[];
    int tiles = (channels + blockDim.x - 1) / blockDim.x;
    int64 n = blockIdx.x / tiles;
    int c = (blockIdx.x - (int)n * tiles) * blockDim.x + threadIdx.x;
    float sum = 0;
    if (c < channels) {
        const T* in = x + n * x_n + c * x_c;
        for (int p = threadIdx.y; p < pixels; p += blockDim.y) {
            int row = p / width;
            sum += to_acc(in[row * x_h + (p - row * width) * x_w]);
        }
    }
    int place = threadIdx.y * blockDim.x + threadIdx.x;
    parts[place] = sum;
    __syncthreads();
    for (int half = blockDim.y / 2; half; half /= 2) {
        if (threadIdx.y < half) parts[place] += parts[place + half * blockDim.x];
        __syncthreads();
    }
    if (threadIdx.y == 0 && c < channels) y[n * channels + c] = from_acc<T>(parts[threadIdx.x] / pixels);
}

template <class T, bool PIXELS, int V> __device__ void global_avg_backward(const T* dy, T* dx, Walk walk) {
    float pixels = (float)walk.height * walk.width;
    for_each<PIXELS, V>(walk, [&](int64 n, int c, int h, int w) {
        Pack<T, V> out;
        #pragma unroll
        for (int k = 0; k < V; ++k)
            out.items[k] = from_acc<T>(to_acc(dy[n * walk.in_n + (c + k) * walk.in_c]) / pixels);
        store_pack(dx + n * walk.out_n + c * walk.out_c + h * walk.out_h + w * walk.out_w, out);
    });
}

#define AVG_POOL(T, NAME, LAYOUT, PIXELS, V)                                                                            \
    extern "C" __global__ void avg_pool_forward_##NAME##_##LAYOUT(const T* x, T* y, float by, bool include_pad, WALK,   \
                                                                    WINDOW) {                                             \
        avg_forward<T, PIXELS, V>(x, y, Divisor{by, include_pad}, Walk WALK_OF, Window WINDOW_OF);                        \
    }                                                                                                                     \
    extern "C" __global__ void avg_pool_backward_##NAME##_##LAYOUT(const T* dy, T* dx, float by, bool include_pad,      \
                                                                     WALK, WINDOW) {                                      \
        avg_backward<T, PIXELS, V>(dy, dx, Divisor{by, include_pad}, Walk WALK_OF, Window WINDOW_OF);                     \
    }                                                                                                                     \
    extern "C" __global__ void adaptive_avg_pool_forward_##NAME##_##LAYOUT(const T* x, T* y, WALK) {                    \
        adaptive_avg<T, false, PIXELS, V>(x, y, Walk WALK_OF);                                                            \
    }                                                                                                                     \
    extern "C" __global__ void adaptive_avg_pool_backward_##NAME##_##LAYOUT(const T* dy, T* dx, WALK) {                 \
        adaptive_avg<T, true, PIXELS, V>(dy, dx, Walk WALK_OF);                                                           \
    }                                                                                                                     \
    extern "C" __global__ void global_avg_pool_backward_##NAME##_##LAYOUT(const T* dy, T* dx, WALK) {                   \
        global_avg_backward<T, PIXELS, V>(dy, dx, Walk WALK_OF);                                                          \
    }

#define EACH_LAYOUT(T, NAME, LAYOUT, PIXELS, V)                       \
    MAX_POOL(T, NAME, signed char, int8, LAYOUT, PIXELS, V)         \
    MAX_POOL(T, NAME, short, int16, LAYOUT, PIXELS, V)              \
    MAX_POOL(T, NAME, int, int32, LAYOUT, PIXELS, V)                \
    AVG_POOL(T, NAME, LAYOUT, PIXELS, V)
#define POOLING(T, NAME)                                                                                                  \
    EACH_LAYOUT(T, NAME, pixels, true, 1)                                                                                 \
    EACH_LAYOUT(T, NAME, channels, false, 1)                                                                              \
    EACH_LAYOUT(T, NAME, packs, false, 16 / sizeof(T))                                                                    \
    extern "C" __global__ void global_avg_pool_forward_##NAME(const T* x, T* y, int channels, int pixels, int width,    \
                                                                int64 x_n, int64 x_c, int64 x_h, int64 x_w) {             \
        global_avg_forward<T>(x, y, channels, pixels, width, x_n, x_c, x_h, x_w);                                         \
    }
#define POOLING_OF(T) POOLING(T, T)
using float32 = float;

#ifdef ONLY  // one dtype compiles in a third of the time
POOLING_OF(ONLY)
#else
POOLING_OF(float32)
POOLING_OF(float16)
POOLING_OF(bfloat16)
#endif
