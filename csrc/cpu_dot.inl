// The inner loops, written once over a vector type V. Included by one file per instruction set,
// each compiled with its own flags, so everything here is in an unnamed namespace: an inline
// function that leaked out could be the copy the linker keeps, and run on a machine without the
// instructions.
//
// V multiplies kWide weights by kWide values of a row at a time, in two registers of each:
//   Row                         element of a prepared row: float or Bf16
//   Reg, Acc, kLanes            register of weights or values; of sums; floats in a sum register
//   kUnits1, kUnits2, kUnits4   units of W1 that meet 1, 2 or 4 rows at once
//   zero, fma(Reg, Reg, Acc), load_sums, store_sums
//   sum(Acc, Acc)                 of all floats in both
//   load_weights(const T*, Reg*)  kWide weights: bfloat16 in an order of V's choosing
//   load_row(const Row*, Reg*)    kWide values of a row that `prepare` put into that order
//   load8(const T*)               8 elements in memory order, others 0

namespace {

constexpr int32_t kUnitsPerPass = 16;  // units of W1 that meet a tile of rows before the next tile
constexpr int32_t kBlockBytes = 5120;  // of each of 4 rows: with the weights they fill 32 KiB
constexpr int kParts = 2;              // sums per product: a chain of one would wait for itself

// Adds elements begin..end-1 to the sums of U units and R rows. `part` keeps the sums between
// blocks; `next` is where the weights begin that W1's reader meets after these.
template <class V, class T, int U, int R>
inline void dot_block(const step::DotTask& t, int32_t unit, int32_t row, int32_t begin, int32_t end,
                      float* part, const T* next) {
    const int64_t dim = t.dim;
    const T* w = static_cast<const T*>(t.w1) + unit * dim;
    const auto* h = static_cast<const typename V::Row*>(t.rows) + row * dim;
    typename V::Acc acc[U][R][kParts];
    for (int u = 0; u < U; ++u) {
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < kParts; ++i) {
                const float* kept = part + ((u * R + r) * kParts + i) * V::kLanes;
                acc[u][r][i] = begin == 0 ? V::zero() : V::load_sums(kept);
            }
        }
    }

    int64_t k = begin;
    for (; k + V::kWide <= end; k += V::kWide) {
        typename V::Reg value[R][kParts];
        for (int r = 0; r < R; ++r) V::load_row(h + r * dim + k, value[r]);
        for (int u = 0; u < U; ++u) {
            typename V::Reg weight[kParts];
            V::load_weights(w + u * dim + k, weight);
            // Into the second-level cache: hardware prefetch starts late on each row of W1, and in
            // the first level rows 4 KiB apart would evict each other.
            const uintptr_t ahead =
                reinterpret_cast<uintptr_t>(next) + (u * dim + (k - begin)) * sizeof(T);
            for (size_t b = 0; b < V::kWide * sizeof(T); b += 64)
                __builtin_prefetch(reinterpret_cast<const void*>(ahead + b), 0, 2);
            for (int r = 0; r < R; ++r) {
                for (int i = 0; i < kParts; ++i) {
                    acc[u][r][i] = V::fma(weight[i], value[r][i], acc[u][r][i]);
                }
            }
        }
    }
    for (; k < end; k += 8) {
        for (int u = 0; u < U; ++u) {
            const typename V::Reg weight = V::load8(w + u * dim + k);
            for (int r = 0; r < R; ++r) {
                acc[u][r][0] = V::fma(weight, V::load8(h + r * dim + k), acc[u][r][0]);
            }
        }
    }

    for (int u = 0; u < U; ++u) {
        for (int r = 0; r < R; ++r) {
            if (end == t.dim) {
                t.z[static_cast<int64_t>(row + r) * t.hidden_units + unit + u] =
                    V::sum(acc[u][r][0], acc[u][r][1]);
                continue;
            }
            for (int i = 0; i < kParts; ++i) {
                V::store_sums(part + ((u * R + r) * kParts + i) * V::kLanes, acc[u][r][i]);
            }
        }
    }
}

template <class V, class T, int U, int R>
inline void dot_tile(const step::DotTask& t, int32_t unit, int32_t unit_end, int32_t row) {
    const T* w1 = static_cast<const T*>(t.w1);
    const int64_t dim = t.dim;
    float part[kUnitsPerPass * R * kParts * V::kLanes];
    const int32_t block = R > 2 ? kBlockBytes / sizeof(typename V::Row) : t.dim;
    for (int32_t begin = 0; begin < t.dim; begin += block) {
        const int32_t end = begin + block < t.dim ? begin + block : t.dim;
        for (int32_t u = unit; u < unit_end; u += U) {
            const bool last = u + U == unit_end;
            const T* next =
                last && end < dim ? w1 + unit * dim + end : w1 + (u + U) * dim + (last ? 0 : begin);
            dot_block<V, T, U, R>(t, u, row, begin, end, part + (u - unit) * R * kParts * V::kLanes,
                                  next);
        }
    }
}

template <class V, class T>
inline void dot_typed(const step::DotTask& t) {
    for (int32_t unit = t.unit_begin; unit < t.unit_end; unit += kUnitsPerPass) {
        const int32_t end = unit + kUnitsPerPass < t.unit_end ? unit + kUnitsPerPass : t.unit_end;
        int32_t row = 0;
        for (; row + 4 <= t.num_rows; row += 4) dot_tile<V, T, V::kUnits4, 4>(t, unit, end, row);
        for (; row + 2 <= t.num_rows; row += 2) dot_tile<V, T, V::kUnits2, 2>(t, unit, end, row);
        for (; row < t.num_rows; ++row) dot_tile<V, T, V::kUnits1, 1>(t, unit, end, row);
    }
}

}  // namespace
