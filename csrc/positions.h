// Disentangled attention: what the distance of two tokens adds to their score, and what flows back
// through it. Each table is laid out by distance, so that from one row of a tile to the next what is
// read of it slides by one row. Neighbouring distances that share a slot are a run: products for
// scores are computed once for a run and spread over its distances.
#pragma once

#include "columns.h"

namespace ptv2::PTV2_LEVEL {

constexpr int64_t kKeysAtOnce = 48;  // keys whose position scores are computed before they are added
constexpr int64_t kSpreadColumns = 128;  // distances whose products are computed before spreading
constexpr int64_t kProductStride = kSpreadColumns + 48;
static_assert(kSpreadColumns + kTileRows + 2 * kLanes <= kProductStride);

// One table by distance, row 0 for -(T - 1); zeros behind the last row.
template <class Operand>
struct DistanceTable {
  int32_t* runs;                   // [distances + kLanes]: the run of each distance
  uint32_t* transposed;            // one column a run, as PackedColumns::keys_transposed
  uint32_t* rows[Operand::depth];  // backward: as PackedColumns::keys, from row 0 and from row 1 on
};

template <class Operand>
struct PositionTables {
  DistanceTable<Operand> key;    // by column - row
  DistanceTable<Operand> query;  // by row - column

  static int64_t distances(const Problem& problem) { return larger(0, 2 * problem.tokens - 1); }

  static PositionTables take(Arena& arena, const Geometry<Operand>& geometry,
                             const Problem& problem, bool backward) {
    const auto take_table = [&](const Table& table) {
      const int64_t count = table.data == nullptr ? 0 : distances(problem);
      const int64_t rows = backward && count > 0 ? geometry.row_steps(count) + 1 : 0;
      DistanceTable<Operand> taken;
      taken.runs = arena.take<int32_t>(count > 0 ? count + kLanes : 0);
      taken.transposed = arena.take<uint32_t>(round_up(count, kPanel) * geometry.steps);
      for (uint32_t*& each : taken.rows) each = arena.take<uint32_t>(rows * geometry.right_words);
      return taken;
    };
    PositionTables tables;
    tables.key = take_table(problem.position_key);
    tables.query = take_table(problem.position_query);
    return tables;
  }
};

template <class Operand>
int64_t position_bytes(const Problem& problem, bool backward) {
  if (problem.position_slots == nullptr) return 0;
  Arena arena(nullptr);
  PositionTables<Operand>::take(arena, Geometry<Operand>(problem.head_dim), problem, backward);
  return arena.used();
}

// The tables of a head, packed once per call.
template <class Operand>
PositionTables<Operand> shared_tables(const Geometry<Operand>& geometry, const Problem& problem,
                                      bool backward, int64_t head) {
  Arena arena(problem.packed_positions + head * position_bytes<Operand>(problem, backward));
  return PositionTables<Operand>::take(arena, geometry, problem, backward);
}

// `sign`: 1 for a table by row - column, -1 for one by column - row.
template <class Operand, class Element>
void pack_table(const DistanceTable<Operand>& packed, const Geometry<Operand>& geometry,
                const Problem& problem, const Table& table, int64_t head, int64_t sign,
                bool backward) {
  const int64_t count = PositionTables<Operand>::distances(problem), head_dim = geometry.head_dim;
  if (table.data == nullptr || count == 0) return;
  constexpr int64_t kRows = kPanel + Operand::depth - 1;
  Element rows[kRows * kMaxHeadDim];
  const auto* of_head = static_cast<const Element*>(table.data) + head * table.head_stride;
  const auto slot_of = [&](int64_t row) {
    const int64_t distance = sign * (row - (problem.tokens - 1));
    return problem.position_slots[distance + problem.position_reach];
  };
  const auto copy_row = [&](int64_t to, int64_t row) {
    __builtin_memcpy(rows + to * head_dim, of_head + slot_of(row) * table.row_stride,
                     head_dim * sizeof(Element));
  };
  int64_t runs = 0;
  const auto pack_runs = [&](int64_t panel_runs) {
    const Rows<Element> panel{rows, head_dim, panel_runs};
    pack_transposed<Operand>(packed.transposed + (runs - panel_runs) * geometry.steps, panel,
                             head_dim);
  };
  for (int64_t row = 0; row < count; ++row) {
    if (row == 0 || slot_of(row) != slot_of(row - 1)) {
      if (runs > 0 && runs % kPanel == 0) pack_runs(kPanel);
      copy_row(runs % kPanel, row);
      ++runs;
    }
    packed.runs[row] = static_cast<int32_t>(runs - 1);
  }
  pack_runs((runs - 1) % kPanel + 1);
  for (int64_t i = 0; i < kLanes; ++i) packed.runs[count + i] = packed.runs[count - 1];
  for (int64_t first = 0; backward && first < count; first += kPanel) {
    const int64_t filled = smaller(kRows, count - first);
    for (int64_t i = 0; i < filled; ++i) copy_row(i, first + i);
    for (int64_t shift = 0; shift < Operand::depth; ++shift) {
      const Rows<Element> shifted{rows + shift * head_dim, head_dim,
                                  larger(0, smaller(kPanel, filled - shift))};
      pack_right<Operand>(packed.rows[shift] + first / Operand::depth * geometry.right_words,
                          geometry.right_words, shifted, head_dim);
    }
  }
  for (int64_t shift = 0; backward && shift < Operand::depth; ++shift) {
    clear(packed.rows[shift], geometry.row_steps(count - shift) * geometry.right_words,
          (geometry.row_steps(count) + 1) * geometry.right_words);
  }
}

template <class Operand, class Element>
void pack_positions(const Problem& problem, bool backward, int64_t head) {
  const Geometry<Operand> geometry(problem.head_dim);
  const PositionTables<Operand> tables = shared_tables(geometry, problem, backward, head);
  pack_table<Operand, Element>(tables.key, geometry, problem, problem.position_key, head, -1,
                               backward);
  pack_table<Operand, Element>(tables.query, geometry, problem, problem.position_query, head, 1,
                               backward);
}

// tile[row][column] += source[column][row]; up to 3 rows behind the last one are added to as well.
inline void add_transposed(float* tile, int64_t tile_stride, const float* source,
                           int64_t source_stride, int64_t rows, int64_t columns) {
  const Rows<float> by_column{source, source_stride, columns};
  for (int64_t column = 0; column < columns; column += kLanes) {
    for (int64_t row = 0; row < rows; row += 4) {
      Words block[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        block[i] = load_quarters<FloatOperand>(by_column, column + i, row);
      }
      transpose_blocks(block);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        float* sums = tile + (row + i) * tile_stride + column;
        store(sums, load<Floats>(sums) + (Floats)block[i]);
      }
    }
  }
}

// row[i] = products[runs[i] - begin]; whole vectors are written.
inline void spread(float* row, const float* products, int64_t begin, const int32_t* runs,
                   int64_t columns) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Ints index = load<Ints>(runs + i) - runs[i];
    store(row + i, permute(load<Floats>(products + (runs[i] - begin)), index));
  }
}

// The position terms of one head's tiles.
template <class Operand, class Element>
class Positions {
 public:
  Positions(const Geometry<Operand>& geometry, const Problem& problem)
      : geometry_(geometry), problem_(problem) {}

  // Memory for tiles of at most `rows` rows and `columns` columns.
  void take(Arena& arena, int64_t rows, int64_t columns) {
    const bool any = problem_.position_slots != nullptr;
    products_ = arena.take<float>(any ? kTileRows * kProductStride : 0);
    stride_ = odd_lines(rows + kLanes);
    by_column_ = arena.take<float>(of_keys() ? kKeysAtOnce * stride_ : 0);
    keys_ = arena.take<uint32_t>(of_keys() ? columns * geometry_.left_words : 0);
  }

  void use_head(int64_t head, bool backward) {
    if (problem_.position_slots == nullptr) return;
    tables_ = shared_tables(geometry_, problem_, backward, head);
  }

  bool of_queries() const { return problem_.position_key.data != nullptr; }
  bool of_keys() const { return problem_.position_query.data != nullptr; }

  // K of a block, before the scores of its tiles.
  void pack_keys(Rows<Element> keys) {
    if (of_keys()) pack_left<Operand>(keys_, geometry_.left_words, keys, geometry_.head_dim);
  }

  // Writes query . position_key of a tile's tokens.
  void write_of_queries(const Block& block, int64_t first, int64_t rows, LeftOperand query,
                        float* scores, int64_t stride) const {
    if (!of_queries()) return;
    write_products(rows, block.token_count, query, tables_.key,
                   block.token_first - first + problem_.tokens - 1, scores, stride);
  }

  // Adds key . position_query.
  void add_of_keys(const Block& block, int64_t first, int64_t rows, float* scores,
                   int64_t stride) const {
    if (!of_keys()) return;
    for (int64_t column = 0; column < block.token_count; column += kKeysAtOnce) {
      const int64_t count = smaller(kKeysAtOnce, block.token_count - column);
      write_products(count, rows, geometry_.left(keys_ + column * geometry_.left_words),
                     tables_.query, first - block.token_first - column + problem_.tokens - 1,
                     by_column_, stride_);
      add_transposed(scores + column, stride, by_column_, stride_, rows, count);
    }
  }

  // sums[row] += dS[row] position_key by distance; `gradients`: dS, zeros beside the block's tokens.
  void fold_rows(const Block& block, int64_t first, int64_t rows, LeftOperand gradients,
                 float* sums) const {
    fold(rows, block.token_count, gradients, tables_.key,
         block.token_first - first + problem_.tokens - 1, {sums, geometry_.right_words, 1.0f, true});
  }

  // sums[column] += scale * dS^T[column] position_query by distance; zeros above and below dS.
  void fold_columns(const Block& block, int64_t first, int64_t rows, LeftOperand gradients,
                    float* sums) const {
    fold(block.token_count, rows, gradients, tables_.query,
         first - block.token_first + problem_.tokens - 1,
         {sums, geometry_.right_words, problem_.scale, true});
  }

 private:
  // scores(r, i) = scale * A(r) . row first - r + i of the table; whole vectors are written.
  void write_products(int64_t m, int64_t n, LeftOperand a, const DistanceTable<Operand>& table,
                      int64_t first, float* scores, int64_t stride) const {
    const auto* words = static_cast<const uint32_t*>(a.data);
    const int64_t tiles = (m + kTileRows - 1) / kTileRows;
    for (int64_t column = 0; column < n; column += kSpreadColumns) {
      const int64_t columns = smaller(kSpreadColumns, n - column);
      int64_t row = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t rows = m / tiles + (tile < m % tiles);
        const int32_t* runs = table.runs + first + column - row;
        const int64_t begin = runs[1 - rows] / kLanes * kLanes;
        multiply_columns<Operand>(rows, begin, runs[columns - 1] + 1, geometry_.steps,
                                  {words + row * a.row_stride, a.row_stride, a.step_stride},
                                  geometry_.transposed(table.transposed),
                                  {products_, kProductStride, problem_.scale, false}, kScoreSteps);
        for (int64_t i = 0; i < rows; ++i) {
          spread(scores + (row + i) * stride + column, products_ + i * kProductStride, begin,
                 runs - i, columns);
        }
        row += rows;
      }
    }
  }

  // Row r of C is the sum over i of A(r, i) times row first - r + i of the table.
  void fold(int64_t m, int64_t n, LeftOperand a, const DistanceTable<Operand>& table, int64_t first,
            Output c) const {
    constexpr int64_t depth = Operand::depth;
    const auto* words = static_cast<const uint32_t*>(a.data);
    // Rows that lie `depth` apart read the same pairs of rows of the table.
    for (int64_t part = 0; part < smaller(depth, m); ++part) {
      const int64_t count = (m - part + depth - 1) / depth;
      const int64_t tiles = (count + kTileRows - 1) / kTileRows;
      int64_t row = part;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t rows = count / tiles + (tile < count % tiles);
        const int64_t begin = first - row - (rows - 1) * depth;
        const LeftOperand left{words + row * a.row_stride - (rows - 1) * a.step_stride,
                               depth * a.row_stride + a.step_stride, a.step_stride};
        const uint32_t* right =
            table.rows[begin % depth] + begin / depth * geometry_.right_words;
        multiply<Operand>(rows, geometry_.head_dim, geometry_.row_steps(n) + rows - 1, left,
                          geometry_.right(right),
                          {c.data + row * c.row_stride, depth * c.row_stride, c.alpha, true});
        row += rows * depth;
      }
    }
  }

  const Geometry<Operand>& geometry_;
  const Problem& problem_;
  PositionTables<Operand> tables_;
  float* products_;  // [kTileRows, kProductStride]
  int64_t stride_;
  float* by_column_;  // [kKeysAtOnce, stride]
  uint32_t* keys_;    // [columns, left_words]
};

}  // namespace ptv2::PTV2_LEVEL
