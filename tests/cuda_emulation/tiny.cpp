// A kernel that uses every wrapper once, for the tests of the emulation itself.
#include "philox.h"
#include "types.h"

namespace pk {
namespace {

using namespace device;

// out[block, i] = in[block, reversed i] through shared memory, each block after the one before it:
// block b waits until b blocks have released `turn`.
struct Reversal {
  const float* in;
  float* out;
  int* turn;
  bool barrier;  // false: a race
  bool release;  // false: a deadlock
};

PK_KERNEL void reverse_kernel(Reversal call) {
  char* cursor = shared_memory();
  float* row = carve<float>(cursor, block_size());
  const int i = thread_x(), n = block_size();
  const int64_t base = static_cast<int64_t>(block_x()) * n;
  if (i % 4 == 0) cp_async_16(row + i, call.in + base + i, true);
  cp_async_commit();
  cp_async_wait<0>();
  if (call.barrier) sync_threads();
  call.out[base + i] = row[n - 1 - i];
  if (thread_x() == 0)
    while (load_acquire(call.turn) < block_x()) spin();
  sync_threads();
  if (thread_x() == 0 && call.release) add_release(call.turn, 1);
}

// d [16, 8] = a [16, 16] b [8, 16]^T of 16-bit elements, by one warp: `how` is 0 for the tensor
// core with plain loads by ldmatrix, 1 for a stored transposed, 2 for the product by shuffles.
template <typename T>
PK_KERNEL void product_kernel(const T* a, const T* b, float* d, int how) {
  char* cursor = shared_memory();
  T* left = carve<T>(cursor, 16 * 24);
  T* right = carve<T>(cursor, 16 * 24);
  for (int i = lane(); i < 256; i += 32) {
    const int row = i / 16, k = i % 16;
    left[how == 1 ? k * 24 + row : row * 24 + k] = a[i];
    right[row * 24 + k] = row < 8 ? b[i] : zero<T>();
  }
  sync_warp();
  uint32_t fa[4], fb[4];
  const int r = lane() % 8, q = lane() / 8;
  if (how == 1)
    ldmatrix_x4_transposed(fa, left + (r + q / 2 * 8) * 24 + q % 2 * 8);
  else
    ldmatrix_x4(fa, left + (r + q % 2 * 8) * 24 + q / 2 * 8);
  ldmatrix_x4(fb, right + (r + q / 2 * 8) * 24 + q % 2 * 8);
  float sum[4] = {};
  const uint32_t first[2] = {fb[0], fb[1]};
  if (how == 2) {
    if constexpr (std::is_same_v<T, Half>)
      mma_by_shuffles<half_to_float>(sum, fa, first);
    else
      mma_by_shuffles<bfloat16_to_float>(sum, fa, first);
  } else {
    mma_16x8x16<T>(sum, fa, first);
  }
  for (int i = 0; i < 4; ++i) d[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = sum[i];
}

template <typename T>
PK_KERNEL void round_kernel(const float* in, T* out, float* back, int n) {
  for (int i = thread_x(); i < n; i += block_size()) {
    out[i] = from_float<T>(in[i]);
    back[i] = to_float(out[i]);
  }
}

// keep[row, k] of dropout, as bytes.
PK_KERNEL void mask_kernel(Dropout dropout, int rows, int columns, uint8_t* keep) {
  const int64_t groups = (columns + 3) / 4;
  for (int64_t i = thread_x(); i < rows * groups; i += block_size()) {
    const int64_t row = i / groups, group = i % groups;
    const uint32_t bits =
        keep_bits(static_cast<uint64_t>(*dropout.seed), dropout.threshold, row, groups, group);
    for (int64_t k = 4 * group; k < 4 * group + 4 && k < columns; ++k)
      keep[row * columns + k] = bits >> (k % 4) & 1;
  }
}

}  // namespace
}  // namespace pk

#define PK_EXPORT extern "C" __attribute__((visibility("default")))

PK_EXPORT int tiny_reverse(
    const float* in, float* out, int* turn, int blocks, int threads, int missing_bytes, bool barrier,
    bool release) {
  return pk::device::launch(
      "reverse", pk::reverse_kernel, {blocks}, threads,
      pk::device::carved_bytes(threads * 4) - missing_bytes, nullptr,
      pk::Reversal{in, out, turn, barrier, release});
}

PK_EXPORT int tiny_product(bool bfloat16, const void* a, const void* b, float* d, int how) {
  const size_t bytes = 2 * pk::device::carved_bytes(16 * 24 * 2);
  if (bfloat16)
    return pk::device::launch(
        "product", pk::product_kernel<pk::BFloat16>, {}, 32, bytes, nullptr,
        static_cast<const pk::BFloat16*>(a), static_cast<const pk::BFloat16*>(b), d, how);
  return pk::device::launch(
      "product", pk::product_kernel<pk::Half>, {}, 32, bytes, nullptr,
      static_cast<const pk::Half*>(a), static_cast<const pk::Half*>(b), d, how);
}

PK_EXPORT int tiny_round(bool bfloat16, const float* in, void* out, float* back, int n) {
  if (bfloat16)
    return pk::device::launch(
        "round", pk::round_kernel<pk::BFloat16>, {}, 32, 0, nullptr, in,
        static_cast<pk::BFloat16*>(out), back, n);
  return pk::device::launch(
      "round", pk::round_kernel<pk::Half>, {}, 32, 0, nullptr, in, static_cast<pk::Half*>(out), back,
      n);
}

PK_EXPORT int tiny_mask(const int64_t* seed, uint32_t threshold, int rows, int columns, uint8_t* keep) {
  return pk::device::launch(
      "mask", pk::mask_kernel, {}, 64, 0, nullptr, pk::Dropout{seed, threshold}, rows, columns, keep);
}
