// The op on CUDA: one launch. Every block classifies the batch and writes the results of its share
// of the rows without a step; without an active row it returns. Otherwise each block computes
// kUnitsPerBlock hidden units for all active rows, so W1 leaves device memory once, and the block
// that arrives last adds the blocks' shares in a fixed order and stores.
//
// The code also compiles as C++ against tests/simt/include, which runs it thread by thread.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda.h"
#include "rows.h"

namespace step {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int kMaxTile = 8;  // active rows that share one pass over the block's slice of W1
constexpr int kVector = 8;   // elements a thread takes at a time
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks that must fit on a multiprocessor, which limits the registers: two, because some GPUs have
// fewer multiprocessors than there are blocks. For Blackwell the compiler would spill then, and its
// larger GPUs have more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMinBlocks = 1;
#else
constexpr int kMinBlocks = 2;
#endif

struct Shared {
    uint16_t active[kMaxRows];                          // rows of the batch, ascending
    int warp_count[kWarps];                             // active rows found by each warp
    float warp_sum[kWarps][kMaxTile * kUnitsPerBlock];  // [warp][row of the tile * unit]
    bool is_last;                                       // this block arrived last
};
static_assert(kMaxRows <= 65536, "Shared::active holds 16-bit row numbers");
static_assert(kMaxTile * kUnitsPerBlock <= kWarp, "one warp finishes a tile");

// Eight elements as loaded, widened only when used: registers are what limits loads in flight.
template <DType kType>
struct Packed {
    uint4 bits;
    __device__ __forceinline__ void widen(float (&v)[kVector]) const {
        const unsigned word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kType == DType::kBFloat16) {
                v[2 * i] = __uint_as_float(word[i] << 16);
                v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
            } else {
                v[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(word[i])));
                v[2 * i + 1] =
                    __half2float(__ushort_as_half(static_cast<unsigned short>(word[i] >> 16)));
            }
        }
    }
};

template <>
struct Packed<DType::kFloat32> {
    float4 low, high;
    __device__ __forceinline__ void widen(float (&v)[kVector]) const {
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
};

// `from` is 16-byte aligned.
template <DType kType>
__device__ __forceinline__ Packed<kType> load_vector(const void* from, int64_t element) {
    Packed<kType> packed;
    if constexpr (kType == DType::kFloat32) {
        const float4* p =
            reinterpret_cast<const float4*>(static_cast<const float*>(from) + element);
        packed.low = __ldg(p);
        packed.high = __ldg(p + 1);
    } else {
        packed.bits = __ldg(
            reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(from) + element));
    }
    return packed;
}

// For rows of `hidden` whose stride or start is no multiple of 16 bytes.
template <DType kType>
__device__ __forceinline__ Packed<kType> load_elements(const void* from, int64_t element) {
    Packed<kType> packed;
    if constexpr (kType == DType::kFloat32) {
        const float* p = static_cast<const float*>(from) + element;
        packed.low = make_float4(__ldg(p), __ldg(p + 1), __ldg(p + 2), __ldg(p + 3));
        packed.high = make_float4(__ldg(p + 4), __ldg(p + 5), __ldg(p + 6), __ldg(p + 7));
    } else {
        const unsigned short* p = static_cast<const unsigned short*>(from) + element;
        unsigned word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = static_cast<unsigned>(__ldg(p + 2 * i)) |
                      static_cast<unsigned>(__ldg(p + 2 * i + 1)) << 16;
        }
        packed.bits = make_uint4(word[0], word[1], word[2], word[3]);
    }
    return packed;
}

// Sums v[i] over the warp for every i at once; lane l returns the sum of v[l / (32 / N)]. Each
// halving sends away the half that the partner keeps. The additions of one i form the same tree for
// every N.
template <int N>
__device__ __forceinline__ float warp_sums(float (&v)[N], int lane) {
    static_assert(N >= 1 && N <= kWarp && (N & (N - 1)) == 0, "N must be a power of two");
    int kept = N;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        if (kept > 1) {
            kept /= 2;
            const bool upper = (lane & distance) != 0;
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                if (i >= kept) break;
                const float sent = upper ? v[i] : v[i + kept];
                const float mine = upper ? v[i + kept] : v[i];
                v[i] = mine + __shfl_xor_sync(kAllLanes, sent, distance);
            }
        } else {
            v[0] += __shfl_xor_sync(kAllLanes, v[0], distance);
        }
    }
    return v[0];
}

// What a row without a step leaves behind. No block reads what this writes: a think-end row's
// `thinking` is read by no row, and slots are distinct.
__device__ void store_no_step(const Params& p, int i, const Row& row) {
    if (row.kind == RowKind::kThinkEnd) p.thinking[row.slot] = 0;
    p.out[2 * i] = __int_as_float(0x7fffffff);  // NaN
    p.out[2 * i + 1] = row.kind == RowKind::kPadding ? 0.0f : p.score_sum[row.slot];
}

// Fills Shared::active; the same in every block. Returns the number of active rows. Of the other
// rows each block stores every gridDim.x-th.
__device__ int find_active(const Params& p, Shared& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarp;
    const int warp = thread / kWarp;
    int total = 0;
    for (int first = 0; first < p.num_rows; first += kThreads) {
        const int i = first + thread;
        bool active = false;
        if (i < p.num_rows) {
            const Row row = classify(p, i);
            active = row.kind == RowKind::kStep;
            if (!active && i % gridDim.x == blockIdx.x) store_no_step(p, i, row);
        }
        const unsigned votes = __ballot_sync(kAllLanes, active);
        if (lane == 0) shared.warp_count[warp] = __popc(votes);
        __syncthreads();
        int before = 0;
        int found = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const int count = shared.warp_count[w];
            before += w < warp ? count : 0;
            found += count;
        }
        const int rank = __popc(votes & ((1u << lane) - 1u));
        if (active) shared.active[total + before + rank] = static_cast<uint16_t>(i);
        total += found;
        __syncthreads();
    }
    return total;
}

// This block's share of the logits of kRows active rows, starting with number `first`.
template <DType kHidden, DType kWeight, int kRows>
__device__ __forceinline__ void score_tile(const Params& p, Shared& shared, int first,
                                           bool aligned) {
    constexpr int kSums = kRows * kUnitsPerBlock;
    constexpr int kRowsAtOnce = kRows < 4 ? kRows : 4;  // more would not fit the registers
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarp;
    const int warp = thread / kWarp;
    const int unit = static_cast<int>(blockIdx.x) * kUnitsPerBlock;

    int64_t start[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        start[r] = token_of(p, shared.active[first + r]) * p.hidden_stride;
    }
    // Fetched before the loop, used after it, by the lanes that finish the tile.
    float b1 = 0.0f, w2 = 0.0f;
    if (warp == 0 && lane < kSums) {
        b1 = __ldg(p.b1 + unit + lane % kUnitsPerBlock);
        w2 = __ldg(p.w2 + unit + lane % kUnitsPerBlock);
    }
    float sum[kSums] = {};
    for (int k = thread * kVector; k < p.dim; k += kThreads * kVector) {
        Packed<kWeight> w[kUnitsPerBlock];
#pragma unroll
        for (int u = 0; u < kUnitsPerBlock; ++u) {
            w[u] = load_vector<kWeight>(p.w1, static_cast<int64_t>(unit + u) * p.dim + k);
        }
#pragma unroll
        for (int first_row = 0; first_row < kRows; first_row += kRowsAtOnce) {
            Packed<kHidden> h[kRowsAtOnce];
#pragma unroll
            for (int r = 0; r < kRowsAtOnce; ++r) {
                const int64_t element = start[first_row + r] + k;
                h[r] = aligned ? load_vector<kHidden>(p.hidden, element)
                               : load_elements<kHidden>(p.hidden, element);
            }
#pragma unroll
            for (int u = 0; u < kUnitsPerBlock; ++u) {
                float weight[kVector];
                w[u].widen(weight);
#pragma unroll
                for (int r = 0; r < kRowsAtOnce; ++r) {
                    float value[kVector];
                    h[r].widen(value);
                    float& s = sum[(first_row + r) * kUnitsPerBlock + u];
#pragma unroll
                    for (int i = 0; i < kVector; ++i) s = fmaf(weight[i], value[i], s);
                }
            }
        }
    }

    const float total = warp_sums(sum, lane);
    constexpr int kLanesPerSum = kWarp / kSums;
    if (lane % kLanesPerSum == 0) shared.warp_sum[warp][lane / kLanesPerSum] = total;
    __syncthreads();
    if (warp == 0) {
        float share = 0.0f;
        if (lane < kSums) {
            float a = b1;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) a += shared.warp_sum[w][lane];
            share = w2 * (a < 0.0f ? 0.0f : a);  // NaN stays NaN
        }
#pragma unroll
        for (int distance = kUnitsPerBlock / 2; distance > 0; distance /= 2) {
            share += __shfl_xor_sync(kAllLanes, share, distance);
        }
        if (lane < kSums && lane % kUnitsPerBlock == 0) {
            float* shares = reinterpret_cast<float*>(p.workspace + kWorkspaceHeader);
            const int64_t row = first + lane / kUnitsPerBlock;
            shares[row * gridDim.x + blockIdx.x] = share;
        }
    }
    __syncthreads();
}

template <DType kHidden, DType kWeight>
__device__ void score_rows(const Params& p, Shared& shared, int num_active) {
    const int bytes = kHidden == DType::kFloat32 ? 4 : 2;
    const bool aligned =
        reinterpret_cast<uintptr_t>(p.hidden) % 16 == 0 && p.hidden_stride * bytes % 16 == 0;
    // Eight float32 rows would not fit the registers.
    constexpr int kTile = kHidden == DType::kFloat32 ? kMaxTile / 2 : kMaxTile;
    int first = 0;
    for (; first + kTile <= num_active; first += kTile) {
        score_tile<kHidden, kWeight, kTile>(p, shared, first, aligned);
    }
    if (num_active - first >= 4) {
        score_tile<kHidden, kWeight, 4>(p, shared, first, aligned);
        first += 4;
    }
    if (num_active - first >= 2) {
        score_tile<kHidden, kWeight, 2>(p, shared, first, aligned);
        first += 2;
    }
    if (num_active - first >= 1) score_tile<kHidden, kWeight, 1>(p, shared, first, aligned);
}

// True in the block that arrives last, which then sees what every block wrote.
__device__ bool arrive(const Params& p, Shared& shared) {
    if (threadIdx.x == 0) {
        // The barrier gave this thread the block's shares; the fence passes them on with the count.
        // A fence in the threads that wrote them would not: it must stand between barrier and
        // count.
        __threadfence();
        // Wraps to 0 at the last block, so the counter is ready for the next launch.
        unsigned* counter = reinterpret_cast<unsigned*>(p.workspace);
        shared.is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();  // before the other blocks' shares are read
    }
    __syncthreads();
    return shared.is_last;
}

__device__ void store_logit(const Params& p, int row, float logit) {
    const int64_t slot = p.slot_ids[row];
    float score = __int_as_float(0x7f800000);  // infinity: a step, but without a score
    if (isfinite(logit)) {
        score = 1.0f / (1.0f + expf(-logit));
        p.score_sum[slot] += score;
        p.num_steps[slot] += 1;
    }
    p.out[2 * row] = score;
    p.out[2 * row + 1] = p.score_sum[slot];
}

// Writes what the steps leave behind; runs in one block, after all blocks have classified.
__device__ void finish(const Params& p, const Shared& shared, int num_active) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarp;
    const int blocks = static_cast<int>(gridDim.x);
    const float b2 = __ldg(p.b2);
    const float* shares = reinterpret_cast<const float*>(p.workspace + kWorkspaceHeader);
    for (int a = thread / kWarp; a < num_active; a += kWarps) {
        float sum = 0.0f;
        for (int b = lane; b < blocks; b += kWarp) {
            sum += __ldcg(shares + static_cast<int64_t>(a) * blocks + b);
        }
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            sum += __shfl_xor_sync(kAllLanes, sum, distance);
        }
        if (lane == 0) store_logit(p, shared.active[a], sum + b2);
    }
}

template <DType kHidden, DType kWeight>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    step_score_kernel(const __grid_constant__ Params p) {
    __shared__ Shared shared;
    const int num_active = find_active(p, shared);
    if (num_active == 0) return;
    score_rows<kHidden, kWeight>(p, shared, num_active);
    if (arrive(p, shared)) finish(p, shared, num_active);
}

template <DType kHidden>
void (*kernel_for(DType weight))(Params) {
    return weight == DType::kBFloat16 ? step_score_kernel<kHidden, DType::kBFloat16>
                                      : step_score_kernel<kHidden, DType::kFloat32>;
}

void (*kernel_for(DType hidden, DType weight))(Params) {
    switch (hidden) {
        case DType::kBFloat16:
            return kernel_for<DType::kBFloat16>(weight);
        case DType::kFloat16:
            return kernel_for<DType::kFloat16>(weight);
        default:
            return kernel_for<DType::kFloat32>(weight);
    }
}

}  // namespace

const char* step_score_cuda(const Params& params, void* stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(params.hidden_units / kUnitsPerBlock));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error =
        cudaLaunchKernelEx(&config, kernel_for(params.hidden_dtype, params.w1_dtype), params);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace step
