// The keep mask of dropout: Philox-4x32-10, bit for bit what peft_kernels/core/rng.py specifies.
//
// Element (row, k) takes word k % 4 of counter row * ceil(columns / 4) + k / 4; it is kept iff the
// word reaches the threshold. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
#pragma once

#include "device.h"

namespace pk {

// What a kernel is given; the seed lies on the device and is null for no dropout.
struct Dropout {
  const int64_t* seed;
  uint32_t threshold;
};

struct Words {
  uint32_t word[4];
};

PK_DEVICE Words philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  PK_UNROLL for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Bit j says whether column 4 * group + j of a row is kept; `groups` is ceil(columns / 4).
PK_DEVICE uint32_t keep_bits(
    uint64_t seed, uint32_t threshold, int64_t row, int64_t groups, int64_t group) {
  const Words words = philox(seed, static_cast<uint64_t>(row * groups + group));
  uint32_t bits = 0;
  PK_UNROLL for (int j = 0; j < 4; ++j) bits |= (words.word[j] >= threshold ? 1u : 0u) << j;
  return bits;
}

}  // namespace pk
