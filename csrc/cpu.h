// The CPU side of the op: an entry point, and the inner loops that exist once per instruction set.
#pragma once

#include <cstdint>

#include "params.h"

namespace step {

// Calls body(ctx, begin, end) on parts of 0..count-1, maybe in parallel.
using ParallelFor = void (*)(int64_t count, void (*body)(void* ctx, int64_t begin, int64_t end),
                             void* ctx);

void step_score_cpu(const Params& params, ParallelFor parallel_for);

// z[r, unit] = w1[unit] . rows[r] for units unit_begin..unit_end-1. The sum of one (row, unit) is
// taken in the same order whatever the number of rows and the split into unit ranges.
struct DotTask {
    const void* rows;  // [num_rows, dim], float as `prepare` wrote them; bfloat16 for `dot_bf16`
    const void* w1;    // [hidden_units, dim] of w1_dtype, any alignment
    float* z;          // [num_rows, hidden_units]
    int32_t num_rows;
    int32_t dim;  // a multiple of 8
    int32_t hidden_units;
    int32_t unit_begin;  // a multiple of 16, as is unit_end
    int32_t unit_end;
    DType w1_dtype;
};

struct CpuKernels {
    const char* name;  // "avx512_bf16", "avx512", "avx2" or "plain"
    void (*dot)(const DotTask& task);
    // Writes one hidden state as float32, in the order in which `dot` meets the weights.
    void (*prepare)(const void* from, DType dtype, DType w1_dtype, void* to, int32_t dim);
    // For bfloat16 rows in memory order and bfloat16 weights. Null: use `prepare` and `dot`.
    void (*dot_bf16)(const DotTask& task);
};

// Null where the compiler did not target the instruction set.
const CpuKernels* cpu_kernels_avx512_bf16();
const CpuKernels* cpu_kernels_avx512();
const CpuKernels* cpu_kernels_avx2();
const CpuKernels* cpu_kernels_plain();

// The best set this machine can run, or the one STEP_CPU_ISA names if the machine has it.
const CpuKernels& cpu_kernels();

}  // namespace step
