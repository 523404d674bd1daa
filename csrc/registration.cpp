// The module `_C`: the CPU ops as torch ops (stable ABI), the same functions on raw pointers for the
// eager path (a dispatcher hop costs more than a small layer), and what this build is.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "cpu/adapter.h"
#include "cpu/dropout.h"
#include "cpu/lora.h"
#include "cpu/vector_level.h"
#include "prefix_binding.h"
#include "prompt_binding.h"

namespace {

namespace py = pybind11;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

pk::Type type_of(const Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16 ? pk::Type::kBFloat16
                                                                         : pk::Type::kFloat32;
}

void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

pk::Gradient gradient_of(const OptionalTensor& tensor) {
  return {data_of(tensor), tensor ? type_of(*tensor) : pk::Type::kFloat32};
}

uint64_t seed_of(const OptionalTensor& seed) {
  return seed ? static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr())) : 0;
}

// y = a b by the GEMM library.
void make_product(const Tensor& y, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), a.get(), b.get()));
}

void cpu_lora_forward(
    Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, OptionalTensor bias, OptionalTensor seed,
    double factor, int64_t threshold, Tensor y, Tensor s) {
  make_product(y, x, torch::stable::transpose(weight, 0, 1));
  pk::lora_forward(pk::LoRAForward{
      .type = type_of(x),
      .tokens = x.size(0),
      .in_features = x.size(1),
      .out_features = weight.size(0),
      .rank = lora_a.size(0),
      .x = {x.data_ptr(), x.stride(0)},
      .lora_a = lora_a.data_ptr(),
      .lora_b = lora_b.data_ptr(),
      .bias = data_of(bias),
      .weight = nullptr,
      .factor = static_cast<float>(factor),
      .dropout = seed.has_value(),
      .seed = seed_of(seed),
      .threshold = static_cast<uint32_t>(threshold),
      .y = y.data_ptr(),
      .s = s.data_ptr(),
  });
}

void cpu_lora_backward(
    Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor lora_a, Tensor lora_b, OptionalTensor seed,
    double factor, int64_t threshold, OptionalTensor dx, OptionalTensor da, OptionalTensor db,
    OptionalTensor dbias) {
  if (dx) make_product(*dx, dy, weight);
  pk::lora_backward(pk::LoRABackward{
      .type = type_of(x),
      .tokens = x.size(0),
      .in_features = x.size(1),
      .out_features = weight.size(0),
      .rank = lora_a.size(0),
      .dy = {dy.data_ptr(), dy.stride(0)},
      .x = {x.data_ptr(), x.stride(0)},
      .s = s.data_ptr(),
      .lora_a = lora_a.data_ptr(),
      .lora_b = lora_b.data_ptr(),
      .weight = nullptr,
      .factor = static_cast<float>(factor),
      .dropout = seed.has_value(),
      .seed = seed_of(seed),
      .threshold = static_cast<uint32_t>(threshold),
      .dx = data_of(dx),
      .da = gradient_of(da),
      .db = gradient_of(db),
      .dbias = gradient_of(dbias),
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
  m.def(
      "cpu_lora_forward(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
      "Tensor? seed, float factor, int threshold, Tensor(a!) y, Tensor(b!) s) -> ()");
  m.def(
      "cpu_lora_backward(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor lora_a, "
      "Tensor lora_b, Tensor? seed, float factor, int threshold, Tensor(a!)? dx, Tensor(b!)? da, "
      "Tensor(c!)? db, Tensor(d!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("cpu_lora_forward", TORCH_BOX(&cpu_lora_forward));
  m.impl("cpu_lora_backward", TORCH_BOX(&cpu_lora_backward));
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

pk::Type type(bool bfloat16) { return bfloat16 ? pk::Type::kBFloat16 : pk::Type::kFloat32; }

// Arguments that both directions of the adapter take.
pk::AdapterCall adapter_call(
    bool bfloat16, int64_t tokens, int64_t features, int64_t rank, uintptr_t x, int64_t x_stride,
    uintptr_t down, uintptr_t up, uintptr_t up_bias, float scale, uintptr_t channels,
    int64_t activation, uintptr_t seed, uint32_t threshold, float keep_scale, uintptr_t pre,
    uintptr_t index, int64_t adapters) {
  return {
      .type = type(bfloat16),
      .tokens = tokens,
      .features = features,
      .rank = rank,
      .x = {pointer(x), x_stride},
      .down = pointer(down),
      .up = pointer(up),
      .up_bias = pointer(up_bias),
      .scale = scale,
      .channels = static_cast<const float*>(pointer(channels)),
      .activation = static_cast<pk::Activation>(activation),
      .dropout = seed != 0,
      .seed = seed ? *static_cast<const uint64_t*>(pointer(seed)) : 0,
      .threshold = threshold,
      .keep_scale = keep_scale,
      .pre = pointer(pre),
      .index = static_cast<const int64_t*>(pointer(index)),
      .adapters = adapters,
  };
}

py::dict build_info() {
  py::dict info;
  info["version"] = PEFT_KERNELS_VERSION;
  info["torch"] = PEFT_KERNELS_BUILT_WITH_TORCH;
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
  info["compiler"] = std::string("g++ ") + __VERSION__;
  info["cpu"] = pk::vector_level();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of peft_kernels";
  m.def("build_info", &build_info, "What this module was built with.");
  bind_prefix(m);
  bind_prompt(m);
  m.def(
      "use_native",
      [](bool on) {
        pk::use_native(on);
        return pk::native_bfloat16();
      },
      "Let AVX-512 code written by hand run where the CPU has it; returns whether bfloat16 does now.");
  m.def(
      "drop",
      [](bool bfloat16, int64_t rows, int64_t columns, uintptr_t x, int64_t x_stride, float factor,
         uintptr_t seed, uint32_t threshold, uintptr_t y) {
        py::gil_scoped_release release;
        pk::drop(pk::Drop{
            .type = type(bfloat16),
            .rows = rows,
            .columns = columns,
            .x = {pointer(x), x_stride},
            .factor = factor,
            .seed = *static_cast<const uint64_t*>(pointer(seed)),
            .threshold = threshold,
            .y = pointer(y),
        });
      },
      "Dropout of an activation by a seed, on raw pointers; see csrc/cpu/dropout.h.");
  m.def(
      "lora_forward",
      [](bool bfloat16, int64_t tokens, int64_t in_features, int64_t out_features, int64_t rank,
         uintptr_t x, int64_t x_stride, uintptr_t lora_a, uintptr_t lora_b, uintptr_t bias,
         uintptr_t weight, float factor, uintptr_t seed, uint32_t threshold, uintptr_t y,
         uintptr_t s) {
        std::optional<py::gil_scoped_release> release;
        if (!weight) release.emplace();  // a small product takes less than handing the lock over
        pk::lora_forward(pk::LoRAForward{
            .type = type(bfloat16),
            .tokens = tokens,
            .in_features = in_features,
            .out_features = out_features,
            .rank = rank,
            .x = {pointer(x), x_stride},
            .lora_a = pointer(lora_a),
            .lora_b = pointer(lora_b),
            .bias = pointer(bias),
            .weight = pointer(weight),
            .factor = factor,
            .dropout = seed != 0,
            .seed = seed ? *static_cast<const uint64_t*>(pointer(seed)) : 0,
            .threshold = threshold,
            .y = pointer(y),
            .s = pointer(s),
        });
      },
      "The low-rank part of lora_linear on raw pointers; see csrc/cpu/lora.h.");
  m.def(
      "lora_backward",
      [](bool bfloat16, int64_t tokens, int64_t in_features, int64_t out_features, int64_t rank,
         uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride, uintptr_t s,
         uintptr_t lora_a, uintptr_t lora_b, uintptr_t weight, float factor, uintptr_t seed,
         uint32_t threshold, uintptr_t dx, uintptr_t da, bool da_bfloat16, uintptr_t db, bool db_bfloat16,
         uintptr_t dbias, bool dbias_bfloat16) {
        std::optional<py::gil_scoped_release> release;
        if (!weight) release.emplace();
        pk::lora_backward(pk::LoRABackward{
            .type = type(bfloat16),
            .tokens = tokens,
            .in_features = in_features,
            .out_features = out_features,
            .rank = rank,
            .dy = {pointer(dy), dy_stride},
            .x = {pointer(x), x_stride},
            .s = pointer(s),
            .lora_a = pointer(lora_a),
            .lora_b = pointer(lora_b),
            .weight = pointer(weight),
            .factor = factor,
            .dropout = seed != 0,
            .seed = seed ? *static_cast<const uint64_t*>(pointer(seed)) : 0,
            .threshold = threshold,
            .dx = pointer(dx),
            .da = {pointer(da), type(da_bfloat16)},
            .db = {pointer(db), type(db_bfloat16)},
            .dbias = {pointer(dbias), type(dbias_bfloat16)},
        });
      },
      "The low-rank gradients of lora_linear on raw pointers; see csrc/cpu/lora.h.");
  py::class_<pk::AdapterCall>(m, "AdapterCall", "What both directions take; see csrc/cpu/adapter.h.")
      .def(py::init(&adapter_call));
  m.def(
      "adapter_forward",
      [](const pk::AdapterCall& call, uintptr_t down_bias, uintptr_t residual,
         int64_t residual_stride, uintptr_t y) {
        py::gil_scoped_release release;
        pk::adapter_forward({call, pointer(down_bias), {pointer(residual), residual_stride}, pointer(y)});
      },
      "The adapter on raw pointers; see csrc/cpu/adapter.h.");
  m.def(
      "adapter_backward",
      [](const pk::AdapterCall& call, uintptr_t dy, int64_t dy_stride, bool input_residual,
         uintptr_t dx, uintptr_t d_down, bool d_down_bfloat16, uintptr_t d_up, bool d_up_bfloat16,
         uintptr_t d_down_bias, bool d_down_bias_bfloat16, uintptr_t d_up_bias,
         bool d_up_bias_bfloat16, uintptr_t d_scale) {
        py::gil_scoped_release release;
        pk::adapter_backward({
            call,
            {pointer(dy), dy_stride},
            input_residual,
            pointer(dx),
            {pointer(d_down), type(d_down_bfloat16)},
            {pointer(d_up), type(d_up_bfloat16)},
            {pointer(d_down_bias), type(d_down_bias_bfloat16)},
            {pointer(d_up_bias), type(d_up_bias_bfloat16)},
            static_cast<float*>(pointer(d_scale)),
        });
      },
      "The gradients of the adapter on raw pointers; see csrc/cpu/adapter.h.");
}
