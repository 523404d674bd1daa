// Prompt tuning on raw pointers, for the eager path of peft_kernels/prompt/cpp.py.
#include "prompt_binding.h"

#include "cpu/prompt.h"

namespace {

namespace py = pybind11;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

bool forward(
    int64_t batch, int64_t tokens, int64_t length, int64_t row_bytes, uintptr_t ids, int64_t id_bytes,
    uintptr_t weight, int64_t weight_stride, int64_t vocabulary, uintptr_t prompt,
    int64_t prompt_stride, int64_t prompt_sample_stride, bool narrows, uintptr_t mask,
    int64_t mask_bytes, int64_t one, int64_t significant, uintptr_t labels, int64_t label_bytes,
    int64_t column, uintptr_t embeddings, uintptr_t mask_out, uintptr_t labels_out,
    uintptr_t positions, uintptr_t columns) {
  py::gil_scoped_release release;
  return pk::prompt_forward(pk::PromptForward{
      .batch = batch,
      .tokens = tokens,
      .length = length,
      .row_bytes = row_bytes,
      .ids = pointer(ids),
      .id_bytes = id_bytes,
      .weight = {pointer(weight), weight_stride},
      .vocabulary = vocabulary,
      .prompt = {pointer(prompt), prompt_stride},
      .prompt_sample_stride = prompt_sample_stride,
      .narrows = narrows,
      .mask = pointer(mask),
      .mask_bytes = mask_bytes,
      .one = one,
      .significant = significant,
      .labels = pointer(labels),
      .label_bytes = label_bytes,
      .column = column,
      .embeddings = pointer(embeddings),
      .mask_out = pointer(mask_out),
      .labels_out = pointer(labels_out),
      .positions = static_cast<int64_t*>(pointer(positions)),
      .columns = static_cast<int64_t*>(pointer(columns)),
  });
}

void backward(
    int64_t type, int64_t prompt_type, int64_t batch, int64_t tokens, int64_t length, int64_t width,
    uintptr_t dy, int64_t dy_batch_stride, int64_t dy_row_stride, uintptr_t columns, int64_t column,
    uintptr_t d_prompt, bool per_sample, uintptr_t ids, uintptr_t order, int64_t padding_idx,
    uintptr_t d_weight) {
  py::gil_scoped_release release;
  pk::prompt_backward(pk::PromptBackward{
      .type = static_cast<pk::Float>(type),
      .prompt_type = static_cast<pk::Float>(prompt_type),
      .batch = batch,
      .tokens = tokens,
      .length = length,
      .width = width,
      .dy = pointer(dy),
      .dy_batch_stride = dy_batch_stride,
      .dy_row_stride = dy_row_stride,
      .columns = static_cast<const int64_t*>(pointer(columns)),
      .column = column,
      .d_prompt = pointer(d_prompt),
      .per_sample = per_sample,
      .ids = static_cast<const int64_t*>(pointer(ids)),
      .order = static_cast<const int64_t*>(pointer(order)),
      .padding_idx = padding_idx,
      .d_weight = pointer(d_weight),
  });
}

}  // namespace

void bind_prompt(py::module_& m) {
  m.def("prompt_forward", &forward, "prompt_embedding on raw pointers; see csrc/cpu/prompt.h.");
  m.def("prompt_backward", &backward, "Its gradients on raw pointers; see csrc/cpu/prompt.h.");
}
