// Registers the op and checks its arguments. Compiled twice: the CPU library owns the schema, the
// CUDA library (STEP_CUDA_LIBRARY) adds the CUDA implementation and is loaded after it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "cuda.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;

std::string text(const char* part) { return part; }
std::string text(const std::string& part) { return part; }
template <typename Integer>
std::string text(Integer part) {
    return std::to_string(part);
}

// Without streams: where a compiler links libstdc++ statically, their locales and torch's mix.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    throw std::runtime_error("step_score_: " + (text(parts) + ...));
}

std::string dtype_name(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Bool:
            return "bool";
        default:
            return "dtype " + std::to_string(static_cast<int>(dtype));
    }
}

std::string shape_text(const int64_t* sizes, int64_t dim) {
    std::string text = "[";
    for (int64_t i = 0; i < dim; ++i) {
        if (i > 0) text += ", ";
        text += sizes[i] == kAny ? "*" : std::to_string(sizes[i]);
    }
    return text + "]";
}

std::string found(const Tensor& t) {
    return dtype_name(t.scalar_type()) + " " + shape_text(t.sizes().data(), t.dim()) +
           (t.is_contiguous() ? "" : " (not contiguous)");
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
    if (t.dim() != static_cast<int64_t>(shape.size())) return false;
    const auto sizes = t.sizes();
    size_t i = 0;
    for (int64_t want : shape) {
        if (want != kAny && sizes[i] != want) return false;
        ++i;
    }
    return true;
}

std::string device_name(int32_t device) {
    return device < 0 ? "cpu" : "cuda:" + std::to_string(device);
}

// -1 on the CPU. Asks for the index only where there is one: each question is a call into torch.
int32_t cuda_index(const Tensor& t) { return t.is_cuda() ? t.get_device_index() : -1; }

// Contiguous, of one of `dtypes`, of this shape, on CUDA device `device` (-1 = CPU).
void check(const char* name, const Tensor& t, int32_t device,
           std::initializer_list<ScalarType> dtypes, std::initializer_list<int64_t> shape) {
    const ScalarType found_dtype = t.scalar_type();
    bool known_dtype = false;
    for (ScalarType dtype : dtypes) known_dtype |= found_dtype == dtype;
    const int32_t found_device = cuda_index(t);
    if (known_dtype && has_shape(t, shape) && t.is_contiguous() && found_device == device) return;

    if (found_device != device)
        fail(name, " must be on the device of hidden, ", device_name(device), ", found ",
             device_name(found_device));
    std::string wanted;
    for (ScalarType dtype : dtypes) wanted += (wanted.empty() ? "" : " or ") + dtype_name(dtype);
    fail(name, " must be a contiguous ", wanted, " tensor of shape ",
         shape_text(shape.begin(), static_cast<int64_t>(shape.size())), ", found ", found(t));
}

step::DType dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::BFloat16:
            return step::DType::kBFloat16;
        case ScalarType::Half:
            return step::DType::kFloat16;
        default:
            return step::DType::kFloat32;
    }
}

void check_hidden(const Tensor& hidden) {
    const ScalarType dtype = hidden.scalar_type();
    const bool is_float =
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
    if (hidden.dim() != 2 || !is_float)
        fail(
            "hidden must be a float32, bfloat16 or float16 tensor of shape [tokens, width], found ",
            found(hidden));
    const int64_t dim = hidden.size(1);
    if (dim < 8 || dim > step::kMaxDim || dim % 8 != 0)
        fail("the width of hidden must be a multiple of 8 from 8 to ", step::kMaxDim, ", found ",
             dim);
    if (hidden.stride(1) != 1)
        fail("the last dimension of hidden must be contiguous (stride 1), found stride ",
             hidden.stride(1));
}

step::Params check_arguments(const Tensor& hidden, const std::optional<Tensor>& row_index,
                             const Tensor& slot_ids, const Tensor& input_ids,
                             const Tensor& positions, const Tensor& boundary, int64_t think_end_id,
                             const Tensor& slots, const Tensor& out, const Tensor& w1,
                             const Tensor& head) {
    check_hidden(hidden);
    const int32_t device = cuda_index(hidden);
    const int64_t tokens = hidden.size(0);
    const int64_t dim = hidden.size(1);
    constexpr int64_t units = step::kHiddenUnits;
    check("slot_ids", slot_ids, device, {ScalarType::Long}, {kAny});
    const int64_t rows = slot_ids.size(0);
    if (rows > step::kMaxRows)
        fail("slot_ids must have at most ", step::kMaxRows, " rows, found ", rows);
    if (row_index) check("row_index", *row_index, device, {ScalarType::Long}, {rows});
    check("input_ids", input_ids, device, {ScalarType::Long}, {tokens});
    check("positions", positions, device, {ScalarType::Long}, {tokens});
    check("boundary", boundary, device, {ScalarType::Int}, {kAny});
    check("slots", slots, device, {ScalarType::Int}, {4, kAny});
    check("out", out, device, {ScalarType::Float}, {kAny, 2});
    if (out.size(0) < rows)
        fail("out must have a row for each of the ", rows, " slot_ids, found ", found(out));
    check("w1", w1, device, {ScalarType::Float, ScalarType::BFloat16}, {units, dim});
    check("head", head, device, {ScalarType::Float}, {2 * units + 1});

    step::Params p{};
    p.hidden = hidden.const_data_ptr();
    p.row_index = row_index ? static_cast<const int64_t*>(row_index->const_data_ptr()) : nullptr;
    p.slot_ids = static_cast<const int64_t*>(slot_ids.const_data_ptr());
    p.input_ids = static_cast<const int64_t*>(input_ids.const_data_ptr());
    p.positions = static_cast<const int64_t*>(positions.const_data_ptr());
    p.boundary = static_cast<const int32_t*>(boundary.const_data_ptr());
    p.num_slots = slots.size(1);
    int32_t* const state = static_cast<int32_t*>(slots.mutable_data_ptr());
    p.score_from = state;
    p.thinking = state + p.num_slots;
    p.score_sum = reinterpret_cast<float*>(state + 2 * p.num_slots);
    p.num_steps = state + 3 * p.num_slots;
    p.out = static_cast<float*>(out.mutable_data_ptr());
    p.w1 = w1.const_data_ptr();
    p.b1 = static_cast<const float*>(head.const_data_ptr());
    p.w2 = p.b1 + units;
    p.b2 = p.w2 + units;
    p.hidden_stride = hidden.stride(0);
    p.num_tokens = tokens;
    p.num_words = boundary.size(0);
    p.think_end_id = think_end_id;
    p.num_rows = static_cast<int32_t>(rows);
    p.dim = static_cast<int32_t>(dim);
    p.hidden_units = step::kHiddenUnits;
    p.hidden_dtype = dtype_of(hidden);
    p.w1_dtype = dtype_of(w1);
    return p;
}

#ifdef STEP_CUDA_LIBRARY

void run(step::Params& params, const Tensor& hidden, const Tensor& workspace) {
    const int32_t device = cuda_index(hidden);
    check("workspace", workspace, device, {ScalarType::Int}, {kAny});
    if (workspace.size(0) < step::workspace_size(params.num_rows))
        fail("workspace must have at least ", step::workspace_size(params.num_rows),
             " elements for ", params.num_rows,
             " rows (step_sglang.scoring.op.workspace_size), found ", workspace.size(0));
    if (reinterpret_cast<uintptr_t>(params.w1) % 16 != 0)
        fail("w1 must start at a multiple of 16 bytes, found address ",
             reinterpret_cast<uintptr_t>(params.w1));
    params.workspace = static_cast<int32_t*>(workspace.mutable_data_ptr());
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const char* error = step::step_score_cuda(params, stream);
    if (error != nullptr) fail("the kernel was not launched: ", error);
}

#else

void run_parallel(int64_t count, void (*body)(void*, int64_t, int64_t), void* ctx) {
    torch::stable::parallel_for(0, count, 1,
                                [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
}

void run(step::Params& params, const Tensor&, const Tensor&) {
    step::step_score_cpu(params, run_parallel);
}

#endif

// Few arguments on purpose: torch's way from Python to here costs more than a call without a step.
void step_score_(const Tensor& hidden, const std::optional<Tensor>& row_index,
                 const Tensor& slot_ids, const Tensor& input_ids, const Tensor& positions,
                 const Tensor& boundary, int64_t think_end_id, const Tensor& slots,
                 const Tensor& out, const Tensor& workspace, const Tensor& w1, const Tensor& head) {
    step::Params params = check_arguments(hidden, row_index, slot_ids, input_ids, positions,
                                          boundary, think_end_id, slots, out, w1, head);
    if (params.num_rows > 0) run(params, hidden, workspace);
}

}  // namespace

#ifdef STEP_CUDA_LIBRARY

STABLE_TORCH_LIBRARY_IMPL(step_sglang, CUDA, m) { m.impl("step_score_", TORCH_BOX(&step_score_)); }

#else

STABLE_TORCH_LIBRARY(step_sglang, m) {
    m.def(
        "step_score_(Tensor hidden, Tensor? row_index, Tensor slot_ids, Tensor input_ids, "
        "Tensor positions, Tensor boundary, int think_end_id, Tensor(a!) slots, Tensor(b!) out, "
        "Tensor(c!) workspace, Tensor w1, Tensor head) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(step_sglang, CPU, m) { m.impl("step_score_", TORCH_BOX(&step_score_)); }

// The instruction set the CPU path chose, for reports and tests.
extern "C" __attribute__((visibility("default"))) const char* step_cpu_isa() {
    return step::cpu_kernels().name;
}

#endif
