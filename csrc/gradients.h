// The element-wise part of the backward: scores and dP in, dropped probabilities and dS out.
#pragma once

#include "columns.h"

namespace ptv2::PTV2_LEVEL {

// The largest exponent of a weight without its gate: of a gate of 0 nothing else bounds it.
constexpr float kMostExponent = 80.0f;

struct GradientRow {
  float pivot;  // lse; +inf for a row without a visible column
  float delta;  // sum of out * grad_out
};

// The gate on the first columns of a row, those of the prefix: a number of whole vectors.
struct RowGate {
  float factor;
  int64_t width;
  float* sums;  // [width]: the gate's gradient by column
};

// A row of the two tiles; bias and keep may be null.
struct ScoreRow {
  float* scores;
  float* gradients;  // dP
  const int32_t* visible;
  const float* bias;
  const int16_t* keep;
  GradientRow state;
  RowGate gate;
};

struct Gradients {
  Floats dropped_probability, score_gradient;
};

// Probability P recomputed from lse, dS = P * (dropout(dP) - delta). Of a gated column P without
// its gate comes first: then dS is the gate's gradient, whatever the gate is, and the gate times it
// that of the score.
template <bool kGated>
PTV2_INLINE Gradients gradients_at(const ScoreRow& row, int64_t column) {
  const bool gated = kGated && column < row.gate.width;
  Floats score = load<Floats>(row.scores + column);
  if (row.bias != nullptr) score += load<Floats>(row.bias + column);
  Floats exponent = score - row.state.pivot;
  if (gated) exponent = exponent > kMostExponent ? splat(kMostExponent) : exponent;
  Floats probability = exp(exponent);
  probability = (Floats)((Ints)probability & load<Ints>(row.visible + column));
  Floats gradient = load<Floats>(row.gradients + column);
  Floats dropped = probability;
  if (row.keep != nullptr) {
    const Ints kept = load_keep(row.keep + column);
    gradient = (Floats)((Ints)gradient & kept);
    dropped = (Floats)((Ints)probability & kept);
  }
  Floats score_gradient = probability * (gradient - row.state.delta);
  if (gated) {
    float* sums = row.gate.sums + column;
    store(sums, load<Floats>(sums) + score_gradient);
    score_gradient *= row.gate.factor;
    dropped *= row.gate.factor;
  }
  return {dropped, score_gradient};
}

template <bool kGated>
void differentiate_row(const ScoreRow& row, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Gradients result = gradients_at<kGated>(row, i);
    store(row.scores + i, result.dropped_probability);
    store(row.gradients + i, result.score_gradient);
  }
}

// Two rows in bfloat16: sums over rows want a word of both rows, written over the first one, and
// sums over columns want the pairs of each row. Without a second row its half of each word is 0.
struct RowPair {
  ScoreRow first, second;
  bool has_second;
  Bfloat16 *first_pairs, *second_pairs;
};

#if defined(PTV2_NATIVE_PAIRS)
// 32 columns, even and odd rows: each row as it is, and word by word.
struct PairedColumns {
  __m512i even, odd;

  static PTV2_INLINE PairedColumns round(Floats even0, Floats even1, Floats odd0, Floats odd1) {
    return {(__m512i)_mm512_cvtne2ps_pbh((__m512)even1, (__m512)even0),
            (__m512i)_mm512_cvtne2ps_pbh((__m512)odd1, (__m512)odd0)};
  }

  PTV2_INLINE void store_words(float* words) const {
    static constexpr int16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                         37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                         11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_loadu_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(words, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_storeu_si512(words + kLanes, _mm512_permutex2var_epi16(even, high, odd));
  }
};

// Rows have room for width rounded up to two vectors.
template <bool kGated>
void differentiate_pair(const RowPair& pair, int64_t width) {
  for (int64_t i = 0; i < width; i += 2 * kLanes) {
    const Gradients even0 = gradients_at<kGated>(pair.first, i);
    const Gradients even1 = gradients_at<kGated>(pair.first, i + kLanes);
    Gradients odd0{}, odd1{};
    if (pair.has_second) {
      odd0 = gradients_at<kGated>(pair.second, i);
      odd1 = gradients_at<kGated>(pair.second, i + kLanes);
    }
    const auto gradients = PairedColumns::round(even0.score_gradient, even1.score_gradient,
                                                odd0.score_gradient, odd1.score_gradient);
    _mm512_storeu_si512(pair.first_pairs + i, gradients.even);
    if (pair.has_second) _mm512_storeu_si512(pair.second_pairs + i, gradients.odd);
    gradients.store_words(pair.first.gradients + i);
    PairedColumns::round(even0.dropped_probability, even1.dropped_probability,
                         odd0.dropped_probability, odd1.dropped_probability)
        .store_words(pair.first.scores + i);
  }
}
#else
template <bool kGated>
void differentiate_pair(const RowPair& pair, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Gradients even = gradients_at<kGated>(pair.first, i);
    Words probability = round_to_bfloat16(even.dropped_probability);
    Words gradient = round_to_bfloat16(even.score_gradient);
    store_floats(pair.first_pairs + i, even.score_gradient);
    if (pair.has_second) {
      const Gradients odd = gradients_at<kGated>(pair.second, i);
      probability |= round_to_bfloat16(odd.dropped_probability) << 16;
      gradient |= round_to_bfloat16(odd.score_gradient) << 16;
      store_floats(pair.second_pairs + i, odd.score_gradient);
    }
    store(pair.first.scores + i, probability);
    store(pair.first.gradients + i, gradient);
  }
}
#endif

template <class Element>
float dot(const Element* a, const Element* b, int64_t count) {
  Floats sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += load_floats(a + i) * load_floats(b + i);
  float sum = sum_of(sums);
  for (; i < count; ++i) sum += to_float(a[i]) * to_float(b[i]);
  return sum;
}

}  // namespace ptv2::PTV2_LEVEL
