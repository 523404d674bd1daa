// Prompt tuning's kernels without Python, for sanitizers and mutants: every result is compared with
// loops that say what it should be.
#include <map>

#include "driver.h"
#include "prompt.h"

namespace {

using namespace pk;
using namespace pk::driver;

// Small integers: sums of them are exact, in every dtype and order.
template <typename T>
std::vector<T> drawn(int64_t size) {
  std::vector<T> values(size);
  for (T& value : values) value = from_float<T>(static_cast<float>(generator() % 5));
  return values;
}

template <typename T, typename MaskInteger>
void check(Type type, int64_t B, int64_t S, int64_t P, int64_t D, bool per_sample) {
  const int64_t V = 7, columns = S + P;
  const auto weight = drawn<T>(V * D), prompt = drawn<T>((per_sample ? B : 1) * P * D);
  const auto dy = drawn<T>(B * columns * D);
  std::vector<int64_t> ids(B * S), starts(B, -1), positions(B * columns, -1);
  std::vector<int32_t> labels(B * S), labels_out(B * columns);
  std::vector<MaskInteger> mask(B * S), mask_out(B * columns);
  for (int64_t& id : ids) id = generator() % V;
  for (int32_t& label : labels) label = generator() % 9;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t s = b * S / B; s < S; ++s) mask[b * S + s] = b % 2 || s % 3 != 1;
  auto embeddings = nans<T>(B * columns * D);
  expect_launched(prompt_forward(
      {.batch = B, .tokens = S, .length = P, .width = D, .vocabulary = V, .type = type,
       .prompt_type = type, .ids = ids.data(), .id_bytes = 8, .weight = weight.data(),
       .weight_stride = D, .prompt = prompt.data(), .prompt_stride = D,
       .prompt_sample_stride = per_sample ? P * D : 0, .mask = mask.data(),
       .mask_bytes = sizeof(MaskInteger), .one = 1, .significant = -1, .labels = labels.data(),
       .label_bytes = 4, .column = 0, .embeddings = embeddings.data(), .mask_out = mask_out.data(),
       .labels_out = labels_out.data(), .positions = positions.data(), .columns = starts.data()},
      nullptr));
  std::vector<double> d_prompt_sum(prompt.size()), d_weight_sum(V * D);
  for (int64_t b = 0; b < B; ++b) {
    int64_t start = 0, kept = 0;
    while (start < S && !mask[b * S + start]) ++start;
    expect("column", starts[b], start);
    for (int64_t t = 0; t < columns; ++t) {
      const bool in_prompt = t >= start && t < start + P;
      const int64_t in = b * S + (t < start ? t : t - P), out = b * columns + t;
      kept += in_prompt || mask[in];
      expect("label", labels_out[out], in_prompt ? -100 : labels[in]);
      expect("mask", mask_out[out], in_prompt ? 1 : mask[in]);
      expect("position", positions[out], kept ? kept - 1 : 0);
      const int64_t row = (per_sample ? b * P : 0) + t - start;
      for (int64_t d = 0; d < D; ++d) {
        const T value = in_prompt ? prompt[row * D + d] : weight[ids[in] * D + d];
        expect("embedding", to_float(embeddings[out * D + d]), to_float(value));
        (in_prompt ? d_prompt_sum[row * D + d] : d_weight_sum[ids[in] * D + d]) +=
            to_float(dy[out * D + d]);
      }
    }
  }
  if (!D) return;
  auto d_prompt = nans<T>(prompt.size());
  expect_launched(prompt_gradient(
      {.type = type, .out_type = type, .batch = B, .length = P, .width = D, .dy = dy.data(),
       .dy_batch_stride = columns * D, .dy_row_stride = D, .columns = starts.data(), .column = 0,
       .per_sample = per_sample, .d_prompt = d_prompt.data()},
      nullptr));
  for (size_t i = 0; i < d_prompt.size(); ++i) expect("d_prompt", to_float(d_prompt[i]), d_prompt_sum[i]);

  std::multimap<int64_t, int64_t> places;  // in the order of insertion where ids are equal
  for (int64_t i = 0; i < B * S; ++i) places.emplace(ids[i], i);
  std::vector<int64_t> sorted, order;
  for (const auto& [id, place] : places) {
    sorted.push_back(id);
    order.push_back(place);
  }
  sorted.shrink_to_fit();
  order.shrink_to_fit();
  std::vector<T> d_weight(V * D, from_float<T>(0.0f));
  const int64_t padding = 2;
  expect_launched(table_gradient(
      {.type = type, .count = B * S, .tokens = S, .length = P, .width = D, .vocabulary = V,
       .dy = dy.data(), .dy_batch_stride = columns * D, .dy_row_stride = D,
       .columns = starts.data(), .column = 0, .ids = sorted.data(), .id_bytes = 8,
       .order = order.data(), .padding_idx = padding, .d_weight = d_weight.data()},
      nullptr));
  for (int64_t i = 0; i < V * D; ++i)
    expect("d_weight", to_float(d_weight[i]), i / D == padding ? 0 : d_weight_sum[i]);
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    check<float, int64_t>(Type::kFloat32, 3, 7, 2, 5, false);
    // More columns than a block takes at a time, twice; no embeddings, for they are many blocks.
    check<float, uint8_t>(Type::kFloat32, 2, 2100, 3, 0, false);
#ifndef __SANITIZE_THREAD__  // it never gives back what it keeps of a thread
    check<float, uint8_t>(Type::kFloat32, 19, 2, 3, 8, true);
    check<Half, int16_t>(Type::kFloat16, 2, 5, 4, 24, false);
    check<BFloat16, int32_t>(Type::kBFloat16, 17, 3, 2, 9, false);
    check<float, uint8_t>(Type::kFloat32, 2, 1200, 3, 1, false);
#endif
  });
}
