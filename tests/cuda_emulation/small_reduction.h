// The token reduction in tiles of 32 x 32 of Half and blocks of 64 threads, for the drivers that
// run their kernels so: several blocks then are few enough threads for ThreadSanitizer.
#pragma once

#include "token_reduction.h"

namespace pk {
// What is inline and not called is not compiled: the tiles of all types would take longest.
inline int token_reduction(const TokenReduction& call, device::Stream stream);
}  // namespace pk

#include "token_reduction.cu"

namespace pk::driver {

using SmallShape = Shape<32, 32, 32, 1, 2>;

inline int reduction(const TokenReduction& call) {
  return launch_reduction<Half, SmallShape>(call, nullptr);
}

}  // namespace pk::driver
