// Runs device code on the CPU, thread by thread: a fiber per CUDA thread, an OS thread per block
// that is in flight. Fibers change hands only at barriers, warp operations, atomics and fences, in
// an order the schedule chooses.
//
// ThreadSanitizer is told of exactly the orderings CUDA promises: barriers within a block; between
// blocks a fence, then an atomic, then an atomic that reads it, then a fence. Warp shuffles and the
// emulation's own switches order nothing, so code that leans on them for ordering is reported even
// where it happens to give the right answer.
#pragma once

#include <cstdint>

namespace simt {

enum class ThreadOrder : int32_t { kAscending, kDescending, kRandom };

struct Schedule {
    const int32_t* block_order;  // a permutation of the blocks, or null = all at once
    ThreadOrder thread_order;
    uint64_t seed;
};

void set_schedule(const Schedule& schedule);

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
    Dim3() = default;
    explicit Dim3(unsigned x_) : x(x_) {}
};

// Runs body(ctx) once for every thread of the grid.
void launch(unsigned blocks, unsigned threads, void (*body)(void* ctx), void* ctx);

void barrier();
void fence();

// Around a relaxed atomic on `address`; other threads' atomics wait in between.
void atomic_begin();
void atomic_end(void* address);

// All 32 lanes give a value; returns a pointer to the 32 values, valid until the lane's next call.
const uint32_t* warp_exchange(unsigned mask, uint32_t value);

[[noreturn]] void fail(const char* message);

}  // namespace simt

extern thread_local simt::Dim3 threadIdx, blockIdx, blockDim, gridDim;
