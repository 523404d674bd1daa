// Prompt tuning on the CPU: token and prompt rows placed in one pass, gradients summed in one order.
#pragma once

#include <cstdint>

namespace pk {

// Row-major rows of `stride` bytes from one to the next.
struct Rows {
  void* data;
  int64_t stride;
};

struct PromptForward {
  int64_t batch, tokens, length;  // B, S, P
  int64_t row_bytes;              // of a row of the table and the embeddings
  const void* ids;                // [B, S], int64 or int32
  int64_t id_bytes;
  Rows weight;                    // [V, D]
  int64_t vocabulary;             // V
  Rows prompt;                    // [P, D], or [B, P, D] with
  int64_t prompt_sample_stride;   // bytes from one sample's prompt to the next; 0: shared
  bool narrows;                   // the prompt is float32, the table bfloat16; else they are one type
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
  int64_t* columns;               // [B]: the first kept token of each row, or null
};

enum class Float : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct PromptBackward {
  Float type, prompt_type;        // of dy and d_weight; of d_prompt
  int64_t batch, tokens, length, width;
  const void* dy;                 // [B, P + S, D], unit inner stride; strides in elements
  int64_t dy_batch_stride, dy_row_stride;
  const int64_t* columns;         // [B] or null
  int64_t column;
  void* d_prompt;                 // [P, D] (per_sample: [B, P, D]) or null
  bool per_sample;
  const int64_t* ids;             // [B * S] sorted ascending, or null
  const int64_t* order;           // place of each sorted id in [B, S], equal ids ascending
  int64_t padding_idx;
  void* d_weight;                 // [V, D], zero where no id points
};

// Returns whether every id lies inside the table; if not, nothing was written.
bool prompt_forward(const PromptForward& call);
void prompt_backward(const PromptBackward& call);

}  // namespace pk
