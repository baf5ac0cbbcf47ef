"""Symlog: a layer with a CUDA kernel of its own, beside the definition that runs where there is no GPU."""

import numpy as np
from gpulayers.kernels.cuda import Source

import gpulayers as gl

SOURCE = Source(r"""
#include "_common.cuh"

// y = sign(x) log(1 + |x|), or dx = dy / (1 + |x|) where dy is given.
template <class T> __device__ void symlog(const T* x, const T* dy, T* out, int64 n) {
    for (int64 i = thread_index(); i < n; i += thread_count()) {
        float v = to_acc(x[i]), size = fabsf(v);
        out[i] = from_acc<T>(dy ? to_acc(dy[i]) / (1 + size) : copysignf(log1pf(size), v));
    }
}
#define KERNELS(T, NAME)                                                                                    \
    extern "C" __global__ void forward_##NAME(const T* x, T* y, int64 n) { symlog<T>(x, nullptr, y, n); }   \
    extern "C" __global__ void backward_##NAME(const T* x, const T* dy, T* dx, int64 n) { symlog<T>(x, dy, dx, n); }
KERNELS(float, float32) KERNELS(float16, float16) KERNELS(bfloat16, bfloat16)
""")


def launch(direction, out, *arrays):
    SOURCE.launch(f"{direction}_{out.dtype}", (-(-out.size // 256),), (256,), (*arrays, out, out.size))
    return out


symlog = gl.op(
    "symlog",
    lambda x: np.sign(x) * np.log1p(np.abs(x)),
    lambda dy, x: dy / (1 + np.abs(x)),
    cuda=(
        lambda x, *, empty: launch("forward", empty(x.shape, x.dtype), x),
        lambda dy, x, *, empty: launch("backward", empty(x.shape, x.dtype), x, dy),
    ),
)


@gl.register
class Symlog(gl.OpLayer):
    """y = sign(x) log(1 + |x|): large numbers become small, any shape (Hafner et al. 2023)."""

    op = symlog


def model():
    """For images of 8 × 8 pixels, ten classes."""
    return gl.Sequential(gl.Flatten(), gl.Linear(64, 64), Symlog(), gl.Linear(64, 10))


if __name__ == "__main__":
    from _train import train

    print(train(model()))
