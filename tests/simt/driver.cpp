// Reads the arguments of one call from a file, runs the device code under several schedules (with
// STEP_CPU the CPU code, which has none), each from the same state, and writes what each left
// behind. Every array is its own allocation of exactly its size, so that AddressSanitizer sees an
// access past any of them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef STEP_CPU
#include "cpu.h"

namespace simt {
[[noreturn]] void fail(const char* message) {
    std::fprintf(stderr, "%s\n", message);
    std::exit(1);
}
}  // namespace simt
#else
#include "cuda.h"
#include "simt.h"
#endif

namespace {

template <class T>
T read_value(FILE* f) {
    T value;
    if (std::fread(&value, sizeof(T), 1, f) != 1) simt::fail("the case file is too short");
    return value;
}

struct Array {
    char* data = nullptr;
    size_t bytes = 0;

    // `shift` bytes past a multiple of 16.
    static Array allocate(size_t bytes, size_t shift) {
        void* base = nullptr;
        if (posix_memalign(&base, 16, shift + bytes) != 0) simt::fail("out of memory");
        return {static_cast<char*>(base) + shift, bytes};
    }
    Array copy() const {
        Array other = allocate(bytes, 0);
        if (bytes > 0) std::memcpy(other.data, data, bytes);
        return other;
    }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data);
    }
};

Array read_array(FILE* f, size_t shift = 0) {
    Array array = Array::allocate(static_cast<size_t>(read_value<int64_t>(f)), shift);
    if (array.bytes > 0 && std::fread(array.data, array.bytes, 1, f) != 1) {
        simt::fail("the case file is too short");
    }
    return array;
}

#ifdef STEP_CPU

// Every piece of parallel work by itself, the last first.
void backwards(int64_t count, void (*body)(void* ctx, int64_t begin, int64_t end), void* ctx) {
    for (int64_t i = count; i > 0; --i) body(ctx, i - 1, i);
}

void select(int64_t, uint64_t, const Array&) {}

bool launch(const step::Params& p) {
    step::step_score_cpu(p, backwards);
    return true;
}

#else

void select(int64_t thread_order, uint64_t seed, const Array& block_order) {
    simt::Schedule schedule{};
    schedule.thread_order = static_cast<simt::ThreadOrder>(thread_order);
    schedule.seed = seed;
    if (block_order.bytes > 0) schedule.block_order = block_order.as<int32_t>();
    simt::set_schedule(schedule);
}

bool launch(const step::Params& p) { return step::step_score_cuda(p, nullptr) == nullptr; }

#endif

void write_array(FILE* f, const Array& array) { std::fwrite(array.data, 1, array.bytes, f); }

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) simt::fail("usage: driver CASE RESULT");
    FILE* in = std::fopen(argv[1], "rb");
    FILE* result = std::fopen(argv[2], "wb");
    if (in == nullptr || result == nullptr) simt::fail("cannot open the files");

    step::Params p{};
    p.num_rows = static_cast<int32_t>(read_value<int64_t>(in));
    p.dim = static_cast<int32_t>(read_value<int64_t>(in));
    p.hidden_units = static_cast<int32_t>(read_value<int64_t>(in));
    p.hidden_stride = read_value<int64_t>(in);
    p.num_tokens = read_value<int64_t>(in);
    p.num_words = read_value<int64_t>(in);
    p.num_slots = read_value<int64_t>(in);
    p.think_end_id = read_value<int64_t>(in);
    p.hidden_dtype = static_cast<step::DType>(read_value<int64_t>(in));
    p.w1_dtype = static_cast<step::DType>(read_value<int64_t>(in));
    const size_t hidden_shift = static_cast<size_t>(read_value<int64_t>(in));
    const int64_t launches = read_value<int64_t>(in);
    const int64_t num_schedules = read_value<int64_t>(in);

    p.hidden = read_array(in, hidden_shift).data;
    const Array row_index = read_array(in);
    if (row_index.bytes > 0) p.row_index = row_index.as<int64_t>();
    p.slot_ids = read_array(in).as<int64_t>();
    p.input_ids = read_array(in).as<int64_t>();
    p.positions = read_array(in).as<int64_t>();
    p.boundary = read_array(in).as<int32_t>();
    p.score_from = read_array(in).as<int32_t>();
    p.w1 = read_array(in).data;
    p.b1 = read_array(in).as<float>();
    p.w2 = read_array(in).as<float>();
    p.b2 = read_array(in).as<float>();
    const Array thinking = read_array(in);
    const Array score_sum = read_array(in);
    const Array num_steps = read_array(in);
    const Array out = read_array(in);
    const Array workspace = read_array(in);

    for (int64_t s = 0; s < num_schedules; ++s) {
        const int64_t thread_order = read_value<int64_t>(in);
        const uint64_t seed = static_cast<uint64_t>(read_value<int64_t>(in));
        select(thread_order, seed, read_array(in));

        const Array state[] = {thinking.copy(), score_sum.copy(), num_steps.copy(), out.copy(),
                               workspace.copy()};
        p.thinking = state[0].as<int32_t>();
        p.score_sum = state[1].as<float>();
        p.num_steps = state[2].as<int32_t>();
        p.out = state[3].as<float>();
        p.workspace = state[4].as<int32_t>();
        for (int64_t i = 0; i < launches; ++i) {
            if (!launch(p)) simt::fail("launch failed");
        }
        for (const Array& array : state) write_array(result, array);
    }
    std::fclose(in);
    return std::fclose(result) == 0 ? 0 : 1;
}
