// Memory that starts on a boundary of 64 bytes: a vector of one register that straddles two cache
// lines costs two loads, and the allocator promises 16 bytes only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace pk {

constexpr size_t kLine = 64;

template <typename T>
struct AlignedAllocator {
  using value_type = T;

  AlignedAllocator() = default;
  template <typename U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kLine}));
  }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t{kLine}); }
  template <typename U>
  bool operator==(const AlignedAllocator<U>&) const { return true; }
};

template <typename T>
using Lines = std::vector<T, AlignedAllocator<T>>;

struct AlignedDelete {
  void operator()(void* data) const { ::operator delete(data, std::align_val_t{kLine}); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

// Elements left as they are, for whoever writes all of them.
template <typename T>
Buffer<T> uninitialized(int64_t count) {
  return Buffer<T>(AlignedAllocator<T>().allocate(static_cast<size_t>(count)));
}

}  // namespace pk
