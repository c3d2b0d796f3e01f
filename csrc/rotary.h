// Rotary positions of packed heads, in place: (x, y) -> (x cos - y sin, x sin + y cos).
#pragma once

#include "rows.h"

namespace ptv2::PTV2_LEVEL {

template <int... lane>
PTV2_INLINE Floats swap_pairs(Floats vector, LaneList<lane...>) {
  return __builtin_shufflevector(vector, vector, (lane ^ 1)...);
}

PTV2_INLINE Floats swap_pairs(Floats vector) {
  return swap_pairs(vector, typename MakeLanes<kLanes>::type{});
}

// A row of cosines and one of sines, as they stand over the elements of interleaved pairs.
inline int64_t rotate_scratch_bytes(int64_t pairs) {
  return 4 * pairs * static_cast<int64_t>(sizeof(float));
}

// Pairs (i, i + pairs) of one head.
template <class Element>
PTV2_INLINE void rotate_halves(Element* head, const float* cosine, const float* sine, float sign,
                               int64_t pairs) {
  for_columns(pairs, [&](int64_t column, auto count) {
    const Floats cos = load_part(cosine + column, count);
    const Floats sin = load_part(sine + column, count) * sign;
    const Floats x = load_part(head + column, count);
    const Floats y = load_part(head + pairs + column, count);
    store_part(head + column, x * cos - y * sin, count);
    store_part(head + pairs + column, x * sin + y * cos, count);
  });
}

// Pairs (2i, 2i + 1) of one head, with (cos, cos) and (-sin, sin) over each.
template <class Element>
PTV2_INLINE void rotate_interleaved(Element* head, const float* cosine, const float* sine,
                                    int64_t pairs) {
  for_columns(2 * pairs, [&](int64_t column, auto count) {
    const Floats x = load_part(head + column, count);
    const Floats along = x * load_part(cosine + column, count);
    store_part(head + column, along + swap_pairs(x) * load_part(sine + column, count), count);
  });
}

template <class Element>
inline void rotate_rows(const RotaryRows& call, int64_t first, int64_t last, char* scratch) {
  const float sign = call.inverse ? -1.0f : 1.0f;
  const int64_t pairs = call.pairs;
  auto* wide_cosine = reinterpret_cast<float*>(scratch);
  float* wide_sine = wide_cosine + 2 * pairs;
  for (int64_t row = first; row < last; ++row) {
    auto* head = static_cast<Element*>(call.packed) + row * call.row_stride;
    const float *cosine = call.cosine + row * pairs, *sine = call.sine + row * pairs;
    if (!call.interleaved) {
      for (int64_t i = 0; i < call.heads; ++i, head += call.head_dim) {
        rotate_halves(head, cosine, sine, sign, pairs);
      }
      continue;
    }
    for (int64_t i = 0; i < pairs; ++i) {
      wide_cosine[2 * i] = wide_cosine[2 * i + 1] = cosine[i];
      wide_sine[2 * i + 1] = sine[i] * sign;
      wide_sine[2 * i] = -wide_sine[2 * i + 1];
    }
    for (int64_t i = 0; i < call.heads; ++i, head += call.head_dim) {
      rotate_interleaved(head, wide_cosine, wide_sine, pairs);
    }
  }
}

}  // namespace ptv2::PTV2_LEVEL
