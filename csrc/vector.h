// Vectors of the level being compiled, by GCC's vector extensions, and the few functions on them.
#pragma once

#include <cstdint>
#if defined(PTV2_X86)
#include <immintrin.h>
#endif

#define PTV2_INLINE inline __attribute__((always_inline))

// All lanes: without a mask GCC 12 warns of an uninitialised value within some intrinsics.
#define PTV2_ALL_LANES static_cast<__mmask16>(0xFFFF)
#define PTV2_ALL_PAIRS static_cast<__mmask8>(0xFF)

namespace ptv2::PTV2_LEVEL {

constexpr int kLanes = PTV2_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(PTV2_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(PTV2_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(PTV2_VECTOR_BYTES)));
typedef uint64_t Longs __attribute__((vector_size(PTV2_VECTOR_BYTES)));
typedef uint16_t Shorts __attribute__((vector_size(PTV2_VECTOR_BYTES)));
typedef int16_t HalfInts __attribute__((vector_size(PTV2_VECTOR_BYTES / 2)));
typedef uint16_t HalfShorts __attribute__((vector_size(PTV2_VECTOR_BYTES / 2)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLog2ERest = 1.92596303e-8f;  // log2(e) = kLog2E + kLog2ERest
constexpr float kLn2 = 0.693147180559945309f;

// A vector in memory, aligned to its elements only.
template <class Vector, int alignment>
struct Unaligned {
  typedef Vector type __attribute__((aligned(alignment), may_alias));
};

template <class Vector, int alignment = 4>
PTV2_INLINE Vector load(const void* address) {
  return *static_cast<const typename Unaligned<Vector, alignment>::type*>(address);
}

template <class Vector, int alignment = 4>
PTV2_INLINE void store(void* address, Vector vector) {
  *static_cast<typename Unaligned<Vector, alignment>::type*>(address) = vector;
}

PTV2_INLINE Floats splat(float value) { return value - Floats{}; }
PTV2_INLINE Words splat_word(uint32_t value) { return value - Words{}; }

PTV2_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

PTV2_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PTV2_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// An odd number of cache lines: rows that lie apart by it spread over all sets of a cache.
PTV2_INLINE int64_t odd_lines(int64_t floats) { return (round_up(floats, 16) / 16 | 1) * 16; }

typedef float FourFloats __attribute__((vector_size(16)));
typedef uint32_t FourWords __attribute__((vector_size(16)));

// Folds the quarters of a vector into one by operation(a, b).
template <class Operation>
PTV2_INLINE float fold(Floats vector, const Operation& operation) {
  FourFloats parts[kLanes / 4];
  __builtin_memcpy(parts, &vector, sizeof(vector));
#pragma GCC unroll 4
  for (int count = kLanes / 8; count > 0; count /= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) parts[i] = operation(parts[i], parts[i + count]);
  }
  FourFloats four = parts[0];
  four = operation(four, (FourFloats)__builtin_shufflevector(four, four, 2, 3, 0, 1));
  four = operation(four, (FourFloats)__builtin_shufflevector(four, four, 1, 0, 3, 2));
  return four[0];
}

PTV2_INLINE float sum_of(Floats vector) {
  return fold(vector, [](FourFloats a, FourFloats b) { return a + b; });
}

PTV2_INLINE float max_of(Floats vector) {
  return fold(vector, [](FourFloats a, FourFloats b) { return a > b ? a : b; });
}

// e^x for x < 88; below -88 exactly 0 (-inf too), NaN stays NaN. e^x = 2^n 2^f with |f| <= 1/2 and
// a polynomial for 2^f. Relative error below 1e-7, found over all floats in [-87, 1].
PTV2_INLINE Floats exp(Floats x) {
  const Floats lowest = splat(-127 * kLn2);
  x = lowest > x ? lowest : x;
  const Floats shifter = splat(12582912.0f);  // 1.5 * 2^23: its low mantissa bits hold n
  const Floats shifted = x * kLog2E + shifter;
  const Floats f = x * kLog2ERest + (x * kLog2E - (shifted - shifter));
  Floats power = splat(1.5533221e-4f);
  power = power * f + splat(1.34085043e-3f);
  power = power * f + splat(9.6178137e-3f);
  power = power * f + splat(5.55030208e-2f);
  power = power * f + splat(2.40226525e-1f);
  power = power * f + splat(6.93147223e-1f);
  power = power * f + splat(1.0f);
  // n = -127 makes the exponent field 0, so that the factor is 0 and not a denormal.
  const Ints exponent = ((Ints)shifted - (0x4B400000 - 127)) << 23;
  return power * (Floats)exponent;
}

struct Bfloat16 {
  uint16_t bits;
};

PTV2_INLINE float to_float(float value) { return value; }
PTV2_INLINE float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  return __builtin_bit_cast(float, bits);
}

PTV2_INLINE Floats load_floats(const float* address) { return load<Floats>(address); }
PTV2_INLINE Floats load_floats(const Bfloat16* address) {
#if defined(PTV2_AVX512)  // where GCC's own conversion goes by way of two halves
  return (Floats)((Words)_mm512_maskz_cvtepu16_epi32(PTV2_ALL_LANES, load<__m256i, 2>(address))
                  << 16);
#endif
  return (Floats)(__builtin_convertvector((load<HalfShorts, 2>(address)), Words) << 16);
}

// The upper 16 bits, rounded to nearest even, in the lower half of each lane.
PTV2_INLINE Words round_to_bfloat16(Floats values) {
#if defined(PTV2_NATIVE_PAIRS)
  return (Words)_mm512_maskz_cvtepu16_epi32(PTV2_ALL_LANES,
                                            (__m256i)_mm512_cvtneps_pbh((__m512)values));
#endif
  const Words bits = (Words)values;
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return values == values ? rounded : splat_word(0x7FC0);
}

PTV2_INLINE void store_floats(float* address, Floats values) { store(address, values); }
PTV2_INLINE void store_floats(Bfloat16* address, Floats values) {
#if defined(PTV2_NATIVE_PAIRS)
  store<HalfShorts, 2>(address, (HalfShorts)_mm512_cvtneps_pbh((__m512)values));
  return;
#endif
  store<HalfShorts, 2>(address, __builtin_convertvector(round_to_bfloat16(values), HalfShorts));
}

// destination = source * factor over one row of any length.
template <class Element>
PTV2_INLINE void store_row(Element* destination, const float* source, int64_t count, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_floats(destination + i, load<Floats>(source + i) * factor);
  }
  for (; i < count; ++i) {
    const Floats value = splat(source[i] * factor);
    if constexpr (sizeof(Element) == 4) {
      destination[i] = value[0];
    } else {
      destination[i].bits = static_cast<uint16_t>(round_to_bfloat16(value)[0]);
    }
  }
}

// Transposes 4 x 4 blocks of words: lane 4q + i of row w becomes lane 4q + w of row i.
template <int... lane>
struct LaneList {};
template <int count, int... lane>
struct MakeLanes : MakeLanes<count - 1, count - 1, lane...> {};
template <int... lane>
struct MakeLanes<0, lane...> {
  using type = LaneList<lane...>;
};

template <class Vector, int lanes, int... lane>
PTV2_INLINE void transpose_blocks(Vector (&rows)[4], LaneList<lane...>) {
  // Pairs of lanes (0, 0'), (1, 1') of every quarter, then pairs (2, 2'), (3, 3').
  const Vector low01 = __builtin_shufflevector(rows[0], rows[1],
                                               (lane / 4 * 4 + lane % 4 / 2 + lane % 2 * lanes)...);
  const Vector low23 = __builtin_shufflevector(rows[2], rows[3],
                                               (lane / 4 * 4 + lane % 4 / 2 + lane % 2 * lanes)...);
  const Vector high01 = __builtin_shufflevector(
      rows[0], rows[1], (lane / 4 * 4 + 2 + lane % 4 / 2 + lane % 2 * lanes)...);
  const Vector high23 = __builtin_shufflevector(
      rows[2], rows[3], (lane / 4 * 4 + 2 + lane % 4 / 2 + lane % 2 * lanes)...);
  rows[0] =
      __builtin_shufflevector(low01, low23, (lane / 4 * 4 + lane % 2 + lane % 4 / 2 * lanes)...);
  rows[1] = __builtin_shufflevector(low01, low23,
                                    (lane / 4 * 4 + 2 + lane % 2 + lane % 4 / 2 * lanes)...);
  rows[2] =
      __builtin_shufflevector(high01, high23, (lane / 4 * 4 + lane % 2 + lane % 4 / 2 * lanes)...);
  rows[3] = __builtin_shufflevector(high01, high23,
                                    (lane / 4 * 4 + 2 + lane % 2 + lane % 4 / 2 * lanes)...);
}

// Lane i of the result is lane index[i] of the vector.
PTV2_INLINE Floats permute(Floats vector, Ints index) {
#if defined(PTV2_AVX512)
  return (Floats)_mm512_maskz_permutexvar_ps(PTV2_ALL_LANES, (__m512i)index, (__m512)vector);
#elif defined(PTV2_X86) && PTV2_VECTOR_BYTES == 32
  return (Floats)_mm256_permutevar8x32_ps((__m256)vector, (__m256i)index);
#else
  Floats result{};
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = vector[index[lane]];
  return result;
#endif
}

// The quarters of a vector side by side; in registers, where a copy through memory would stall.
template <class Vector>
PTV2_INLINE Vector join(const FourWords (&quarters)[sizeof(Vector) / 16]) {
  if constexpr (sizeof(Vector) == 16) {
    return __builtin_bit_cast(Vector, quarters[0]);
  } else {
    const auto low = __builtin_shufflevector(quarters[0], quarters[1], 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (sizeof(Vector) == 32) {
      return __builtin_bit_cast(Vector, low);
    } else {
      const auto high = __builtin_shufflevector(quarters[2], quarters[3], 0, 1, 2, 3, 4, 5, 6, 7);
      return __builtin_bit_cast(Vector, __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7,
                                                                8, 9, 10, 11, 12, 13, 14, 15));
    }
  }
}

template <class Vector>
PTV2_INLINE void transpose_blocks(Vector (&rows)[4]) {
  constexpr int lanes = sizeof(Vector) / 4;
  transpose_blocks<Vector, lanes>(rows, typename MakeLanes<lanes>::type{});
}

}  // namespace ptv2::PTV2_LEVEL
