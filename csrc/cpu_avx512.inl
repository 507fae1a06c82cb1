// What the AVX-512 vector types share: float32 sums and the shape of the tiles. Included like
// cpu_dot.inl.
#include <immintrin.h>

namespace {

struct Avx512Sums {
    using Acc = __m512;
    static constexpr int kLanes = 16;
    static constexpr int kUnits1 = 4;
    static constexpr int kUnits2 = 4;
    static constexpr int kUnits4 = 2;

    static Acc zero() { return _mm512_setzero_ps(); }
    static Acc load_sums(const float* from) { return _mm512_loadu_ps(from); }
    static void store_sums(float* to, Acc r) { _mm512_storeu_ps(to, r); }
    static float sum(Acc a, Acc b) { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }

    // Keeps a row's values in registers: GCC would load them again for every unit they meet, and
    // loads are what is scarce.
    template <class Reg>
    static void hold(Reg (&values)[2]) {
        __asm__("" : "+v"(values[0]), "+v"(values[1]));
    }
};

}  // namespace
