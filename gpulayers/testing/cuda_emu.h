// CUDA C++ on the CPU, as a kernel file sees it: compiled in front of the kernels, together with cuda_emu_runtime.h.
// Every memory access of the kernels calls the runtime first (-fsanitize=thread), which checks it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#define GPULAYERS_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __constant__ static
#define __align__(n) alignas(n)
#define UNCHECKED __attribute__((no_sanitize("thread")))

struct uint3 {
    unsigned x, y, z;
};
using dim3 = uint3;

namespace emu {
extern uint3 thread_index, block, block_size, grid_size;  // thread_index: of the fiber that runs now
extern char* dynamic_shared;
void sync_block();
void sync_warp(unsigned mask);
uint64_t exchange(uint64_t value, int lane, unsigned mask);  // this lane's value for that lane's
unsigned ballot(bool vote, unsigned mask);
int lane();
void atomic(void* p, size_t size);  // check an atomic access
void fence();
void updated(bool changed);         // what an atomic has done
void poll(const void* p, size_t size, bool acquires);  // a load of what others may write; they run meanwhile
[[noreturn]] void fail(const char* what);

float half_to_float(unsigned short bits);
unsigned short float_to_half(float x);
unsigned short float_to_bfloat16(float x);

template <class T> T* opaque(T* p) {
    asm volatile("" : "+r"(p));
    return p;
}
template <class T> T shuffle(T value, int source, unsigned mask) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    bits = exchange(bits, source, mask);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// What a kernel's parameter is, as a word that the launching side compares with what it passes.
template <class T> struct Type {
    static std::string word() {
        if (std::is_same_v<T, bool>) return "b1";
        if (std::is_arithmetic_v<T>)
            return (std::is_floating_point_v<T> ? "f" : std::is_unsigned_v<T> ? "u" : "i") + std::to_string(sizeof(T));
        return "?";
    }
};
}  // namespace emu
struct float16;
struct bfloat16;
template <> struct emu::Type<float16> {
    static std::string word() { return "f2"; }
};
template <> struct emu::Type<bfloat16> {
    static std::string word() { return "bf"; }
};
template <> struct emu::Type<void> {
    static std::string word() { return "?"; }
};
template <class T> struct emu::Type<T*> {
    static std::string word() { return "*" + Type<std::remove_cv_t<T>>::word(); }
};
namespace emu {
template <class... A> UNCHECKED const char* types(void (*)(A...)) {
    static std::string words = ((Type<std::remove_cv_t<A>>::word() + " ") + ... + std::string());
    return words.c_str();
}
template <class... A, size_t... I> UNCHECKED void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(A*)args[I]...);
}
template <class... A> UNCHECKED void call(void (*kernel)(A...), void** args) {
    call(kernel, args, std::index_sequence_for<A...>());
}
}  // namespace emu

#define EMU_EXPORT(NAME)                                                            \
    extern "C" UNCHECKED void emu_call_##NAME(void** args) { emu::call(NAME, args); } \
    extern "C" UNCHECKED const char* emu_types_##NAME() { return emu::types(NAME); }

#define threadIdx (emu::thread_index)
#define blockIdx (emu::block)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)
constexpr int warpSize = 32;

// --- Synchronisation and exchange --------------------------------------------------------------------------------

inline void __syncthreads() { emu::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emu::sync_warp(mask); }
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() {}
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    int lane = emu::lane();
    return emu::shuffle(value, (lane & -width) + (source & (width - 1)), mask);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    int lane = emu::lane(), source = lane ^ bits;
    return emu::shuffle(value, source / width > lane / width ? lane : source, mask);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = emu::lane(), source = lane + (int)delta;
    return emu::shuffle(value, source / width == lane / width ? source : lane, mask);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = emu::lane(), source = lane - (int)delta;
    return emu::shuffle(value, source >= (lane & -width) ? source : lane, mask);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) { return emu::ballot(vote, mask); }
inline bool __any_sync(unsigned mask, bool vote) { return emu::ballot(vote, mask) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return emu::ballot(!vote, mask) == 0; }

// Fibers run one at a time, so a plain update is atomic; the runtime is told that it is meant so.
template <class T, class F> UNCHECKED T emu_update(T* p, F f) {
    emu::atomic((void*)p, sizeof(T));
    T old = *p, fresh = f(old);
    *p = fresh;
    emu::updated(__builtin_memcmp(&old, &fresh, sizeof(T)) != 0);
    return old;
}
template <class T> UNCHECKED T emu_load(const T* p, bool acquires) {
    emu::poll(p, sizeof(T), acquires);
    return *p;
}
namespace emu {
template <class T> T acquire(const T* p) { return emu_load(p, true); }
template <class T> T relaxed(const T* p) { return emu_load(p, false); }
// mma.m16n8k16: this lane's four sums, from the registers of the lanes that share its row of a or its columns of b.
template <class F> void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned* b, F value) {
    int row = lane() / 4, column = lane() % 4 * 2;
    for (int s = 0; s < 4; ++s)
        for (int high = 0; high < 2; ++high) {
            unsigned x[2] = {shuffle(a[2 * high], 4 * row + s, ~0u), shuffle(a[2 * high + 1], 4 * row + s, ~0u)};
            unsigned y[2] = {shuffle(b[high], 4 * column + s, ~0u), shuffle(b[high], 4 * (column + 1) + s, ~0u)};
            for (int i = 0; i < 4; ++i)
                for (int part = 0; part < 32; part += 16)
                    d[i] += value((unsigned short)(x[i / 2] >> part)) * value((unsigned short)(y[i % 2] >> part));
        }
}
}  // namespace emu
template <class T> T atomicAdd(T* p, T v) { return emu_update(p, [=](T old) { return T(old + v); }); }
template <class T> T atomicSub(T* p, T v) { return emu_update(p, [=](T old) { return T(old - v); }); }
template <class T> T atomicMax(T* p, T v) { return emu_update(p, [=](T old) { return std::max(old, v); }); }
template <class T> T atomicMin(T* p, T v) { return emu_update(p, [=](T old) { return std::min(old, v); }); }
template <class T> T atomicExch(T* p, T v) { return emu_update(p, [=](T) { return v; }); }
template <class T> T atomicCAS(T* p, T c, T v) { return emu_update(p, [=](T old) { return old == c ? v : old; }); }

// --- Vector types, loads, arithmetic -----------------------------------------------------------------------------

#define EMU_VECTORS(T, NAME)                                                                                    \
    struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                                          \
    struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) NAME##4 { T x, y, z, w; };                          \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                                  \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(float, float)
EMU_VECTORS(double, double)
EMU_VECTORS(int, int)
EMU_VECTORS(unsigned, uint)
EMU_VECTORS(unsigned short, ushort)
EMU_VECTORS(long long, longlong)

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T> void __stcg(T* p, T v) { *p = v; }

template <class To, class From> To emu_bits(From x) {
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emu_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
inline float __int_as_float(int x) { return emu_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emu_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emu_bits<double>(x); }
inline int __float2int_rn(float x) { return (int)std::nearbyint(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanhf(float x) { return std::tanh(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { volatile float product = x * y; return product; }  // never fused with a sum
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
#undef assert
#define assert(condition) ((condition) ? (void)0 : emu::fail("assertion failed: " #condition))
