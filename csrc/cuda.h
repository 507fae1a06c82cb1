// The CUDA side of the op.
#pragma once

#include <cstdint>

#include "params.h"

namespace step {

constexpr int kUnitsPerBlock = 4;    // hidden units one thread block computes
constexpr int kWorkspaceHeader = 1;  // the arrival counter

constexpr int64_t workspace_size(int64_t num_rows) {
    return kWorkspaceHeader + num_rows * (kHiddenUnits / kUnitsPerBlock);
}

// Enqueues one kernel on `stream` (a cudaStream_t). Returns null, or what CUDA says went wrong.
const char* step_score_cuda(const Params& params, void* stream);

}  // namespace step
