#include "philox.h"

#include <algorithm>

#include "vec.h"
#include "vector_level.h"

#ifdef PK_AVX512
// GCC 12 warns of the deliberately undefined operands inside its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace pk {
namespace {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// Write keep[0, 4 * groups) of one row, starting at a counter.
PK_CLONES void keep_words(const Dropout& dropout, uint64_t counter, int64_t groups, uint32_t* keep) {
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
        const uint64_t p0 = static_cast<uint64_t>(c0[i]) * kMultiplier0;
        const uint64_t p1 = static_cast<uint64_t>(c2[i]) * kMultiplier1;
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(p0);
      }
      k0 += kWeyl0;
      k1 += kWeyl1;
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

#ifdef PK_AVX512
// The same, eight counters in the low halves of eight lanes; what the high halves hold is ignored.
PK_AVX512 void keep_words_avx512(
    const Dropout& dropout, uint64_t counter, int64_t groups, uint32_t* keep) {
  constexpr int kXor3 = 0x96;
  const __m512i first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const __m512i second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  const __m512i threshold = _mm512_set1_epi32(static_cast<int>(dropout.threshold));
  const __m512i multiplier0 = _mm512_set1_epi64(kMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kMultiplier1);
  __m512i c = _mm512_add_epi64(
      _mm512_set1_epi64(static_cast<int64_t>(counter)), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  for (int64_t g = 0; g < groups; g += 8, c = _mm512_add_epi64(c, _mm512_set1_epi64(8))) {
    __m512i c0 = c, c1 = _mm512_srli_epi64(c, 32), c2{}, c3{};
    uint32_t k0 = static_cast<uint32_t>(dropout.seed);
    uint32_t k1 = static_cast<uint32_t>(dropout.seed >> 32);
    PK_UNROLL for (int round = 0; round < 10; ++round) {
      const __m512i p0 = _mm512_mul_epu32(c0, multiplier0), p1 = _mm512_mul_epu32(c2, multiplier1);
      const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, key0, kXor3);
      c1 = p1;
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, key1, kXor3);
      c3 = p0;
      k0 += kWeyl0;
      k1 += kWeyl1;
    }
    const __m512i c01 = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
    const __m512i c23 = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    const __m512i low = _mm512_permutex2var_epi64(c01, first, c23);
    const __m512i high = _mm512_permutex2var_epi64(c01, second, c23);
    _mm512_storeu_si512(keep + 4 * g, _mm512_movm_epi32(_mm512_cmpge_epu32_mask(low, threshold)));
    _mm512_storeu_si512(
        keep + 4 * g + 16, _mm512_movm_epi32(_mm512_cmpge_epu32_mask(high, threshold)));
  }
}
#endif

}  // namespace

void draw_keep(
    const Dropout& dropout, const Rows& rows, int64_t columns, int64_t first_column, uint32_t* keep) {
  auto* words = keep_words;
#ifdef PK_AVX512
  if (native_avx512()) words = keep_words_avx512;
#endif
  const uint64_t groups = static_cast<uint64_t>((columns + 3) / 4);
  const int64_t needed = (std::min(kDepth, columns - first_column) + 3) / 4;
  for (int64_t m = 0; m < rows.count; ++m)
    words(
        dropout, static_cast<uint64_t>(rows[m]) * groups + first_column / 4, needed,
        keep + m * kDepth);
}

}  // namespace pk
