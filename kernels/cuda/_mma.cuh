// mma.m16n8k16 of 16-bit numbers with float32 sums: d (16, 8) += a (16, 16) b (16, 8), a warp's lanes together. Lane l has of
// d rows l / 4 and l / 4 + 8, columns l % 4 * 2 and + 1; of a those rows, and of b column l / 4, at k = l % 4 * 2, + 1, + 8, + 9.

#ifdef GPULAYERS_EMULATED
template <class T> __device__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned* b, T) {
    emu::mma_m16n8k16(d, a, b, [](unsigned short bits) { return to_acc(T{bits}); });
}
#else
#define MMA(T, NAME)                                                                                                   \
    __device__ inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned* b, T) {                          \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                           \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                       \
    }
MMA(float16, "f16.f16")
MMA(bfloat16, "bf16.bf16")
#endif
