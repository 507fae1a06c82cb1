// float16 for the emulation. Stands in for the toolkit's header of the same name.
#pragma once

#include "cuda_runtime.h"

struct __half {
    unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half half) {
    const unsigned sign = static_cast<unsigned>(half.bits & 0x8000u) << 16;
    const unsigned rest = half.bits & 0x7fffu;
    if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest << 13));  // inf, NaN
    // 2^-24 units below the smallest normal number, else a shifted exponent.
    const float size = rest < 0x400u ? static_cast<float>(rest) * 0x1p-24f
                                     : __uint_as_float((rest << 13) + (112u << 23));
    return sign != 0 ? -size : size;
}
