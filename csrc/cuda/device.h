// What a kernel may use of the GPU. The only file that knows nvcc from the emulation on a CPU.
//
// Kernels are plain function templates marked PK_KERNEL, take their arguments by value and reach
// the GPU through the functions below; everything else in them is C++. nvcc compiles these
// functions to the instructions named. With PEFT_KERNELS_EMULATED the same sources are host C++,
// each thread of a block a fiber: tests/cuda_emulation/emulated_device.h has the same names.
//
// Rules that keep both the same program: shared memory is dynamic and carved by `carve`; warp
// functions are called by full warps; kernels are launched by `launch` and no other way; a loop
// that waits for another block calls `spin`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pk {

struct Half;
struct BFloat16;

namespace device {

using Stream = void*;  // a cudaStream_t

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// CUDA's text of the last failed launch of this host thread, with the kernel's name before it.
inline std::string& last_error() {
  static thread_local std::string text;
  return text;
}

}  // namespace device
}  // namespace pk

#ifdef PEFT_KERNELS_EMULATED

#include "emulated_device.h"

#else

#include <cuda_runtime.h>

#define PK_KERNEL __global__
#define PK_DEVICE __device__ __forceinline__
#define PK_HOST_DEVICE __host__ __device__ __forceinline__
#define PK_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define PK_UNROLL _Pragma("unroll")
#define PK_NO_UNROLL _Pragma("unroll 1")

namespace pk::device {

constexpr int kRedZone = 0;  // bytes behind each carved array that nobody may touch

PK_DEVICE int thread_x() { return static_cast<int>(threadIdx.x); }
PK_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
PK_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
PK_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
PK_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
PK_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }
PK_DEVICE int grid_z() { return static_cast<int>(gridDim.z); }
PK_DEVICE int block_size() { return static_cast<int>(blockDim.x); }

PK_DEVICE void sync_threads() { __syncthreads(); }
PK_DEVICE void sync_warp() { __syncwarp(); }

// The block's dynamic shared memory, aligned to 16 bytes.
PK_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char pk_shared_memory[];
  return pk_shared_memory;
}
PK_DEVICE void mark_red_zone(char*) {}

template <typename T>
PK_DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
template <typename T>
PK_DEVICE T shuffle(T value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }

PK_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8x8 matrices of 16-bit elements; lane 8 i + j gives the address of row j of matrix i.
PK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
PK_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// Copy 16 bytes from global to shared memory, both aligned to 16; zeros where not valid, and then
// `global` is not read. Below sm_80 the copy is done at once.
PK_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)),
                 "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) =
      valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}
PK_DEVICE void cp_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Wait until all but the last N groups of this thread have arrived.
template <int N>
PK_DEVICE void cp_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
#endif
}

// Relaxed; returns the value before.
PK_DEVICE int atomic_add(int* global, int value) { return atomicAdd(global, value); }
PK_DEVICE int load_acquire(const int* global) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return value;
}
PK_DEVICE void add_release(int* global, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(value)
               : "memory");
}
// Returns the value before; for "the last to arrive sees what the others did".
PK_DEVICE int add_acquire_release(int* global, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(global)), "r"(value)
               : "memory");
  return before;
}
PK_DEVICE void thread_fence() { __threadfence(); }
PK_DEVICE void spin() { __nanosleep(64); }

PK_DEVICE float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
PK_DEVICE uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
PK_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
PK_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }
// a b + c, rounded once.
PK_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// d += a b of one 16x16 and one 16x8 matrix, in the registers of a warp as mma.sync has them.
template <typename T>
PK_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Launch a kernel: 0, or the CUDA error, and then last_error() says which kernel and why.
template <typename... P, typename... A>
int launch(
    const char* name, void (*kernel)(P...), Grid grid, int block, size_t shared_bytes,
    Stream stream, A... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    const dim3 blocks(
        static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
        static_cast<unsigned>(grid.z));
    kernel<<<blocks, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
        static_cast<P>(args)...);
  }
  // The launch's own error is the last one; taking it leaves the process able to go on.
  const cudaError_t last = cudaGetLastError();
  if (error == cudaSuccess) error = last;
  if (error != cudaSuccess)
    last_error() = std::string(name) + ": " + cudaGetErrorString(error);
  return static_cast<int>(error);
}

}  // namespace pk::device

#endif

namespace pk::device {

PK_DEVICE int lane() { return thread_x() % 32; }
PK_DEVICE int warp() { return thread_x() / 32; }

// Bytes that an array of `bytes` takes of shared memory; the sum over all arrays is what `launch`
// is given.
PK_HOST_DEVICE constexpr int carved_bytes(int bytes) { return (bytes + 15) / 16 * 16 + kRedZone; }

// Take the next array from shared memory; `cursor` starts at shared_memory().
template <typename T>
PK_DEVICE T* carve(char*& cursor, int count) {
  char* array = cursor;
  cursor += carved_bytes(count * static_cast<int>(sizeof(T)));
  mark_red_zone(cursor - kRedZone);
  return reinterpret_cast<T*>(array);
}

PK_DEVICE float bfloat16_to_float(uint16_t bits) {
  return bits_to_float(static_cast<uint32_t>(bits) << 16);
}
// To nearest even; NaN stays NaN.
PK_DEVICE uint16_t float_to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
#else
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// mma_16x8x16 by shuffles and multiply-adds, for dtypes whose product the GPU lacks.
// Lane 4 g + t has rows g and g + 8 of a and d, columns 2 t and 2 t + 1 of d, column g of b.
template <float (*To)(uint16_t)>
PK_DEVICE void mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int row = lane() / 4 * 4, column = lane() % 4 * 8;
  // Not unrolled: it is made dozens of times in a kernel.
  PK_NO_UNROLL for (int step = 0; step < 8; ++step) {
    const bool second = step >= 4;
    const int t = step % 4;
    const uint32_t upper = shuffle(second ? a[2] : a[0], row + t);
    const uint32_t lower = shuffle(second ? a[3] : a[1], row + t);
    const uint32_t left = shuffle(second ? b[1] : b[0], column + t);
    const uint32_t right = shuffle(second ? b[1] : b[0], column + 4 + t);
    PK_UNROLL for (int word = 0; word < 32; word += 16) {
      const float u = To(static_cast<uint16_t>(upper >> word));
      const float v = To(static_cast<uint16_t>(lower >> word));
      const float l = To(static_cast<uint16_t>(left >> word));
      const float r = To(static_cast<uint16_t>(right >> word));
      d[0] += u * l;
      d[1] += u * r;
      d[2] += v * l;
      d[3] += v * r;
    }
  }
}

#ifndef PEFT_KERNELS_EMULATED

template <>
PK_DEVICE void mma_16x8x16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // sm_75 has the product of half the depth.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

template <>
PK_DEVICE void mma_16x8x16<BFloat16>(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  mma_by_shuffles<bfloat16_to_float>(d, a, b);
#endif
}

#endif

}  // namespace pk::device
