// What peft_kernels/core/cuda_library.py asks of the library itself, by name.
#include "cuda/device.h"

#define PK_EXPORT extern "C" __attribute__((used, visibility("default")))

// CUDA's text of this thread's last failed launch, with the kernel's name before it.
PK_EXPORT const char* peft_kernels_cuda_error() { return pk::device::last_error().c_str(); }

#ifndef PEFT_KERNELS_EMULATED

// The newest CUDA that the driver knows, 13000 for 13.0; 0 without a driver.
PK_EXPORT int peft_kernels_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

#define PK_TEXT_OF(...) #__VA_ARGS__
#define PK_TEXT(...) PK_TEXT_OF(__VA_ARGS__)

// What this build is, read from the file before it is decided whether to load it.
PK_EXPORT const char peft_kernels_cuda_build[] =
    "<peft_kernels CUDA library"
    "|version=" PK_TEXT(PEFT_KERNELS_VERSION)
    "|torch=" PK_TEXT(PEFT_KERNELS_BUILT_WITH_TORCH)
    "|cuda=" PK_TEXT(PEFT_KERNELS_BUILT_WITH_CUDA)
    "|cuda_archs=" PK_TEXT(PEFT_KERNELS_CUDA_ARCHS)
    "|compiler=g++ " __VERSION__ ">";

#endif
