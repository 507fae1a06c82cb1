// The part of the CUDA runtime that the device code uses, for a C++ compiler. Stands in for the
// toolkit's header of the same name.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "simt.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One copy per block. AddressSanitizer guards ordinary statics but not thread-local ones; under it
// blocks run one at a time, so an ordinary static will do.
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

using dim3 = simt::Dim3;
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class To, class From>
To simt_bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float __uint_as_float(unsigned bits) { return simt_bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return simt_bit_cast<float>(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
using std::isfinite;

template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcg(const T* from) {
    return *from;
}

inline void __syncthreads() { simt::barrier(); }
inline void __threadfence() { simt::fence(); }

inline unsigned atomicInc(unsigned* address, unsigned limit) {
    simt::atomic_begin();
    const unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
    __atomic_store_n(address, old >= limit ? 0 : old + 1, __ATOMIC_RELAXED);
    simt::atomic_end(address);
    return old;
}

inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
    const uint32_t* values = simt::warp_exchange(mask, simt_bit_cast<uint32_t>(value));
    return simt_bit_cast<float>(values[(threadIdx.x % 32) ^ static_cast<unsigned>(lane_mask)]);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
    const uint32_t* values = simt::warp_exchange(mask, vote);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) votes |= values[lane] << lane;
    return votes;
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... args) {
    auto call = [&] { kernel(args...); };
    simt::launch(
        config->gridDim.x, config->blockDim.x,
        [](void* ctx) { (*static_cast<decltype(call)*>(ctx))(); }, &call);
    return cudaSuccess;
}
