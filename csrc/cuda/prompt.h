// Prompt tuning on the GPU: token and prompt rows placed in one launch, gradients summed in one order.
#pragma once

#include <cstdint>

#include "device.h"
#include "types.h"

namespace pk {

struct PromptForward {
  int64_t batch, tokens, length;  // B, S, P
  int64_t width, vocabulary;      // D, V
  Type type, prompt_type;         // of the table and the embeddings; of the prompt
  const void* ids;                // [B, S], int64 or int32
  int64_t id_bytes;
  const void* weight;             // [V, D], unit inner stride; strides in elements
  int64_t weight_stride;
  const void* prompt;             // [P, D], or [B, P, D] with
  int64_t prompt_stride;
  int64_t prompt_sample_stride;   // from one sample's prompt to the next; 0: shared
  const void* mask;               // [B, S], as integers of mask_bytes; read where mask_out is not null
  int64_t mask_bytes;
  int64_t one, significant;       // see peft_kernels/prompt/mask_bits.py
  const void* labels;             // [B, S], int64 or int32; read where labels_out is not null
  int64_t label_bytes;
  int64_t column;                 // of every row's prompt, where `columns` is null
  void* embeddings;               // [B, P + S, D]
  void* mask_out;                 // [B, P + S] or null
  void* labels_out;               // [B, P + S] or null
  int64_t* positions;             // [B, P + S]
  int64_t* columns;               // [B], written: the first kept token of each row, or null
};

struct PromptGradient {
  Type type, out_type;             // of dy; of d_prompt
  int64_t batch, length, width;    // B, P, D
  const void* dy;                  // [B, P + S, D], unit inner stride; strides in elements
  int64_t dy_batch_stride, dy_row_stride;
  const int64_t* columns;          // [B] or null
  int64_t column;
  bool per_sample;
  void* d_prompt;                  // [P, D], or per sample [B, P, D]
};

struct TableGradient {
  Type type;                       // of dy and d_weight
  int64_t count, tokens, length;   // B * S, S, P
  int64_t width, vocabulary;       // D, V
  const void* dy;
  int64_t dy_batch_stride, dy_row_stride;
  const int64_t* columns;
  int64_t column;
  const void* ids;                 // [B * S] sorted ascending, int64 or int32
  int64_t id_bytes;
  const int64_t* order;            // place of each sorted id in [B, S], equal ids ascending
  int64_t padding_idx;
  void* d_weight;                  // [V, D], zero where no id points
};

// Each launches one kernel and returns what `launch` does.
int prompt_forward(const PromptForward& call, device::Stream stream);
int prompt_gradient(const PromptGradient& call, device::Stream stream);
int table_gradient(const TableGradient& call, device::Stream stream);

}  // namespace pk
