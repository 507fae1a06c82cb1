// Inner loops for AVX2 with FMA and F16C. Compiled with those flags; called only where they exist.
#include "cpu.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include "cpu_types.h"

namespace {

struct Avx2 {
    using Row = float;
    using Reg = __m256;
    using Acc = __m256;
    static constexpr int kLanes = 8;
    static constexpr int kWide = 16;
    static constexpr int kUnits1 = 4;
    static constexpr int kUnits2 = 2;
    static constexpr int kUnits4 = 1;

    static Acc zero() { return _mm256_setzero_ps(); }
    static Acc load_sums(const float* from) { return _mm256_loadu_ps(from); }
    static void store_sums(float* to, Acc r) { _mm256_storeu_ps(to, r); }

    static Reg load8(const float* from) { return _mm256_loadu_ps(from); }
    static Reg load8(const Bf16* from) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static Reg load8(const Fp16* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }

    static void load_row(const float* from, Reg (&to)[2]) {
        to[0] = _mm256_loadu_ps(from);
        to[1] = _mm256_loadu_ps(from + kLanes);
    }
    static void load_weights(const float* from, Reg (&to)[2]) { load_row(from, to); }
    // The even elements, then the odd ones: one operation each, where memory order takes two.
    static void load_weights(const Bf16* from, Reg (&to)[2]) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
        to[1] = _mm256_castsi256_ps(_mm256_and_si256(bits, high));
    }
    static void order_bf16(float* v) {
        const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
        const __m256 a = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), even);
        const __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v + kLanes), even);
        _mm256_storeu_ps(v, _mm256_permute2f128_ps(a, b, 0x20));
        _mm256_storeu_ps(v + kLanes, _mm256_permute2f128_ps(a, b, 0x31));
    }

    static Acc fma(Reg a, Reg b, Acc c) { return _mm256_fmadd_ps(a, b, c); }
    static float sum(Acc a, Acc b) {
        const __m256 r = _mm256_add_ps(a, b);
        __m128 v = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
        v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
    }

    template <class T>
    static void widen8(const T* from, float* to) {
        _mm256_storeu_ps(to, load8(from));
    }
};

}  // namespace

#include "cpu_float.inl"

const step::CpuKernels* step::cpu_kernels_avx2() {
    static const CpuKernels kernels{"avx2", dot<Avx2>, prepare<Avx2>, nullptr};
    return &kernels;
}

#else

const step::CpuKernels* step::cpu_kernels_avx2() { return nullptr; }

#endif
