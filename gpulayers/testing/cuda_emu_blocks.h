// How blocks run: one after another, or, of a cooperative launch, all at once. A part of cuda_emu_runtime.h.

constexpr unsigned PATIENCE = 1000;  // rounds in which threads only poll; then they poll in vain
constexpr unsigned STARVED = 32;     // rounds in which the others only poll, before a block that starves may run

static void begin_block(unsigned n) {
    block_arrived = block_generation = 0;
    warps.assign((n + 31) / 32, Barrier());
    memset((void*)shared_static.low, 0xff, shared_static.cells.size());
    memset(dynamic_shared, 0xff, shared_dynamic.cells.size());
    known = acquired = Known();
    for (unsigned i = 0; i < n; ++i) start(threads[i], i);
}
// Run each thread of the block until it waits; how many are not done. ran: whether any could run.
static unsigned turn(bool& ran) {
    unsigned left = 0;
    for (Thread& t : threads) {
        if (t.done) continue;
        if (!t.blocked) {
            ran = true;
            current = &t;
            thread_index = t.index;
            emu_switch(&scheduler, t.stack_pointer);
            if (fault->kind) return 0;
        }
        left += !t.done;
    }
    return left;
}
static void stuck(unsigned left) {
    unsigned polling = 0;
    for (Thread& t : threads) polling += !t.done && t.polls;
    fault->kind = polling ? POLL : block_arrived ? BARRIER : WARP;
    fault->block = block_number;
    fault->waiting = polling ? polling : block_arrived ? block_arrived : left;
}
static void run_block(unsigned n) {
    begin_block(n);
    for (unsigned left = n, idle = 0; left;) {
        bool ran = progress = false;
        left = turn(ran);
        idle = progress ? 0 : idle + 1;
        if (left && (!ran || idle > PATIENCE)) return stuck(left);
    }
}

// What of a block is in the variables above while it runs.
struct Block {
    uint3 index;
    int64_t number;
    std::vector<Thread> threads;
    unsigned arrived = 0, left = 0;
    uint32_t generation = 0;
    std::vector<Barrier> warps;
    Known known, acquired;
    Span statics, dynamics;
    std::vector<char> memory, bytes;
};
static void swap(Block& b) {
    std::swap(b.threads, threads), std::swap(b.warps, warps);
    std::swap(b.arrived, block_arrived), std::swap(b.generation, block_generation);
    std::swap(b.known, known), std::swap(b.acquired, acquired);
    std::swap(b.statics.cells, shared_static.cells), std::swap(b.dynamics, shared_dynamic);
    std::swap_ranges(b.bytes.begin(), b.bytes.end(), (char*)shared_static.low);
    block = b.index, slot = block_number = b.number, dynamic_shared = (char*)shared_dynamic.low;
}
static void prepare(Block& b, size_t number, unsigned n, size_t bytes, size_t dynamic_bytes) {
    unsigned x = number % grid_size.x, y = number / grid_size.x % grid_size.y;
    b.index = {x, y, (unsigned)(number / ((size_t)grid_size.x * grid_size.y))};
    b.number = number, b.left = n;
    b.threads.resize(n), b.bytes.resize(bytes), b.memory.resize(dynamic_bytes + 16);
    b.statics.cells.resize(bytes);
    b.dynamics = {((uintptr_t)b.memory.data() + 15) & ~(uintptr_t)15, 1, std::vector<Cell>(dynamic_bytes)};
    swap(b), begin_block(n), swap(b);
}
// One block, another one again and again, starves until the others only poll: no order of blocks may be relied on.
static void run_cooperatively(unsigned n) {
    std::vector<Block> blocks(blocks_at_once);
    size_t bytes = shared_static.cells.size(), dynamic_bytes = shared_dynamic.cells.size();
    for (size_t i = 0; i < blocks.size(); ++i) prepare(blocks[i], i, n, bytes, dynamic_bytes);
    size_t victim = blocks.size() - 1;
    uint32_t random = 1;
    for (unsigned left = 1, idle = 0; left && !fault->kind;) {
        progress = false;
        left = 0;
        for (Block& b : blocks) {
            if (b.left && ((size_t)b.number != victim || idle >= STARVED)) {
                bool ran = false;
                swap(b);
                b.left = turn(ran);
                if (fault->kind && fault->kind != POLL) return;
                // Blame a block whose own barrier is broken before those that wait for it.
                if (b.left && (!ran || idle > PATIENCE) && (!fault->kind || block_arrived)) stuck(b.left);
                swap(b);
            }
            left += b.left;
        }
        if (progress && idle >= STARVED) random = random * 1664525 + 1013904223, victim = (random >> 16) % blocks.size();
        idle = progress ? 0 : idle + 1;
    }
}
