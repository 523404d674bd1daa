// LoRA forward and backward without Python, for sanitizers and mutants: every result is compared
// with sums in double, and the counters must be zero again.
//
// With PK_SMALL_TILES the kernels run in tiles of 32 x 32 and blocks of 64 threads: several blocks
// then are few enough threads for ThreadSanitizer, and one file is all there is to compile.
#include "driver.h"

#ifdef PK_SMALL_TILES
#include "lora_kernel.h"
#include "small_reduction.h"
#else
#include "lora.h"
#include "token_reduction.h"
#endif

namespace {

using namespace pk;
using namespace pk::driver;

#ifdef PK_SMALL_TILES
int product(const LoRAProduct& call) {
  return call.along ? launch_lora<TileProduct<Half, SmallShape, true, true>>(call, nullptr)
                    : launch_lora<TileProduct<Half, SmallShape, true, false>>(call, nullptr);
}
#else
int product(const LoRAProduct& call) { return lora_product(call, nullptr); }
int reduction(const TokenReduction& call) { return token_reduction(call, nullptr); }
#endif

template <typename T>
void check(
    Type type, double tolerance, int64_t M, int64_t N, int64_t K, int64_t R, bool drops, int offset) {
  const auto x = Matrix<T>(M, K, offset).draw(1), w = Matrix<T>(N, K, offset).draw(1 / std::sqrt(K));
  const auto a = Matrix<T>(R, K).draw(1 / std::sqrt(K)), b = Matrix<T>(N, R).draw(1 / std::sqrt(R));
  const auto bias = Matrix<T>(1, N).draw(1), dy = Matrix<T>(M, N, offset).draw(1);
  Matrix<T> y(M, N), s(M, R), dx(M, K), ds(M, R), da(R, K), db(N, R), dbias(1, N);
  std::vector<int> counters(2 + (M + 31) / 32 + 1024);
  const int64_t seed = 123456789;
  const uint32_t threshold = drops ? 1u << 30 : 0;
  const float scale = 1.5f, inverse_keep = drops ? 4.0f / 3.0f : 1.0f;
  const Dropout dropout{drops ? &seed : nullptr, threshold};
  expect_launched(product({
      .type = type, .tokens = M, .depth = K, .columns = N, .rank = R, .x = {x.data, K}, .along = true,
      .w = {w.data, K}, .a = {a.data, K}, .b = {b.data, R}, .bias = bias.data, .scale_at = nullptr,
      .scale = scale, .inverse_keep = inverse_keep, .dropout = dropout, .drops_output = false,
      .y = y.data, .s = s.data, .counters = counters.data(), .multiprocessors = 2,
  }));
  expect_launched(product({
      .type = type, .tokens = M, .depth = N, .columns = K, .rank = R, .x = {dy.data, N}, .along = false,
      .w = {w.data, K}, .a = {b.data, R}, .b = {a.data, K}, .bias = nullptr, .scale_at = &scale,
      .scale = 0, .inverse_keep = inverse_keep, .dropout = dropout, .drops_output = true,
      .y = dx.data, .s = ds.data, .counters = counters.data(), .multiprocessors = 2,
  }));
  const int64_t splits = 3;
  std::vector<float> parts(splits * ((K + N) * R + N + R), NAN);
  expect_launched(reduction({
      .type = type, .tokens = M, .rank = R,
      .first = {x.data, K, K, ds.data, {da.data, type, 1, K}, {}},
      .second = {dy.data, N, N, s.data, {db.data, type, R, 1}, {dbias.data, type, 1, 0}},
      .dropout = dropout, .dropped = 0, .scaling = {}, .splits = splits, .parts = parts.data(),
      .counters = counters.data(), .order = nullptr, .offsets = nullptr, .groups = 0,
  }));
  for (int count : counters) expect("counter", count, 0, 0);

  const auto keep = [&](int64_t m, int64_t k) {
    return drops ? keep_bits(seed, threshold, m, (K + 3) / 4, k / 4) >> (k % 4) & 1 : 1;
  };
  const double factor = scale * inverse_keep;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t r = 0; r < R; ++r) {
      double low = 0, back = 0;
      for (int64_t k = 0; k < K; ++k) low += keep(m, k) * x.at(m, k) * a.at(r, k);
      for (int64_t n = 0; n < N; ++n) back += dy.at(m, n) * b.at(n, r);
      expect("s", s.at(m, r), factor * low, tolerance);
      expect("ds", ds.at(m, r), factor * back, tolerance);
    }
    for (int64_t n = 0; n < N; ++n) {
      double sum = bias.at(0, n);
      for (int64_t k = 0; k < K; ++k) sum += x.at(m, k) * w.at(n, k);
      for (int64_t r = 0; r < R; ++r) sum += s.at(m, r) * b.at(n, r);
      expect("y", y.at(m, n), sum, tolerance);
    }
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0, low = 0;
      for (int64_t n = 0; n < N; ++n) sum += dy.at(m, n) * w.at(n, k);
      for (int64_t r = 0; r < R; ++r) low += ds.at(m, r) * a.at(r, k);
      expect("dx", dx.at(m, k), sum + keep(m, k) * low, tolerance);
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0;
      for (int64_t m = 0; m < M; ++m) sum += keep(m, k) * x.at(m, k) * ds.at(m, r);
      expect("da", da.at(r, k), sum, tolerance);
    }
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t m = 0; m < M; ++m) sum += dy.at(m, n) * s.at(m, r);
      expect("db", db.at(n, r), sum, tolerance);
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0;
    for (int64_t m = 0; m < M; ++m) sum += dy.at(m, n);
    expect("dbias", dbias.at(0, n), sum, tolerance);
  }
}

template <typename T>
void check_all(Type type, double tolerance) {
  check<T>(type, tolerance, 40, 48, 104, 8, false, 0);
  check<T>(type, tolerance, 75, 37, 131, 5, true, 1);
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    check_all<Half>(Type::kFloat16, 1e-2);
#ifndef PK_SMALL_TILES
    check_all<float>(Type::kFloat32, 1e-4);
    check_all<BFloat16>(Type::kBFloat16, 5e-2);
    check<Half>(Type::kFloat16, 1e-2, 150, 140, 40, 9, true, 0);
#endif
  });
}
