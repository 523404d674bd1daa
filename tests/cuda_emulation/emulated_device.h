// csrc/cuda/device.h on a CPU: the same names, each thread of a block a fiber (fibers.cpp).
//
// What a GPU would let pass by luck shows here. Shared memory starts as NaN (0xFF) and is followed
// by a guard; cp_async_16 fills its destination with NaN at issue and copies at the wait; threads
// run in ascending, descending or seeded random order; a wait without end is reported with the
// line at which each thread stands; ThreadSanitizer is told of every barrier and of nothing else.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#define PK_KERNEL
#define PK_DEVICE inline
#define PK_HOST_DEVICE inline
#define PK_LAUNCH_BOUNDS(threads, blocks)
#define PK_UNROLL
#define PK_NO_UNROLL

#define PK_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#if defined(__SANITIZE_THREAD__) || defined(PK_TSAN)
extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
#endif

namespace pk::emulation {

// What a kernel may ask of the thread that runs; fibers.cpp has the rest.
struct Place {
  int thread_x, block_x, block_y, block_z, grid_x, grid_y, grid_z, block_size;
  char* shared;
};
extern Place* current;

void sync_threads(const char* file, int line);
void sync_warp(const char* file, int line);
void spin(const char* file, int line);
void maybe_yield(const char* file, int line);
uint64_t shuffle(uint64_t bits, int lane, const char* file, int line);
void ldmatrix(uint32_t* r, const void* row, bool transposed, const char* file, int line);
void mma(bool bfloat16, float* d, const uint32_t* a, const uint32_t* b, const char* file, int line);
void cp_async(void* shared, const void* global, bool valid, const char* file, int line);
void cp_async_commit();
void cp_async_wait(int groups, const char* file, int line);
void mark_red_zone(char* zone);
int run(
    const char* name, const device::Grid& grid, int block, size_t shared_bytes,
    void (*body)(void*), void* context);

}  // namespace pk::emulation

namespace pk::device {

constexpr int kRedZone = 64;

inline int thread_x() { return emulation::current->thread_x; }
inline int block_x() { return emulation::current->block_x; }
inline int block_y() { return emulation::current->block_y; }
inline int block_z() { return emulation::current->block_z; }
inline int grid_x() { return emulation::current->grid_x; }
inline int grid_y() { return emulation::current->grid_y; }
inline int grid_z() { return emulation::current->grid_z; }
inline int block_size() { return emulation::current->block_size; }

inline void sync_threads(PK_HERE) { emulation::sync_threads(file, line); }
inline void sync_warp(PK_HERE) { emulation::sync_warp(file, line); }
inline char* shared_memory() { return emulation::current->shared; }
inline void mark_red_zone(char* zone) { emulation::mark_red_zone(zone); }

template <typename T>
inline T shuffle(T value, int lane, PK_HERE) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = emulation::shuffle(bits, lane, file, line);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
inline T shuffle_xor(T value, int mask, PK_HERE) {
  return shuffle(value, (thread_x() % 32) ^ mask, file, line);
}

inline void read_by_sanitizer(const void* address, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_read_range(const_cast<void*>(address), bytes);
#else
  (void)address, (void)bytes;
#endif
}
inline void written_by_sanitizer(void* address, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_write_range(address, bytes);
#else
  (void)address, (void)bytes;
#endif
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, PK_HERE) {
  read_by_sanitizer(shared, 16);
  emulation::ldmatrix(r, shared, false, file, line);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared, PK_HERE) {
  read_by_sanitizer(shared, 16);
  emulation::ldmatrix(r, shared, true, file, line);
}

template <typename T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PK_HERE) {
  emulation::mma(std::is_same_v<T, BFloat16>, d, a, b, file, line);
}

inline void cp_async_16(void* shared, const void* global, bool valid, PK_HERE) {
  written_by_sanitizer(shared, 16);
  if (valid) read_by_sanitizer(global, 16);
  emulation::cp_async(shared, global, valid, file, line);
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int N>
inline void cp_async_wait(PK_HERE) {
  emulation::cp_async_wait(N, file, line);
}

inline int atomic_add(int* global, int value, PK_HERE) {
  emulation::maybe_yield(file, line);
  return __atomic_fetch_add(global, value, __ATOMIC_RELAXED);
}
inline int load_acquire(const int* global, PK_HERE) {
  emulation::maybe_yield(file, line);
  return __atomic_load_n(global, __ATOMIC_ACQUIRE);
}
inline void add_release(int* global, int value, PK_HERE) {
  emulation::maybe_yield(file, line);
  __atomic_fetch_add(global, value, __ATOMIC_RELEASE);
}
inline int add_acquire_release(int* global, int value, PK_HERE) {
  emulation::maybe_yield(file, line);
  return __atomic_fetch_add(global, value, __ATOMIC_ACQ_REL);
}
// ThreadSanitizer does not know fences: use the functions above where order matters.
inline void thread_fence() {
#if !defined(__SANITIZE_THREAD__)
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
inline void spin(PK_HERE) { emulation::spin(file, line); }

inline float half_to_float(uint16_t bits) {
  _Float16 value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}
inline uint16_t float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  __builtin_memcpy(&bits, &half, sizeof(bits));
  return bits;
}
inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
// The product is exact in double: rounded once, but for ties that double makes.
inline float multiply_add(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * b + c);
}

template <typename... P, typename... A>
int launch(
    const char* name, void (*kernel)(P...), Grid grid, int block, size_t shared_bytes, Stream,
    A... args) {
  std::tuple<P...> values(static_cast<P>(args)...);
  auto body = [&] { std::apply(kernel, values); };
  return emulation::run(
      name, grid, block, shared_bytes, [](void* call) { (*static_cast<decltype(body)*>(call))(); },
      &body);
}

}  // namespace pk::device
