// Prompt tuning on the CPU.
//
// Forward: one pass over the rows of the output, each copied from the table or the prompt; mask,
// labels and positions row by row beside it.
// Backward: sums in blocks of kChain rows, each from zero in ascending order, then the blocks: the
// order of every backend, so all agree bit for bit; it does not depend on the number of threads.
#include "prompt.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace pk {
namespace {

constexpr int64_t kChain = 16;
constexpr int64_t kPiece = 512;                  // columns summed while they lie in the cache
constexpr int64_t kGrainBytes = int64_t{1} << 15;  // a thread's least share

using Half = c10::Half;

PK_INLINE double widen(double value) { return value; }
PK_INLINE float widen(float value) { return value; }
PK_INLINE float widen(bfloat16 value) { return to_float(value); }
PK_INLINE float widen(Half value) { return static_cast<float>(value); }

PK_INLINE void narrow(double value, double* out) { *out = value; }
PK_INLINE void narrow(double value, float* out) { *out = static_cast<float>(value); }
PK_INLINE void narrow(double value, bfloat16* out) { from_float(static_cast<float>(value), out); }
PK_INLINE void narrow(double value, Half* out) { *out = static_cast<Half>(static_cast<float>(value)); }

int64_t grain(int64_t bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes)); }

template <typename T>
int64_t first_kept(const void* mask, int64_t row, int64_t tokens, int64_t significant) {
  const T* in = static_cast<const T*>(mask) + row * tokens;
  for (int64_t s = 0; s < tokens; ++s)
    if (static_cast<int64_t>(in[s]) & significant) return s;
  return tokens;
}

int64_t first_kept(const PromptForward& call, int64_t row) {
  switch (call.mask_bytes) {
    case 1: return first_kept<uint8_t>(call.mask, row, call.tokens, call.significant);
    case 2: return first_kept<int16_t>(call.mask, row, call.tokens, call.significant);
    case 4: return first_kept<int32_t>(call.mask, row, call.tokens, call.significant);
    default: return first_kept<int64_t>(call.mask, row, call.tokens, call.significant);
  }
}

// out[P + S] = in[:start], `fill` P times, in[start:].
template <typename T>
void insert(const void* from, void* to, int64_t row, int64_t tokens, int64_t length, int64_t start, T fill) {
  const T* in = static_cast<const T*>(from) + row * tokens;
  T* out = static_cast<T*>(to) + row * (tokens + length);
  std::copy(in, in + start, out);
  std::fill(out + start, out + start + length, fill);
  std::copy(in + start, in + tokens, out + start + length);
}

template <typename T>
void write_mask(const PromptForward& call, int64_t row, int64_t start) {
  insert<T>(call.mask, call.mask_out, row, call.tokens, call.length, start, static_cast<T>(call.one));
  const int64_t columns = call.tokens + call.length;
  const T* mask = static_cast<const T*>(call.mask_out) + row * columns;
  int64_t* positions = call.positions + row * columns;
  int64_t kept = 0;
  for (int64_t t = 0; t < columns; ++t) {
    kept += (static_cast<int64_t>(mask[t]) & call.significant) != 0;
    positions[t] = std::max<int64_t>(kept - 1, 0);
  }
}

void write_row(const PromptForward& call, int64_t row, int64_t start) {
  if (call.labels_out && call.label_bytes == 8)
    insert<int64_t>(call.labels, call.labels_out, row, call.tokens, call.length, start, -100);
  else if (call.labels_out)
    insert<int32_t>(call.labels, call.labels_out, row, call.tokens, call.length, start, -100);
  if (!call.mask_out) {
    const int64_t columns = call.tokens + call.length;
    for (int64_t t = 0; t < columns; ++t) call.positions[row * columns + t] = t;
    return;
  }
  switch (call.mask_bytes) {
    case 1: return write_mask<uint8_t>(call, row, start);
    case 2: return write_mask<int16_t>(call, row, start);
    case 4: return write_mask<int32_t>(call, row, start);
    default: return write_mask<int64_t>(call, row, start);
  }
}

template <typename T>
bool ids_inside(const PromptForward& call) {
  using Unsigned = std::make_unsigned_t<T>;  // in which what is negative is large
  const T* ids = static_cast<const T*>(call.ids);
  Unsigned most = 0;
  for (int64_t i = 0; i < call.batch * call.tokens; ++i) most = std::max(most, static_cast<Unsigned>(ids[i]));
  return call.batch * call.tokens == 0 || most < static_cast<uint64_t>(call.vocabulary);
}

const char* token_row(const PromptForward& call, int64_t place) {
  const int64_t id = call.id_bytes == 8 ? static_cast<const int64_t*>(call.ids)[place]
                                        : static_cast<const int32_t*>(call.ids)[place];
  return static_cast<const char*>(call.weight.data) + id * call.weight.stride;
}

PK_CLONES void narrow_row(const float* from, bfloat16* to, int64_t width) {
  for (int64_t d = 0; d < width; ++d) from_float(from[d], to + d);
}

void write_embedding(const PromptForward& call, int64_t row, int64_t column) {
  const int64_t start = call.columns ? call.columns[row] : call.column;
  char* out = static_cast<char*>(call.embeddings) +
              (row * (call.tokens + call.length) + column) * call.row_bytes;
  if (column < start || column >= start + call.length) {
    const int64_t place = row * call.tokens + (column < start ? column : column - call.length);
    std::memcpy(out, token_row(call, place), call.row_bytes);
    return;
  }
  const char* in = static_cast<const char*>(call.prompt.data) + row * call.prompt_sample_stride +
                   (column - start) * call.prompt.stride;
  if (call.narrows)
    narrow_row(reinterpret_cast<const float*>(in), reinterpret_cast<bfloat16*>(out),
               call.row_bytes / static_cast<int64_t>(sizeof(bfloat16)));
  else
    std::memcpy(out, in, call.row_bytes);
}

template <typename T>
struct Sum {
  using Wide = decltype(widen(T{}));
  Wide total[kPiece], part[kPiece];
  int64_t width;

  explicit Sum(int64_t columns) : width(columns) {
    std::fill(total, total + width, Wide{0});
    std::fill(part, part + width, Wide{0});
  }
  void add(const T* row) {
    for (int64_t d = 0; d < width; ++d) part[d] += widen(row[d]);
  }
  void close_block() {
    for (int64_t d = 0; d < width; ++d) {
      total[d] += part[d];
      part[d] = Wide{0};
    }
  }
  template <typename Out>
  void write(Out* out) const {
    for (int64_t d = 0; d < width; ++d) narrow(total[d], out + d);
  }
};

template <typename T, typename Out>
void prompt_gradient(const PromptBackward& call) {
  const T* dy = static_cast<const T*>(call.dy);
  Out* out = static_cast<Out*>(call.d_prompt);
  const auto row_of = [&](int64_t b, int64_t p) {
    const int64_t start = call.columns ? call.columns[b] : call.column;
    return dy + b * call.dy_batch_stride + (start + p) * call.dy_row_stride;
  };
  if (call.per_sample) {
    torch::stable::parallel_for(
        0, call.batch * call.length, grain(call.width * sizeof(T)), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const T* in = row_of(i / call.length, i % call.length);
            for (int64_t d = 0; d < call.width; ++d) narrow(widen(in[d]), out + i * call.width + d);
          }
        });
    return;
  }
  const int64_t pieces = (call.width + kPiece - 1) / kPiece;
  const int64_t bytes = call.batch * std::min(call.width, kPiece) * sizeof(T);
  torch::stable::parallel_for(
      0, call.length * pieces, grain(bytes), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t p = i / pieces, first = i % pieces * kPiece;
          Sum<T> sum(std::min(kPiece, call.width - first));
          for (int64_t b = 0; b < call.batch; ++b) {
            sum.add(row_of(b, p) + first);
            if ((b + 1) % kChain == 0 || b + 1 == call.batch) sum.close_block();
          }
          sum.write(out + p * call.width + first);
        }
      });
}

template <typename T>
void table_gradient(const PromptBackward& call) {
  const T* dy = static_cast<const T*>(call.dy);
  T* out = static_cast<T*>(call.d_weight);
  const int64_t count = call.batch * call.tokens;
  std::vector<int64_t> heads;  // of the runs of equal ids
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || call.ids[i] != call.ids[i - 1]) heads.push_back(i);
  heads.push_back(count);
  const int64_t runs = static_cast<int64_t>(heads.size()) - 1;
  const int64_t bytes = count / std::max<int64_t>(1, runs) * call.width * sizeof(T);
  torch::stable::parallel_for(0, runs, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t id = call.ids[heads[run]];
      if (id == call.padding_idx) continue;
      for (int64_t first = 0; first < call.width; first += kPiece) {
        Sum<T> sum(std::min(kPiece, call.width - first));
        for (int64_t i = heads[run]; i < heads[run + 1]; ++i) {
          const int64_t b = call.order[i] / call.tokens, s = call.order[i] % call.tokens;
          const int64_t start = call.columns ? call.columns[b] : call.column;
          const int64_t t = s < start ? s : s + call.length;
          sum.add(dy + b * call.dy_batch_stride + t * call.dy_row_stride + first);
          if ((i + 1 - heads[run]) % kChain == 0 || i + 1 == heads[run + 1]) sum.close_block();
        }
        sum.write(out + id * call.width + first);
      }
    }
  });
}

template <typename T>
void backward_as(const PromptBackward& call) {
  if (call.d_prompt) {
    switch (call.prompt_type) {
      case Float::kFloat32: prompt_gradient<T, float>(call); break;
      case Float::kBFloat16: prompt_gradient<T, bfloat16>(call); break;
      case Float::kFloat16: prompt_gradient<T, Half>(call); break;
      case Float::kFloat64: prompt_gradient<T, double>(call); break;
    }
  }
  if (call.d_weight) table_gradient<T>(call);
}

}  // namespace

bool prompt_forward(const PromptForward& call) {
  if (!(call.id_bytes == 8 ? ids_inside<int64_t>(call) : ids_inside<int32_t>(call))) return false;
  const int64_t columns = call.tokens + call.length;
  torch::stable::parallel_for(0, call.batch, grain(columns * 8), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t start = call.columns ? first_kept(call, row) : call.column;
      if (call.columns) call.columns[row] = start;
      write_row(call, row, start);
    }
  });
  torch::stable::parallel_for(
      0, call.batch * columns, grain(call.row_bytes), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) write_embedding(call, i / columns, i % columns);
      });
  return true;
}

void prompt_backward(const PromptBackward& call) {
  switch (call.type) {
    case Float::kFloat32: return backward_as<float>(call);
    case Float::kBFloat16: return backward_as<bfloat16>(call);
    case Float::kFloat16: return backward_as<Half>(call);
    case Float::kFloat64: return backward_as<double>(call);
  }
}

}  // namespace pk
