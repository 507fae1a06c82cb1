// Inner loops for AVX-512 with BF16: bfloat16 states times bfloat16 weights, 32 products at a time,
// summed in float32. Compiled with those flags; called only where they exist.
#include "cpu.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__)

#include "cpu_avx512.inl"
#include "cpu_types.h"

namespace {

struct Avx512Bf16 : Avx512Sums {
    using Row = Bf16;
    using Reg = __m512bh;
    static constexpr int kWide = 64;

    static Reg load8(const Bf16* from) { return (Reg)_mm512_maskz_loadu_epi16(0xff, from); }
    static void load_weights(const Bf16* from, Reg (&to)[2]) {
        to[0] = (Reg)_mm512_loadu_si512(from);
        to[1] = (Reg)_mm512_loadu_si512(from + 32);
    }
    static void load_row(const Bf16* from, Reg (&to)[2]) {
        load_weights(from, to);
        hold(to);
    }

    static Acc fma(Reg a, Reg b, Acc c) { return _mm512_dpbf16_ps(c, a, b); }
};

}  // namespace

#include "cpu_dot.inl"

const step::CpuKernels* step::cpu_kernels_avx512_bf16() {
    const CpuKernels* base = cpu_kernels_avx512();
    if (base == nullptr) return nullptr;
    static const CpuKernels kernels{"avx512_bf16", base->dot, base->prepare,
                                    dot_typed<Avx512Bf16, Bf16>};
    return &kernels;
}

#else

const step::CpuKernels* step::cpu_kernels_avx512_bf16() { return nullptr; }

#endif
