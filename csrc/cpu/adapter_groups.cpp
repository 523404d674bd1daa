#include "adapter_groups.h"

namespace pk {

Grouping::Grouping(const AdapterCall& call) : rest{0, 0, nullptr} {
  if (!call.index) {
    numbers.push_back(0);
    rows.push_back({0, call.tokens, nullptr});
    return;
  }
  // Place 0 is for rows without an adapter.
  const auto place = [&](int64_t row) {
    const int64_t number = call.index[row];
    return number >= 0 && number < call.adapters ? number + 1 : 0;
  };
  std::vector<int64_t> ends(call.adapters + 2, 0);
  for (int64_t row = 0; row < call.tokens; ++row) ++ends[place(row) + 1];
  for (int64_t at = 0; at <= call.adapters; ++at) ends[at + 1] += ends[at];
  order.resize(call.tokens);
  for (int64_t row = 0; row < call.tokens; ++row) order[ends[place(row)]++] = row;
  // Each place's start has become its end.
  rest = {0, ends[0], order.data()};
  for (int64_t number = 0; number < call.adapters; ++number) {
    const int64_t begin = ends[number], count = ends[number + 1] - begin;
    if (count == 0) {
      unused.push_back(number);
    } else {
      numbers.push_back(number);
      rows.push_back({0, count, order.data() + begin});
    }
  }
}

void add_tasks(int64_t group, const Rows& rows, int64_t most, std::vector<Task>* tasks) {
  for (int64_t begin = 0; begin < rows.count; begin += most)
    tasks->push_back({group, rows.part(begin, most)});
}

void add_rest(const Grouping& grouping, std::vector<Task>* tasks) {
  add_tasks(Task::kNone, grouping.rest, 64, tasks);
}

}  // namespace pk
