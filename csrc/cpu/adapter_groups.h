// The rows of each adapter, and the tasks that threads share. One adapter is a group of all rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "adapter.h"
#include "pack.h"

namespace pk {

struct Grouping {
  std::vector<int64_t> order;    // row numbers by adapter, in rising order for each; with one adapter empty
  std::vector<int64_t> numbers;  // of the adapters that have rows
  std::vector<Rows> rows;        // of each of those
  std::vector<int64_t> unused;   // the other adapters
  Rows rest;                     // rows without an adapter

  explicit Grouping(const AdapterCall& call);
  Grouping(const Grouping&) = delete;
  int64_t count() const { return static_cast<int64_t>(numbers.size()); }
};

// Some rows of one group, or with group kNone of `rest`.
struct Task {
  static constexpr int64_t kNone = -1;
  int64_t group;
  Rows rows;
};

void add_tasks(int64_t group, const Rows& rows, int64_t most, std::vector<Task>* tasks);
void add_rest(const Grouping& grouping, std::vector<Task>* tasks);

// Hands out the numbers below `count`, each once: tasks may be as unequal as the groups are.
class Tickets {
 public:
  explicit Tickets(int64_t count) : count_(count) {}
  bool take(int64_t* number) { return (*number = next_.fetch_add(1)) < count_; }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

// work(tickets) on every thread.
template <typename Work>
void share_out(int64_t count, const Work& work) {
  Tickets tickets(count);
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads <= 1) return work(tickets);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(tickets); });
}

// Rows of `to` [., columns] take those of `from`, or zeros where its data is null.
template <typename T>
void copy_rows(const Rows& rows, const Matrix& from, int64_t columns, void* to) {
  const size_t bytes = columns * sizeof(T);
  for (int64_t m = 0; m < rows.count; ++m) {
    T* out = static_cast<T*>(to) + rows[m] * columns;
    if (from.data) {
      std::memcpy(out, static_cast<const T*>(from.data) + rows[m] * from.stride, bytes);
    } else {
      std::memset(out, 0, bytes);
    }
  }
}

// Vectors [columns] of T, or null, widened to [2 * stride], zeros beyond and instead of null.
template <typename T>
Buffer<float> vectors_of(
    const void* from, int64_t columns, int64_t stride, const std::vector<int64_t>& numbers) {
  return packed_p<Portable<T>>(from, 0, 1, 1, from ? columns : 0, stride, numbers);
}

// use(m, j, count, activated) for up to kLanes elements from column j on of every row of pre.
template <typename T, typename Use>
PK_INLINE void activate_rows(const AdapterCall& call, const Rows& rows, const Use& use) {
  with_activation(call.activation, [&](auto activation) PK_INLINE_LAMBDA {
    for (int64_t m = 0; m < rows.count; ++m) {
      const T* pre = static_cast<const T*>(call.pre) + rows[m] * call.rank;
      for (int64_t j = 0; j < call.rank; j += kLanes) {
        const int64_t count = std::min(kLanes, call.rank - j);
        use(m, j, count, activate(activation, load_some(pre + j, count)));
      }
    }
  });
}

}  // namespace pk
