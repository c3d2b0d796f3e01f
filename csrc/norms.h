// dropout + add + norm, its gradient and its parts; rows are independent. The norm is LayerNorm, or
// RMSNorm, which takes no mean.
#pragma once

#include "philox.h"
#include "rows.h"

namespace ptv2::PTV2_LEVEL {

// The keep mask of a row, or null where nothing is dropped.
PTV2_INLINE const int16_t* keep_of_row(const NormRows& call, int64_t row, char* scratch) {
  if (!call.dropout.drops) return nullptr;
  auto* keep = reinterpret_cast<int16_t*>(scratch);
  const int32_t* at = call.coordinates + 2 * row;
  const DropoutRow place{static_cast<uint32_t>(at[1]), static_cast<uint32_t>(at[0]), call.stream};
  fill_keep(keep, 0, call.columns, call.dropout, place);
  return keep;
}

// What is kept of a vector, times the factor.
PTV2_INLINE Floats dropped(Floats values, const int16_t* keep, int64_t column, float factor) {
  if (keep != nullptr) values = (Floats)((Ints)values & load_keep(keep + column));
  return values * factor;
}

// A row in fp32, and behind it its keep mask.
inline int64_t norm_scratch_bytes(int64_t columns) {
  return round_up(columns, 16) * static_cast<int64_t>(sizeof(float)) +
         (columns + kColumnsPerStep) * static_cast<int64_t>(sizeof(int16_t));
}

// Writes a row of total; take(vector) gets it as it was rounded, with 0 behind the last column.
template <class Input, class Residual, class Take>
PTV2_INLINE void add_row(const NormRows& call, int64_t row, char* scratch, const Take& take) {
  const auto* input = row_of<Input>(call.input, row, call.columns);
  const auto* residual = row_of<Residual>(call.residual, row, call.columns);
  auto* total = row_of<Residual>(call.total, row, call.columns);
  const float *bias = call.bias, factor = call.dropout.factor;
  const int16_t* keep = keep_of_row(call, row, scratch);
  for_columns(call.columns, [&](int64_t column, auto count) {
    Floats added = load_part(input + column, count);
    if (bias != nullptr) added += load_part(bias + column, count);
    added = load_part(residual + column, count) + dropped(added, keep, column, factor);
    store_part(total + column, added, count);
    take(load_part(total + column, count));
  });
}

template <class Residual>
PTV2_INLINE void normalise_row(const NormRows& call, int64_t row) {
  const auto* total = row_of<Residual>(call.total, row, call.columns);
  auto* out = row_of<Residual>(call.out, row, call.columns);
  const float *weight = call.weight, *beta = call.beta;
  const float mean = call.statistics[2 * row], scale = call.statistics[2 * row + 1];
  for_columns(call.columns, [&](int64_t column, auto count) {
    const Floats normal = (load_part(total + column, count) - mean) * scale;
    Floats result = normal * load_part(weight + column, count);
    if (beta != nullptr) result += load_part(beta + column, count);
    store_part(out + column, result, count);
  });
}

template <class Residual>
inline void norm_rows(const NormRows& call, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) normalise_row<Residual>(call, row);
}

template <class Input, class Residual>
inline void add_rows(const NormRows& call, int64_t first, int64_t last, char* scratch) {
  for (int64_t row = first; row < last; ++row) {
    add_row<Input, Residual>(call, row, scratch, [](Floats) {});
  }
}

template <class Input, class Residual>
inline void add_norm_rows(const NormRows& call, int64_t first, int64_t last, char* scratch) {
  const auto columns = static_cast<float>(call.columns);
  for (int64_t row = first; row < last; ++row) {
    float mean = 0.0f;
    Floats squares{};
    if (call.subtract_mean) {
      Floats sum{};
      add_row<Input, Residual>(call, row, scratch, [&](Floats total) { sum += total; });
      mean = sum_of(sum) / columns;
      const auto* total = row_of<Residual>(call.total, row, call.columns);
      for_columns(call.columns, [&](int64_t column, auto count) {
        const Floats from_mean = inside(load_part(total + column, count) - mean, count);
        squares += from_mean * from_mean;
      });
    } else {
      add_row<Input, Residual>(call, row, scratch, [&](Floats total) { squares += total * total; });
    }
    call.statistics[2 * row] = mean;
    call.statistics[2 * row + 1] = 1.0f / __builtin_sqrtf(sum_of(squares) / columns + call.epsilon);
    normalise_row<Residual>(call, row);
  }
}

template <class Input, class Residual>
inline void add_norm_backward_rows(const NormRows& call, int64_t first, int64_t last,
                                   char* scratch) {
  auto* scaled_row = reinterpret_cast<float*>(scratch);
  char* keep_scratch = scratch + round_up(call.columns, 16) * sizeof(float);
  const auto columns = static_cast<float>(call.columns);
  const float *weight = call.weight, factor = call.dropout.factor;
  for (int64_t row = first; row < last; ++row) {
    const auto* total = row_of<Residual>(call.total, row, call.columns);
    const auto* grad_out = row_of<Residual>(call.grad_out, row, call.columns);
    const auto* grad_other = row_of<Input>(call.grad_other, row, call.columns);
    const auto* grad_total = row_of<Residual>(call.grad_total, row, call.columns);
    auto* grad_residual = row_of<Residual>(call.grad_residual, row, call.columns);
    auto* grad_input = row_of<Input>(call.grad_input, row, call.columns);
    const float mean = call.statistics[2 * row], scale = call.statistics[2 * row + 1];
    Floats sum{}, product{};
    for_columns(call.columns, [&](int64_t column, auto count) {
      Floats grad{};
      if (grad_out != nullptr) grad = load_part(grad_out + column, count);
      if (grad_other != nullptr) grad += load_part(grad_other + column, count);
      const Floats scaled = grad * load_part(weight + column, count);
      const Floats normal = (load_part(total + column, count) - mean) * scale;
      sum += scaled;
      product += scaled * normal;
      store(scaled_row + column, scaled);
    });
    const float mean_scaled = call.subtract_mean ? sum_of(sum) / columns : 0.0f;
    const float mean_product = sum_of(product) / columns;
    const int16_t* keep = grad_input == nullptr ? nullptr : keep_of_row(call, row, keep_scratch);
    for_columns(call.columns, [&](int64_t column, auto count) {
      const Floats normal = (load_part(total + column, count) - mean) * scale;
      const Floats centred = load<Floats>(scaled_row + column) - mean_scaled;
      Floats grad = scale * (centred - normal * mean_product);
      if (grad_total != nullptr) grad += load_part(grad_total + column, count);
      store_part(grad_residual + column, grad, count);
      if (grad_input == nullptr) return;
      store_part(grad_input + column, dropped(grad, keep, column, factor), count);
    });
  }
}

template <class Input, class Residual>
inline void add_backward_rows(const NormRows& call, int64_t first, int64_t last, char* scratch) {
  const float factor = call.dropout.factor;
  for (int64_t row = first; row < last; ++row) {
    const auto* grad_total = row_of<Residual>(call.grad_total, row, call.columns);
    auto* grad_input = row_of<Input>(call.grad_input, row, call.columns);
    const int16_t* keep = keep_of_row(call, row, scratch);
    for_columns(call.columns, [&](int64_t column, auto count) {
      const Floats grad = load_part(grad_total + column, count);
      store_part(grad_input + column, dropped(grad, keep, column, factor), count);
    });
  }
}

}  // namespace ptv2::PTV2_LEVEL
