// The scratch memory of a backward task: how large its tiles are, and the arrays that it works in.
#pragma once

#include "backward_sums.h"
#include "gradients.h"
#include "positions.h"

namespace ptv2::PTV2_LEVEL {

constexpr int64_t kBackwardRows = 128;  // query rows of a tile; even

// Sizes that follow from the problem.
template <class Operand>
struct BackwardSizes {
  static constexpr bool kPairs = Operand::depth == 2;
  // Rows and columns around dS that a product with sliding runs reads: zeros.
  static constexpr int64_t kFoldRows = (kTileRows - 1) * Operand::depth;
  static constexpr int64_t kPairsBefore = 32;  // kFoldRows or more: a cache line

  explicit BackwardSizes(const BackwardProblem& problem)
      : geometry(problem.head_dim),
        width(geometry.right_words),
        columns(backward_columns(problem.head_dim)),
        token_columns(smaller(columns, problem.tokens)),
        folds(problem.position_key.data != nullptr || problem.position_query.data != nullptr),
        folds_rows(problem.needs_query && problem.position_key.data != nullptr),
        tile_stride(odd_lines(columns + 2 * kLanes + 2 * kFoldRows * folds_rows)),
        tile(kBackwardRows * tile_stride),
        keep_stride(tile_stride + 2 * kColumnsPerStep),
        prefix_floats(problem.prefix * width),
        gated(problem.prefix_gate.data != nullptr),
        gate_columns(round_up(problem.prefix, kLanes)) {}

  Geometry<Operand> geometry;
  int64_t width;          // row stride of the fp32 sums
  int64_t columns;        // of a block
  int64_t token_columns;  // of a block, at most
  bool folds;             // scores by distance
  bool folds_rows;        // and a gradient of the queries through them
  int64_t tile_stride;
  int64_t tile;           // elements
  int64_t keep_stride;
  int64_t prefix_floats;  // fp32 sums of the keys of a prefix
  bool gated;
  int64_t gate_columns;
};

// Rows of query or grad_out as both operands; floats serve as either.
template <class Operand, class Element>
struct RowOperands {
  static constexpr bool kPairs = Operand::depth == 2;
  uint32_t* left;
  uint32_t* right;

  static RowOperands take(Arena& arena, const Geometry<Operand>& geometry) {
    const int64_t rows = geometry.row_steps(kBackwardRows);
    RowOperands operands;
    operands.right = arena.take<uint32_t>(rows * geometry.right_words);
    operands.left =
        kPairs ? arena.take<uint32_t>(kBackwardRows * geometry.left_words) : operands.right;
    return operands;
  }

  void pack(const Geometry<Operand>& geometry, Rows<Element> rows) const {
    pack_right<Operand>(right, geometry.right_words, rows, geometry.head_dim);
    if (kPairs) pack_left<Operand>(left, geometry.left_words, rows, geometry.head_dim);
  }

  LeftOperand as_left(const Geometry<Operand>& geometry) const {
    return {left, kPairs ? geometry.left_words : geometry.right_words, 1};
  }
};

// The arrays, each with its shape.
template <class Operand, class Element>
struct BackwardScratch {
  float* probabilities;             // [kBackwardRows, tile_stride]: scores, then dropped P
  float* score_gradients;           // [kBackwardRows, tile_stride]: dP, then dS
  Bfloat16* score_gradient_pairs;   // [kBackwardRows, tile_stride], pairs only: dS
  RowOperands<Operand, Element> query, grad_out;
  GradientRow* rows;                // [group, T]
  float* grad_query;                // [group, T, width], for one part of the columns
  float* tile_grad_query;           // [kBackwardRows, width]
  float *grad_key, *grad_value;     // [token_columns, width]
  float* prefix_sums;               // [2, P, width], prefix dropout only
  float* gate_sums;                 // [group, gate_columns]
  int32_t* visible;                 // [tile_stride]
  int32_t* row_visible;             // [2, tile_stride]
  float* bias;                      // [2, tile_stride]
  int16_t* keep;                    // [2, keep_stride]
  PackedColumns<Operand> tokens;
  PrefixSource<Operand, Element> prefix;

  static BackwardScratch take(Arena& arena, const BackwardSizes<Operand>& sizes,
                              const BackwardProblem& problem) {
    using Sizes = BackwardSizes<Operand>;
    const Geometry<Operand>& geometry = sizes.geometry;
    const int64_t width = sizes.width, tile_stride = sizes.tile_stride, tile = sizes.tile;
    const int64_t beside = sizes.folds ? Sizes::kFoldRows * tile_stride : 0;
    const int64_t before = sizes.folds ? Sizes::kPairsBefore : 0;
    const int64_t group_rows = problem.group * problem.queries;
    const bool keeps_query = problem.needs_query && problem.column_parts == 1;
    const int64_t token_floats = problem.needs_key_value ? sizes.token_columns * width : 0;
    const bool drops_prefix = problem.needs_prefix && problem.prefix_dropout.drops;
    BackwardScratch scratch;
    scratch.probabilities = arena.take<float>(tile);
    scratch.score_gradients = arena.take<float>(tile + beside, beside);
    scratch.score_gradient_pairs = arena.take<Bfloat16>(Sizes::kPairs ? tile : 0, before);
    scratch.query = RowOperands<Operand, Element>::take(arena, geometry);
    scratch.grad_out = RowOperands<Operand, Element>::take(arena, geometry);
    scratch.rows = arena.take<GradientRow>(group_rows);
    scratch.grad_query = arena.take<float>(keeps_query ? group_rows * width : 0);
    scratch.tile_grad_query = arena.take<float>(sizes.folds_rows ? kBackwardRows * width : 0);
    scratch.grad_key = arena.take<float>(token_floats);
    scratch.grad_value = arena.take<float>(token_floats);
    scratch.prefix_sums = arena.take<float>(drops_prefix ? 2 * sizes.prefix_floats : 0);
    scratch.gate_sums = arena.take<float>(sizes.gated ? problem.group * sizes.gate_columns : 0);
    scratch.visible = arena.take<int32_t>(tile_stride);
    scratch.row_visible = arena.take<int32_t>(has_row_limits(problem) ? 2 * tile_stride : 0);
    scratch.bias = arena.take<float>(problem.bias.data != nullptr ? 2 * tile_stride : 0);
    scratch.keep = arena.take<int16_t>(2 * sizes.keep_stride + problem.head_dim);
    scratch.tokens = PackedColumns<Operand>::take(arena, geometry, sizes.token_columns, true);
    scratch.prefix = PrefixSource<Operand, Element>::take(arena, geometry, problem, true);
    return scratch;
  }
};

}  // namespace ptv2::PTV2_LEVEL
