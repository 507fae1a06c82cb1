// Inner loops for AVX-512 (F, BW, VL). Compiled with those flags; called only where they exist.
#include "cpu.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include "cpu_avx512.inl"
#include "cpu_types.h"

namespace {

struct Avx512 : Avx512Sums {
    using Row = float;
    using Reg = __m512;
    static constexpr int kWide = 32;

    static Reg load8(const float* from) { return _mm512_maskz_loadu_ps(0xff, from); }
    static Reg load8(const Bf16* from) {
        const __m256i bits = _mm256_zextsi128_si256(_mm_loadu_si128(as_128(from)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }

    static void load_weights(const float* from, Reg (&to)[2]) {
        to[0] = _mm512_loadu_ps(from);
        to[1] = _mm512_loadu_ps(from + kLanes);
    }
    static void load_row(const float* from, Reg (&to)[2]) {
        load_weights(from, to);
        hold(to);
    }
    // The even elements, then the odd ones: one operation each, where memory order takes two.
    static void load_weights(const Bf16* from, Reg (&to)[2]) {
        const __m512i bits = _mm512_loadu_si512(from);
        const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        to[1] = _mm512_castsi512_ps(_mm512_and_si512(bits, high));
    }
    static void order_bf16(float* v) {
        const __m512i even =
            _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const __m512i odd =
            _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        Reg in[2];
        load_row(v, in);
        _mm512_storeu_ps(v, _mm512_permutex2var_ps(in[0], even, in[1]));
        _mm512_storeu_ps(v + kLanes, _mm512_permutex2var_ps(in[0], odd, in[1]));
    }

    static Acc fma(Reg a, Reg b, Acc c) { return _mm512_fmadd_ps(a, b, c); }

    static void widen8(const float* from, float* to) {
        _mm256_storeu_ps(to, _mm256_loadu_ps(from));
    }
    static void widen8(const Bf16* from, float* to) {
        _mm256_storeu_ps(to, _mm512_castps512_ps256(load8(from)));
    }
    static void widen8(const Fp16* from, float* to) {
        _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(as_128(from))));
    }

  private:
    static const __m128i* as_128(const void* p) { return static_cast<const __m128i*>(p); }
};

}  // namespace

#include "cpu_float.inl"

const step::CpuKernels* step::cpu_kernels_avx512() {
    static const CpuKernels kernels{"avx512", dot<Avx512>, prepare<Avx512>, nullptr};
    return &kernels;
}

#else

const step::CpuKernels* step::cpu_kernels_avx512() { return nullptr; }

#endif
