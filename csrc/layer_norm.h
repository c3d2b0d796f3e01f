// dropout + add + LayerNorm, its gradient, and the LayerNorm alone; rows are independent.
#pragma once

#include "philox.h"
#include "rows.h"

namespace ptv2::PTV2_LEVEL {

PTV2_INLINE DropoutRow dropout_row(const LayerNormRows& call, int64_t row) {
  const int32_t* at = call.coordinates + 2 * row;
  return {static_cast<uint32_t>(at[1]), static_cast<uint32_t>(at[0]), call.stream};
}

// The keep mask of a row, or null where nothing is dropped.
PTV2_INLINE const int16_t* keep_of_row(const LayerNormRows& call, int64_t row, char* scratch) {
  if (!call.dropout.drops) return nullptr;
  auto* keep = reinterpret_cast<int16_t*>(scratch);
  fill_keep(keep, 0, call.columns, call.dropout, dropout_row(call, row));
  return keep;
}

// A row in fp32, and behind it its keep mask.
inline int64_t layer_norm_scratch_bytes(int64_t columns) {
  return round_up(columns, 16) * static_cast<int64_t>(sizeof(float)) +
         (columns + kColumnsPerStep) * static_cast<int64_t>(sizeof(int16_t));
}

template <class Residual>
PTV2_INLINE void normalise_row(const LayerNormRows& call, int64_t row) {
  const auto* total = static_cast<const Residual*>(call.total) + row * call.columns;
  auto* out = static_cast<Residual*>(call.out) + row * call.columns;
  const float mean = call.statistics[2 * row], scale = call.statistics[2 * row + 1];
  for_columns(call.columns, [&](int64_t column, auto count) {
    const Floats normal = (load_part(total + column, count) - mean) * scale;
    const Floats weight = load_part(call.weight + column, count);
    store_part(out + column, normal * weight + load_part(call.beta + column, count), count);
  });
}

template <class Residual>
inline void layer_norm_rows(const LayerNormRows& call, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) normalise_row<Residual>(call, row);
}

template <class Input, class Residual>
inline void add_layer_norm_rows(const LayerNormRows& call, int64_t first, int64_t last,
                                char* scratch) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * call.columns;
    const auto* input = static_cast<const Input*>(call.input) + start;
    const auto* residual = static_cast<const Residual*>(call.residual) + start;
    auto* total = static_cast<Residual*>(call.total) + start;
    const int16_t* keep = keep_of_row(call, row, scratch);
    Floats sum{};
    for_columns(call.columns, [&](int64_t column, auto count) {
      Floats added = load_part(input + column, count);
      if (call.bias != nullptr) added += load_part(call.bias + column, count);
      if (keep != nullptr) added = (Floats)((Ints)added & load_keep(keep + column));
      added = load_part(residual + column, count) + added * call.dropout.factor;
      store_part(total + column, added, count);
      sum += load_part(total + column, count);
    });
    const float mean = sum_of(sum) / static_cast<float>(call.columns);
    Floats squares{};
    for_columns(call.columns, [&](int64_t column, auto count) {
      const Floats from_mean = inside(load_part(total + column, count) - mean, count);
      squares += from_mean * from_mean;
    });
    const float variance = sum_of(squares) / static_cast<float>(call.columns);
    call.statistics[2 * row] = mean;
    call.statistics[2 * row + 1] = 1.0f / __builtin_sqrtf(variance + call.epsilon);
    normalise_row<Residual>(call, row);
  }
}

template <class Input, class Residual>
inline void add_layer_norm_backward_rows(const LayerNormRows& call, int64_t first, int64_t last,
                                         char* scratch) {
  auto* scaled_row = reinterpret_cast<float*>(scratch);
  char* keep_scratch = scratch + round_up(call.columns, 16) * sizeof(float);
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * call.columns;
    const auto* total = static_cast<const Residual*>(call.total) + start;
    const auto* grad_out = static_cast<const Residual*>(call.grad_out) + start;
    const auto* grad_other = static_cast<const Input*>(call.grad_other);
    auto* grad_residual = static_cast<Residual*>(call.grad_residual) + start;
    auto* grad_input = static_cast<Input*>(call.grad_input);
    const float mean = call.statistics[2 * row], scale = call.statistics[2 * row + 1];
    Floats sum{}, product{};
    for_columns(call.columns, [&](int64_t column, auto count) {
      Floats grad = load_part(grad_out + column, count);
      if (grad_other != nullptr) grad += load_part(grad_other + start + column, count);
      const Floats scaled = grad * load_part(call.weight + column, count);
      const Floats normal = (load_part(total + column, count) - mean) * scale;
      sum += scaled;
      product += scaled * normal;
      store(scaled_row + column, scaled);
    });
    const auto columns = static_cast<float>(call.columns);
    const float mean_scaled = sum_of(sum) / columns, mean_product = sum_of(product) / columns;
    const int16_t* keep = grad_input == nullptr ? nullptr : keep_of_row(call, row, keep_scratch);
    for_columns(call.columns, [&](int64_t column, auto count) {
      const Floats normal = (load_part(total + column, count) - mean) * scale;
      const Floats centred = load<Floats>(scaled_row + column) - mean_scaled;
      Floats grad = scale * (centred - normal * mean_product);
      store_part(grad_residual + column, grad, count);
      if (grad_input == nullptr) return;
      if (keep != nullptr) grad = (Floats)((Ints)grad & load_keep(keep + column));
      store_part(grad_input + start + column, grad * call.dropout.factor, count);
    });
  }
}

}  // namespace ptv2::PTV2_LEVEL
