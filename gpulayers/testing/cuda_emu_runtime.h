// The runtime under cuda_emu.h: one fiber per CUDA thread, blocks one after another, every access checked.
// Compiled on its own, without instrumentation, and linked to the kernels.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};

// --- What the launching side passes and gets (emulator.py has the same layouts) ----------------------------------

extern "C" struct EmuRegion {  // one array argument
    uintptr_t low, bytes, unit;
    const unsigned char* holes;  // one byte a unit, nonzero where it is no element; null if there is none
    int64_t span;                // the stretch of memory that overlapping arrays share
};
extern "C" struct EmuSpan {
    uintptr_t low, cells, unit;
};
extern "C" struct EmuFault {
    int64_t kind, region, offset, size, thread, block, other_thread, other_block, waiting;
    char text[256];
};
enum Kind { NONE, LOAD, STORE, ATOMIC, MISALIGNED, RACE_WAW, RACE_RAW, RACE_WAR, BARRIER, WARP, FAILED, POLL, STRAY };

namespace emu {

// --- What blocks that run at once publish to each other ----------------------------------------------------------

// Whose accesses are known, a vector clock: of each block those before a generation of its barrier, of single threads those
// before one of their fences.
struct Known {
    std::vector<uint32_t> blocks;
    std::map<int64_t, uint32_t> threads;
};
static Known known, acquired;  // of this block: ordered before now; to be so for all its threads from its next barrier
static std::map<uintptr_t, Known> published;  // through an atomic
static size_t blocks_at_once;

static void learn(Known& mine, const Known& other) {
    if (!other.blocks.empty()) mine.blocks.resize(blocks_at_once);
    for (size_t i = 0; i < other.blocks.size(); ++i) mine.blocks[i] = std::max(mine.blocks[i], other.blocks[i]);
    for (auto& [thread, fences] : other.threads) mine.threads[thread] = std::max(mine.threads[thread], fences);
}

// --- Fibers ------------------------------------------------------------------------------------------------------

constexpr size_t STACK = 256 * 1024;

struct Thread {
    uint3 index;
    void* stack_pointer;
    char* stack;
    int number;
    bool done, blocked, polls;
    uint32_t fenced = 0, fences = 0;  // by its last fence others can see the block's generations before this; how many
    Known seen, own;  // what it has found published, for a fence to acquire; what is ordered before its own accesses
};
static Thread* current;
uint3 thread_index, block, block_size, grid_size;
char* dynamic_shared;

static std::vector<Thread> threads;
static char* stacks;
static size_t stacks_made;
static void* scheduler;
static void (*kernel)(void**);
static void** kernel_args;
static bool progress;
static EmuFault* fault;
static int64_t block_number;
static size_t slot;  // of the block, among those that run at once

extern "C" void emu_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
constexpr int SAVED = 6;      // registers below the return address
constexpr int RETURN_AT = 6;  // the slot that holds it
constexpr int FRAME = 8;      // slots, so that the entry finds the stack aligned as after a call
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr int RETURN_AT = 11;
constexpr int FRAME = 20;
#else
#error "the emulator switches fibers on x86-64 and AArch64 only"
#endif

static void leave() { emu_switch(&current->stack_pointer, scheduler); }
static void enter() {
    kernel(kernel_args);
    current->done = progress = true;
    leave();
    abort();  // a finished fiber is never resumed
}
[[noreturn]] static void raise(Kind kind) {
    fault->kind = kind;
    fault->thread = current->number;
    fault->block = block_number;
    leave();
    abort();
}
[[noreturn]] void fail(const char* what) {
    strncpy(fault->text, what, sizeof fault->text - 1);
    raise(FAILED);
}
static void start(Thread& t, int number) {
    t = {};
    t.number = number;
    t.index = {number % block_size.x, number / block_size.x % block_size.y, number / (block_size.x * block_size.y)};
    t.stack = stacks + STACK * (slot * threads.size() + number);
    void** top = (void**)(t.stack + STACK) - FRAME;
    top[RETURN_AT] = (void*)enter;
    t.stack_pointer = top;
}

// --- Barriers ----------------------------------------------------------------------------------------------------

struct Barrier {
    unsigned arrived = 0, mask = 0;
    uint32_t generation = 0;
    uint64_t slots[32];
};
static unsigned block_arrived;
static uint32_t block_generation;
static std::vector<Barrier> warps;

void fence() {
    if (blocks_at_once < 2) return;
    current->fenced = block_generation, ++current->fences;
    learn(acquired, current->seen), learn(current->own, current->seen);
}

static void wait() {
    current->blocked = true;
    while (current->blocked) leave();
}
int lane() { return current->number % 32; }

void sync_block() {
    progress = true;
    if (++block_arrived < threads.size()) return wait();
    block_arrived = 0;
    ++block_generation;
    if (blocks_at_once > 1) learn(known, acquired);
    for (Thread& t : threads) t.blocked = false;
}
static unsigned lanes_of(int warp) {
    int n = (int)threads.size() - 32 * warp;
    return n >= 32 ? ~0u : (1u << n) - 1;
}
void sync_warp(unsigned mask) {
    int warp = current->number / 32;
    Barrier& b = warps[warp];
    mask &= lanes_of(warp);
    if (!(mask >> lane() & 1)) fail("a lane synchronises its warp with a mask that leaves out the lane itself");
    if (b.arrived && b.mask != mask) fail("lanes of one warp synchronise with different masks");
    progress = true;
    b.mask = mask;
    b.arrived |= 1u << lane();
    if (b.arrived != mask) return wait();
    b.arrived = 0;
    ++b.generation;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) threads[32 * warp + i].blocked = false;
}
uint64_t exchange(uint64_t value, int source, unsigned mask) {
    Barrier& b = warps[current->number / 32];
    b.slots[lane()] = value;
    sync_warp(mask);
    value = b.slots[source & 31];
    sync_warp(mask);
    return value;
}
unsigned ballot(bool vote, unsigned mask) {
    Barrier& b = warps[current->number / 32];
    b.slots[lane()] = vote;
    sync_warp(mask);
    unsigned votes = 0, lanes = mask & lanes_of(current->number / 32);
    for (int i = 0; i < 32; ++i)
        if (lanes >> i & 1) votes |= (unsigned)b.slots[i] << i;
    sync_warp(mask);
    return votes;
}

// --- Memory: bounds, and hazards between threads that no barrier orders ------------------------------------------

struct Visit {  // who, and since which barriers
    int32_t block = -1, thread = 0;
    uint32_t generation = 0, warp_generation = 0, fences = 0;
    bool many = false, warps_differ = false, atomic = false;
};
struct Cell {
    Visit writer, reader;
    int32_t first_reading_block = -1;
    std::vector<Visit> reads;  // of blocks that run at once, each one's last
};
struct Span {
    uintptr_t low, unit;
    std::vector<Cell> cells;
};
static const EmuRegion* regions;
static int64_t region_count, last_region;
static std::vector<Span> spans;
static Span shared_static, shared_dynamic;
static uintptr_t module_low, module_high;
static bool check_races;
static bool polling;  // the load at hand is of what others may write at the same time

static Visit now() {
    Visit v;
    v.block = (int32_t)block_number;
    v.thread = current->number;
    v.generation = block_generation;
    v.warp_generation = warps[current->number / 32].generation;
    v.fences = current->fences;
    return v;
}
static bool knows(const Known& k, const Visit& v) {
    if ((size_t)v.block < k.blocks.size() && k.blocks[v.block] > v.generation) return true;
    auto found = v.many ? k.threads.end() : k.threads.find(v.block * (int64_t)threads.size() + v.thread);
    return found != k.threads.end() && found->second > v.fences;
}
// Whether an earlier visit, by another thread, happened in no particular order with one now.
static bool unordered(const Visit& v, const Visit& n) {
    if (v.block < 0) return false;
    if (v.block != n.block) return blocks_at_once < 2 || !(knows(known, v) || knows(current->own, v));
    if (v.generation != n.generation || (v.thread == n.thread && !v.many)) return false;
    bool one_warp = v.thread / 32 == n.thread / 32 && !v.warps_differ;
    return !(one_warp && v.warp_generation != n.warp_generation);
}
static void race(Kind kind, const Visit& other, bool elsewhere) {
    fault->other_thread = other.thread;
    fault->other_block = elsewhere ? -1 : other.block;
    raise(kind);
}
static void record(Span& span, uintptr_t p, size_t size, Kind kind, bool lasting) {
    Visit n = now();
    n.atomic = kind == ATOMIC || polling;
    size_t first = (p - span.low) / span.unit, last = (p + size - 1 - span.low) / span.unit;
    for (size_t i = first; i <= last && i < span.cells.size(); ++i) {
        Cell& c = span.cells[i];
        if (!lasting && c.writer.block != n.block) c.writer = Visit();  // shared memory begins anew in each block
        if (!lasting && c.reader.block != n.block) c.reader = Visit(), c.first_reading_block = -1;
        if (!(c.writer.atomic && n.atomic) && unordered(c.writer, n)) race(kind == LOAD ? RACE_RAW : RACE_WAW, c.writer, 0);
        if (kind != LOAD) {
            bool now_or_alone = c.reader.block == n.block || blocks_at_once < 2;
            if (now_or_alone && !(c.reader.atomic && n.atomic) && unordered(c.reader, n)) race(RACE_WAR, c.reader, false);
            for (const Visit& v : c.reads)
                if (v.block != n.block && !(v.atomic && n.atomic) && unordered(v, n)) race(RACE_WAR, v, false);
            if (blocks_at_once < 2 && c.first_reading_block >= 0 && c.first_reading_block != n.block) race(RACE_WAR, c.reader, true);
            c.writer = n;
            continue;
        }
        bool same = c.reader.block == n.block && c.reader.generation == n.generation;
        n.atomic = n.atomic && (!same || c.reader.atomic);
        if (same && c.reader.thread != n.thread) {
            n.many = true;
            n.warps_differ = c.reader.warps_differ || c.reader.thread / 32 != n.thread / 32;
        } else if (same) {
            n.many = c.reader.many, n.warps_differ = c.reader.warps_differ;
        }
        c.reader = n;
        if (lasting && blocks_at_once > 1) c.reads.resize(blocks_at_once), c.reads[n.block] = n;
        if (c.first_reading_block < 0) c.first_reading_block = n.block;
    }
}
static bool within(uintptr_t p, size_t size, uintptr_t low, uintptr_t bytes) {
    return p - low < bytes && p - low + size <= bytes;
}
static bool whole(const EmuRegion& r, uintptr_t p, size_t size) {
    if (r.holes)
        for (uintptr_t i = (p - r.low) / r.unit; i <= (p + size - 1 - r.low) / r.unit; ++i)
            if (r.holes[i]) return false;
    return true;
}
static bool shared(Span& span, uintptr_t p, size_t size, Kind kind) {
    if (!within(p, size, span.low, span.cells.size() * span.unit)) return false;
    fault->region = -1;
    if (check_races) record(span, p, size, kind, false);
    return true;
}
static void check(uintptr_t p, size_t size, Kind kind, bool exact) {
    if (!current || p - (uintptr_t)current->stack < STACK) return;
    if (within(p, size, module_low, module_high - module_low)) return;  // constants, and the emulator's own state
    fault->size = size;
    for (int64_t k = 0; k <= region_count; ++k) {  // the array of the last access first
        int64_t i = k ? k - 1 : last_region;
        if (i >= region_count) continue;
        const EmuRegion& r = regions[i];
        if (p - r.low >= r.bytes) continue;
        fault->region = i, fault->offset = p - r.low;
        if (exact && p % size) raise(MISALIGNED);
        if (!within(p, size, r.low, r.bytes) || !whole(r, p, size)) continue;  // perhaps another view of this memory
        last_region = i;
        if (check_races) record(spans[r.span], p, size, kind, true);
        return;
    }
    if (shared(shared_static, p, size, kind) || shared(shared_dynamic, p, size, kind)) {
        if (exact && p % size) fault->region = -1, raise(MISALIGNED);
        return;
    }
    int64_t nearest = -1, distance = 0;
    for (int64_t i = 0; i < region_count; ++i) {
        int64_t before = (int64_t)(regions[i].low - p), after = (int64_t)(p - (regions[i].low + regions[i].bytes)) + 1;
        int64_t d = before > after ? before : after;
        if (nearest < 0 || d < distance) nearest = i, distance = d;
    }
    fault->region = distance < (1 << 20) ? nearest : -1;
    fault->offset = nearest < 0 ? 0 : (int64_t)(p - regions[nearest].low);
    raise(kind);
}
static void publish(uintptr_t p) {
    if (blocks_at_once < 2 || !current->fences) return;
    Known& clock = published[p];
    learn(clock, known), learn(clock, current->own);
    clock.blocks.resize(blocks_at_once);
    clock.blocks[block_number] = std::max(clock.blocks[block_number], current->fenced);
    clock.threads[block_number * (int64_t)threads.size() + current->number] = current->fences;
}
static void see(uintptr_t p, bool acquires) {
    auto found = published.find(p);
    if (found == published.end()) return;
    learn(current->seen, found->second);
    if (acquires) learn(acquired, found->second), learn(current->own, found->second);
}
static void others_run() {
    current->polls = true;
    leave();
    current->polls = false;
}
void atomic(void* p, size_t size) {
    check((uintptr_t)p, size, ATOMIC, true);
    see((uintptr_t)p, false), publish((uintptr_t)p);
}
void updated(bool changed) {
    if (changed) progress = true;
    else others_run();  // one that changes nothing may be a try of many
}
void poll(const void* p, size_t size, bool acquires) {
    others_run();
    polling = true;
    check((uintptr_t)p, size, LOAD, true);
    polling = false;
    see((uintptr_t)p, acquires);
}

static int half_shift_right(uint32_t x, int n) {  // to nearest, ties to even
    uint32_t rest = x & ((1u << n) - 1), half = 1u << (n - 1);
    x >>= n;
    return x + (rest > half || (rest == half && (x & 1)));
}
float half_to_float(unsigned short bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
              : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                             : std::ldexp((float)mantissa, -24);
    return bits & 0x8000 ? -x : x;
}
unsigned short float_to_half(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    unsigned sign = u >> 16 & 0x8000;
    int exponent = (int)(u >> 23 & 255) - 112;
    uint32_t mantissa = u & 0x7fffff;
    if (std::isnan(x)) return 0x7fff;
    if (exponent >= 31) return sign | 0x7c00;
    if (exponent > 0) return sign | half_shift_right((uint32_t)exponent << 23 | mantissa, 13);
    if (exponent < -10) return sign;
    return sign | half_shift_right(mantissa | 0x800000, 14 - exponent);
}
unsigned short float_to_bfloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

// --- A launch ----------------------------------------------------------------------------------------------------

static int find_module(dl_phdr_info* info, size_t, void* address) {
    uintptr_t low = ~(uintptr_t)0, high = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& h = info->dlpi_phdr[i];
        if (h.p_type != PT_LOAD) continue;
        low = std::min(low, (uintptr_t)(info->dlpi_addr + h.p_vaddr));
        high = std::max(high, (uintptr_t)(info->dlpi_addr + h.p_vaddr + h.p_memsz));
    }
    if ((uintptr_t)address < low || (uintptr_t)address >= high) return 0;
    module_low = low, module_high = high;
    shared_static = {};
    for (int i = 0; i < info->dlpi_phnum; ++i)
        if (info->dlpi_phdr[i].p_type == PT_TLS) {
            shared_static.low = (uintptr_t)info->dlpi_tls_data, shared_static.unit = 1;
            shared_static.cells.resize(info->dlpi_phdr[i].p_memsz);
        }
    return 1;
}
#include "cuda_emu_blocks.h"
thread_local char anchor;  // makes sure that this library's thread-local memory is there

extern "C" __attribute__((visibility("default"))) void emu_launch(
    void (*entry)(void**), void** args, const unsigned* sizes, size_t dynamic_bytes, const EmuRegion* arrays,
    int64_t array_count, const EmuSpan* stretches, int64_t stretch_count, int races, int corners, int cooperative, EmuFault* result) {
    grid_size = {sizes[0], sizes[1], sizes[2]};
    block_size = {sizes[3], sizes[4], sizes[5]};
    unsigned n = block_size.x * block_size.y * block_size.z;
    kernel = entry, kernel_args = args, fault = result, check_races = races;
    regions = arrays, region_count = array_count, last_region = 0;
    anchor = 0;
    dl_iterate_phdr(find_module, (void*)entry);
    blocks_at_once = cooperative ? (size_t)grid_size.x * grid_size.y * grid_size.z : 1;
    published.clear();
    slot = 0;
    if (size_t wanted = n * blocks_at_once; stacks_made < wanted) {
        if (stacks) munmap(stacks, STACK * stacks_made);
        stacks = (char*)mmap(nullptr, STACK * wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        stacks_made = wanted;
    }
    std::vector<char> memory(dynamic_bytes + 16);
    dynamic_shared = (char*)(((uintptr_t)memory.data() + 15) & ~(uintptr_t)15);
    shared_dynamic = {(uintptr_t)dynamic_shared, 1, std::vector<Cell>(dynamic_bytes)};
    spans.clear();
    for (int64_t i = 0; i < stretch_count; ++i)
        spans.push_back({stretches[i].low, stretches[i].unit, std::vector<Cell>(races ? stretches[i].cells : 0)});
    threads.resize(n);
    if (blocks_at_once > 1) {
        run_cooperatively(n);
        current = nullptr;
        return;
    }
    auto next = [&](unsigned i, unsigned size) { return corners && i + 2 < size ? size - 1 : i + 1; };
    for (unsigned z = 0; z < grid_size.z && !fault->kind; z = next(z, grid_size.z))
        for (unsigned y = 0; y < grid_size.y && !fault->kind; y = next(y, grid_size.y))
            for (unsigned x = 0; x < grid_size.x && !fault->kind; x = next(x, grid_size.x)) {
                block_number = ((int64_t)z * grid_size.y + y) * grid_size.x + x;
                block = {x, y, z};
                run_block(n);
            }
    current = nullptr;
}
}  // namespace emu

// --- What g++ calls before each access of a kernel ---------------------------------------------------------------

#define ON_ACCESS(SIZE)                                                                                       \
    extern "C" void __tsan_read##SIZE(uintptr_t p) { emu::check(p, SIZE, LOAD, true); }                       \
    extern "C" void __tsan_write##SIZE(uintptr_t p) { emu::check(p, SIZE, STORE, true); }                     \
    extern "C" void __tsan_unaligned_read##SIZE(uintptr_t p) { emu::check(p, SIZE, LOAD, false); }            \
    extern "C" void __tsan_unaligned_write##SIZE(uintptr_t p) { emu::check(p, SIZE, STORE, false); }
ON_ACCESS(1)
ON_ACCESS(2)
ON_ACCESS(4)
ON_ACCESS(8)
ON_ACCESS(16)
extern "C" void __tsan_read_range(uintptr_t p, size_t size) { emu::check(p, size, LOAD, false); }
extern "C" void __tsan_write_range(uintptr_t p, size_t size) { emu::check(p, size, STORE, false); }
#define ON_VOLATILE(SIZE)                                                                                     \
    extern "C" void __tsan_volatile_read##SIZE(void* p) { emu::poll(p, SIZE, false); }                        \
    extern "C" void __tsan_volatile_write##SIZE(void* p) { emu::atomic(p, SIZE), emu::updated(true); }
ON_VOLATILE(1)
ON_VOLATILE(2)
ON_VOLATILE(4)
ON_VOLATILE(8)
ON_VOLATILE(16)
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
