// The keep mask of dropout: Philox-4x32-10, bit for bit what peft_kernels/core/rng.py specifies.
//
// Element (row, k) takes word k % 4 of counter row * ceil(cols / 4) + k / 4; it is kept iff the word
// reaches the threshold. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
#pragma once

#include "vec.h"

namespace pk {

struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t threshold;
};

// Write keep[0, 4 * groups) of one row, starting at a counter: 0xFFFFFFFF for kept, 0 for dropped.
PK_INLINE void keep_words(const Dropout& dropout, uint64_t counter, int64_t groups, uint32_t* keep) {
  constexpr int64_t kBlock = 16;
  for (int64_t g = 0; g < groups; g += kBlock) {
    uint32_t c0[kBlock], c1[kBlock], c2[kBlock], c3[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      const uint64_t c = counter + static_cast<uint64_t>(g + i);
      c0[i] = static_cast<uint32_t>(c);
      c1[i] = static_cast<uint32_t>(c >> 32);
      c2[i] = c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(dropout.seed);
    uint32_t k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int64_t i = 0; i < kBlock; ++i) {
        const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(p0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    // The buffer has room for whole blocks, so the tail needs no care.
    uint32_t* out = keep + 4 * g;
    for (int64_t i = 0; i < kBlock; ++i) {
      out[4 * i + 0] = c0[i] >= dropout.threshold ? 0xFFFFFFFFu : 0u;
      out[4 * i + 1] = c1[i] >= dropout.threshold ? 0xFFFFFFFFu : 0u;
      out[4 * i + 2] = c2[i] >= dropout.threshold ? 0xFFFFFFFFu : 0u;
      out[4 * i + 3] = c3[i] >= dropout.threshold ? 0xFFFFFFFFu : 0u;
    }
  }
}

}  // namespace pk
