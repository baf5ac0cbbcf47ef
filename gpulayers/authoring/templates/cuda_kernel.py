"""MyLayer, a layer with a CUDA kernel. After a change: gpulayers check my_layer.py:MyLayer

The op alone, its memory accesses and its machine code: gpulayers check my_layer.py:my_layer --input-shape 5,300
"""

import numpy as np

import gpulayers as gl
from gpulayers.kernels.cuda import Source


def forward(x):
    """y = x |x|; any shape."""
    return x * np.abs(x)


def backward(dy, x):  # what follows dy is kept from forward: inputs, y, or what else it returned
    return 2 * np.abs(x) * dy


SOURCE = Source(r"""
#include "_common.cuh"

// y = x |x|, or dx = 2 |x| dy where dy is given.
template <class T> __device__ void compute(const T* x, const T* dy, T* out, int64 n) {
    for (int64 i = thread_index(); i < n; i += thread_count()) {
        float v = to_acc(x[i]);
        out[i] = from_acc<T>(fabsf(v) * (dy ? 2 * to_acc(dy[i]) : v));
    }
}
#define KERNELS(T, NAME)                                                                                     \
    extern "C" __global__ void forward_##NAME(const T* x, T* y, int64 n) { compute<T>(x, nullptr, y, n); }   \
    extern "C" __global__ void backward_##NAME(const T* x, const T* dy, T* dx, int64 n) { compute<T>(x, dy, dx, n); }
KERNELS(float, float32) KERNELS(float16, float16) KERNELS(bfloat16, bfloat16)
""")


def cuda_forward(x, *, empty):
    y = empty(x.shape, x.dtype)
    SOURCE.launch(f"forward_{x.dtype}", (-(-x.size // 256),), (256,), (x, y, x.size))
    return y


def cuda_backward(dy, x, *, empty):
    dx = empty(x.shape, x.dtype)
    SOURCE.launch(f"backward_{x.dtype}", (-(-x.size // 256),), (256,), (x, dy, dx, x.size))
    return dx


my_layer = gl.op("my_layer", forward, backward, cuda=(cuda_forward, cuda_backward))


@gl.register
class MyLayer(gl.OpLayer):
    """y = x |x|; any shape."""

    op = my_layer
