// Serves CUDA arrays where Triton, or torch, which Triton's launches need, is not installed: CuPy's arrays, then. Where both
// are, Triton's kernels are faster and stand first.
//
// Copies between arrays of one shape that do not lie in memory alike: bound by memory, an element at a time.

#include "_common.cuh"

// y[…] = x[…] over six axes, of n0 … n5 elements (n0 follows from size), x0 … x5 and y0 … y5 elements apart.
template <class T>
__device__ void copy(const T* x, T* y, int64 size, int64 n1, int64 n2, int64 n3, int64 n4, int64 n5, int64 x0, int64 x1,
                     int64 x2, int64 x3, int64 x4, int64 x5, int64 y0, int64 y1, int64 y2, int64 y3, int64 y4, int64 y5) {
    for (int64 i = thread_index(); i < size; i += thread_count()) {
        int64 i5 = i % n5, left = i / n5;
        int64 i4 = left % n4;
        left /= n4;
        int64 i3 = left % n3;
        left /= n3;
        int64 i2 = left % n2;
        left /= n2;
        int64 i1 = left % n1, i0 = left / n1;
        y[i0 * y0 + i1 * y1 + i2 * y2 + i3 * y3 + i4 * y4 + i5 * y5] = x[i0 * x0 + i1 * x1 + i2 * x2 + i3 * x3 + i4 * x4 + i5 * x5];
    }
}

#define COPY(T, NAME)                                                                                                      \
    extern "C" __global__ void copy_##NAME(const T* x, T* y, int64 size, int64 n1, int64 n2, int64 n3, int64 n4, int64 n5, \
                                           int64 x0, int64 x1, int64 x2, int64 x3, int64 x4, int64 x5, int64 y0, int64 y1, \
                                           int64 y2, int64 y3, int64 y4, int64 y5) {                                       \
        copy<T>(x, y, size, n1, n2, n3, n4, n5, x0, x1, x2, x3, x4, x5, y0, y1, y2, y3, y4, y5);                           \
    }
FOR_EACH_DTYPE(COPY)
COPY(int64, int64)
COPY(int, int32)
COPY(unsigned char, uint8)
