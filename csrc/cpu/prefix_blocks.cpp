#include "prefix_blocks.h"

namespace pk {

Ranges ranges_of(const PrefixCall& call) {
  const int64_t queries = call.queries, keys = call.keys;
  Ranges ranges{std::vector<int64_t>(queries, 0), std::vector<int64_t>(queries, keys)};
  const int64_t window = call.window ? std::min(call.window, queries + keys) : 0;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t place = i + keys - queries;
    int64_t begin = 0, end = keys;
    if (call.causal) end = std::min(end, place + 1);
    if (window) begin = std::max(begin, place - window + 1);
    if (window && !call.causal) end = std::min(end, place + window);
    ranges.begin[i] = std::clamp<int64_t>(begin, 0, keys);
    ranges.end[i] = std::max(ranges.begin[i], std::clamp<int64_t>(end, 0, keys));
  }
  for (int64_t n = 0; n < call.segment_count; ++n)
    for (int64_t i = call.segments[n]; i < call.segments[n + 1]; ++i) {
      ranges.begin[i] = std::max<int64_t>(ranges.begin[i], call.segments[n]);
      ranges.end[i] = std::min<int64_t>(ranges.end[i], call.segments[n + 1]);
    }
  return ranges;
}

namespace {

void append_segments(bool prefix, int64_t begin, int64_t end, std::vector<Segment>& to) {
  for (int64_t first = begin; first < end; first += kSegment)
    to.push_back({prefix, first, std::min(kSegment, end - first)});
}

}  // namespace

std::vector<Segment> prefix_segments(const PrefixCall& call) {
  std::vector<Segment> segments;
  append_segments(true, 0, call.prefix, segments);
  return segments;
}

std::vector<Segment> sequence_segments(
    const PrefixCall& call, const Ranges& ranges, int64_t first, int64_t last) {
  int64_t begin = call.keys, end = 0;
  for (int64_t i = first; i < last; ++i) {
    if (ranges.begin[i] == ranges.end[i]) continue;
    begin = std::min(begin, ranges.begin[i]);
    end = std::max(end, ranges.end[i]);
  }
  std::vector<Segment> segments;
  append_segments(false, begin / kPanel * kPanel, end, segments);
  return segments;
}

Visible visible_in(const Segment& segment, const Ranges& ranges, const RowBlock& block) {
  if (segment.prefix) return {0, segment.count};
  int64_t begin = segment.first + segment.count, end = segment.first;
  for (int64_t i = block.query; i < block.query + block.queries; ++i) {
    if (ranges.begin[i] == ranges.end[i]) continue;
    begin = std::min(begin, ranges.begin[i]);
    end = std::max(end, ranges.end[i]);
  }
  begin = std::max(begin - segment.first, int64_t{0}) / kPanel * kPanel;
  return {begin, std::min(end - segment.first, segment.count)};
}

void fill_row_ranges(
    const PrefixCall& call, const Segment& segment, const Ranges& ranges, const RowBlock& block,
    int64_t stride, int64_t* begin, int64_t* end) {
  for (int64_t h = 0; h < block.heads; ++h)
    for (int64_t i = 0; i < block.queries; ++i) {
      const int64_t row = h * block.queries + i;
      begin[row] = segment.prefix ? 0 : ranges.begin[block.query + i];
      end[row] = segment.prefix ? call.prefix : ranges.end[block.query + i];
    }
  std::fill(begin + block.rows(), begin + stride, 0);
  std::fill(end + block.rows(), end + stride, 0);
}

void fill_key_keep(
    const PrefixCall& call, const Segment& segment, int64_t sample, uint32_t* key_keep) {
  const uint8_t* mask = call.key_mask + sample * call.keys + segment.first;
  for (int64_t j = 0; j < segment.padded(); ++j)
    key_keep[j] = j < segment.count && mask[j] ? 0xFFFFFFFFu : 0u;
}

void draw_block(
    const PrefixCall& call, const Segment& segment, const RowBlock& block, int64_t sample,
    int64_t kv_head, int64_t first_key, uint32_t* keep) {
  const int64_t ahead = round_up(call.prefix, 4), group = call.heads / call.kv_heads;
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t head = kv_head * group + block.head + h;
    draw_keep(
        call.dropout,
        {(sample * call.heads + head) * call.queries + block.query, block.queries, nullptr},
        ahead + call.keys, first_key + (segment.prefix ? 0 : ahead),
        keep + h * block.queries * kDepth);
  }
}

}  // namespace pk
