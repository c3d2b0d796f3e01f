// C [m, n] (+)= alpha * A B for every product of the kernels, out of one register-blocked
// micro-kernel.
#pragma once

#include "vector.h"

namespace ptv2::PTV2_LEVEL {

constexpr int kTileRows = 6;
constexpr int kTileVectors = PTV2_TILE_VECTORS;
constexpr int kPanel = kTileVectors * kLanes;  // columns of a tile

// Operands are 32-bit words: a float, or two bfloat16 that are neighbours in the summed dimension.
struct FloatOperand {
  static constexpr int depth = 1;
  static PTV2_INLINE Floats multiply_add(Words a, Words b, Floats sum) {
    return (Floats)a * (Floats)b + sum;
  }
};

struct PairOperand {
  static constexpr int depth = 2;
  static PTV2_INLINE Floats multiply_add(Words a, Words b, Floats sum) {
#if defined(PTV2_NATIVE_PAIRS)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum = (Floats)(a & 0xFFFF0000) * (Floats)(b & 0xFFFF0000) + sum;
    return (Floats)(a << 16) * (Floats)(b << 16) + sum;
#endif
  }
};

// A: word (row, step) at row * row_stride + step * step_stride.
struct LeftOperand {
  const void* data;
  int64_t row_stride, step_stride;
};

// B: word (step, column) at column / kPanel * panel_stride + step * step_stride + column % kPanel.
struct RightOperand {
  const void* data;
  int64_t panel_stride, step_stride;
};

struct Output {
  float* data;
  int64_t row_stride;
  float alpha;
  bool accumulate;
};

template <class Operand, int rows, int vectors>
void multiply_tile(int64_t steps, const uint32_t* a, int64_t a_row, int64_t a_step,
                   const uint32_t* b, int64_t b_step, float* c, int64_t c_row, float alpha,
                   bool accumulate) {
  Floats sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sums[i][j] = Floats{};
  }
  for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
    Words right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) right[j] = load<Words>(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Words left = splat_word(a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        sums[i][j] = Operand::multiply_add(left, right[j], sums[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* destination = c + i * c_row + j * kLanes;
      Floats result = sums[i][j] * alpha;
      if (accumulate) result += load<Floats>(destination);
      store(destination, result);
    }
  }
}

using TileFunction = void (*)(int64_t, const uint32_t*, int64_t, int64_t, const uint32_t*, int64_t,
                              float*, int64_t, float, bool);

template <class Operand, int rows>
PTV2_INLINE TileFunction tile_function(int vectors) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return multiply_tile<Operand, rows, 4>;
    if (vectors == 3) return multiply_tile<Operand, rows, 3>;
  }
  return vectors == 2 ? multiply_tile<Operand, rows, 2> : multiply_tile<Operand, rows, 1>;
}

template <class Operand>
TileFunction tile_function(int64_t rows, int vectors) {
  static_assert(kTileRows == 6);
  switch (rows) {
    case 6:
      return tile_function<Operand, 6>(vectors);
    case 5:
      return tile_function<Operand, 5>(vectors);
    case 4:
      return tile_function<Operand, 4>(vectors);
    case 3:
      return tile_function<Operand, 3>(vectors);
    case 2:
      return tile_function<Operand, 2>(vectors);
    default:
      return tile_function<Operand, 1>(vectors);
  }
}

// Scores are summed in pieces: one long chain of roundings would show in the largest of them.
constexpr int64_t kScoreSteps = 32;
constexpr int64_t kAllSteps = INT64_MAX;

PTV2_INLINE void multiply_in_pieces(TileFunction tile, int64_t steps, int64_t piece,
                                    const uint32_t* a, int64_t a_row, int64_t a_step,
                                    const uint32_t* b, int64_t b_step, float* c, int64_t c_row,
                                    float alpha, bool accumulate) {
  int64_t step = 0;
  do {
    const int64_t count = smaller(piece, steps - step);
    tile(count, a + step * a_step, a_row, a_step, b + step * b_step, b_step, c, c_row, alpha,
         accumulate || step > 0);
    step += count;
  } while (step < steps);
}

// C's rows hold whole vectors: columns from n to the next multiple of kLanes are written too.
// Each element is one sum in the order of the steps, in pieces of `piece` steps, whatever m and n
// are.
template <class Operand>
void multiply(int64_t m, int64_t n, int64_t steps, LeftOperand a, RightOperand b, Output c,
              int64_t piece = kAllSteps) {
  if (m == 0) return;
  const auto* left = static_cast<const uint32_t*>(a.data);
  const auto* right = static_cast<const uint32_t*>(b.data);
  // Rows are split evenly: 128 = 18 * 6 + 4 * 5 rather than 21 * 6 + 2.
  const int64_t row_tiles = (m + kTileRows - 1) / kTileRows;
  const int64_t small = m / row_tiles, large_tiles = m % row_tiles;
  for (int64_t column = 0; column < n; column += kPanel) {
    const int vectors = static_cast<int>((smaller(n - column, kPanel) + kLanes - 1) / kLanes);
    const TileFunction small_tile = tile_function<Operand>(small, vectors);
    const TileFunction large_tile = tile_function<Operand>(small + 1, vectors);
    const uint32_t* panel = right + column / kPanel * b.panel_stride;
    int64_t row = 0;
    for (int64_t tile = 0; tile < row_tiles; ++tile) {
      const bool large = tile < large_tiles;
      multiply_in_pieces(large ? large_tile : small_tile, steps, piece, left + row * a.row_stride,
                         a.row_stride, a.step_stride, panel, b.step_stride,
                         c.data + row * c.row_stride + column, c.row_stride, c.alpha, c.accumulate);
      row += small + large;
    }
  }
}

// The same for up to kTileRows rows and columns of B from `begin`, a multiple of kLanes, to end - 1:
// they are columns 0 and on of C.
template <class Operand>
void multiply_columns(int64_t m, int64_t begin, int64_t end, int64_t steps, LeftOperand a,
                      RightOperand b, Output c, int64_t piece) {
  const auto* left = static_cast<const uint32_t*>(a.data);
  const auto* right = static_cast<const uint32_t*>(b.data);
  for (int64_t column = begin; column < end;) {
    const int64_t first = column % kPanel;
    const int64_t vectors = (smaller(end - column, kPanel - first) + kLanes - 1) / kLanes;
    multiply_in_pieces(tile_function<Operand>(m, static_cast<int>(vectors)), steps, piece, left,
                       a.row_stride, a.step_stride,
                       right + column / kPanel * b.panel_stride + first, b.step_stride,
                       c.data + column - begin, c.row_stride, c.alpha, c.accumulate);
    column += vectors * kLanes;
  }
}

}  // namespace ptv2::PTV2_LEVEL
