// The adapter, one or many, forward and backward without Python, for sanitizers and mutants: every
// result is compared with sums in double, and the counters must be zero again.
//
// With PK_SMALL_TILES the kernels run in tiles of 32 x 32 and blocks of 64 threads, as LoRA's do.
#include <algorithm>
#include <numeric>

#include "driver.h"
#ifdef PK_SMALL_TILES
#include "adapter_kernel.h"
#include "small_reduction.h"
#else
#include "adapter.h"
#include "token_reduction.h"
#endif

namespace {

using namespace pk;
using namespace pk::driver;

#ifdef PK_SMALL_TILES
int pass(const AdapterPass& call) {
  return call.backward ? launch_adapter<Half, SmallShape, true>(call, nullptr)
                       : launch_adapter<Half, SmallShape, false>(call, nullptr);
}
#else
int pass(const AdapterPass& call) { return adapter_pass(call, nullptr); }
int reduction(const TokenReduction& call) { return token_reduction(call, nullptr); }
#endif

// adapters: 0 is one for all rows. offset: elements off a multiple of 16 bytes.
struct Case {
  int64_t tokens, features, bottleneck, adapters, tile_rows;
  bool drops, per_channel;
  int offset;
};

double silu(double x) { return x / (1 + std::exp(-x)); }
double silu_derivative(double x) {
  const double s = 1 / (1 + std::exp(-x));
  return s + x * s * (1 - s);
}

template <typename T>
void check(Type type, double tolerance, const Case& given) {
  const auto [M, D, R, adapters, tile_rows, drops, per_channel, offset] = given;
  const int64_t E = adapters ? adapters : 1;
  const auto x = Matrix<T>(M, D, offset).draw(1), dy = Matrix<T>(M, D, offset).draw(1);
  const auto down = Matrix<T>(E * R, D).draw(1 / std::sqrt(D));
  const auto up = Matrix<T>(E * D, R).draw(1 / std::sqrt(R));
  const auto down_bias = Matrix<T>(E, R).draw(1), up_bias = Matrix<T>(E, D).draw(1);
  const auto scales = Matrix<float>(1, per_channel ? D : 1).draw(1);

  // Row m has adapter index[m], the second of them no rows; -1 is none.
  std::vector<int64_t> index(M), order(M), offsets(E + 2), tiles(E + 1);
  for (int64_t m = 0; m < M; ++m) index[m] = adapters ? m * 7 % (E + 1) - 1 : 0;
  std::replace(index.begin(), index.end(), int64_t{1}, int64_t{0});
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t a, int64_t b) { return index[a] < index[b]; });
  for (int64_t group = 0; group <= E; ++group) {
    const int64_t size = std::count(index.begin(), index.end(), group - 1);
    offsets[group + 1] = offsets[group] + size;
    if (group < E) tiles[group + 1] = tiles[group] + (size + tile_rows - 1) / tile_rows;
  }
  const auto groups = adapters ? RowGroups{order.data(), offsets.data(), tiles.data(), E + 1}
                               : RowGroups{nullptr, nullptr, nullptr, 0};

  Matrix<T> y(M, D), pre(M, R), hidden(M, R), dx(M, D), d_pre(M, R), hidden_again(M, R);
  Matrix<T> d_down(E * R, D), d_up(E * D, R), d_down_bias(E, R), d_up_bias(E, D);
  Matrix<float> d_scale(1, scales.columns);
  const int64_t seed = 987654321;
  const uint32_t threshold = drops ? 1u << 30 : 0;
  const float inverse_keep = drops ? 4.0f / 3.0f : 1.0f;
  const Dropout dropout{drops ? &seed : nullptr, threshold};
  AdapterPass call{
      .type = type, .backward = false, .tokens = M, .features = D, .bottleneck = R,
      .tile_rows = tile_rows, .v = x.data, .v_stride = D, .inner = down.data, .outer = up.data,
      .inner_bias = down_bias.data, .outer_bias = up_bias.data, .added = x.data, .added_stride = D,
      .scale_at = scales.data, .per_channel = per_channel, .scale = 0, .inverse_keep = inverse_keep,
      .activation = Activation::kSiLU, .dropout = dropout, .pre = pre.data, .low = hidden.data,
      .hidden = nullptr, .out = y.data, .groups = groups,
  };
  expect_launched(pass(call));
  call.backward = true;
  call.v = call.added = dy.data;
  call.inner = up.data, call.outer = down.data;
  call.inner_bias = call.outer_bias = nullptr;
  call.low = d_pre.data, call.hidden = hidden_again.data, call.out = dx.data;
  expect_launched(pass(call));
  const int64_t splits = adapters ? 1 : 3, rank_blocks = (R + 31) / 32;
  auto parts = nans<float>(splits > 1 ? splits * (2 * D * R + D + R) : 0);
  auto scale_parts = nans<float>(rank_blocks * D);
  std::vector<int> counters(2 * ((D + 31) / 32) * rank_blocks + 1);
  expect_launched(reduction({
      .type = type, .tokens = M, .rank = R,
      .first = {x.data, D, D, d_pre.data, {d_down.data, type, 1, D},
                {d_down_bias.data, type, 0, 1}},
      .second = {dy.data, D, D, hidden_again.data, {d_up.data, type, R, 1},
                 {d_up_bias.data, type, 1, 0}},
      .dropout = dropout, .dropped = 1,
      .scaling = {.active = true, .scale_at = scales.data, .per_column = per_channel, .scale = 0,
                  .inverse_keep = inverse_keep, .gradient = adapters ? nullptr : d_scale.data,
                  .parts = scale_parts.data(), .weight = up.data, .bias = up_bias.data},
      .splits = splits, .parts = parts.data(), .counters = counters.data(),
      .order = groups.order, .offsets = adapters ? offsets.data() + 1 : nullptr, .groups = adapters,
  }));
  for (int counter : counters) expect("counter", counter, 0);

  const auto kept = [&](int64_t m, int64_t k) {
    return drops && !(keep_bits(seed, threshold, m, (D + 3) / 4, k / 4) >> (k % 4) & 1)
               ? 0.0 : static_cast<double>(inverse_keep);
  };
  const auto scale = [&](int64_t k) { return scales.at(0, per_channel ? k : 0); };
  std::vector<double> down_sum(E * R * D), up_sum(E * D * R), down_bias_sum(E * R);
  std::vector<double> up_bias_sum(E * D), scale_sum(scales.columns);
  for (int64_t m = 0; m < M; ++m) {
    const int64_t e = index[m];
    for (int64_t r = 0; r < R && e >= 0; ++r) {
      double sum = down_bias.at(e, r), back = 0;
      for (int64_t k = 0; k < D; ++k) {
        sum += x.at(m, k) * down.at(e * R + r, k);
        back += scale(k) * kept(m, k) * dy.at(m, k) * up.at(e * D + k, r);
      }
      expect("pre", pre.at(m, r), sum, tolerance);
      expect("hidden", hidden.at(m, r), silu(pre.at(m, r)), tolerance);
      expect("hidden again", hidden_again.at(m, r), hidden.at(m, r), tolerance);
      expect("d_pre", d_pre.at(m, r), silu_derivative(pre.at(m, r)) * back, tolerance);
      down_bias_sum[e * R + r] += d_pre.at(m, r);
    }
    for (int64_t k = 0; k < D; ++k) {
      double low = e < 0 ? 0 : up_bias.at(e, k), back = 0;
      for (int64_t r = 0; r < R && e >= 0; ++r) {
        low += hidden.at(m, r) * up.at(e * D + k, r);
        back += d_pre.at(m, r) * down.at(e * R + r, k);
        down_sum[(e * R + r) * D + k] += d_pre.at(m, r) * x.at(m, k);
        up_sum[(e * D + k) * R + r] += scale(k) * kept(m, k) * dy.at(m, k) * hidden.at(m, r);
      }
      expect("y", y.at(m, k), x.at(m, k) + scale(k) * kept(m, k) * low, tolerance);
      expect("dx", dx.at(m, k), dy.at(m, k) + back, tolerance);
      if (e >= 0) up_bias_sum[e * D + k] += scale(k) * kept(m, k) * dy.at(m, k);
      scale_sum[per_channel ? k : 0] += kept(m, k) * dy.at(m, k) * low;
    }
  }
  const auto expect_all = [&](const char* name, const auto& actual, const auto& exact) {
    for (size_t i = 0; i < exact.size(); ++i)
      expect(name, to_float(actual.data[i]), exact[i], tolerance);
  };
  expect_all("d_down", d_down, down_sum);
  expect_all("d_up", d_up, up_sum);
  expect_all("d_down_bias", d_down_bias, down_bias_sum);
  expect_all("d_up_bias", d_up_bias, up_bias_sum);
  if (!adapters) expect_all("d_scale", d_scale, scale_sum);
}

#ifdef PK_SMALL_TILES
void check_all() {
  check<Half>(Type::kFloat16, 2e-2, {75, 37, 40, 0, 32, true, true, 1});
  check<Half>(Type::kFloat16, 2e-2, {90, 48, 5, 3, 32, false, false, 0});
#ifndef __SANITIZE_THREAD__
  check<Half>(Type::kFloat16, 2e-2, {40, 48, 8, 0, 32, true, false, 0});
#endif
}
#else
template <typename T>
void check_type(Type type, double tolerance) {
  check<T>(type, tolerance, {70, 40, 70, 0, 16, false, true, 0});
  check<T>(type, tolerance, {67, 37, 5, 0, 64, true, false, 1});
  check<T>(type, tolerance, {75, 37, 5, 3, 16, true, true, 1});
  check<T>(type, tolerance, {75, 40, 8, 3, 64, false, false, 0});
}
void check_all() {
  check_type<float>(Type::kFloat32, 1e-4);
  check_type<Half>(Type::kFloat16, 2e-2);
  check_type<BFloat16>(Type::kBFloat16, 1e-1);
}
#endif

}  // namespace

int main(int count, char** arguments) { return run(count, arguments, check_all); }
