// What one call of the op reads and writes. No torch and no CUDA header: the CPU code, the CUDA
// code and the tests that run device code on the CPU share this file.
#pragma once

#include <cstdint>

namespace step {

constexpr int kHiddenUnits = 512;  // width of the scorer's hidden layer
constexpr int kMaxRows = 4096;     // requests in one batch
constexpr int kMaxDim = 16384;     // width of a hidden state

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct Params {
    const void* hidden;         // [num_tokens, dim] of hidden_dtype
    const int64_t* row_index;   // [num_rows] row of hidden, input_ids and positions; null: row i
                                // is token i
    const int64_t* slot_ids;    // [num_rows] outside 0..num_slots-1 = padding row
    const int64_t* input_ids;   // [num_tokens]
    const int64_t* positions;   // [num_tokens]
    const int32_t* boundary;    // [num_words] bit (id & 31) of word id >> 5
    const int32_t* score_from;  // [num_slots] first position that may be scored
    int32_t* thinking;          // [num_slots]
    float* score_sum;           // [num_slots]
    int32_t* num_steps;         // [num_slots]
    float* out;                 // [num_rows, 2] step score, NaN or infinity; score_sum
    int32_t* workspace;         // [1 + num_rows * hidden_units / kUnitsPerBlock], CUDA only
    const void* w1;             // [hidden_units, dim] of w1_dtype
    const float* b1;            // [hidden_units]
    const float* w2;            // [hidden_units]
    const float* b2;            // [1]

    int64_t hidden_stride;  // elements from one row of hidden to the next
    int64_t num_tokens;
    int64_t num_words;
    int64_t num_slots;
    int64_t think_end_id;  // negative = none
    int32_t num_rows;
    int32_t dim;
    int32_t hidden_units;
    DType hidden_dtype;
    DType w1_dtype;
};

}  // namespace step
