// The element-wise part of the backward: scores and dP in, dropped probabilities and dS out.
#pragma once

#include "columns.h"

namespace ptv2::PTV2_LEVEL {

struct GradientRow {
  float pivot;  // lse; +inf for a row without a visible column
  float delta;  // sum of out * grad_out
};

// A row of the two tiles; bias and keep may be null.
struct ScoreRow {
  float* scores;
  float* gradients;  // dP
  const int32_t* visible;
  const float* bias;
  const int16_t* keep;
  GradientRow state;
};

struct Gradients {
  Floats dropped_probability, score_gradient;
};

// Probability P recomputed from lse, dS = P * (dropout(dP) - delta).
PTV2_INLINE Gradients gradients_at(const ScoreRow& row, int64_t column) {
  Floats score = load<Floats>(row.scores + column);
  if (row.bias != nullptr) score += load<Floats>(row.bias + column);
  Floats probability = exp(score - row.state.pivot);
  probability = (Floats)((Ints)probability & load<Ints>(row.visible + column));
  Floats gradient = load<Floats>(row.gradients + column);
  Floats dropped = probability;
  if (row.keep != nullptr) {
    const Ints kept = load_keep(row.keep + column);
    gradient = (Floats)((Ints)gradient & kept);
    dropped = (Floats)((Ints)probability & kept);
  }
  return {dropped, probability * (gradient - row.state.delta)};
}

inline void differentiate_row(const ScoreRow& row, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Gradients result = gradients_at(row, i);
    store(row.scores + i, result.dropped_probability);
    store(row.gradients + i, result.score_gradient);
  }
}

// Two rows in bfloat16: sums over rows want a word of both rows, written over the first one, and
// sums over columns want the pairs of each row.
inline void differentiate_pair(const ScoreRow& first, const ScoreRow& second, bool has_second,
                               int64_t width, Bfloat16* first_pairs, Bfloat16* second_pairs) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Gradients even = gradients_at(first, i);
    Words probability = round_to_bfloat16(even.dropped_probability);
    Words gradient = round_to_bfloat16(even.score_gradient);
    store_floats(first_pairs + i, even.score_gradient);
    if (has_second) {
      const Gradients odd = gradients_at(second, i);
      probability |= round_to_bfloat16(odd.dropped_probability) << 16;
      gradient |= round_to_bfloat16(odd.score_gradient) << 16;
      store_floats(second_pairs + i, odd.score_gradient);
    }
    store(first.scores + i, probability);
    store(first.gradients + i, gradient);
  }
}

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
