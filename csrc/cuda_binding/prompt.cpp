// Prompt tuning as torch ops; see csrc/cuda/prompt.h.
#include "cuda/prompt.h"

#include "binding.h"

namespace {

using namespace pk::binding;

int64_t prompt_forward(
    Tensor input_ids, Tensor weight, Tensor prompt, OptionalTensor mask, OptionalTensor labels,
    int64_t column, int64_t one, int64_t significant, Tensor embeddings, OptionalTensor mask_out,
    OptionalTensor labels_out, Tensor positions, OptionalTensor columns) {
  const bool per_sample = prompt.dim() == 3;
  const pk::PromptForward call{
      .batch = input_ids.size(0),
      .tokens = input_ids.size(1),
      .length = prompt.size(per_sample ? 1 : 0),
      .width = weight.size(1),
      .vocabulary = weight.size(0),
      .type = type_of(weight),
      .prompt_type = type_of(prompt),
      .ids = input_ids.data_ptr(),
      .id_bytes = bytes_of(input_ids),
      .weight = weight.data_ptr(),
      .weight_stride = weight.stride(0),
      .prompt = prompt.data_ptr(),
      .prompt_stride = prompt.stride(per_sample ? 1 : 0),
      .prompt_sample_stride = per_sample ? prompt.stride(0) : 0,
      .mask = data_of(mask),
      .mask_bytes = bytes_of(mask),
      .one = one,
      .significant = significant,
      .labels = data_of(labels),
      .label_bytes = bytes_of(labels),
      .column = column,
      .embeddings = embeddings.data_ptr(),
      .mask_out = data_of(mask_out),
      .labels_out = data_of(labels_out),
      .positions = static_cast<int64_t*>(positions.data_ptr()),
      .columns = static_cast<int64_t*>(data_of(columns)),
  };
  return run(weight, [&](pk::device::Stream stream) { return pk::prompt_forward(call, stream); });
}

int64_t prompt_gradient(Tensor dy, OptionalTensor columns, int64_t column, Tensor d_prompt) {
  const bool per_sample = d_prompt.dim() == 3;
  const pk::PromptGradient call{
      .type = type_of(dy),
      .out_type = type_of(d_prompt),
      .batch = dy.size(0),
      .length = d_prompt.size(per_sample ? 1 : 0),
      .width = dy.size(2),
      .dy = dy.data_ptr(),
      .dy_batch_stride = dy.stride(0),
      .dy_row_stride = dy.stride(1),
      .columns = static_cast<const int64_t*>(data_of(columns)),
      .column = column,
      .per_sample = per_sample,
      .d_prompt = d_prompt.data_ptr(),
  };
  return run(dy, [&](pk::device::Stream stream) { return pk::prompt_gradient(call, stream); });
}

int64_t table_gradient(
    Tensor dy, Tensor sorted_ids, Tensor order, OptionalTensor columns, int64_t column,
    int64_t padding_idx, int64_t tokens, Tensor d_weight) {
  const pk::TableGradient call{
      .type = type_of(dy),
      .count = sorted_ids.size(0),
      .tokens = tokens,
      .length = dy.size(1) - tokens,
      .width = dy.size(2),
      .vocabulary = d_weight.size(0),
      .dy = dy.data_ptr(),
      .dy_batch_stride = dy.stride(0),
      .dy_row_stride = dy.stride(1),
      .columns = static_cast<const int64_t*>(data_of(columns)),
      .column = column,
      .ids = sorted_ids.data_ptr(),
      .id_bytes = bytes_of(sorted_ids),
      .order = static_cast<const int64_t*>(order.data_ptr()),
      .padding_idx = padding_idx,
      .d_weight = d_weight.data_ptr(),
  };
  return run(dy, [&](pk::device::Stream stream) { return pk::table_gradient(call, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels_cuda, m) {
  m.def(
      "prompt_forward(Tensor input_ids, Tensor weight, Tensor prompt, Tensor? mask, Tensor? labels, "
      "int column, int one, int significant, Tensor(a!) embeddings, Tensor(b!)? mask_out, "
      "Tensor(c!)? labels_out, Tensor(d!) positions, Tensor(e!)? columns) -> int");
  m.def(
      "prompt_gradient(Tensor dy, Tensor? columns, int column, Tensor(a!) d_prompt) -> int");
  m.def(
      "table_gradient(Tensor dy, Tensor sorted_ids, Tensor order, Tensor? columns, int column, "
      "int padding_idx, int tokens, Tensor(a!) d_weight) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_cuda, PK_DISPATCH_KEY, m) {
  m.impl("prompt_forward", TORCH_BOX(&prompt_forward));
  m.impl("prompt_gradient", TORCH_BOX(&prompt_gradient));
  m.impl("table_gradient", TORCH_BOX(&table_gradient));
}
