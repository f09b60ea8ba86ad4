/* emulator.cc - fibers, and what they do together. */
#include "tests/emulated/emulator.h"

#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>

#include <atomic>
#include <thread>
#include <vector>

namespace emulator {

enum {
    MAX_WARPS = 32,
    STACK_BYTES = 128 << 10,
    PAGE_BYTES = 4096,
    GUARD_BYTES = 1024, /* past dynamic shared memory */
    UNWRITTEN = 0xff,   /* a byte of NaN */
};

} // namespace emulator

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) thread_local uint8_t shared[emulator::SHARED_LIMIT + emulator::GUARD_BYTES];

namespace emulator {

struct copy {
    void *to;
    const void *from;
    int bytes, group;
};

struct fiber {
    void *stack;              /* its pointer, while another one runs */
    std::vector<copy> copies; /* not done, in their order */
    int groups;               /* of copies, so far */
};

struct warp {
    uint32_t ready, meeting, at_barrier; /* lanes, by what they wait for */
    struct meeting *lanes[LANES];
    uint32_t masks[LANES];
};

struct block {
    void *host_stack;
    const std::function<void()> *kernel;
    std::vector<fiber> fibers;
    warp warps[MAX_WARPS];
    uint32_t ready_warps;
    int current, left, arrived; /* the thread that runs; how many did not end, are at the barrier */
    bool vote, verdict;
    uint64_t random;
};
static __thread block *here;

[[noreturn]] void fail(const char *what) {
    fprintf(stderr, "emulator: %s (thread %u of block %u)\n", what, threadIdx.x, blockIdx.x);
    abort();
}

/* ---- fibers ---- */

/* Leaves the stack pointer at *from, all else on that stack, and goes on with `to`. */
extern "C" void gn_emulator_switch(void **from, void *to);
asm(".text\n"
    ".type gn_emulator_switch, @function\n"
    "gn_emulator_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n"
    "    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n"
    "    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n"
    ".size gn_emulator_switch, . - gn_emulator_switch\n");

static int warp_of(const block *b) {
    return b->current / LANES;
}
static uint32_t lane_bit(const block *b) {
    return 1u << b->current % LANES;
}

static uint32_t random_bits(block *b) {
    b->random = b->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(b->random >> 32);
}

/* Any bit of a mask that has some. */
static int pick(block *b, uint32_t mask) {
    for (uint32_t skip = random_bits(b) % (uint32_t)__builtin_popcount(mask); skip > 0; skip--)
        mask &= mask - 1;
    return __builtin_ctz(mask);
}

static void set_ready(block *b, int w, uint32_t lanes) {
    b->warps[w].ready |= lanes;
    if (lanes) b->ready_warps |= 1u << w;
}

static void go_on_with(block *b, void **from, int w, int lane) {
    warp *next = &b->warps[w];
    next->ready &= ~(1u << lane);
    if (next->ready == 0) b->ready_warps &= ~(1u << w);
    b->current = w * LANES + lane;
    threadIdx.x = (unsigned)b->current;
    gn_emulator_switch(from, b->fibers[(size_t)b->current].stack);
}

static void run_another(block *b, void **from) {
    if (b->ready_warps == 0) fail("threads wait for others that do not come");
    const int w = b->ready_warps >> warp_of(b) & 1 ? warp_of(b) : pick(b, b->ready_warps);
    go_on_with(b, from, w, __builtin_ctz(b->warps[w].ready));
}

static void stop(block *b) {
    run_another(b, &b->fibers[(size_t)b->current].stack);
}

void let_others_run() {
    block *b = here;
    const int mine = warp_of(b);
    const uint32_t others = b->ready_warps & ~(1u << mine);
    void **from = &b->fibers[(size_t)b->current].stack;
    sched_yield();
    if (others == 0 && b->warps[mine].ready == 0) return;
    const int w = others ? pick(b, others) : mine, lane = __builtin_ctz(b->warps[w].ready);
    set_ready(b, mine, lane_bit(b));
    go_on_with(b, from, w, lane);
}

static void release_barrier(block *b) {
    b->arrived = 0;
    b->verdict = b->vote;
    b->vote = true;
    for (int w = 0; w < (int)b->fibers.size() / LANES; w++) {
        set_ready(b, w, b->warps[w].at_barrier);
        b->warps[w].at_barrier = 0;
    }
}

static void run_fiber() {
    (*here->kernel)();
    block *b = here;
    void *nowhere;
    if (--b->left == 0) gn_emulator_switch(&nowhere, b->host_stack);
    if (b->arrived == b->left) release_barrier(b);
    run_another(b, &nowhere);
}

/* A stack from which the switch returns to run_fiber. */
static void *new_stack(char *memory) {
    void **top = (void **)(memory + STACK_BYTES);
    top[-2] = (void *)run_fiber;
    return top - 8; /* six registers are below */
}

/* ---- launches ---- */

static void run_block(block *b, char *stacks, size_t shared_bytes) {
    memset(shared, UNWRITTEN, shared_bytes + GUARD_BYTES);
    b->left = (int)b->fibers.size();
    b->arrived = b->current = 0;
    b->vote = true;
    for (int i = 0; i < b->left; i++)
        b->fibers[(size_t)i] = {new_stack(stacks + (size_t)i * STACK_BYTES), {}, 0};
    for (int w = 0; w < b->left / LANES; w++) {
        b->warps[w] = {};
        set_ready(b, w, ~0u);
    }
    run_another(b, &b->host_stack);
    for (int i = 0; i < GUARD_BYTES; i++)
        if (shared[shared_bytes + (size_t)i] != UNWRITTEN)
            fail("dynamic shared memory is written past its end");
}

/* Stacks for all threads of a block, each above a page that nobody may touch. */
static char *map_stacks() {
    enum { ALL = MAX_WARPS * LANES * STACK_BYTES };
    void *memory =
        mmap(NULL, ALL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    for (char *stack = (char *)memory; stack < (char *)memory + ALL; stack += STACK_BYTES)
        if (mprotect(stack, PAGE_BYTES, PROT_NONE) != 0) fail("no memory for stacks");
    return (char *)memory;
}

/* Of host thread `i` of a launch; kept for the next one. */
static char *stacks_of(unsigned i) {
    static char *stacks[RESIDENT_BLOCKS];
    if (!stacks[i]) stacks[i] = map_stacks();
    return stacks[i];
}

struct grid {
    dim3 blocks, threads;
    size_t shared_bytes;
    const std::function<void()> *kernel;
    std::atomic<unsigned> next;
};

static unsigned n_blocks(const grid *g) {
    return g->blocks.x * g->blocks.y * g->blocks.z;
}

static void run_blocks(grid *g, char *stacks) {
    block b = {};
    b.kernel = g->kernel;
    b.fibers.resize(g->threads.x);
    here = &b;
    for (unsigned i; (i = g->next++) < n_blocks(g);) {
        const unsigned x = g->blocks.x, y = g->blocks.y;
        blockIdx = {i % x, i / x % y, i / x / y};
        blockDim = {g->threads.x, 1, 1};
        gridDim = {x, y, g->blocks.z};
        b.random = i;
        run_block(&b, stacks, g->shared_bytes);
    }
}

cudaError_t run(dim3 blocks, dim3 threads, size_t shared_bytes,
                const std::function<void()> &kernel) {
    grid g = {blocks, threads, shared_bytes, &kernel, {0}};
    if (n_blocks(&g) == 0 || threads.x == 0 || threads.x % LANES != 0 ||
        threads.x > MAX_WARPS * LANES || threads.y != 1 || threads.z != 1 ||
        shared_bytes > SHARED_LIMIT)
        return cudaErrorInvalidConfiguration;
    std::vector<std::thread> hosts;
    for (unsigned i = 0; i < n_blocks(&g) && i < RESIDENT_BLOCKS; i++)
        hosts.emplace_back(run_blocks, &g, stacks_of(i));
    for (std::thread &host : hosts) host.join();
    return cudaSuccess;
}

/* ---- barriers ---- */

/* Threads that ended do not count. */
bool all_of_block(bool vote) {
    block *b = here;
    b->vote &= vote;
    if (++b->arrived == b->left) {
        release_barrier(b);
    } else {
        b->warps[warp_of(b)].at_barrier |= lane_bit(b);
        stop(b);
    }
    return b->verdict;
}

void sync_block() {
    all_of_block(true);
}

void meet(meeting *mine, uint32_t mask) {
    block *b = here;
    warp *w = &b->warps[warp_of(b)];
    const int lane = b->current % LANES;
    w->lanes[lane] = mine;
    w->masks[lane] = mask;
    w->meeting |= lane_bit(b);
    if (!(mask & lane_bit(b))) fail("a lane is not in its own mask");
    if ((w->meeting & mask) != mask) return stop(b);
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1 && (w->masks[i] != mask || w->lanes[i]->run != mine->run))
            fail("lanes of a warp meet at different instructions");
    mine->run(w->lanes, mask);
    w->meeting &= ~mask;
    set_ready(b, warp_of(b), mask & ~lane_bit(b));
}

/* ---- what lanes do together ---- */

void sync_warp(uint32_t mask) {
    meeting mine = {[](meeting *const *, uint32_t) {}};
    meet(&mine, mask);
}

struct exchange_part : meeting {
    uint64_t value, result;
    int from;
};

static void run_exchange(meeting *const lanes[LANES], uint32_t mask) {
    for (int i = 0; i < LANES; i++) {
        if (!(mask >> i & 1)) continue;
        exchange_part *part = (exchange_part *)lanes[i];
        const int from = part->from % LANES;
        if (!(mask >> from & 1)) fail("a lane reads from one that is not there");
        part->result = ((exchange_part *)lanes[from])->value;
    }
}

uint64_t exchange(uint32_t mask, uint64_t value, int from) {
    exchange_part mine = {{run_exchange}, value, 0, from};
    meet(&mine, mask);
    return mine.result;
}

struct ballot_part : meeting {
    bool vote;
    uint32_t result;
};

static void run_ballot(meeting *const lanes[LANES], uint32_t mask) {
    uint32_t votes = 0;
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) votes |= (uint32_t)((ballot_part *)lanes[i])->vote << i;
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) ((ballot_part *)lanes[i])->result = votes;
}

uint32_t ballot(uint32_t mask, bool vote) {
    ballot_part mine = {{run_ballot}, vote, 0};
    meet(&mine, mask);
    return mine.result;
}

struct mma_part : meeting {
    float *c;
    const uint32_t *a, *b;
};

/* The lower or upper half of a register. */
static float half_of(uint32_t pair, int upper) {
    const uint32_t bits = upper ? pair & 0xffff0000u : pair << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Lane 4g + t has rows g and g + 8 of a and c, and column g of b. */
static void run_mma(meeting *const lanes[LANES], uint32_t) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < LANES; lane++) {
        const mma_part *part = (const mma_part *)lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i++)
            a[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = half_of(part->a[i / 2], i % 2);
        for (int i = 0; i < 4; i++)
            b[2 * t + i / 2 * 8 + i % 2][g] = half_of(part->b[i / 2], i % 2);
        for (int i = 0; i < 4; i++) c[g + i / 2 * 8][2 * t + i % 2] = part->c[i];
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int col = 0; col < 8; col++) c[row][col] += a[row][k] * b[k][col];
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++)
            ((mma_part *)lanes[lane])->c[i] = c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    mma_part mine = {{run_mma}, c, a, b};
    meet(&mine, ~0u);
}

struct matrices_part : meeting {
    const void *row;
    uint32_t *m;
    bool turned;
};

/* Lane l's register i has, of matrix i, row l / 4 and columns 2 (l % 4) and one more; of the turned
 * one, column l / 4 and those rows. */
static void run_load_matrices(meeting *const lanes[LANES], uint32_t) {
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < 4; i++) {
            matrices_part *part = (matrices_part *)lanes[l];
            uint16_t v[2];
            for (int j = 0; j < 2; j++) {
                const int along = 2 * (l % 4) + j, row = part->turned ? along : l / 4;
                const void *from = ((matrices_part *)lanes[8 * i + row])->row;
                v[j] = ((const uint16_t *)from)[part->turned ? l / 4 : along];
            }
            part->m[i] = (uint32_t)v[1] << 16 | v[0];
        }
}

void load_matrices(uint32_t m[4], const void *row, bool turned) {
    if ((uintptr_t)row % 16 != 0) fail("a row of a matrix is not aligned");
    matrices_part mine = {{run_load_matrices}, row, m, turned};
    meet(&mine, ~0u);
}

/* ---- copies ---- */

static fiber *this_fiber() {
    return &here->fibers[(size_t)here->current];
}

void copy_async(void *to, const void *from, int bytes) {
    if ((uintptr_t)to % (uintptr_t)bytes != 0 || (uintptr_t)from % (uintptr_t)bytes != 0)
        fail("a copy is not aligned");
    memset(to, UNWRITTEN, (size_t)bytes);
    this_fiber()->copies.push_back({to, from, bytes, this_fiber()->groups});
}

void commit_copies() {
    this_fiber()->groups++;
}

void wait_for_copies(int groups) {
    fiber *f = this_fiber();
    size_t n = 0;
    for (; n < f->copies.size() && f->copies[n].group < f->groups - groups; n++) {
        const copy *c = &f->copies[n];
        if (c->from)
            memcpy(c->to, c->from, (size_t)c->bytes);
        else
            memset(c->to, 0, (size_t)c->bytes);
    }
    f->copies.erase(f->copies.begin(), f->copies.begin() + (ptrdiff_t)n);
}

} // namespace emulator
