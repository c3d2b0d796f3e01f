// Dropout decisions by Philox-4x32-7 (Salmon et al., SC 2011), a pure function of their
// coordinates.
#pragma once

#include "problem.h"
#include "vector.h"
#if defined(PTV2_X86)
#include <immintrin.h>
#endif

namespace ptv2::PTV2_LEVEL {

enum Stream : uint32_t { kTokens = 0, kPrefix = 1, kPrefixKey = 2, kPrefixValue = 3 };

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kKeyIncrement0 = 0x9E3779B9, kKeyIncrement1 = 0xBB67AE85;
constexpr int kRounds = 7;
constexpr int kColumnsPerCall = 8;
constexpr int kColumnsPerStep = kColumnsPerCall * kLanes;

// The 64-bit products of the even words.
PTV2_INLINE Longs multiply_even(Words words, uint32_t multiplier) {
#if defined(PTV2_X86) && PTV2_VECTOR_BYTES == 32
  return (Longs)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi32(static_cast<int>(multiplier)));
#elif defined(PTV2_X86) && PTV2_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi32(static_cast<int>(multiplier)));
#else
  return ((Longs)words & 0xFFFFFFFFull) * static_cast<uint64_t>(multiplier);
#endif
}

template <int... lane>
PTV2_INLINE void multiply_halves(Words words, uint32_t multiplier, Words& high, Words& low,
                                 LaneList<lane...>) {
  const Words even = (Words)multiply_even(words, multiplier);
  const Words odd = (Words)multiply_even((Words)((Longs)words >> 32), multiplier);
  high = __builtin_shufflevector(even, odd, (lane / 2 * 2 + 1 + lane % 2 * kLanes)...);
  low = __builtin_shufflevector(even, odd, (lane / 2 * 2 + lane % 2 * kLanes)...);
}

PTV2_INLINE void multiply_halves(Words words, uint32_t multiplier, Words& high, Words& low) {
  multiply_halves(words, multiplier, high, low, typename MakeLanes<kLanes>::type{});
}

// Lane 4q + i holds call i * kLanes / 4 + q: transposing 4 x 4 blocks puts the calls in order.
PTV2_INLINE Words call_of_lane() {
  Words calls;
  for (uint32_t lane = 0; lane < kLanes; ++lane) calls[lane] = lane % 4 * (kLanes / 4) + lane / 4;
  return calls;
}

// keep[i] = -1 where column first + i is kept and 0 where it is dropped; first is a multiple of 8.
// Whole steps are written: keep has room for count rounded up to kColumnsPerStep.
inline void fill_keep(int16_t* keep, int64_t first, int64_t count, const Dropout& dropout,
                      DropoutRow at) {
  const uint64_t product = static_cast<uint64_t>(at.sequence_head) * kMultiplier1;
  const uint32_t key0 = dropout.key[0], key1 = dropout.key[1];
  // Round 1 leaves two counters and round 2 one that are equal for a whole row.
  const uint32_t row0 = static_cast<uint32_t>(product >> 32) ^ at.row ^ key0;
  const uint32_t row1 = static_cast<uint32_t>(product);
  const uint64_t row_product = static_cast<uint64_t>(row0) * kMultiplier0;
  const auto last_dropped = dropout.last_dropped - Shorts{};
  for (int64_t i = 0; i < count; i += kColumnsPerStep) {
    const Words call = call_of_lane() + static_cast<uint32_t>((first + i) / kColumnsPerCall);
    Words high, low, c[4];
    multiply_halves(call, kMultiplier0, high, low);
    Words next_key0 = splat_word(key0 + kKeyIncrement0);
    Words next_key1 = splat_word(key1 + kKeyIncrement1);
    c[2] = high ^ at.stream ^ key1;
    c[3] = low;
    multiply_halves(c[2], kMultiplier1, high, low);
    c[0] = high ^ row1 ^ next_key0;
    c[1] = low;
    c[2] = static_cast<uint32_t>(row_product >> 32) ^ c[3] ^ next_key1;
    c[3] = splat_word(static_cast<uint32_t>(row_product));
#pragma GCC unroll 8
    for (int round = 2; round < kRounds; ++round) {
      next_key0 += kKeyIncrement0;
      next_key1 += kKeyIncrement1;
      Words high0, low0;
      multiply_halves(c[0], kMultiplier0, high0, low0);
      multiply_halves(c[2], kMultiplier1, high, low);
      c[0] = high ^ c[1] ^ next_key0;
      c[1] = low;
      c[2] = high0 ^ c[3] ^ next_key1;
      c[3] = low0;
    }
    transpose_blocks(c);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      store<Shorts, 2>(keep + i + part * 2 * kLanes, (Shorts)((Shorts)c[part] > last_dropped));
    }
  }
}

// -1 or 0 in every lane.
PTV2_INLINE Ints load_keep(const int16_t* keep) {
  return __builtin_convertvector((load<HalfInts, 2>(keep)), Ints);
}

}  // namespace ptv2::PTV2_LEVEL
