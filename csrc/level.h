// The entry points of one level, for a source file that defines PTV2_LEVEL (its namespace),
// PTV2_VECTOR_BYTES, PTV2_TILE_VECTORS and PTV2_PAIRS (bfloat16 in pairs rather than as floats).
#pragma once

#include "activations.h"
#include "backward.h"
#include "forward.h"
#include "norms.h"
#include "rotary.h"

namespace ptv2::PTV2_LEVEL {

template <class Operand_, class Element_>
struct Types {
  using Operand = Operand_;
  using Element = Element_;
};

using FloatTypes = Types<FloatOperand, float>;
#if PTV2_PAIRS
using Bfloat16Types = Types<PairOperand, Bfloat16>;
#else
using Bfloat16Types = Types<FloatOperand, Bfloat16>;
#endif

template <class T>
struct Entries {
  using Operand = typename T::Operand;
  using Element = typename T::Element;

  static int64_t prefix_bytes(const Problem& problem, bool backward) {
    return PTV2_LEVEL::prefix_bytes<Operand>(problem, backward);
  }

  static void pack_prefix(const Problem& problem, bool backward, int64_t bank_row, int64_t head) {
    const Geometry<Operand> geometry(problem.head_dim);
    const int64_t columns = problem.prefix_of_row(bank_row);
    shared_prefix(geometry, problem, backward, bank_row, head)
        .pack(geometry, rows_of<Element>(problem.prefix_key, bank_row, head, columns),
              rows_of<Element>(problem.prefix_value, bank_row, head, columns), backward);
  }

  static void pack_positions(const Problem& problem, bool backward, int64_t head) {
    PTV2_LEVEL::pack_positions<Operand, Element>(problem, backward, head);
  }

  static int64_t keep_bytes(int64_t columns) {
    return (columns + kColumnsPerStep) * static_cast<int64_t>(sizeof(int16_t));
  }

  static void drop_row(void* destination, const void* source, int64_t columns,
                       const Dropout& dropout, DropoutRow at, char* scratch) {
    auto* keep = reinterpret_cast<int16_t*>(scratch);
    auto* to = static_cast<Element*>(destination);
    const auto* from = static_cast<const Element*>(source);
    if (dropout.drops) {
      fill_keep(keep, 0, columns, dropout, at);
    } else {
      __builtin_memset(keep, -1, columns * sizeof(int16_t));
    }
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      const Floats kept = (Floats)((Ints)load_floats(from + i) & load_keep(keep + i));
      store_floats(to + i, kept * dropout.factor);
    }
    for (; i < columns; ++i) {
      const float kept = keep[i] ? to_float(from[i]) : 0.0f;
      store_row(to + i, &kept, 1, dropout.factor);
    }
  }

  static constexpr Kernels table() {
    using ForwardTask = Forward<Operand, Element>;
    using BackwardTask = Backward<Operand, Element>;
    return {prefix_bytes,
            pack_prefix,
            position_bytes<Operand>,
            pack_positions,
            ForwardTask::bytes,
            ForwardTask::run,
            BackwardTask::bytes,
            BackwardTask::run,
            partial_bytes<Operand>,
            column_parts,
            query_partial_bytes<Operand>,
            reduce_query<Operand, Element>,
            reduce_prefix<Operand, Element>,
            keep_bytes,
            drop_row};
  }
};

inline void exp_of_each(const float* source, float* destination, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(destination + i, exp(load<Floats>(source + i)));
  for (; i < count; ++i) destination[i] = exp(splat(source[i]))[0];
}

template <class Input, class Residual>
constexpr RowKernels row_table() {
  return {{activation_table<Gelu, Input>(), activation_table<GeluTanh, Input>(),
           activation_table<Silu, Input>(), activation_table<Relu, Input>(),
           activation_table<QuickGelu, Input>()},
          norm_scratch_bytes,
          add_norm_rows<Input, Residual>,
          add_norm_backward_rows<Input, Residual>,
          norm_rows<Residual>,
          add_rows<Input, Residual>,
          add_backward_rows<Input, Residual>,
          rotate_scratch_bytes,
          rotate_rows<Input>};
}

constexpr Level make_level(const char* name) {
  return {name,
          Entries<FloatTypes>::table(),
          Entries<Bfloat16Types>::table(),
          row_table<float, float>(),
          row_table<Bfloat16, Bfloat16>(),
          row_table<Bfloat16, float>(),
          exp_of_each};
}

}  // namespace ptv2::PTV2_LEVEL
