// What goes between the blocks of a cooperative launch: loads and stores that others see, a barrier of all blocks.

#ifdef GPULAYERS_EMULATED
template <class P> __device__ P load_strong(const P* p) { return emu::relaxed(p); }
template <class T> __device__ void store_strong(T* p, T x) { atomicExch(p, x); }
__device__ inline unsigned load_acquire(const unsigned* p) { return emu::acquire(p); }
__device__ inline void prefetch(const void*) {}
#else
template <class P> __device__ P load_strong(const P* p) {  // from L2: L1 doesn't see what other blocks write
    P x;
    unsigned v[4];
    if constexpr (sizeof(P) == 16)
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "l"(__cvta_generic_to_global(p))
                     : "memory");
    else if constexpr (sizeof(P) == 4) v[0] = *(const volatile unsigned*)p;
    else *(unsigned short*)v = *(const volatile unsigned short*)p;
    memcpy(&x, v, sizeof x);
    return x;
}
template <class T> __device__ void store_strong(T* p, T x) {
    if constexpr (sizeof(T) == 4)
        asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "f"(x) : "memory");
    else asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "h"(x.bits) : "memory");
}
__device__ inline unsigned load_acquire(const unsigned* p) {
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(p)) : "memory");
    return x;
}
__device__ inline void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}
#endif

// All threads of all blocks. *arrived is 0 before the launch; its top bit flips when all blocks are there, so that it needs
// no reset between barriers. phase: that bit as it is before a block's first barrier.
constexpr unsigned TOP = 0x80000000u;
__device__ inline void grid_barrier(unsigned* arrived, unsigned& phase) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // releases what the whole block has written: the barrier above orders it before this
        atomicAdd(arrived, blockIdx.x ? 1 : TOP - (gridDim.x - 1));
        phase ^= TOP;
        while ((load_acquire(arrived) ^ phase) & TOP) {}
    }
    __syncthreads();
}
