// All of a LoRA product too small for a GEMM call, base product included, one row after another: no
// packing and no memory but one buffer that its thread keeps. For few rows: gradients are sums of sums of eight.
#include "lora_small.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dots.h"
#include "lowrank.h"
#include "parts.h"

namespace pk {
namespace {

// Floats that stay allocated between calls; what they hold at the start is undefined.
float* scratch(int64_t count) {
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

template <typename T>
PK_INLINE void widen_row(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

// sum + the products of v and w lane by lane, in short chains; v is zero up to a whole vector.
template <typename T>
PK_INLINE vf add_products(vf sum, const float* v, const T* w, int64_t count, int64_t room) {
  for (int64_t k0 = 0; k0 < count; k0 += kChain * kLanes) {
    vf acc{};
    for (int64_t k = k0; k < std::min(count, k0 + kChain * kLanes); k += kLanes)
      acc += load(v + k) * load_as_float(w + k, count - k, room - k);
    sum += acc;
  }
  return sum;
}

// out[0, count) = sum_n v[n] w[n, 0 .. count), in short chains; out has room for a whole vector.
template <typename T>
PK_INLINE void combine(const float* v, const T* w, int64_t rows, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += kLanes) {
    vf sum{};
    for (int64_t n0 = 0; n0 < rows; n0 += kChain) {
      vf acc{};
      for (int64_t n = n0; n < std::min(rows, n0 + kChain); ++n)
        acc += v[n] * load_as_float(w + n * count + k, count - k, (rows - n) * count - k);
      sum += acc;
    }
    store(out + k, sum);
  }
}

PK_INLINE void add_scaled(float factor, const float* v, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * v[i];
}

// Zero the dropped elements of a row of an activation.
PK_INLINE void drop_row(const Dropout& dropout, int64_t row, int64_t columns, float* v) {
  uint32_t keep[kDepth];
  for (int64_t k = 0; k < columns; k += kDepth) {
    draw_keep(dropout, {row, 1, nullptr}, columns, k, keep);
    for (int64_t i = 0; i < std::min(kDepth, columns - k); ++i) v[k + i] = keep[i] ? v[k + i] : 0.0f;
  }
}

template <typename T>
PK_INLINE void forward_rows(const LoRAForward& c) {
  const int64_t K = c.in_features, N = c.out_features, R = c.rank;
  const int64_t width = round_up(K, kLanes), ranks = round_up(R, kLanes);
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  const auto *a = static_cast<const T*>(c.lora_a), *b = static_cast<const T*>(c.lora_b);
  const auto *weight = static_cast<const T*>(c.weight), *bias = static_cast<const T*>(c.bias);
  float* x = scratch(2 * width + ranks);
  float *dropped = c.dropout ? x + width : x, *s = x + 2 * width;
  std::fill_n(x, 2 * width + ranks, 0.0f);
  for (int64_t m = 0; m < c.tokens; ++m) {
    widen_row(static_cast<const T*>(c.x.data) + m * c.x.stride, K, x);
    if (c.dropout) {
      std::copy_n(x, K, dropped);
      drop_row(dropout, m, K, dropped);
    }
    T* saved = static_cast<T*>(c.s) + m * R;
    for (int64_t j0 = 0; j0 < R; j0 += kLanes) {
      vf products[kLanes] = {};
      const int64_t count = std::min(kLanes, R - j0);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t j = j0 + i;
        products[i] = add_products(vf{}, dropped, a + j * K, K, (R - j) * K);
      }
      float line[kLanes];
      store(line, c.factor * sums_of(products));
      for (int64_t i = 0; i < count; ++i) {
        from_float(line[i], saved + j0 + i);
        s[j0 + i] = to_float(saved[j0 + i]);
      }
    }
    T* y = static_cast<T*>(c.y) + m * N;
    for (int64_t n0 = 0; n0 < N; n0 += kLanes) {
      vf products[kLanes] = {};
      const int64_t count = std::min(kLanes, N - n0);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = n0 + i;
        const vf base = add_products(vf{}, x, weight + n * K, K, (N - n) * K);
        products[i] = add_products(base, s, b + n * R, R, (N - n) * R);
      }
      vf sums = sums_of(products);
      if (bias) sums += load_as_float(bias + n0, count, N - n0);
      float line[kLanes];
      store(line, sums);
      for (int64_t i = 0; i < count; ++i) from_float(line[i], y + n0 + i);
    }
  }
}

// The gradients of the factors: sums over a block of rows, added to the sums over all of them.
struct Sums {
  float *da, *db, *dbias;  // [R, K], [N, R], [N]
};

template <typename T>
PK_INLINE void backward_row(const LoRABackward& c, int64_t m, float* buffer, const Sums& sums) {
  const int64_t K = c.in_features, N = c.out_features, R = c.rank;
  const int64_t width = round_up(K, kLanes), ranks = round_up(R, kLanes);
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  float *x = buffer, *low = x + width, *base = low + width, *s = base + width, *ds = s + ranks;
  float* dy = ds + ranks;
  widen_row(static_cast<const T*>(c.dy.data) + m * c.dy.stride, N, dy);
  widen_row(static_cast<const T*>(c.s) + m * R, R, s);
  for (int64_t n = 0; c.db.data && n < N; ++n) add_scaled(dy[n], s, R, sums.db + n * R);
  for (int64_t n = 0; c.dbias.data && n < N; ++n) sums.dbias[n] += dy[n];
  if (!c.dx && !c.da.data) return;
  combine(dy, static_cast<const T*>(c.lora_b), N, R, ds);
  for (int64_t j = 0; j < R; ++j) ds[j] = rounded<T>(c.factor * ds[j]);
  if (c.da.data) {
    widen_row(static_cast<const T*>(c.x.data) + m * c.x.stride, K, x);
    if (c.dropout) drop_row(dropout, m, K, x);
    for (int64_t j = 0; j < R; ++j) add_scaled(ds[j], x, K, sums.da + j * K);
  }
  if (!c.dx) return;
  combine(ds, static_cast<const T*>(c.lora_a), R, K, low);
  if (c.dropout) drop_row(dropout, m, K, low);
  combine(dy, static_cast<const T*>(c.weight), N, K, base);
  T* dx = static_cast<T*>(c.dx) + m * K;
  for (int64_t k = 0; k < K; ++k) from_float(base[k] + low[k], dx + k);
}

template <typename T>
PK_INLINE void backward_rows(const LoRABackward& c) {
  const int64_t K = c.in_features, N = c.out_features, R = c.rank;
  const int64_t da = c.da.data ? R * K : 0, db = c.db.data ? N * R : 0, dbias = c.dbias.data ? N : 0;
  const int64_t size = da + db + dbias;
  const int64_t row = 3 * round_up(K, kLanes) + 2 * round_up(R, kLanes) + round_up(N, kLanes);
  float *block = scratch(2 * size + row), *total = block + size, *buffer = total + size;
  std::fill_n(total, size, 0.0f);
  for (int64_t first = 0; first < c.tokens; first += kStrip) {
    std::fill_n(block, size, 0.0f);
    for (int64_t m = first; m < std::min(c.tokens, first + kStrip); ++m)
      backward_row<T>(c, m, buffer, {block, block + da, block + da + db});
    add_scaled(1.0f, block, size, total);
  }
  write_gradient(total, K, 1, R, K, c.da);
  write_gradient(total + da, R, 1, N, R, c.db);
  write_gradient(total + da + db, N, 1, 1, N, c.dbias);
}

PK_CLONES void small_forward_float(const LoRAForward& call) { forward_rows<float>(call); }
PK_CLONES void small_forward_bfloat16(const LoRAForward& call) { forward_rows<bfloat16>(call); }
PK_CLONES void small_backward_float(const LoRABackward& call) { backward_rows<float>(call); }
PK_CLONES void small_backward_bfloat16(const LoRABackward& call) { backward_rows<bfloat16>(call); }

}  // namespace

void lora_forward_small(const LoRAForward& call) {
  call.type == Type::kFloat32 ? small_forward_float(call) : small_forward_bfloat16(call);
}

void lora_backward_small(const LoRABackward& call) {
  call.type == Type::kFloat32 ? small_backward_float(call) : small_backward_bfloat16(call);
}

}  // namespace pk
