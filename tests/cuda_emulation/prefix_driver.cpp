// Prefix attention forward and backward without Python, for sanitizers and mutants: every result is
// compared with sums in double.
//
// With PK_FORWARD_ALONE there is no backward: of what both are made of mutants are compiled sooner.
#include <algorithm>
#include <limits>

#include "driver.h"
#include "prefix.h"

namespace {

using namespace pk;
using namespace pk::driver;

// padding: keys that the first sample lacks on the left. offset: elements off 16 bytes.
// far: every score is so far below zero that e to the power of what it lacks is infinite.
struct Case {
  int64_t batch, heads, kv_heads, queries, keys, prefix, size;
  bool shared, gated, causal, drops;
  int64_t window, padding, splits;
  std::vector<int32_t> segments;
  int offset;
  bool far = false;
};

constexpr int64_t kSeed = 192837465;
constexpr uint32_t kThreshold = 1u << 30;
constexpr float kInverseKeep = 4.0f / 3.0f;

using Numbers = std::vector<double>;
struct Problem {
  Numbers query, key, value, prefix_key, prefix_value, d_out, gate, d_lse;
};
struct Results {
  Numbers out, lse, prefix_lse, d_query, d_key, d_value, d_prefix_key, d_prefix_value, d_gate;
};

template <typename T>
Numbers numbers_of(const Matrix<T>& matrix) {
  Numbers numbers(matrix.rows * matrix.columns);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = to_float(matrix.data[i]);
  return numbers;
}

bool sees(const Case& given, int64_t batch, int64_t i, int64_t n) {
  const int64_t position = i + given.keys - given.queries;
  if (given.causal && n > position) return false;
  if (given.window && (n <= position - given.window || n >= position + given.window)) return false;
  for (int32_t bound : given.segments)
    if ((i < bound) != (n < bound)) return false;
  return batch || n >= given.padding;
}

// What a query sees of the prefix or of the sequence: one of the two, or a part of one softmax.
Results reference(const Case& given, const Problem& of, double scale) {
  const auto& [B, H, KV, Q, N, P, D, shared, gated, causal, drops, window, padding, splits,
               segments, offset, far] = given;
  Results is{
      Numbers(B * H * Q * D), Numbers(B * H * Q), Numbers(B * H * Q), Numbers(B * H * Q * D),
      Numbers(B * KV * N * D), Numbers(B * KV * N * D), Numbers(of.prefix_key.size()),
      Numbers(of.prefix_key.size()), Numbers(H)};
  Numbers s(P + N), p(P + N), keep(P + N), dp(P + N);
  for (int64_t row = 0; row < B * H * Q; ++row) {
    const int64_t b = row / (H * Q), h = row / Q % H, i = row % Q, kv = b * KV + h / (H / KV);
    const double* q = &of.query[row * D];
    const double* d_out = &of.d_out[row * D];
    const double strength = gated ? std::tanh(of.gate[h]) : 1;
    // Key n of the prefix, and then of the sequence: where it is in a tensor of either.
    const auto at = [&](int64_t n) {
      return n < P ? ((shared ? h / (H / KV) : kv) * P + n) * D : (kv * N + n - P) * D;
    };
    for (int64_t n = 0; n < P + N; ++n) {
      const int64_t column = n < P ? n : (P + 3) / 4 * 4 + n - P;
      const int64_t groups = (P + 3) / 4 + (N + 3) / 4;
      keep[n] = !drops ? 1
                : keep_bits(kSeed, kThreshold, row, groups, column / 4) >> (column % 4) & 1
                    ? kInverseKeep : 0;
      s[n] = dp[n] = 0;
      for (int64_t d = 0; d < D; ++d) {
        s[n] += scale * q[d] * (n < P ? of.prefix_key : of.key)[at(n) + d];
        dp[n] += keep[n] * d_out[d] * (n < P ? of.prefix_value : of.value)[at(n) + d];
      }
      if (n >= P && !sees(given, b, i, n - P)) s[n] = -std::numeric_limits<double>::infinity();
    }
    // A softmax over [first, last).
    const auto attend = [&](int64_t first, int64_t last, double d_lse, double times, double& lse) {
      double sum = 0, delta = 0;
      for (int64_t n = first; n < last; ++n) sum += std::exp(s[n]);
      lse = std::log(sum);
      for (int64_t n = first; n < last; ++n) {
        p[n] = sum > 0 ? std::exp(s[n]) / sum : 0;
        delta += p[n] * dp[n];
      }
      for (int64_t n = first; n < last; ++n) {
        const double ds = scale * times * p[n] * (dp[n] - delta + d_lse);
        for (int64_t d = 0; d < D; ++d) {
          is.out[row * D + d] +=
              times * p[n] * keep[n] * (n < P ? of.prefix_value : of.value)[at(n) + d];
          is.d_query[row * D + d] += ds * (n < P ? of.prefix_key : of.key)[at(n) + d];
          (n < P ? is.d_prefix_key : is.d_key)[at(n) + d] += ds * q[d];
          (n < P ? is.d_prefix_value : is.d_value)[at(n) + d] += times * p[n] * keep[n] * d_out[d];
        }
      }
      return delta;
    };
    if (gated) {
      const double delta = attend(0, P, 0, strength, is.prefix_lse[row]);
      is.d_gate[h] += (1 - strength * strength) * delta;
    }
    attend(gated ? P : 0, P + N, of.d_lse[row], 1, is.lse[row]);
  }
  return is;
}

template <typename T>
Heads heads_of(const Matrix<T>& matrix, int64_t heads, int64_t rows, bool one = false) {
  const int64_t d = matrix.columns;
  const bool aligned = is_aligned(matrix.data, 16) && d * sizeof(T) % 16 == 0;
  return {matrix.data, one ? 0 : heads * rows * d, rows * d, d, aligned};
}

template <typename T>
void check(Type type, double tolerance, const Case& given) {
  const auto& [B, H, KV, Q, N, P, D, shared, gated, causal, drops, window, padding, splits,
               segments, offset, far] = given;
  const int64_t owners = shared ? 1 : B, rows = B * H * Q;
  auto query = Matrix<T>(rows, D, offset).draw(1), key = Matrix<T>(B * KV * N, D, offset).draw(1);
  const auto d_out = Matrix<T>(rows, D, offset).draw(1);
  const auto value = Matrix<T>(B * KV * N, D, offset).draw(1);
  const auto prefix_key = Matrix<T>(owners * KV * P, D).draw(1);
  const auto prefix_value = Matrix<T>(owners * KV * P, D).draw(1);
  const auto gate = Matrix<float>(1, H).draw(1), d_lse = Matrix<float>(1, rows).draw(1);
  std::vector<uint8_t> mask(B * N, 1);
  for (int64_t n = 0; n < padding; ++n) mask[n] = 0;
  if (far) {
    std::fill(query.memory.begin(), query.memory.end(), from_float<T>(6));
    std::fill(key.memory.begin(), key.memory.end(), from_float<T>(-6));
  }
  const float scale = 1 / std::sqrt(static_cast<float>(D));

  Matrix<T> out(rows, D), d_query(rows, D), d_key(B * KV * N, D), d_value(B * KV * N, D);
  Matrix<T> d_prefix_key(owners * KV * P, D), d_prefix_value(owners * KV * P, D);
  Matrix<float> lse(1, rows), prefix_lse(1, gated ? rows : 0), d_gate(1, gated ? H : 0);
  Matrix<float> of_rows(2, rows), of_prefix_rows(2, gated ? rows : 0);
  auto parts = nans<float>(splits > 1 ? 2 * splits * owners * KV * P * D : 0);
  const PrefixCall call{
      .type = type, .batch = B, .heads = H, .kv_heads = KV, .queries = Q, .keys = N, .prefix = P,
      .head_size = D, .query = heads_of(query, H, Q), .key = heads_of(key, KV, N),
      .value = heads_of(value, KV, N), .prefix_key = heads_of(prefix_key, KV, P, shared),
      .prefix_value = heads_of(prefix_value, KV, P, shared), .shared = shared,
      .key_mask = padding ? mask.data() : nullptr,
      .segments = segments.empty() ? nullptr : segments.data(),
      .segment_count = static_cast<int64_t>(segments.size()) - 1,
      .gate = gated ? gate.data : nullptr, .dropout = {drops ? &kSeed : nullptr, kThreshold},
      .inverse_keep = drops ? kInverseKeep : 1, .causal = causal, .window = window, .scale = scale,
      .lse = lse.data, .prefix_lse = prefix_lse.data, .out = out.data,
  };
  expect_launched(prefix_forward(call, nullptr));
#ifndef PK_FORWARD_ALONE
  expect_launched(prefix_backward(
      call,
      {.d_out = heads_of(d_out, H, Q), .d_lse = d_lse.data, .d_query = d_query.data,
       .d_key = d_key.data, .d_value = d_value.data, .d_prefix_key = d_prefix_key.data,
       .d_prefix_value = d_prefix_value.data, .d_prefix_key_type = type,
       .d_prefix_value_type = type, .d_gate = gated ? d_gate.data : nullptr,
       .delta = of_rows.data, .correction = of_rows.data + rows,
       .prefix_delta = of_prefix_rows.data,
       .prefix_correction = of_prefix_rows.data + (gated ? rows : 0), .splits = splits,
       .parts = parts.data()},
      nullptr));
#endif

  const Results is = reference(
      given,
      {numbers_of(query), numbers_of(key), numbers_of(value), numbers_of(prefix_key),
       numbers_of(prefix_value), numbers_of(d_out), numbers_of(gate), numbers_of(d_lse)},
      scale);
  const auto expect_all = [&](const char* name, const auto& actual, const Numbers& exact) {
    for (int64_t i = 0; i < actual.rows * actual.columns; ++i)
      expect(name, to_float(actual.data[i]), exact[i], tolerance);
  };
  expect_all("out", out, is.out);
  expect_all("lse", lse, is.lse);
  expect_all("prefix_lse", prefix_lse, is.prefix_lse);
#ifndef PK_FORWARD_ALONE
  expect_all("d_query", d_query, is.d_query);
  expect_all("d_key", d_key, is.d_key);
  expect_all("d_value", d_value, is.d_value);
  expect_all("d_prefix_key", d_prefix_key, is.d_prefix_key);
  expect_all("d_prefix_value", d_prefix_value, is.d_prefix_value);
  expect_all("d_gate", d_gate, is.d_gate);
#endif
}

template <typename T>
void check_type(Type type, double tolerance) {
  // Several tiles of rows and of keys, of a size off the tiles.
  check<T>(type, tolerance, {
      .batch = 2, .heads = 2, .kv_heads = 1, .queries = 35, .keys = 67, .prefix = 5, .size = 20,
      .shared = true, .gated = false, .causal = true, .drops = true, .window = 0, .padding = 3,
      .splits = 2, .segments = {}, .offset = 0});
  // Several panels of the head size, and a prefix of its own for each sample.
  check<T>(type, tolerance, {
      .batch = 2, .heads = 2, .kv_heads = 2, .queries = 9, .keys = 40, .prefix = 9, .size = 80,
      .shared = false, .gated = true, .causal = false, .drops = true, .window = 0, .padding = 40,
      .splits = 1, .segments = {}, .offset = 0});
}

template <typename T>
void check_masks(Type type, double tolerance) {
  check<T>(type, tolerance, {
      .batch = 1, .heads = 3, .kv_heads = 1, .queries = 30, .keys = 30, .prefix = 66, .size = 24,
      .shared = true, .gated = true, .causal = true, .drops = false, .window = 5, .padding = 0,
      .splits = 3, .segments = {0, 7, 20, 30}, .offset = 1});
  check<T>(type, tolerance, {
      .batch = 1, .heads = 1, .kv_heads = 1, .queries = 3, .keys = 2, .prefix = 0, .size = 24,
      .shared = true, .gated = false, .causal = false, .drops = false, .window = 0, .padding = 0,
      .splits = 1, .segments = {}, .offset = 0, .far = true});
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    check_type<Half>(Type::kFloat16, 2e-2);
    check_type<float>(Type::kFloat32, 1e-4);
    check_masks<Half>(Type::kFloat16, 2e-2);
    check_masks<float>(Type::kFloat32, 1e-4);
#ifdef __SANITIZE_ADDRESS__
    check_type<BFloat16>(Type::kBFloat16, 1e-1);
#endif
  });
}
