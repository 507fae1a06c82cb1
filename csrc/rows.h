// The rule that says what a row of the batch is. One text for CPU and CUDA, so they cannot
// disagree.
#pragma once

#include "params.h"

#ifdef __CUDACC__
#define STEP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define STEP_HOST_DEVICE inline
#endif

namespace step {

enum class RowKind : int32_t {
    kPadding,   // no slot, or a row that does not exist
    kNotAStep,  // a slot, but no scored step ends at this token
    kThinkEnd,  // scored positions end here
    kStep,      // a scored step ends here
};

struct Row {
    RowKind kind;
    int64_t slot;
    int64_t token;  // row of hidden
};

STEP_HOST_DEVICE bool is_boundary(const Params& p, int64_t id) {
    if (id < 0 || (id >> 5) >= p.num_words) return false;
    return (static_cast<uint32_t>(p.boundary[id >> 5]) >> (id & 31)) & 1u;
}

STEP_HOST_DEVICE int64_t token_of(const Params& p, int32_t i) {
    return p.row_index == nullptr ? i : p.row_index[i];
}

STEP_HOST_DEVICE Row classify(const Params& p, int32_t i) {
    Row row{RowKind::kPadding, p.slot_ids[i], token_of(p, i)};
    if (row.slot < 0 || row.slot >= p.num_slots) return row;
    if (row.token < 0 || row.token >= p.num_tokens) return row;

    // Two levels of loads, none of which waits for another of its level: on CUDA the time of a call
    // without a step is the length of this chain.
    const int64_t id = p.input_ids[row.token];
    const int64_t position = p.positions[row.token];

    const bool has_think_end = p.think_end_id >= 0;
    const bool ends_thinking = has_think_end && id == p.think_end_id;
    const bool boundary = is_boundary(p, id);
    const int32_t from = p.score_from[row.slot];
    // A think-end row must not read `thinking`: on CUDA another block may be clearing it.
    const bool thinks = !has_think_end || ends_thinking || p.thinking[row.slot] != 0;

    row.kind = RowKind::kNotAStep;
    if (position < from) return row;
    if (ends_thinking) {
        row.kind = RowKind::kThinkEnd;
    } else if (boundary && thinks) {
        row.kind = RowKind::kStep;
    }
    return row;
}

}  // namespace step
