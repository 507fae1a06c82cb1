// Inner loops in plain C++, for machines without AVX2.
#include <cstring>

#include "cpu.h"
#include "cpu_types.h"

namespace {

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

float to_float(float value) { return value; }
float to_float(Bf16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

float to_float(Fp16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t rest = value.bits & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest << 13));  // inf, NaN
    // The exponent bias differs by 112; multiplying also makes subnormals right.
    const float scaled = from_bits(rest << 13) * from_bits((127u + 112u) << 23);
    return sign ? -scaled : scaled;
}

struct Plain {
    using Row = float;
    static constexpr int kLanes = 8;
    static constexpr int kWide = 16;
    static constexpr int kUnits1 = 4;
    static constexpr int kUnits2 = 2;
    static constexpr int kUnits4 = 1;
    struct Reg {
        float lane[kLanes];
    };
    using Acc = Reg;

    static Acc zero() { return Acc{}; }

    template <class T>
    static Reg load8(const T* from) {
        Reg r;
        for (int i = 0; i < kLanes; ++i) r.lane[i] = to_float(from[i]);
        return r;
    }

    template <class T>
    static void load_weights(const T* from, Reg (&to)[2]) {
        to[0] = load8(from);
        to[1] = load8(from + kLanes);
    }
    static void load_row(const float* from, Reg (&to)[2]) { load_weights(from, to); }
    static void order_bf16(float*) {}

    static Acc load_sums(const float* from) { return load8(from); }
    static void store_sums(float* to, const Acc& r) { std::memcpy(to, r.lane, sizeof(r.lane)); }

    static Acc fma(const Reg& a, const Reg& b, Acc c) {
        for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }

    static float sum(const Acc& a, const Acc& b) {
        Acc r;
        for (int i = 0; i < kLanes; ++i) r.lane[i] = a.lane[i] + b.lane[i];
        return ((r.lane[0] + r.lane[4]) + (r.lane[2] + r.lane[6])) +
               ((r.lane[1] + r.lane[5]) + (r.lane[3] + r.lane[7]));
    }

    template <class T>
    static void widen8(const T* from, float* to) {
        for (int i = 0; i < 8; ++i) to[i] = to_float(from[i]);
    }
};

}  // namespace

#include "cpu_float.inl"

const step::CpuKernels* step::cpu_kernels_plain() {
    static const CpuKernels kernels{"plain", dot<Plain>, prepare<Plain>, nullptr};
    return &kernels;
}
