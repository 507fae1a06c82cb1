// The emulation's engine. Compiled without sanitizers, also where the device code has them: it
// tells them what they need to know, and its own bookkeeping is none of their business.
#include "simt.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#ifndef __x86_64__
#error "the emulation switches fibers with x86-64 code"
#endif

#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

#ifdef SIMT_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

// Saves the callee-saved registers and the stack pointer, and continues from another stack.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");

thread_local simt::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kLanes = 32;
constexpr unsigned kNoSync = 1;  // TSan: this switch orders nothing
constexpr unsigned kAtomicsPerBlock = 4;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
    void* stack_pointer;
    char* stack;
    void* fake_stack;  // AddressSanitizer's
    void* tsan;
    State state;
    char fenced;   // stands for what was written before the last fence
    char pending;  // stands for what atomics read, and the next fence will show
};

struct Warp {
    uint32_t incoming[kLanes];
    uint32_t values[kLanes];
    unsigned arrived;
};

struct Grid {
    unsigned blocks, threads;
    void (*body)(void*);
    void* ctx;
};

Schedule schedule{};
char done_order;  // an address that stands for an ordering, for TSan
std::atomic_flag atomic_lock = ATOMIC_FLAG_INIT;

// TSan's fibers: one per thread of the grid, and carriers (see atomic_end). They cost milliseconds
// each, so launches reuse them; what a fiber knows of an earlier launch is known to all anyway.
std::vector<void*> tsan_fibers;

void reserve_tsan_fibers(unsigned blocks, unsigned threads) {
    while (tsan_fibers.size() < static_cast<size_t>(blocks) * (threads + kAtomicsPerBlock)) {
        tsan_fibers.push_back(__tsan_create_fiber(0));
    }
}

// One OS thread's worth of emulation: runs blocks, one at a time.
struct Worker {
    Grid grid;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Fiber* current = nullptr;
    unsigned at_barrier = 0, done = 0, atomics = 0;
    void* const* tsan_of_block = nullptr;
    void* scheduler_stack_pointer = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    void* scheduler_tsan = nullptr;
    uint64_t random;
    char start_order, barrier_order;  // more of them

    explicit Worker(const Grid& g) : grid(g), fibers(g.threads), warps(g.threads / kLanes) {
        for (Fiber& f : fibers) {
            void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (stack == MAP_FAILED) fail("no memory for a fiber's stack");
            f.stack = static_cast<char*>(stack);
        }
    }
    ~Worker() {
        for (Fiber& f : fibers) munmap(f.stack, kStackBytes);
    }

    void run_block(unsigned block);
    void resume(Fiber& fiber);
    void yield(State state);
    Fiber* pick();
    uint64_t next_random() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return random;
    }
};

thread_local Worker* worker = nullptr;

void fiber_main() {
    Worker& w = *worker;
    __sanitizer_finish_switch_fiber(nullptr, &w.scheduler_stack, &w.scheduler_stack_size);
    __tsan_acquire(&w.start_order);
    w.grid.body(w.grid.ctx);
    __tsan_release(&done_order);
    w.yield(State::kDone);
    fail("a finished fiber was resumed");
}

void Worker::resume(Fiber& fiber) {
    current = &fiber;
    threadIdx.x = static_cast<unsigned>(&fiber - fibers.data());
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
    __tsan_switch_to_fiber(fiber.tsan, kNoSync);
    simt_switch(&scheduler_stack_pointer, fiber.stack_pointer);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void Worker::yield(State state) {
    Fiber& self = *current;
    self.state = state;
    __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &self.fake_stack,
                                   scheduler_stack, scheduler_stack_size);
    __tsan_switch_to_fiber(scheduler_tsan, kNoSync);
    simt_switch(&self.stack_pointer, scheduler_stack_pointer);
    __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

Fiber* Worker::pick() {
    const unsigned n = grid.threads;
    const unsigned start = schedule.thread_order == ThreadOrder::kRandom
                               ? static_cast<unsigned>(next_random() % n)
                               : 0;
    for (unsigned i = 0; i < n; ++i) {
        const unsigned t =
            schedule.thread_order == ThreadOrder::kDescending ? n - 1 - i : (start + i) % n;
        if (fibers[t].state == State::kReady) return &fibers[t];
    }
    return nullptr;
}

void Worker::run_block(unsigned block) {
    worker = this;
    blockIdx.x = block;
    blockDim.x = grid.threads;
    gridDim.x = grid.blocks;
    random = (schedule.seed + 1) * 0x9e3779b97f4a7c15ull + block * 2 + 1;
    scheduler_tsan = __tsan_get_current_fiber();
    tsan_of_block = tsan_fibers.data() + block * (grid.threads + kAtomicsPerBlock);
    at_barrier = done = atomics = 0;
    for (Warp& warp : warps) warp.arrived = 0;
    for (Fiber& f : fibers) {
        f.state = State::kReady;
        f.fake_stack = nullptr;
        f.tsan = tsan_of_block[&f - fibers.data()];
        // What simt_switch pops: six registers, then the address it returns to. A function expects
        // the stack to be 8 bytes off a multiple of 16 when it is entered.
        void** top = reinterpret_cast<void**>(f.stack + kStackBytes) - 1;
        *--top = reinterpret_cast<void*>(&fiber_main);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        f.stack_pointer = top;
    }
    __tsan_release(&start_order);
    while (done < grid.threads) {
        Fiber* next = pick();
        if (next == nullptr) fail("deadlock: threads of a block wait for each other");
        resume(*next);
        if (next->state == State::kDone) ++done;
        if (done > 0 && at_barrier > 0) fail("a thread ended while others wait at a barrier");
    }
    __tsan_acquire(&done_order);
}

}  // namespace

void fail(const char* message) {
    std::fprintf(stderr, "simt: %s\n", message);
    std::_Exit(70);
}

void set_schedule(const Schedule& s) { schedule = s; }

void launch(unsigned blocks, unsigned threads, void (*body)(void*), void* ctx) {
    const Grid grid{blocks, threads, body, ctx};
    reserve_tsan_fibers(blocks, threads);
    if (schedule.block_order != nullptr) {
        Worker w(grid);
        for (unsigned i = 0; i < blocks; ++i) {
            w.run_block(static_cast<unsigned>(schedule.block_order[i]));
        }
    } else {
        std::vector<std::thread> threads_of_blocks;
        for (unsigned block = 0; block < blocks; ++block) {
            threads_of_blocks.emplace_back([&grid, block] {
                Worker w(grid);
                w.run_block(block);
            });
        }
        for (std::thread& thread : threads_of_blocks) thread.join();
    }
    __tsan_acquire(&done_order);
}

void barrier() {
    Worker& w = *worker;
    __tsan_release(&w.barrier_order);
    if (++w.at_barrier == w.grid.threads) {
        w.at_barrier = 0;
        for (Fiber& f : w.fibers) f.state = State::kReady;
        w.yield(State::kReady);
    } else {
        w.yield(State::kAtBarrier);
    }
    __tsan_acquire(&w.barrier_order);
}

void fence() {
    Worker& w = *worker;
    w.yield(State::kReady);
    __tsan_acquire(&w.current->pending);
    __tsan_release(&w.current->fenced);
    w.yield(State::kReady);
}

void atomic_begin() {
    worker->yield(State::kReady);
    while (atomic_lock.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
}

void atomic_end(void* address) {
    Worker& w = *worker;
    Fiber& self = *w.current;
    // What an earlier fence published goes to the address, what is at the address will be seen at
    // the next fence. A fiber of its own carries both, so that this thread learns nothing now.
    if (w.atomics == kAtomicsPerBlock) fail("too many atomics in a block");
    __tsan_switch_to_fiber(w.tsan_of_block[w.grid.threads + w.atomics++], kNoSync);
    __tsan_acquire(address);
    __tsan_release(&self.pending);
    __tsan_acquire(&self.fenced);
    __tsan_release(address);
    __tsan_switch_to_fiber(self.tsan, kNoSync);
    atomic_lock.clear(std::memory_order_release);
    w.yield(State::kReady);
}

const uint32_t* warp_exchange(unsigned mask, uint32_t value) {
    Worker& w = *worker;
    const unsigned thread = threadIdx.x;
    Warp& warp = w.warps[thread / kLanes];
    if (mask != 0xffffffffu) fail("only full warp masks are emulated");
    warp.incoming[thread % kLanes] = value;
    if (++warp.arrived == kLanes) {
        warp.arrived = 0;
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            warp.values[lane] = warp.incoming[lane];
            w.fibers[thread / kLanes * kLanes + lane].state = State::kReady;
        }
        w.yield(State::kReady);
    } else {
        w.yield(State::kInWarp);
    }
    return warp.values;
}

}  // namespace simt
