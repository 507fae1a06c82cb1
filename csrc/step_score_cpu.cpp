// The op on the CPU: classify the rows, multiply the active ones by W1, finish and store.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu.h"
#include "rows.h"

namespace step {
namespace {

constexpr int32_t kRowsPerPass = 64;    // active rows that share one pass over W1
constexpr int32_t kUnitsPerChunk = 16;  // hidden units in the smallest piece of parallel work
// Multiply-adds below which waking other threads costs more than they save (about 50 microseconds
// of one thread's work).
constexpr int64_t kParallelWork = 1 << 20;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct ActiveRow {
    int32_t index;  // row of the batch
    int64_t slot;
    int64_t token;
};

// Kept between calls: a decode step should not pay for an allocation.
struct Scratch {
    std::vector<ActiveRow> active;
    std::vector<float> rows;  // [kRowsPerPass, dim], or bfloat16 in half of it
    std::vector<float> z;     // [kRowsPerPass, hidden_units]
};

const void* hidden_row(const Params& p, int64_t token) {
    const int64_t offset = token * p.hidden_stride;
    if (p.hidden_dtype == DType::kFloat32) return static_cast<const float*>(p.hidden) + offset;
    return static_cast<const uint16_t*>(p.hidden) + offset;
}

// b2 + w2 . relu(z + b1), in eight partial sums whose order never changes.
float logit(const Params& p, const float* z) {
    constexpr int kParts = 8;
    float part[kParts] = {};
    for (int32_t j = 0; j < p.hidden_units; j += kParts) {
        for (int i = 0; i < kParts; ++i) {
            const float a = z[j + i] + p.b1[j + i];
            part[i] += p.w2[j + i] * (a < 0.0f ? 0.0f : a);  // NaN stays NaN
        }
    }
    float sum = p.b2[0];
    for (float value : part) sum += value;
    return sum;
}

void finish_row(const Params& p, const ActiveRow& row, const float* z) {
    const float x = logit(p, z);
    float* out = p.out + 2 * static_cast<int64_t>(row.index);
    out[0] = kInfinity;  // a step, but its hidden state has no score
    if (std::isfinite(x)) {
        out[0] = 1.0f / (1.0f + std::exp(-x));
        p.score_sum[row.slot] += out[0];
        p.num_steps[row.slot] += 1;
    }
    out[1] = p.score_sum[row.slot];
}

void find_active(const Params& p, std::vector<ActiveRow>& active) {
    active.clear();
    for (int32_t i = 0; i < p.num_rows; ++i) {
        const Row row = classify(p, i);
        float* out = p.out + 2 * static_cast<int64_t>(i);
        out[0] = kNaN;
        out[1] = row.kind == RowKind::kPadding ? 0.0f : p.score_sum[row.slot];
        if (row.kind == RowKind::kThinkEnd) p.thinking[row.slot] = 0;
        if (row.kind == RowKind::kStep) active.push_back({i, row.slot, row.token});
    }
}

void grow(std::vector<float>& v, size_t size) {
    if (v.size() < size) v.resize(size);
}

void score_pass(const Params& p, const CpuKernels& kernels, const ActiveRow* active, int32_t count,
                Scratch& scratch, ParallelFor parallel_for) {
    grow(scratch.rows, static_cast<size_t>(count) * p.dim);
    grow(scratch.z, static_cast<size_t>(count) * p.hidden_units);
    const bool in_bf16 = kernels.dot_bf16 != nullptr && p.hidden_dtype == DType::kBFloat16 &&
                         p.w1_dtype == DType::kBFloat16;
    for (int32_t r = 0; r < count; ++r) {
        const void* row = hidden_row(p, active[r].token);
        const int64_t offset = static_cast<int64_t>(r) * p.dim;
        if (in_bf16) {
            std::memcpy(reinterpret_cast<uint16_t*>(scratch.rows.data()) + offset, row,
                        sizeof(uint16_t) * p.dim);
        } else {
            kernels.prepare(row, p.hidden_dtype, p.w1_dtype, scratch.rows.data() + offset, p.dim);
        }
    }

    struct Work {
        DotTask task;
        void (*dot)(const DotTask&);
    } work{{scratch.rows.data(), p.w1, scratch.z.data(), count, p.dim, p.hidden_units, 0, 0,
            p.w1_dtype},
           in_bf16 ? kernels.dot_bf16 : kernels.dot};
    const auto run_chunks = [](void* ctx, int64_t begin, int64_t end) {
        const Work& work = *static_cast<const Work*>(ctx);
        DotTask task = work.task;
        task.unit_begin = static_cast<int32_t>(begin) * kUnitsPerChunk;
        task.unit_end = static_cast<int32_t>(end) * kUnitsPerChunk;
        work.dot(task);
    };
    const int64_t chunks = p.hidden_units / kUnitsPerChunk;
    if (static_cast<int64_t>(count) * p.dim * p.hidden_units < kParallelWork) {
        run_chunks(&work, 0, chunks);
    } else {
        parallel_for(chunks, run_chunks, &work);
    }

    for (int32_t r = 0; r < count; ++r) {
        finish_row(p, active[r], scratch.z.data() + static_cast<int64_t>(r) * p.hidden_units);
    }
}

bool machine_has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

bool machine_has_avx512() {
#if defined(__x86_64__)
    return machine_has_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

bool machine_has_avx512_bf16() {
#if defined(__x86_64__)
    return machine_has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

const CpuKernels& choose_kernels() {
    const CpuKernels* candidates[] = {
        machine_has_avx512_bf16() ? cpu_kernels_avx512_bf16() : nullptr,
        machine_has_avx512() ? cpu_kernels_avx512() : nullptr,
        machine_has_avx2() ? cpu_kernels_avx2() : nullptr, cpu_kernels_plain()};
    const char* wanted = std::getenv("STEP_CPU_ISA");
    const CpuKernels* best = nullptr;
    for (const CpuKernels* kernels : candidates) {
        if (kernels == nullptr) continue;
        if (best == nullptr) best = kernels;
        if (wanted != nullptr && std::strcmp(wanted, kernels->name) == 0) return *kernels;
    }
    return *best;
}

}  // namespace

const CpuKernels& cpu_kernels() {
    static const CpuKernels& kernels = choose_kernels();
    return kernels;
}

void step_score_cpu(const Params& params, ParallelFor parallel_for) {
    thread_local Scratch scratch;
    find_active(params, scratch.active);
    const int32_t count = static_cast<int32_t>(scratch.active.size());
    for (int32_t first = 0; first < count; first += kRowsPerPass) {
        const int32_t rows = count - first < kRowsPerPass ? count - first : kRowsPerPass;
        score_pass(params, cpu_kernels(), scratch.active.data() + first, rows, scratch,
                   parallel_for);
    }
}

}  // namespace step
