// One tile of the backward pass: the rows of a query head by the columns of a block. Scores and dP
// become dropped probabilities and dS, and these are multiplied into the sums of the gradients.
#pragma once

#include <type_traits>

#include "backward_scratch.h"

namespace ptv2::PTV2_LEVEL {

// One query head of a sequence.
struct QueryHead {
  int64_t index;
  const GradientRow* rows;  // [queries]
  float* grad_query;        // [queries, width], with needs_query
  RowGate gate;             // on the columns of the block
};

// Sums of keys and values of a prefix, [columns, width] each.
struct PrefixSums {
  float *key, *value;

  PrefixSums from(int64_t floats) const { return {key + floats, value + floats}; }
};

struct Tile {
  const Sequence& sequence;
  const QueryHead& head;
  Block block;
  int64_t first, rows;
  bool query_accumulates;  // else the head's grad_query holds nothing yet, and is written
  bool tokens_accumulate;  // likewise the scratch's grad_key and grad_value
  PrefixSums prefix_sums;  // of the block's columns, with needs_prefix
};

template <class Operand, class Element>
class TileGradients {
 public:
  TileGradients(const BackwardProblem& problem, const BackwardSizes<Operand>& sizes,
                const BackwardScratch<Operand, Element>& scratch,
                const Positions<Operand, Element>& positions)
      : problem_(problem), sizes_(sizes), scratch_(scratch), positions_(positions) {}

  // Adds what the tile gives to every gradient that is needed. Its keys, values and, by distance,
  // tables are packed.
  void add(const Tile& tile) const {
    const Geometry<Operand>& geometry = sizes_.geometry;
    const Block& block = tile.block;
    const int64_t first = tile.first, rows = tile.rows, head = tile.head.index;
    const auto query = rows_of<Element>(problem_.query, tile.sequence, head, first, rows);
    const auto grad_out = rows_of<Element>(problem_.grad_out, tile.sequence, head, first, rows);
    scratch_.query.pack(geometry, query);
    scratch_.grad_out.pack(geometry, grad_out);
    const PackedColumns<Operand> prefix = scratch_.prefix.packed.from(geometry, block.prefix_first);
    const float prefix_factor = problem_.prefix_dropout.factor;
    const int64_t offset = block.token_offset();
    float* token_scores = scratch_.probabilities + offset;
    if (block.token_count > 0) {
      positions_.write_of_queries(block, first, rows, scratch_.query.as_left(geometry),
                                  token_scores, sizes_.tile_stride);
    }
    if (block.prefix_count > 0) {
      compute_scores(prefix, 0, block.prefix_count, rows, prefix_factor, false);
    }
    if (block.token_count > 0) {
      const bool accumulate = positions_.of_queries();
      compute_scores(scratch_.tokens, offset, block.token_count, rows, 1.0f, accumulate);
      positions_.add_of_keys(block, first, rows, token_scores, sizes_.tile_stride);
    }
    if (sizes_.gated && block.prefix_count > 0) {
      differentiate<true>(tile);
    } else {
      differentiate<false>(tile);
    }
    Output query_sums{nullptr, sizes_.width, prefix_factor, tile.query_accumulates};
    if (problem_.needs_query) query_sums.data = tile.head.grad_query + first * sizes_.width;
    if (block.prefix_count > 0) {
      if (problem_.needs_prefix) {
        const PrefixSums& sums = tile.prefix_sums;
        add_columns(0, block.prefix_count, rows, sums.key, sums.value, true);
      }
      if (problem_.needs_query) add_query(prefix, 0, block.prefix_count, rows, query_sums);
      query_sums.accumulate = true;
    }
    if (block.token_count > 0) {
      query_sums.alpha = 1.0f;
      if (problem_.needs_key_value) {
        add_columns(offset, block.token_count, rows, scratch_.grad_key, scratch_.grad_value,
                    tile.tokens_accumulate);
        if (positions_.of_keys()) fold_columns(tile);
      }
      if (sizes_.folds_rows) {
        add_query_by_distance(tile, query_sums);
      } else if (problem_.needs_query) {
        add_query(scratch_.tokens, offset, block.token_count, rows, query_sums);
      }
    }
  }

 private:
  using Sizes = BackwardSizes<Operand>;

  // Scores, and the gradient of the (kept) probabilities.
  void compute_scores(const PackedColumns<Operand>& columns, int64_t offset, int64_t count,
                      int64_t rows, float factor, bool accumulate) const {
    const Geometry<Operand>& geometry = sizes_.geometry;
    multiply<Operand>(rows, count, geometry.steps, scratch_.query.as_left(geometry),
                      geometry.transposed(columns.keys_transposed),
                      {scratch_.probabilities + offset, sizes_.tile_stride,
                       problem_.scale * factor, accumulate},
                      kScoreSteps);
    multiply<Operand>(rows, count, geometry.steps, scratch_.grad_out.as_left(geometry),
                      geometry.transposed(columns.values_transposed),
                      {scratch_.score_gradients + offset, sizes_.tile_stride,
                       problem_.attention_dropout.factor * factor, false});
  }

  // Turns scores and probability gradients into dropped probabilities and score gradients.
  template <bool kGated>
  void differentiate(const Tile& tile) const {
    const bool drops = problem_.attention_dropout.drops;
    const auto sequence_head =
        static_cast<uint32_t>(tile.sequence.index * problem_.heads + tile.head.index);
    for (int64_t row = 0; row < tile.rows; row += Operand::depth) {
      for (int64_t i = 0; drops && i < Operand::depth; ++i) {
        fill_block_keep(scratch_.keep + i * sizes_.keep_stride, problem_, tile.block,
                        static_cast<uint32_t>(tile.first + row + i), sequence_head);
      }
      const ScoreRow scores = score_row(tile, row, row, 0);
      if constexpr (Sizes::kPairs) {
        const bool has_second = row + 1 < tile.rows;
        const ScoreRow second = score_row(tile, row + 1, row + has_second, 1);
        Bfloat16* pairs = scratch_.score_gradient_pairs + row * sizes_.tile_stride;
        differentiate_pair<kGated>(
            {scores, second, has_second, pairs, pairs + sizes_.tile_stride}, tile.block.width());
      } else {
        differentiate_row<kGated>(scores, tile.block.width());
      }
    }
  }

  // Row `row` of the two tiles, with what `source` has, a row that exists; `slot`: of what is
  // filled for one row at a time.
  ScoreRow score_row(const Tile& tile, int64_t row, int64_t source, int64_t slot) const {
    const int64_t logical_row = tile.first + source;
    return {scratch_.probabilities + row * sizes_.tile_stride,
            scratch_.score_gradients + row * sizes_.tile_stride,
            row_visible(tile, logical_row, slot),
            row_bias(tile, logical_row, slot),
            problem_.attention_dropout.drops ? scratch_.keep + slot * sizes_.keep_stride : nullptr,
            tile.head.rows[logical_row],
            tile.head.gate};
  }

  const int32_t* row_visible(const Tile& tile, int64_t row, int64_t slot) const {
    if (!has_row_limits(problem_)) return scratch_.visible;
    int32_t* filled = scratch_.row_visible + slot * sizes_.tile_stride;
    fill_row_visible(filled, scratch_.visible, problem_, tile.sequence, tile.block, row);
    return filled;
  }

  const float* row_bias(const Tile& tile, int64_t row, int64_t slot) const {
    if (problem_.bias.data == nullptr) return nullptr;
    float* filled = scratch_.bias + slot * sizes_.tile_stride;
    fill_bias(filled, problem_, tile.sequence, tile.head.index, tile.block, row);
    return filled;
  }

  // grad_key += scale * dS^T query, grad_value += P^T grad_out for columns that lie at offset.
  void add_columns(int64_t offset, int64_t count, int64_t rows, float* grad_key, float* grad_value,
                   bool accumulate) const {
    const Geometry<Operand>& geometry = sizes_.geometry;
    const int64_t steps = geometry.row_steps(rows);
    const int64_t step_stride = Operand::depth * sizes_.tile_stride;
    const LeftOperand probabilities{scratch_.probabilities + offset, 1, step_stride};
    const LeftOperand score_gradients{scratch_.score_gradients + offset, 1, step_stride};
    multiply<Operand>(count, problem_.head_dim, steps, probabilities,
                      geometry.right(scratch_.grad_out.right),
                      {grad_value, sizes_.width, problem_.attention_dropout.factor, accumulate});
    multiply<Operand>(count, problem_.head_dim, steps, score_gradients,
                      geometry.right(scratch_.query.right),
                      {grad_key, sizes_.width, problem_.scale, accumulate});
  }

  // sums += dS key for columns that lie at offset; the scale is left to the end.
  void add_query(const PackedColumns<Operand>& columns, int64_t offset, int64_t count,
                 int64_t rows, Output sums) const {
    multiply<Operand>(rows, problem_.head_dim, sizes_.geometry.row_steps(count),
                      gradient_rows(offset), sizes_.geometry.right(columns.keys), sums);
  }

  // dS as an operand whose sum runs over the columns.
  LeftOperand gradient_rows(int64_t offset) const {
    const int64_t stride = sizes_.tile_stride;
    if constexpr (Sizes::kPairs) return {scratch_.score_gradient_pairs + offset, stride / 2, 1};
    return {scratch_.score_gradients + offset, stride, 1};
  }

  // total += dS key + what flows through position_key. The block's part is summed by itself: a task
  // that has the later blocks only rounds likewise.
  void add_query_by_distance(const Tile& tile, const Output& total) const {
    const Block& block = tile.block;
    const int64_t offset = block.token_offset(), width = sizes_.width;
    float* sums = total.accumulate ? scratch_.tile_grad_query : total.data;
    add_query(scratch_.tokens, offset, block.token_count, tile.rows, {sums, width, 1.0f, false});
    // Zeros beside the tokens, where the prefix and an earlier, wider tile had theirs.
    const LeftOperand gradients = gradient_rows(offset);
    using Gradient = std::conditional_t<Sizes::kPairs, Bfloat16, float>;
    auto* tokens = static_cast<Gradient*>(const_cast<void*>(gradients.data));
    constexpr int64_t kFoldRows = Sizes::kFoldRows;
    for (int64_t row = 0; row < tile.rows; ++row, tokens += sizes_.tile_stride) {
      __builtin_memset(tokens - kFoldRows, 0, kFoldRows * sizeof(Gradient));
      __builtin_memset(tokens + block.token_count, 0, (kFoldRows + 1) * sizeof(Gradient));
    }
    positions_.fold_rows(block, tile.first, tile.rows, gradients, sums);
    if (!total.accumulate) return;
    for (int64_t i = 0; i < tile.rows * width; i += kLanes) {
      store(total.data + i, load<Floats>(total.data + i) + load<Floats>(sums + i));
    }
  }

  // grad_key += what flows through position_query.
  void fold_columns(const Tile& tile) const {
    const Block& block = tile.block;
    const int64_t stride = sizes_.tile_stride;
    float* tokens = scratch_.score_gradients + block.token_offset();
    const int64_t end = round_up(tile.rows, Operand::depth);
    for (int64_t row = 0; row < Sizes::kFoldRows; ++row) {
      clear_rows(tokens - (row + 1) * stride, block.token_count);
      clear_rows(tokens + (end + row) * stride, block.token_count);
    }
    const LeftOperand gradients{tokens, 1, Operand::depth * stride};
    positions_.fold_columns(block, tile.first, tile.rows, gradients, scratch_.grad_key);
  }

  const BackwardProblem& problem_;
  const BackwardSizes<Operand>& sizes_;
  const BackwardScratch<Operand, Element>& scratch_;
  const Positions<Operand, Element>& positions_;
};

}  // namespace ptv2::PTV2_LEVEL
