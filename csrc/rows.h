// Vectors along a row of any length: whole ones, and a last one that may be a part.
#pragma once

#include "philox.h"
#include "problem.h"
#include "vector.h"

namespace ptv2::PTV2_LEVEL {

// Row number `row` of a tensor [R, columns] without gaps; null where there is no tensor.
template <class Element>
PTV2_INLINE const Element* row_of(const void* data, int64_t row, int64_t columns) {
  return data == nullptr ? nullptr : static_cast<const Element*>(data) + row * columns;
}

template <class Element>
PTV2_INLINE Element* row_of(void* data, int64_t row, int64_t columns) {
  return data == nullptr ? nullptr : static_cast<Element*>(data) + row * columns;
}

struct Whole {};  // kLanes elements
struct Part {     // fewer: lanes behind them are 0 and are not stored
  int64_t count;
};

// Calls step(column, Whole or Part) from the first column on.
template <class Step>
PTV2_INLINE void for_columns(int64_t columns, const Step& step) {
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) step(column, Whole{});
  if (column < columns) step(column, Part{columns - column});
}

template <class Element>
PTV2_INLINE Floats load_part(const Element* address, Whole) {
  return load_floats(address);
}

template <class Element>
PTV2_INLINE Floats load_part(const Element* address, Part part) {
  Element elements[kLanes] = {};
  __builtin_memcpy(elements, address, part.count * sizeof(Element));
  return load_floats(elements);
}

template <class Element>
PTV2_INLINE void store_part(Element* address, Floats values, Whole) {
  store_floats(address, values);
}

template <class Element>
PTV2_INLINE void store_part(Element* address, Floats values, Part part) {
  Element elements[kLanes];
  store_floats(elements, values);
  __builtin_memcpy(address, elements, part.count * sizeof(Element));
}

// a < b ? a : b and a > b ? a : b in every lane, which GCC does not find for all widths.
PTV2_INLINE Floats lesser(Floats a, Floats b) {
#if defined(PTV2_AVX512)
  return (Floats)_mm512_maskz_min_ps(PTV2_ALL_LANES, (__m512)a, (__m512)b);
#elif defined(PTV2_X86) && PTV2_VECTOR_BYTES == 32
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

PTV2_INLINE Floats greater(Floats a, Floats b) {
#if defined(PTV2_AVX512)
  return (Floats)_mm512_maskz_max_ps(PTV2_ALL_LANES, (__m512)a, (__m512)b);
#elif defined(PTV2_X86) && PTV2_VECTOR_BYTES == 32
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Lanes that hold elements; the others become 0.
PTV2_INLINE Floats inside(Floats values, Whole) { return values; }

PTV2_INLINE Floats inside(Floats values, Part part) {
  for (int64_t lane = part.count; lane < kLanes; ++lane) values[lane] = 0.0f;
  return values;
}

}  // namespace ptv2::PTV2_LEVEL
