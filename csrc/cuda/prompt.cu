// Prompt tuning on the GPU.
//
//     token s   goes to column  s + P * [s >= c]        prompt row p  goes to column  c + p
//
// Forward, one launch. The first B blocks write one row of mask, labels, positions and its c each; of
// the others each warp copies one piece of one row of embeddings, from the table or the prompt. Who
// needs c finds it in the mask, so that no block waits for another. Read once: the rows of the table,
// the prompt once a batch row; written once: every output.
//
// Backward. The prompt's gradient: a thread sums its columns over the batch. The table's: the ids come
// sorted (stably), and the block at the head of a run of equal ids sums the run. Both add in float32 in
// blocks of kChain rows, each from zero, then the blocks, in ascending order: the bits of every backend.
//
// 16 bytes a thread where every address and stride allows it, else element by element. An id outside
// the vocabulary is not read: its row of embeddings is NaN, its gradient is dropped.
#include "prompt.h"

namespace pk {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChain = 16;
constexpr int kColumns = 8;  // of a row of bookkeeping that a thread takes at a time
constexpr int kPacks = 4;    // of 16 bytes that a thread copies
constexpr int64_t kIgnoredLabel = -100;

using Bytes16 = Pack<uint32_t, 4>;

PK_DEVICE int64_t load_integer(const void* data, int64_t bytes, int64_t index) {
  switch (bytes) {
    case 1: return static_cast<const uint8_t*>(data)[index];
    case 2: return static_cast<const int16_t*>(data)[index];
    case 4: return static_cast<const int32_t*>(data)[index];
    default: return static_cast<const int64_t*>(data)[index];
  }
}

PK_DEVICE void store_integer(void* data, int64_t bytes, int64_t index, int64_t value) {
  switch (bytes) {
    case 1: static_cast<uint8_t*>(data)[index] = static_cast<uint8_t>(value); break;
    case 2: static_cast<int16_t*>(data)[index] = static_cast<int16_t>(value); break;
    case 4: static_cast<int32_t*>(data)[index] = static_cast<int32_t>(value); break;
    default: static_cast<int64_t*>(data)[index] = value;
  }
}

PK_HOST_DEVICE int64_t bytes_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

PK_DEVICE float load_as(const void* data, Type type, int64_t index) {
  switch (type) {
    case Type::kFloat16: return to_float(static_cast<const Half*>(data)[index]);
    case Type::kBFloat16: return to_float(static_cast<const BFloat16*>(data)[index]);
    default: return static_cast<const float*>(data)[index];
  }
}

// c of a row, found by a whole warp.
PK_DEVICE int64_t start_of(const PromptForward& call, int64_t row) {
  if (!call.columns) return call.column;
  for (int64_t first = 0; first < call.tokens; first += kWarp * kColumns) {
    int found = kWarp * kColumns;
    for (int i = kColumns - 1; i >= 0; --i) {
      const int64_t s = first + i * kWarp + lane();
      if (s < call.tokens &&
          (load_integer(call.mask, call.mask_bytes, row * call.tokens + s) & call.significant))
        found = i * kWarp + lane();
    }
    for (int mask = 1; mask < kWarp; mask *= 2) {
      const int other = shuffle_xor(found, mask);
      found = other < found ? other : found;
    }
    if (found < kWarp * kColumns) return first + found;
  }
  return call.tokens;
}

// The sum of `value` over the threads before this one, and over all of them in `total`.
PK_DEVICE int sum_before(int value, int* totals, int* total) {
  int sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = shuffle(sum, lane() >= step ? lane() - step : lane());
    sum += lane() >= step ? before : 0;
  }
  if (lane() == kWarp - 1) totals[warp()] = sum;
  sync_threads();
  int before = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp() ? totals[w] : 0;
    all += totals[w];
  }
  sync_threads();
  *total = all;
  return before + sum - value;
}

// One row of mask, labels and positions, and its c.
PK_DEVICE void write_row(const PromptForward& call, int64_t row) {
  char* cursor = shared_memory();
  int* totals = carve<int>(cursor, kWarps);
  const int64_t start = start_of(call, row);
  if (call.columns && thread_x() == 0) call.columns[row] = start;
  const int64_t columns = call.tokens + call.length;
  int64_t kept_before = 0;
  for (int64_t first = 0; first < columns; first += kThreads * kColumns) {
    const int64_t mine = first + thread_x() * kColumns;
    uint32_t kept = 0;  // a bit for each column
    int count = 0;
    for (int i = 0; i < kColumns && mine + i < columns; ++i) {
      const int64_t t = mine + i, out = row * columns + t;
      const bool in_prompt = t >= start && t < start + call.length;
      const int64_t in = row * call.tokens + (t < start ? t : t - call.length);
      if (call.labels_out)
        store_integer(
            call.labels_out, call.label_bytes, out,
            in_prompt ? kIgnoredLabel : load_integer(call.labels, call.label_bytes, in));
      if (!call.mask_out) {
        call.positions[out] = t;
        continue;
      }
      const int64_t value = in_prompt ? call.one : load_integer(call.mask, call.mask_bytes, in);
      store_integer(call.mask_out, call.mask_bytes, out, value);
      const bool keep = (value & call.significant) != 0;
      kept |= static_cast<uint32_t>(keep) << i;
      count += keep;
    }
    if (!call.mask_out) continue;
    int total;
    int64_t seen = kept_before + sum_before(count, totals, &total);
    for (int i = 0; i < kColumns && mine + i < columns; ++i) {
      seen += kept >> i & 1;
      call.positions[row * columns + mine + i] = seen ? seen - 1 : 0;
    }
    kept_before += total;
  }
}

// Bytes [first, last) of a row, by a whole warp; `from` is null for a row of NaN.
template <typename Unit>
PK_DEVICE void copy(const char* from, char* to, int64_t first, int64_t last, Unit nan) {
  const Unit* in = reinterpret_cast<const Unit*>(from);
  Unit* out = reinterpret_cast<Unit*>(to);
  const int64_t end = last / static_cast<int64_t>(sizeof(Unit));
  for (int64_t i = first / static_cast<int64_t>(sizeof(Unit)) + lane(); i < end; i += kWarp)
    out[i] = from ? in[i] : nan;
}

// Grid: B rows of bookkeeping, then the pieces of rows of embeddings, kWarps a block.
PK_KERNEL void prompt_forward_kernel(PromptForward call, int64_t pieces, int64_t piece) {
  if (block_x() < call.batch) return write_row(call, block_x());
  const int64_t columns = call.tokens + call.length;
  const int64_t place = (block_x() - call.batch) * kWarps + warp();
  const int64_t row = place / (columns * pieces), t = place / pieces % columns;
  if (row >= call.batch) return;
  const int64_t start = start_of(call, row);
  const int64_t first = place % pieces * piece;
  const int64_t last = first + piece < call.width ? first + piece : call.width;  // in elements
  const int64_t size = bytes_of(call.type), out = (row * columns + t) * call.width;
  const bool in_prompt = t >= start && t < start + call.length;
  const char* from;
  if (in_prompt) {
    const int64_t in = row * call.prompt_sample_stride + (t - start) * call.prompt_stride;
    if (call.prompt_type != call.type) {
      for (int64_t d = first + lane(); d < last; d += kWarp)
        store_as(call.embeddings, call.type, out + d, load_as(call.prompt, call.prompt_type, in + d));
      return;
    }
    from = static_cast<const char*>(call.prompt) + in * size;
  } else {
    const int64_t s = row * call.tokens + (t < start ? t : t - call.length);
    const int64_t id = load_integer(call.ids, call.id_bytes, s);
    from = id < 0 || id >= call.vocabulary
               ? nullptr
               : static_cast<const char*>(call.weight) + id * call.weight_stride * size;
  }
  char* to = static_cast<char*>(call.embeddings) + out * size;
  // Quiet NaN in float32; twice over in 16 bits it is one in float16 and in bfloat16.
  const uint32_t nan = 0x7FFF7FFF;
  if (is_aligned(from, 16) && is_aligned(to, 16) && call.width * size % 16 == 0)
    copy(from, to, first * size, last * size, Bytes16{{nan, nan, nan, nan}});
  else if (size == 4)
    copy(from, to, first * size, last * size, nan);
  else
    copy(from, to, first * size, last * size, static_cast<uint16_t>(nan));
}

// Sums of N columns in the order of every backend.
template <typename T, int N>
struct Sum {
  float total[N] = {}, part[N] = {};

  PK_DEVICE void add(const Pack<T, N>& row) {
    PK_UNROLL for (int i = 0; i < N; ++i) part[i] += to_float(row[i]);
  }
  PK_DEVICE void close_block() {
    PK_UNROLL for (int i = 0; i < N; ++i) {
      total[i] += part[i];
      part[i] = 0.0f;
    }
  }
};

// Grid: P (per sample B * P) rows by blocks of kThreads * N columns.
template <typename T, int N>
PK_KERNEL void prompt_gradient_kernel(PromptGradient call, int64_t blocks_d) {
  const int64_t d = (block_x() % blocks_d * kThreads + thread_x()) * N;
  if (d >= call.width) return;
  const int64_t row = block_x() / blocks_d, p = row % call.length;
  const T* dy = static_cast<const T*>(call.dy) + p * call.dy_row_stride + d;
  const auto load = [&](int64_t b) {
    const int64_t start = call.columns ? call.columns[b] : call.column;
    return load_pack<T, N>(dy + b * call.dy_batch_stride + start * call.dy_row_stride);
  };
  Sum<T, N> sum;
  const int64_t begin = call.per_sample ? row / call.length : 0;
  const int64_t end = call.per_sample ? begin + 1 : call.batch;
  int64_t b = begin;
  for (; b + kChain <= end; b += kChain) {
    Pack<T, N> rows[kChain];
    PK_UNROLL for (int i = 0; i < kChain; ++i) rows[i] = load(b + i);
    PK_UNROLL for (int i = 0; i < kChain; ++i) sum.add(rows[i]);
    sum.close_block();
  }
  for (; b < end; ++b) sum.add(load(b));
  sum.close_block();
  PK_UNROLL for (int i = 0; i < N; ++i)
    store_as(call.d_prompt, call.out_type, row * call.width + d + i, sum.total[i]);
}

// Grid: B * S sorted ids by blocks of kThreads * N columns.
template <typename T, int N>
PK_KERNEL void table_gradient_kernel(TableGradient call, int64_t blocks_d) {
  const int64_t head = block_x() / blocks_d;
  const int64_t d = (block_x() % blocks_d * kThreads + thread_x()) * N;
  const int64_t id = load_integer(call.ids, call.id_bytes, head);
  const bool first = head == 0 || load_integer(call.ids, call.id_bytes, head - 1) != id;
  if (!first || id == call.padding_idx || id < 0 || id >= call.vocabulary || d >= call.width) return;
  const T* dy = static_cast<const T*>(call.dy) + d;
  const auto load = [&](int64_t nth) {
    const int64_t b = call.order[nth] / call.tokens, s = call.order[nth] % call.tokens;
    const int64_t start = call.columns ? call.columns[b] : call.column;
    const int64_t t = s < start ? s : s + call.length;
    return load_pack<T, N>(dy + b * call.dy_batch_stride + t * call.dy_row_stride);
  };
  Sum<T, N> sum;
  bool more = true;
  for (int64_t nth = head; more; nth += kChain) {
    Pack<T, N> rows[kChain] = {};
    PK_UNROLL for (int i = 0; i < kChain; ++i) {
      more = nth + i < call.count && load_integer(call.ids, call.id_bytes, nth + i) == id;
      if (more) rows[i] = load(nth + i);
    }
    PK_UNROLL for (int i = 0; i < kChain; ++i) sum.add(rows[i]);
    sum.close_block();
  }
  Pack<T, N> rounded;
  PK_UNROLL for (int i = 0; i < N; ++i) rounded[i] = from_float<T>(sum.total[i]);
  store_pack(static_cast<T*>(call.d_weight) + id * call.width + d, rounded);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every row of dy, [.., D] with these strides, can be read 16 bytes at a time.
template <typename Gradient>
bool in_packs(const Gradient& call, int64_t elements) {
  return call.width % elements == 0 && call.dy_batch_stride % elements == 0 &&
         call.dy_row_stride % elements == 0 && is_aligned(call.dy, 16);
}

template <typename T, int N>
int launch_prompt_gradient(const PromptGradient& call, Stream stream) {
  const int64_t blocks_d = divide_up(call.width, kThreads * N);
  const int64_t rows = call.length * (call.per_sample ? call.batch : 1);
  return launch(
      "prompt_gradient", prompt_gradient_kernel<T, N>, {rows * blocks_d}, kThreads, 0, stream, call,
      blocks_d);
}

template <typename T, int N>
int launch_table_gradient(const TableGradient& call, Stream stream) {
  const int64_t blocks_d = divide_up(call.width, kThreads * N);
  return launch(
      "table_gradient", table_gradient_kernel<T, N>, {call.count * blocks_d}, kThreads, 0, stream,
      call, blocks_d);
}

template <typename T>
int prompt_gradient_of(const PromptGradient& call, Stream stream) {
  constexpr int kPack = kPackOf16<T>;
  return in_packs(call, kPack) ? launch_prompt_gradient<T, kPack>(call, stream)
                               : launch_prompt_gradient<T, 1>(call, stream);
}

template <typename T>
int table_gradient_of(const TableGradient& call, Stream stream) {
  constexpr int kPack = kPackOf16<T>;
  return in_packs(call, kPack) && is_aligned(call.d_weight, 16)
             ? launch_table_gradient<T, kPack>(call, stream)
             : launch_table_gradient<T, 1>(call, stream);
}

}  // namespace

int prompt_forward(const PromptForward& call, Stream stream) {
  // Of every element size a piece begins where 16 bytes do.
  const int64_t piece = kWarp * kPacks * 16 / bytes_of(call.type);
  const int64_t pieces = divide_up(call.width, piece);
  const int64_t rows = call.batch * (call.tokens + call.length);
  return launch(
      "prompt_forward", prompt_forward_kernel, {call.batch + divide_up(rows * pieces, kWarps)},
      kThreads, carved_bytes(kWarps * sizeof(int)), stream, call, pieces, piece);
}

int prompt_gradient(const PromptGradient& call, Stream stream) {
  switch (call.type) {
    case Type::kFloat32: return prompt_gradient_of<float>(call, stream);
    case Type::kBFloat16: return prompt_gradient_of<BFloat16>(call, stream);
    default: return prompt_gradient_of<Half>(call, stream);
  }
}

int table_gradient(const TableGradient& call, Stream stream) {
  switch (call.type) {
    case Type::kFloat32: return table_gradient_of<float>(call, stream);
    case Type::kBFloat16: return table_gradient_of<BFloat16>(call, stream);
    default: return table_gradient_of<Half>(call, stream);
  }
}

}  // namespace pk
