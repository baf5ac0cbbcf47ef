// Serves CUDA arrays where Triton, or torch, which Triton's launches need, is not installed: CuPy's arrays, then. Where both
// are, Triton's kernels are faster and stand first.
//
// Activations, bound by memory: each thread moves packs of 16 bytes where the arrays allow it. One functor for each
// activation has its value (from x) and its slope: the factor of dy, from x or from y as the forward kept it.

#include "_common.cuh"

struct Numbers {
    float a, b;
};

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline float at_most(float x, float most) { return x > most ? most : x; }  // NaN stays
__device__ inline float clip(float x, float low, float high) { return x < low ? low : at_most(x, high); }
// dy passes NaN, as in torch.
__device__ inline float where_inside(float dy, float x, float low, float high) { return x <= low || x >= high ? 0 : dy; }
__device__ inline float where_outside(float dy, float x, float most) { return x >= -most && x <= most ? 0 : dy; }

struct relu {
    static __device__ float value(float x, Numbers) { return x < 0 ? 0 : x; }
    static __device__ float gradient(float dy, float y, Numbers) { return y <= 0 ? 0 : dy; }
};

struct leaky_relu {
    static __device__ float value(float x, Numbers n) { return x > 0 ? x : x * n.a; }
    static __device__ float gradient(float dy, float x, Numbers n) { return x > 0 ? dy : dy * n.a; }
};

struct relu6 {
    static __device__ float value(float x, Numbers) { return clip(x, 0, 6); }
    static __device__ float gradient(float dy, float y, Numbers) { return where_inside(dy, y, 0, 6); }
};

struct relu_squared {
    static __device__ float value(float x, Numbers) { return x < 0 ? 0 : x * x; }
    static __device__ float gradient(float dy, float x, Numbers) { return x <= 0 ? 0 : 2 * x * dy; }
};

struct hardtanh {  // a: min_val, b: max_val
    static __device__ float value(float x, Numbers n) { return clip(x, n.a, n.b); }
    static __device__ float gradient(float dy, float x, Numbers n) { return where_inside(dy, x, n.a, n.b); }
};

struct hardsigmoid {
    static __device__ float value(float x, Numbers) { return clip(x + 3, 0, 6) / 6; }
    static __device__ float gradient(float dy, float x, Numbers) { return x > -3 && x < 3 ? dy / 6 : 0; }
};

struct hardshrink {
    static __device__ float value(float x, Numbers n) { return x >= -n.a && x <= n.a ? 0 : x; }
    static __device__ float gradient(float dy, float x, Numbers n) { return where_outside(dy, x, n.a); }
};

struct softshrink {
    static __device__ float value(float x, Numbers n) {
        return x > n.a ? x - n.a : x < -n.a ? x + n.a : x * 0;  // NaN stays
    }
    static __device__ float gradient(float dy, float x, Numbers n) { return where_outside(dy, x, n.a); }
};

struct threshold {  // a: threshold, b: value
    static __device__ float value(float x, Numbers n) { return x <= n.a ? n.b : x; }
    static __device__ float gradient(float dy, float x, Numbers n) { return x <= n.a ? 0 : dy; }
};

struct gelu {
    static __device__ float normal(float x) { return 0.5f * (1 + erff(x * 0.70710678f)); }
    static __device__ float value(float x, Numbers) { return x * normal(x); }
    static __device__ float gradient(float dy, float x, Numbers) {
        return dy * (normal(x) + x * expf(-0.5f * x * x) * 0.39894228f);
    }
};

struct gelu_tanh {  // (1 + tanh u) / 2 = sigmoid(2u)
    static __device__ float half(float x) { return sigmoid(1.59576912f * x * (1 + 0.044715f * x * x)); }
    static __device__ float value(float x, Numbers) { return x * half(x); }
    static __device__ float gradient(float dy, float x, Numbers) {
        float p = half(x);
        return dy * (p + x * p * (1 - p) * 1.59576912f * (1 + 0.134145f * x * x));
    }
};

struct silu {
    static __device__ float value(float x, Numbers) { return x * sigmoid(x); }
    static __device__ float gradient(float dy, float x, Numbers) {
        float s = sigmoid(x);
        return dy * s * (1 + x * (1 - s));
    }
};

struct quick_gelu {
    static __device__ float value(float x, Numbers) { return x * sigmoid(1.702f * x); }
    static __device__ float gradient(float dy, float x, Numbers n) { return silu::gradient(dy, 1.702f * x, n); }
};

struct sigmoid_ {
    static __device__ float value(float x, Numbers) { return sigmoid(x); }
    static __device__ float gradient(float dy, float y, Numbers) { return dy * y * (1 - y); }
};

struct logsigmoid {
    static __device__ float value(float x, Numbers) { return at_most(x, 0) - log1pf(expf(-fabsf(x))); }
    static __device__ float gradient(float dy, float x, Numbers) { return dy * sigmoid(-x); }
};

struct tanh_ {
    static __device__ float value(float x, Numbers) { return tanhf(x); }
    static __device__ float gradient(float dy, float y, Numbers) { return dy * (1 - y * y); }
};

struct tanhshrink {
    static __device__ float value(float x, Numbers) {
        float a = fabsf(x), s = x * x;
        if (a < 1) {  // the two cancel: a Chebyshev fit
            float near = ((0.00042069549f * s - 0.0025104594f) * s + 0.00821892172f) * s - 0.0216601156f;
            return (((near * s + 0.0539347902f) * s - 0.133331284f) * s + 0.333333313f) * s * x;
        }
        float far = (a - 1) + 2 / (expf(2 * a) + 1);
        return x < 0 ? -far : far;
    }
    static __device__ float gradient(float dy, float x, Numbers) {
        float t = tanhf(x);
        return dy * t * t;
    }
};

struct softsign {
    static __device__ float value(float x, Numbers) { return x / (1 + fabsf(x)); }
    static __device__ float gradient(float dy, float x, Numbers) {
        float d = 1 + fabsf(x);
        return dy / d / d + (d - d);  // NaN for Inf, as y is
    }
};

struct softplus {  // a: beta, b: threshold
    static __device__ float value(float x, Numbers n) {
        float z = x * n.a;
        return z > n.b ? x : (fmaxf(z, 0) + log1pf(expf(-fabsf(z)))) / n.a;
    }
    static __device__ float gradient(float dy, float x, Numbers n) {
        float z = x * n.a;
        return z > n.b ? dy : dy * sigmoid(z);
    }
};

struct elu {
    static __device__ float value(float x, Numbers n) { return x > 0 ? x : n.a * expm1f(x); }
    static __device__ float gradient(float dy, float x, Numbers n) { return x <= 0 ? dy * n.a * expf(x) : dy; }
};

struct celu {
    static __device__ float value(float x, Numbers n) { return x > 0 ? x : n.a * expm1f(x / n.a); }
    static __device__ float gradient(float dy, float x, Numbers n) { return x <= 0 ? dy * expf(x / n.a) : dy; }
};

struct selu {
    static __device__ float value(float x, Numbers) { return x > 0 ? 1.05070099f * x : 1.75809934f * expm1f(x); }
    static __device__ float gradient(float dy, float x, Numbers) {
        return dy * (x <= 0 ? 1.75809934f * expf(x) : 1.05070099f);
    }
};

struct hardswish {
    static __device__ float value(float x, Numbers) { return x * fminf(fmaxf(x + 3, 0), 6) / 6; }
    static __device__ float gradient(float dy, float x, Numbers) {
        return x <= -3 ? 0 : x < 3 ? dy * (x / 3 + 0.5f) : dy;
    }
};

struct mish {  // tanh(log(1 + e)) = n / (n + 2) with e = exp(x), n = e (e + 2); 1 past 20
    static __device__ float value(float x, Numbers) {
        float e = expf(at_most(x, 20)), n = e * (e + 2);
        return x * (n / (n + 2));
    }
    static __device__ float gradient(float dy, float x, Numbers) {
        float e = expf(at_most(x, 20)), n = e * (e + 2), t = n / (n + 2);
        return dy * (t + x * (e / (e + 1)) * (1 - t * t));
    }
};

// Packs of V elements; then, one by one, what is left of `size`.
template <class F, int V, class T> __device__ void forward(const T* x, T* y, int64 size, Numbers numbers) {
    int64 packs = size / V;
    for (int64 p = thread_index(); p < packs; p += thread_count()) {
        Pack<T, V> pack = load_pack<T, V>(x + p * V);
        #pragma unroll
        for (T& item : pack.items) item = from_acc<T>(F::value(to_acc(item), numbers));
        store_pack(y + p * V, pack);
    }
    for (int64 i = packs * V + thread_index(); i < size; i += thread_count())
        y[i] = from_acc<T>(F::value(to_acc(x[i]), numbers));
}

template <class F, int V, class T>
__device__ void backward(const T* dy, const T* kept, T* dx, int64 size, Numbers numbers) {
    int64 packs = size / V;
    for (int64 p = thread_index(); p < packs; p += thread_count()) {
        Pack<T, V> g = load_pack<T, V>(dy + p * V), s = load_pack<T, V>(kept + p * V);
        #pragma unroll
        for (int k = 0; k < V; ++k)
            g.items[k] = from_acc<T>(F::gradient(to_acc(g.items[k]), to_acc(s.items[k]), numbers));
        store_pack(dx + p * V, g);
    }
    for (int64 i = packs * V + thread_index(); i < size; i += thread_count())
        dx[i] = from_acc<T>(F::gradient(to_acc(dy[i]), to_acc(kept[i]), numbers));
}

#define KERNELS(F, T, NAME, WIDTH, V)                                                                             \
    extern "C" __global__ void F##_forward_##NAME##_##WIDTH(const T* x, T* y, int64 size, float a, float b) {     \
        forward<F, V>(x, y, size, Numbers{a, b});                                                                 \
    }                                                                                                             \
    extern "C" __global__ void F##_backward_##NAME##_##WIDTH(const T* dy, const T* kept, T* dx, int64 size,       \
                                                             float a, float b) {                                  \
        backward<F, V>(dy, kept, dx, size, Numbers{a, b});                                                        \
    }
#define EACH_WIDTH(F, T, NAME) KERNELS(F, T, NAME, packs, 16 / sizeof(T)) KERNELS(F, T, NAME, single, 1)
#define EACH_DTYPE(F) EACH_WIDTH(F, float, float32) EACH_WIDTH(F, float16, float16) EACH_WIDTH(F, bfloat16, bfloat16)

#ifdef ONLY  // one of them compiles in a second, all in a quarter of a minute
EACH_DTYPE(ONLY)
#else
EACH_DTYPE(relu)
EACH_DTYPE(leaky_relu)
EACH_DTYPE(relu6)
EACH_DTYPE(relu_squared)
EACH_DTYPE(hardtanh)
EACH_DTYPE(hardsigmoid)
EACH_DTYPE(hardswish)
EACH_DTYPE(hardshrink)
EACH_DTYPE(softshrink)
EACH_DTYPE(threshold)
EACH_DTYPE(gelu)
EACH_DTYPE(gelu_tanh)
EACH_DTYPE(silu)
EACH_DTYPE(quick_gelu)
EACH_DTYPE(sigmoid_)
EACH_DTYPE(logsigmoid)
EACH_DTYPE(tanh_)
EACH_DTYPE(tanhshrink)
EACH_DTYPE(softsign)
EACH_DTYPE(softplus)
EACH_DTYPE(elu)
EACH_DTYPE(celu)
EACH_DTYPE(selu)
EACH_DTYPE(mish)
#endif
