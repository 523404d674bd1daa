// The low-rank part of LoRA on the CPU: one pass over each activation per direction.
//
// Forward, per block of rows: s = factor * (mask * x) A^T, then y = bias + s B^T. The caller adds
// x W^T by the GEMM library with beta = 1, so y costs no pass of its own.
// Backward, per block of rows: dy is read once for ds, dB and dbias, x once for dA, and dx starts as
// mask * (ds A), to which the caller adds dy W. The mask is drawn again, never stored.
//
// Gradients of the factors are summed per chunk of rows and the chunks in order: a function of the
// shapes alone, so results do not depend on the number of threads.
#include "lora.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "lowrank.h"

namespace pk {
namespace {

constexpr int64_t kWide = 2 * kLanes;
constexpr int64_t kChunks = 16;
constexpr int64_t kPartialBytes = int64_t{64} << 20;

int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

// [rows, columns] widened to float32 with row stride `stride`, zeros beyond `columns`.
template <typename T>
std::vector<float> padded(const void* from, int64_t rows, int64_t columns, int64_t stride) {
  std::vector<float> to(rows * stride, 0.0f);
  const T* in = static_cast<const T*>(from);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[i * stride + j] = to_float(in[i * columns + j]);
  return to;
}

// The transpose of [rows, columns], widened, with row stride `stride`, zeros beyond `rows`.
template <typename T>
std::vector<float> transposed(const void* from, int64_t rows, int64_t columns, int64_t stride) {
  std::vector<float> to(columns * stride, 0.0f);
  const T* in = static_cast<const T*>(from);
  constexpr int64_t kTile = 32;
  for (int64_t i0 = 0; i0 < rows; i0 += kTile)
    for (int64_t j0 = 0; j0 < columns; j0 += kTile)
      for (int64_t j = j0; j < std::min(columns, j0 + kTile); ++j)
        for (int64_t i = i0; i < std::min(rows, i0 + kTile); ++i)
          to[j * stride + i] = to_float(in[i * columns + j]);
  return to;
}

struct ForwardPlan {
  const LoRAForward* call;
  int64_t ranks, q_stride;
  const float *p, *q, *bias;
};

PK_INLINE void draw_keep(
    const Dropout& dropout, int64_t first_row, int64_t rows, int64_t columns, int64_t first_column,
    uint32_t* keep) {
  const uint64_t groups = static_cast<uint64_t>((columns + 3) / 4);
  const int64_t needed = (std::min(kDepth, columns - first_column) + 3) / 4;
  for (int64_t m = 0; m < rows; ++m) {
    const uint64_t counter = static_cast<uint64_t>(first_row + m) * groups + first_column / 4;
    keep_words(dropout, counter, needed, keep + m * kDepth);
  }
}

template <typename T>
PK_INLINE float dot(const T* a, const T* b, int64_t count) {
  vf sum{};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    float one[kLanes], other[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      one[i] = to_float(a[k + i]);
      other[i] = to_float(b[k + i]);
    }
    sum += load(one) * load(other);
  }
  float rest = 0.0f;
  for (; k < count; ++k) rest += to_float(a[k]) * to_float(b[k]);
  float lanes[kLanes];
  store(lanes, sum);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0] + rest;
}

// Rows [first, first + rows) of y when this code makes all of it: products too small for a GEMM.
template <typename T>
PK_INLINE void whole_rows(const ForwardPlan& plan, const float* s, int64_t first, int64_t rows) {
  const LoRAForward& c = *plan.call;
  std::vector<float> y(rows * plan.q_stride);
  expand(s, plan.ranks, plan.q, plan.q_stride, plan.bias, nullptr, 0, rows, c.rank, c.out_features,
         y.data(), plan.q_stride);
  for (int64_t m = 0; m < rows; ++m) {
    const T* x = static_cast<const T*>(c.x.data) + (first + m) * c.x.stride;
    const T* weight = static_cast<const T*>(c.weight);
    T* out = static_cast<T*>(c.y) + (first + m) * c.out_features;
    for (int64_t n = 0; n < c.out_features; ++n)
      from_float(y[m * plan.q_stride + n] + dot(x, weight + n * c.in_features, c.in_features), out + n);
  }
}

template <typename T>
PK_INLINE void forward_blocks(const ForwardPlan& plan, int64_t begin, int64_t end) {
  const LoRAForward& c = *plan.call;
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  std::vector<float> v(kRows * kDepth), s(kRows * plan.ranks);
  std::vector<uint32_t> keep(c.dropout ? kRows * kDepth : 0);
  const T* x = static_cast<const T*>(c.x.data);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRows, rows = std::min(kRows, c.tokens - first);
    std::fill(s.begin(), s.end(), 0.0f);
    for (int64_t k = 0; k < c.in_features; k += kDepth) {
      const int64_t depth = std::min(kDepth, c.in_features - k);
      widen(x + first * c.x.stride + k, c.x.stride, rows, depth, v.data());
      if (c.dropout) {
        draw_keep(dropout, first, rows, c.in_features, k, keep.data());
        apply_mask(keep.data(), kDepth, rows, v.data());
      }
      project(v.data(), plan.p + k * plan.ranks, rows, depth, plan.ranks, s.data());
    }
    T* out = static_cast<T*>(c.s) + first * c.rank;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < c.rank; ++j) {
        float& value = s[m * plan.ranks + j];
        from_float(value * c.factor, out + m * c.rank + j);
        value = to_float(out[m * c.rank + j]);
      }
    if (c.weight) {
      whole_rows<T>(plan, s.data(), first, rows);
    } else {
      expand(s.data(), plan.ranks, plan.q, plan.q_stride, plan.bias, nullptr, 0, rows, c.rank,
             c.out_features, static_cast<T*>(c.y) + first * c.out_features, c.out_features);
    }
  }
}

struct BackwardPlan {
  const LoRABackward* call;
  int64_t ranks, q_stride, chunks, blocks_per_chunk, da_rows, db_rows;
  const float *p, *q;
  float *da, *db, *dbias;  // one part per chunk
};

template <typename T>
PK_INLINE void backward_chunk(const BackwardPlan& plan, int64_t chunk) {
  const LoRABackward& c = *plan.call;
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  const int64_t ranks = plan.ranks;
  const bool need_ds = c.dx || c.da;
  std::vector<float> v(kRows * kDepth), s(kRows * ranks), ds(kRows * ranks);
  std::vector<uint32_t> keep(c.dropout ? kRows * kDepth : 0);
  float* da = plan.da + chunk * plan.da_rows * ranks;
  float* db = plan.db + chunk * plan.db_rows * ranks;
  float* dbias = plan.dbias + chunk * c.out_features;
  const int64_t last = std::min(blocks_of(c.tokens), (chunk + 1) * plan.blocks_per_chunk);
  for (int64_t block = chunk * plan.blocks_per_chunk; block < last; ++block) {
    const int64_t first = block * kRows, rows = std::min(kRows, c.tokens - first);
    std::fill(s.begin(), s.end(), 0.0f);
    std::fill(ds.begin(), ds.end(), 0.0f);
    const T* saved = static_cast<const T*>(c.s) + first * c.rank;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < c.rank; ++j) s[m * ranks + j] = to_float(saved[m * c.rank + j]);

    const T* dy = static_cast<const T*>(c.dy.data) + first * c.dy.stride;
    for (int64_t n = 0; n < c.out_features; n += kDepth) {
      const int64_t depth = std::min(kDepth, c.out_features - n);
      widen(dy + n, c.dy.stride, rows, depth, v.data());
      if (need_ds) project(v.data(), plan.p + n * ranks, rows, depth, ranks, ds.data());
      if (c.db) gradient(v.data(), s.data(), rows, depth, ranks, db + n * ranks);
      if (c.dbias)
        for (int64_t m = 0; m < rows; ++m)
          for (int64_t k = 0; k < depth; ++k) dbias[n + k] += v[m * kDepth + k];
    }
    if (!need_ds) continue;
    for (float& value : ds) value = rounded<T>(value * c.factor);

    const T* x = static_cast<const T*>(c.x.data) + first * c.x.stride;
    for (int64_t k = 0; k < c.in_features; k += kDepth) {
      const int64_t depth = std::min(kDepth, c.in_features - k);
      if (c.dropout) draw_keep(dropout, first, rows, c.in_features, k, keep.data());
      if (c.da) {
        widen(x + k, c.x.stride, rows, depth, v.data());
        if (c.dropout) apply_mask(keep.data(), kDepth, rows, v.data());
        gradient(v.data(), ds.data(), rows, depth, ranks, da + k * ranks);
      }
      if (c.dx)
        expand(ds.data(), ranks, plan.q + k, plan.q_stride, nullptr,
               c.dropout ? keep.data() : nullptr, kDepth, rows, c.rank, depth,
               static_cast<T*>(c.dx) + first * c.in_features + k, c.in_features);
    }
  }
}

PK_CLONES void forward_float(const ForwardPlan& plan, int64_t begin, int64_t end) {
  forward_blocks<float>(plan, begin, end);
}
PK_CLONES void forward_bfloat16(const ForwardPlan& plan, int64_t begin, int64_t end) {
  forward_blocks<bfloat16>(plan, begin, end);
}
PK_CLONES void backward_float(const BackwardPlan& plan, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<float>(plan, chunk);
}
PK_CLONES void backward_bfloat16(const BackwardPlan& plan, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<bfloat16>(plan, chunk);
}

void write(float value, void* to, int64_t index, Type type) {
  if (type == Type::kFloat32) {
    static_cast<float*>(to)[index] = value;
  } else {
    from_float(value, static_cast<bfloat16*>(to) + index);
  }
}

// Elements [begin, end) of the first part become the sum over all parts, in order.
PK_CLONES void add_parts(float* parts, int64_t chunks, int64_t size, int64_t begin, int64_t end) {
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float* part = parts + chunk * size;
    for (int64_t i = begin; i < end; ++i) parts[i] += part[i];
  }
}

void sum_parts(float* parts, int64_t chunks, int64_t size) {
  constexpr int64_t kPiece = 4096;  // its sum stays in the first-level cache
  if (chunks == 1 || size == 0) return;
  torch::stable::parallel_for(0, (size + kPiece - 1) / kPiece, 8, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece)
      add_parts(parts, chunks, size, piece * kPiece, std::min(size, (piece + 1) * kPiece));
  });
}

template <typename T>
void forward_as(const LoRAForward& call, void (*blocks)(const ForwardPlan&, int64_t, int64_t)) {
  const int64_t ranks = round_up(call.rank, kLanes), q_stride = round_up(call.out_features, kWide);
  const auto p = transposed<T>(call.lora_a, call.rank, call.in_features, ranks);
  const auto q = transposed<T>(call.lora_b, call.out_features, call.rank, q_stride);
  std::vector<float> bias;
  if (call.bias) bias = padded<T>(call.bias, 1, call.out_features, q_stride);
  const ForwardPlan plan{&call, ranks, q_stride, p.data(), q.data(), call.bias ? bias.data() : nullptr};
  const int64_t count = blocks_of(call.tokens);
  if (count == 1) {
    blocks(plan, 0, 1);
  } else {
    torch::stable::parallel_for(
        0, count, 1, [&](int64_t begin, int64_t end) { blocks(plan, begin, end); });
  }
}

template <typename T>
void backward_as(const LoRABackward& call, void (*chunks)(const BackwardPlan&, int64_t, int64_t)) {
  const int64_t ranks = round_up(call.rank, kLanes), q_stride = round_up(call.in_features, kDepth);
  const auto p = padded<T>(call.lora_b, call.out_features, call.rank, ranks);
  std::vector<float> q;
  if (call.dx) q = padded<T>(call.lora_a, call.rank, call.in_features, q_stride);

  BackwardPlan plan{&call, ranks, q_stride, 0, 0, 0, 0, p.data(), q.data(), nullptr, nullptr, nullptr};
  plan.da_rows = call.da ? round_up(call.in_features, kStrip) : 0;
  plan.db_rows = call.db ? round_up(call.out_features, kStrip) : 0;
  const int64_t part = (plan.da_rows + plan.db_rows) * ranks * static_cast<int64_t>(sizeof(float));
  const int64_t blocks = blocks_of(call.tokens);
  const int64_t wanted = std::max<int64_t>(1, std::min(kChunks, part ? kPartialBytes / part : kChunks));
  plan.blocks_per_chunk = (blocks + wanted - 1) / wanted;
  plan.chunks = (blocks + plan.blocks_per_chunk - 1) / plan.blocks_per_chunk;
  std::vector<float> da(plan.chunks * plan.da_rows * ranks), db(plan.chunks * plan.db_rows * ranks);
  std::vector<float> dbias(call.dbias ? plan.chunks * call.out_features : 0);
  plan.da = da.data();
  plan.db = db.data();
  plan.dbias = dbias.data();
  if (plan.chunks == 1) {
    chunks(plan, 0, 1);
  } else {
    torch::stable::parallel_for(
        0, plan.chunks, 1, [&](int64_t begin, int64_t end) { chunks(plan, begin, end); });
  }

  sum_parts(plan.da, plan.chunks, plan.da_rows * ranks);
  sum_parts(plan.db, plan.chunks, plan.db_rows * ranks);
  sum_parts(plan.dbias, plan.chunks, call.dbias ? call.out_features : 0);
  for (int64_t j = 0; call.da && j < call.rank; ++j)
    for (int64_t k = 0; k < call.in_features; ++k)
      write(da[k * ranks + j], call.da, j * call.in_features + k, call.da_type);
  for (int64_t n = 0; call.db && n < call.out_features; ++n)
    for (int64_t j = 0; j < call.rank; ++j)
      write(db[n * ranks + j], call.db, n * call.rank + j, call.db_type);
  for (int64_t n = 0; call.dbias && n < call.out_features; ++n)
    write(dbias[n], call.dbias, n, call.dbias_type);
}

}  // namespace

void lora_forward(const LoRAForward& call) {
  if (call.type == Type::kFloat32) {
    forward_as<float>(call, forward_float);
  } else {
    forward_as<bfloat16>(call, forward_bfloat16);
  }
}

void lora_backward(const LoRABackward& call) {
  if (call.type == Type::kFloat32) {
    backward_as<float>(call, backward_float);
  } else {
    backward_as<bfloat16>(call, backward_bfloat16);
  }
}

const char* vector_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "default";
}

}  // namespace pk
