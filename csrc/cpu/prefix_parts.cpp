#include "prefix_parts.h"

#include <cmath>

#include "parts.h"

namespace pk {
namespace {

constexpr int64_t kItems = 16;        // wanted, for threads to share
constexpr int64_t kParts = 16;        // of a shared prefix, at most
constexpr int64_t kFewestRows = 512;  // of an item: fewer would pack keys too often
constexpr int64_t kFewKeys = 256;
constexpr int64_t kPartBytes = int64_t{256} << 20;

int64_t fitting(int64_t floats) {
  return std::max<int64_t>(1, kPartBytes / std::max<int64_t>(1, 2 * floats * int64_t{sizeof(float)}));
}

// Keys that one query may see at most.
int64_t most_seen(const PrefixCall& call) {
  const int64_t window = call.causal ? call.window : 2 * std::min(call.window, call.keys) - 1;
  return call.prefix + (call.window ? std::min(window, call.keys) : call.keys);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

BackwardPlan::BackwardPlan(const PrefixCall& call, const PrefixGradients& to)
    : ranges(ranges_of(call)),
      weighs(!call.partial && (call.gate || most_seen(call) <= kFewKeys)),
      padded_prefix(round_up(call.prefix, kLanes)),
      padded_head(round_up(call.head_size, kLanes)) {
  const RowBlocks blocks(call);
  const int64_t heads = call.batch * call.kv_heads, size = heads * call.keys * call.head_size;
  const int64_t most = std::max<int64_t>(1, call.queries * blocks.group / kFewestRows);
  const int64_t wanted = std::min({ceil_div(kItems, heads), most, fitting(size)});
  queries = round_up(ceil_div(call.queries, wanted), blocks.queries);
  query_chunks = ceil_div(call.queries, queries);
  if (query_chunks > 1 && to.d_key) d_key = uninitialized<float>(query_chunks * size);
  if (query_chunks > 1 && to.d_value) d_value = uninitialized<float>(query_chunks * size);

  const int64_t part = call.kv_heads * padded_prefix * padded_head;
  const bool wants_prefix = to.d_prefix_key.data || to.d_prefix_value.data;
  const int64_t parts = std::min(kParts, fitting(part));
  samples = call.shared && wants_prefix
                ? ceil_div(call.batch, std::max<int64_t>(1, parts / query_chunks))
                : 1;
  sample_chunks = ceil_div(call.batch, samples);
  const int64_t count = query_chunks * (call.shared ? sample_chunks : call.batch) * part;
  if (to.d_prefix_key.data) d_prefix_key = uninitialized<float>(count);
  if (to.d_prefix_value.data) d_prefix_value = uninitialized<float>(count);
  if (to.d_gate) dots = uninitialized<float>(call.batch * call.heads * call.queries);
}

void BackwardPlan::finish(const PrefixCall& call, const PrefixGradients& to) const {
  const int64_t rows = call.batch * call.kv_heads * call.keys;
  const auto write_keys = [&](float* parts, void* gradient) {
    if (!parts) return;
    sum_parts(parts, query_chunks, rows * call.head_size);
    write_gradient(parts, call.head_size, 1, rows, call.head_size, {gradient, call.type});
  };
  write_keys(d_key.get(), to.d_key);
  write_keys(d_value.get(), to.d_value);

  const int64_t matrix = padded_prefix * padded_head;
  const int64_t matrices = (call.shared ? 1 : call.batch) * call.kv_heads;
  const auto write_prefix = [&](float* parts, Gradient gradient) {
    if (!parts) return;
    sum_parts(parts, call.shared ? sample_chunks * query_chunks : query_chunks, matrices * matrix);
    const int64_t bytes = gradient.type == Type::kFloat32 ? 4 : 2;
    for (int64_t i = 0; i < matrices; ++i) {
      char* to_matrix = static_cast<char*>(gradient.data) + i * call.prefix * call.head_size * bytes;
      write_gradient(
          parts + i * matrix, padded_head, 1, call.prefix, call.head_size, {to_matrix, gradient.type});
    }
  };
  write_prefix(d_prefix_key.get(), to.d_prefix_key);
  write_prefix(d_prefix_value.get(), to.d_prefix_value);

  for (int64_t head = 0; to.d_gate && head < call.heads; ++head) {
    double sum = 0;
    for (int64_t sample = 0; sample < call.batch; ++sample) {
      const float* row = dots.get() + (sample * call.heads + head) * call.queries;
      for (int64_t i = 0; i < call.queries; ++i) sum += row[i];
    }
    const double t = std::tanh(static_cast<double>(call.gate[head]));
    to.d_gate[head] = static_cast<float>((1.0 - t * t) * sum);
  }
}

}  // namespace pk
