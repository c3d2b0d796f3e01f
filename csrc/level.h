// The entry points of one level, for a source file that defines PTV2_LEVEL (its namespace),
// PTV2_VECTOR_BYTES, PTV2_TILE_VECTORS and PTV2_PAIRS (bfloat16 in pairs rather than as floats).
#pragma once

#include "backward.h"
#include "forward.h"

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

  static constexpr Kernels table() {
    using ForwardTask = Forward<Operand, Element>;
    using BackwardTask = Backward<Operand, Element>;
    return {
        prefix_bytes,        pack_prefix,       ForwardTask::bytes,          ForwardTask::run,
        BackwardTask::bytes, BackwardTask::run, BackwardTask::partial_bytes, BackwardTask::reduce};
  }
};

constexpr Level make_level(const char* name) {
  return {name, Entries<FloatTypes>::table(), Entries<Bfloat16Types>::table()};
}

}  // namespace ptv2::PTV2_LEVEL
