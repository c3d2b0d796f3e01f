// Rows of K, V, Q and grad_out brought into the layouts that multiply() reads.
#pragma once

#include "gemm.h"
#include "philox.h"

namespace ptv2::PTV2_LEVEL {

// Rows [first, first + count) of one head.
template <class Element>
struct Rows {
  const Element* data;
  int64_t stride, count;

  PTV2_INLINE const Element* row(int64_t index) const { return data + index * stride; }
  Rows from(int64_t first, int64_t rows) const { return {row(first), stride, rows}; }

  // Rows of a head lie a token apart, further than the processor looks ahead by itself.
  PTV2_INLINE void prefetch(int64_t index, int64_t elements) const {
    if (index >= count) return;
    const auto* bytes = reinterpret_cast<const char*>(row(index));
    const int64_t size = elements * static_cast<int64_t>(sizeof(Element));
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i);
  }
};

constexpr int64_t kRowsAhead = 8;
constexpr int64_t kMaxHeadDim = 256;

// Zeros behind the values: products run over whole vectors.
PTV2_INLINE void clear(uint32_t* words, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) words[i] = 0;
}

PTV2_INLINE void store_converted(float* destination, const float* source, int64_t count) {
  __builtin_memcpy(destination, source, count * 4);
}

inline void store_converted(float* destination, const Bfloat16* source, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(destination + i, load_floats(source + i));
  }
  for (; i < count; ++i) destination[i] = to_float(source[i]);
}

// Words of one row in memory: floats, or pairs of bfloat16 as they are.
template <class Operand, class Element>
void copy_row(uint32_t* destination, const Element* source, int64_t head_dim) {
  if constexpr (Operand::depth == 2) {
    __builtin_memcpy(destination, source, head_dim * 2);
  } else {
    store_converted(reinterpret_cast<float*>(destination), source, head_dim);
  }
}

// A operand whose sum runs over head_dim: [rows][row_words].
template <class Operand, class Element>
void pack_left(uint32_t* destination, int64_t row_words, Rows<Element> rows, int64_t head_dim) {
  for (int64_t row = 0; row < rows.count; ++row) {
    rows.prefetch(row + kRowsAhead, head_dim);
    copy_row<Operand>(destination + row * row_words, rows.row(row), head_dim);
  }
}

// B operand whose sum runs over the rows: [rows / depth][row_words].
template <class Operand, class Element>
void pack_right(uint32_t* destination, int64_t row_words, Rows<Element> rows, int64_t head_dim) {
  const int64_t width = round_up(head_dim, kLanes);
  for (int64_t row = 0; row < rows.count; row += Operand::depth) {
    uint32_t* words = destination + row / Operand::depth * row_words;
    clear(words, head_dim, width);
    for (int64_t i = 0; i < Operand::depth; ++i) rows.prefetch(row + kRowsAhead + i, head_dim);
    if constexpr (Operand::depth == 1) {
      copy_row<Operand>(words, rows.row(row), head_dim);
    } else {
      const auto* even = reinterpret_cast<const uint16_t*>(rows.row(row));
      const bool pair = row + 1 < rows.count;
      const auto* odd = reinterpret_cast<const uint16_t*>(rows.row(pair ? row + 1 : row));
      const uint32_t odd_bits = pair ? 0xFFFFFFFF : 0;
      for (int64_t i = 0; i < head_dim; ++i) words[i] = even[i] | (odd[i] << 16 & odd_bits);
    }
  }
}

typedef uint16_t FourShorts __attribute__((vector_size(8)));

template <class Operand>
PTV2_INLINE FourWords load_four(const float* address) {
  return load<FourWords>(address);
}

template <class Operand>
PTV2_INLINE FourWords load_four(const Bfloat16* address) {
  if constexpr (Operand::depth == 2) return load<FourWords, 2>(address);
  return __builtin_convertvector((load<FourShorts, 2>(address)), FourWords) << 16;
}

// Four words of one row for every quarter of a vector: rows first, first + 4, ...; zeros behind the
// last row.
template <class Operand, class Element>
PTV2_INLINE Words load_quarters(Rows<Element> rows, int64_t first, int64_t element) {
  FourWords quarters[kLanes / 4];
#pragma GCC unroll 4
  for (int quarter = 0; quarter < kLanes / 4; ++quarter) {
    const int64_t row = first + quarter * 4;
    quarters[quarter] = FourWords{};
    if (row < rows.count) quarters[quarter] = load_four<Operand>(rows.row(row) + element);
  }
  return join<Words>(quarters);
}

// B operand whose sum runs over head_dim: panels [rows / kPanel][head_dim / depth][kPanel], zeros
// behind the last row up to a whole vector.
template <class Operand, class Element>
void pack_transposed(uint32_t* destination, Rows<Element> rows, int64_t head_dim) {
  const int64_t steps = head_dim / Operand::depth;
  const int64_t padded = round_up(rows.count, kLanes);
  for (int64_t row = 0; row < padded; row += kLanes) {
    uint32_t* panel = destination + row / kPanel * kPanel * steps + row % kPanel;
    for (int64_t i = 0; i < kLanes; ++i) rows.prefetch(row + kLanes + i, head_dim);
    for (int64_t step = 0; step < steps; step += 4) {
      Words block[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        block[i] = load_quarters<Operand>(rows, row + i, step * Operand::depth);
      }
      transpose_blocks(block);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(panel + (step + i) * kPanel, block[i]);
    }
  }
}

// destination = source with the dropped elements zeroed; the factor 1 / (1 - p) is left to alpha.
template <class Element>
Rows<Element> drop_elements(Element* destination, Rows<Element> source, int64_t head_dim,
                            int16_t* keep, const Dropout& dropout, DropoutRow at) {
  for (int64_t row = 0; row < source.count; ++row) {
    at.row = static_cast<uint32_t>(row);
    fill_keep(keep, 0, head_dim, dropout, at);
    for (int64_t i = 0; i < head_dim; ++i) {
      destination[row * head_dim + i] = keep[i] ? source.row(row)[i] : Element{};
    }
  }
  return {destination, head_dim, source.count};
}

}  // namespace ptv2::PTV2_LEVEL
