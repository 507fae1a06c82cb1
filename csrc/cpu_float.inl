// The kernels that multiply in float32, over a vector type V as in cpu_dot.inl with Row = float and
//   order_bf16(float*)         puts kWide floats into the order of load_weights(const Bf16*)
//   widen8(const T*, float*)   8 elements of a hidden state as floats
#include "cpu_dot.inl"

namespace {

template <class V>
void dot(const step::DotTask& t) {
    if (t.w1_dtype == step::DType::kBFloat16) {
        dot_typed<V, Bf16>(t);
    } else {
        dot_typed<V, float>(t);
    }
}

template <class V, class From>
inline void prepare_typed(const From* from, step::DType w1_dtype, float* to, int32_t dim) {
    for (int32_t k = 0; k < dim; k += 8) V::widen8(from + k, to + k);
    if (w1_dtype != step::DType::kBFloat16) return;
    for (int32_t k = 0; k + V::kWide <= dim; k += V::kWide) V::order_bf16(to + k);
}

template <class V>
void prepare(const void* from, step::DType dtype, step::DType w1_dtype, void* to, int32_t dim) {
    float* row = static_cast<float*>(to);
    if (dtype == step::DType::kBFloat16) {
        prepare_typed<V>(static_cast<const Bf16*>(from), w1_dtype, row, dim);
    } else if (dtype == step::DType::kFloat16) {
        prepare_typed<V>(static_cast<const Fp16*>(from), w1_dtype, row, dim);
    } else {
        prepare_typed<V>(static_cast<const float*>(from), w1_dtype, row, dim);
    }
}

}  // namespace
