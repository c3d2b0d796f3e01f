// Dropout decisions by Philox-4x32-7 (Salmon et al., SC 2011), a pure function of their
// coordinates.
#pragma once

#include "problem.h"
#include "vector.h"

namespace ptv2::PTV2_LEVEL {

enum Stream : uint32_t { kTokens = 0, kPrefix = 1, kPrefixKey = 2, kPrefixValue = 3 };

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kKeyIncrement0 = 0x9E3779B9, kKeyIncrement1 = 0xBB67AE85;
constexpr int kRounds = 7;
constexpr int kColumnsPerCall = 8;

// The types of a step of the generator: a whole vector of words, or half of one where fewer columns
// are left.
template <int bytes>
struct StepVectors;

#define PTV2_STEP_VECTORS(bytes)                                 \
  template <>                                                    \
  struct StepVectors<bytes> {                                    \
    typedef uint32_t Words __attribute__((vector_size(bytes)));  \
    typedef uint64_t Longs __attribute__((vector_size(bytes)));  \
    typedef uint16_t Shorts __attribute__((vector_size(bytes))); \
  }
PTV2_STEP_VECTORS(16);
PTV2_STEP_VECTORS(32);
PTV2_STEP_VECTORS(64);
#undef PTV2_STEP_VECTORS

template <int bytes>
struct Step {
  static constexpr int lanes = bytes / 4;
  static constexpr int columns = lanes * kColumnsPerCall;
  using Words = typename StepVectors<bytes>::Words;
  using Longs = typename StepVectors<bytes>::Longs;
  using Shorts = typename StepVectors<bytes>::Shorts;

  // The 64-bit products of the even words.
  static PTV2_INLINE Longs multiply_even(Words words, uint32_t multiplier) {
#if defined(PTV2_X86)
    const auto factor = static_cast<int>(multiplier);
    if constexpr (bytes == 16) {
      return (Longs)_mm_mul_epu32((__m128i)words, _mm_set1_epi32(factor));
    }
#if PTV2_VECTOR_BYTES >= 32
    if constexpr (bytes == 32) {
      return (Longs)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi32(factor));
    }
#endif
#if defined(PTV2_AVX512)
    if constexpr (bytes == 64) {
      return (Longs)_mm512_maskz_mul_epu32(PTV2_ALL_PAIRS, (__m512i)words,
                                           _mm512_set1_epi32(factor));
    }
#endif
#endif
    return ((Longs)words & 0xFFFFFFFFull) * static_cast<uint64_t>(multiplier);
  }

  template <int... lane>
  static PTV2_INLINE void multiply_halves(Words words, uint32_t multiplier, Words& high, Words& low,
                                          LaneList<lane...>) {
    const Words even = (Words)multiply_even(words, multiplier);
    const Words odd = (Words)multiply_even((Words)((Longs)words >> 32), multiplier);
    high = __builtin_shufflevector(even, odd, (lane / 2 * 2 + 1 + lane % 2 * lanes)...);
    low = __builtin_shufflevector(even, odd, (lane / 2 * 2 + lane % 2 * lanes)...);
  }

  static PTV2_INLINE void multiply_halves(Words words, uint32_t multiplier, Words& high,
                                          Words& low) {
    multiply_halves(words, multiplier, high, low, typename MakeLanes<lanes>::type{});
  }

  // Lane 4q + i holds call i * lanes / 4 + q: transposing 4 x 4 blocks puts the calls in order.
  static PTV2_INLINE Words call_of_lane() {
    Words calls;
    for (uint32_t lane = 0; lane < lanes; ++lane) calls[lane] = lane % 4 * (lanes / 4) + lane / 4;
    return calls;
  }

  // keep[i] = -1 where column first + i is kept and 0 where it is dropped.
  static PTV2_INLINE void fill(int16_t* keep, int64_t first, const Dropout& dropout,
                               DropoutRow at) {
    const uint64_t product = static_cast<uint64_t>(at.sequence_head) * kMultiplier1;
    const uint32_t key0 = dropout.key[0], key1 = dropout.key[1];
    // Round 1 leaves two counters and round 2 one that are equal for a whole row.
    const uint32_t row0 = static_cast<uint32_t>(product >> 32) ^ at.row ^ key0;
    const uint32_t row1 = static_cast<uint32_t>(product);
    const uint64_t row_product = static_cast<uint64_t>(row0) * kMultiplier0;
    const Words call = call_of_lane() + static_cast<uint32_t>(first / kColumnsPerCall);
    Words high, low, c[4];
    multiply_halves(call, kMultiplier0, high, low);
    uint32_t next_key0 = key0 + kKeyIncrement0, next_key1 = key1 + kKeyIncrement1;
    c[2] = high ^ at.stream ^ key1;
    c[3] = low;
    multiply_halves(c[2], kMultiplier1, high, low);
    c[0] = high ^ row1 ^ next_key0;
    c[1] = low;
    c[2] = static_cast<uint32_t>(row_product >> 32) ^ c[3] ^ next_key1;
    c[3] = static_cast<uint32_t>(row_product) - Words{};
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
    const auto last_dropped = dropout.last_dropped - Shorts{};
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      store<Shorts, 2>(keep + part * 2 * lanes, (Shorts)((Shorts)c[part] > last_dropped));
    }
  }
};

using WholeStep = Step<PTV2_VECTOR_BYTES>;
using HalfStep = Step<(PTV2_VECTOR_BYTES > 16 ? PTV2_VECTOR_BYTES / 2 : 16)>;
constexpr int kColumnsPerStep = WholeStep::columns;

// keep[i] = -1 where column first + i is kept and 0 where it is dropped; first is a multiple of 8.
// keep has room for count rounded up to kColumnsPerStep, and what is behind count may be written.
inline void fill_keep(int16_t* keep, int64_t first, int64_t count, const Dropout& dropout,
                      DropoutRow at) {
  int64_t i = 0;
  for (; i + HalfStep::columns < count; i += WholeStep::columns) {
    WholeStep::fill(keep + i, first + i, dropout, at);
  }
  if (i < count) HalfStep::fill(keep + i, first + i, dropout, at);
}

// -1 or 0 in every lane.
PTV2_INLINE Ints load_keep(const int16_t* keep) {
#if defined(PTV2_AVX512)  // as in load_floats
  return (Ints)_mm512_maskz_cvtepi16_epi32(PTV2_ALL_LANES, load<__m256i, 2>(keep));
#endif
  return __builtin_convertvector((load<HalfInts, 2>(keep)), Ints);
}

}  // namespace ptv2::PTV2_LEVEL
