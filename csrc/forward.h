// Forward: a task is a run of query rows of one (sequence, head); softmax is online over blocks.
#pragma once

#include "positions.h"

namespace ptv2::PTV2_LEVEL {

constexpr int64_t kForwardRows = 48;  // query rows of a tile

// Columns of a block: packed K and V take about half of a 512 KB second-level cache.
PTV2_INLINE int64_t forward_columns(int64_t head_dim) {
  return larger(128, smaller(512, 32768 / head_dim / 64 * 64));
}

struct RowState {
  float max;  // of the scores
  float sum;
};

// Scores of one row -> unnormalised probabilities (of this block), dropped where keep says so; bias
// and keep may be null. Returns the factor that brings earlier blocks to the new maximum.
template <class Operand>
float softmax_row(float* row, int64_t width, const int32_t* visible, const float* bias,
                  const int16_t* keep, RowState& state) {
  const Floats minus_infinity = splat(-kInfinity);
  Floats maxima = minus_infinity;
  for (int64_t i = 0; i < width; i += kLanes) {
    Floats score = load<Floats>(row + i);
    if (bias != nullptr) score += load<Floats>(bias + i);
    score = load<Ints>(visible + i) ? score : minus_infinity;
    maxima = score > maxima ? score : maxima;
    store(row + i, score);
  }
  const float block_max = max_of(maxima);
  const float new_max = block_max > state.max ? block_max : state.max;
  // A finite pivot keeps rows without a visible column free of -inf - -inf.
  const float pivot = new_max == -kInfinity ? 0.0f : new_max;
  Floats sums{};
  for (int64_t i = 0; i < width; i += kLanes) {
    Floats probability = exp(load<Floats>(row + i) - pivot);
    sums += probability;
    if (keep != nullptr) probability = (Floats)((Ints)probability & load_keep(keep + i));
    if constexpr (Operand::depth == 1) {
      store(row + i, probability);
    } else {
      store_floats(reinterpret_cast<Bfloat16*>(row) + i, probability);
    }
  }
  float correction = 0.0f;
  if (state.max != -kInfinity) correction = exp(splat(state.max - pivot))[0];
  state.sum = state.sum * correction + sum_of(sums);
  state.max = new_max;
  return correction;
}

template <class Operand, class Element>
class Forward {
 public:
  static int64_t bytes(const ForwardProblem& problem) {
    return Forward(problem, nullptr).arena_.used();
  }

  static void run(const ForwardProblem& problem, int64_t task, char* scratch) {
    Forward(problem, scratch).run_task(task);
  }

 private:
  Forward(const ForwardProblem& problem, char* scratch)
      : problem_(problem),
        geometry_(problem.head_dim),
        arena_(scratch),
        positions_(geometry_, problem) {
    const int64_t columns = forward_columns(problem.head_dim);
    tile_stride_ = odd_lines(columns + 2 * kLanes);
    tile_ = arena_.take<float>(kForwardRows * tile_stride_);
    query_ = arena_.take<uint32_t>(kForwardRows * geometry_.left_words);
    sums_ = arena_.take<float>(problem.query_chunk * geometry_.right_words);
    states_ = arena_.take<RowState>(problem.query_chunk);
    visible_ = arena_.take<int32_t>(tile_stride_);
    row_visible_ = arena_.take<int32_t>(has_row_limits(problem) ? tile_stride_ : 0);
    bias_ = arena_.take<float>(problem.bias.data != nullptr ? tile_stride_ : 0);
    keep_ = arena_.take<int16_t>(tile_stride_ + 2 * kColumnsPerStep + problem.head_dim);
    tokens_ =
        PackedColumns<Operand>::take(arena_, geometry_, smaller(columns, problem.tokens), false);
    prefix_ = PrefixSource<Operand, Element>::take(arena_, geometry_, problem, false);
    positions_.take(arena_, kForwardRows, smaller(columns, problem.tokens));
  }

  void run_task(int64_t task) {
    const int64_t chunk = problem_.query_chunk;
    const int64_t chunks = (problem_.queries + chunk - 1) / chunk;
    head_ = task / chunks % problem_.heads;
    kv_head_ = head_ / problem_.group;
    sequence_ = problem_.sequence(task / chunks / problem_.heads);
    first_row_ = task % chunks * chunk;
    rows_ = smaller(chunk, sequence_.queries - first_row_);
    if (rows_ <= 0) return;
    for (int64_t row = 0; row < rows_; ++row) states_[row] = {-kInfinity, 0.0f};
    const float gate = problem_.gate_of(sequence_.bank_row, head_);
    if (gate == 0.0f) sequence_.prefix = 0;  // to the bit as without one
    log_gate_ = gate == 1.0f ? 0.0f : __builtin_logf(gate);
    prefix_.prepare(geometry_, problem_, sequence_, kv_head_, keep_, false);
    positions_.use_head(head_, false);
    BlockWalk walk(sequence_.prefix, visible_tokens(problem_, sequence_),
                   forward_columns(problem_.head_dim));
    is_first_block_ = true;
    for (Block block; walk.next(block); is_first_block_ = false) add_block(block);
    write_rows();
  }

  void add_block(const Block& block) {
    fill_visible(visible_, problem_, sequence_, block);
    const auto key =
        rows_of<Element>(problem_.key, sequence_, kv_head_, block.token_first, block.token_count);
    const auto value =
        rows_of<Element>(problem_.value, sequence_, kv_head_, block.token_first, block.token_count);
    tokens_.pack(geometry_, key, value, false);
    positions_.pack_keys(key);
    for (int64_t row = 0; row < rows_; row += kForwardRows) {
      const int64_t rows = smaller(kForwardRows, rows_ - row);
      add_tile(visible_block(block, problem_, sequence_, first_row_ + row, rows), row, rows);
    }
  }

  void add_tile(const Block& block, int64_t first, int64_t rows) {
    if (block.width() == 0) {
      const int64_t width = geometry_.right_words;
      if (is_first_block_) __builtin_memset(sums_ + first * width, 0, rows * width * sizeof(float));
      return;
    }
    pack_left<Operand>(query_, geometry_.left_words,
                       rows_of<Element>(problem_.query, sequence_, head_, first_row_ + first, rows),
                       problem_.head_dim);
    const LeftOperand query = geometry_.left(query_);
    const PackedColumns<Operand> prefix = prefix_.packed.from(geometry_, block.prefix_first);
    const float prefix_factor = problem_.prefix_dropout.factor;
    const float scale = problem_.scale;
    const int64_t offset = block.token_offset(), first_row = first_row_ + first;
    positions_.write_of_queries(block, first_row, rows, query, tile_ + offset, tile_stride_);
    multiply<Operand>(rows, block.prefix_count, geometry_.steps, query,
                      geometry_.transposed(prefix.keys_transposed),
                      {tile_, tile_stride_, scale * prefix_factor, false}, kScoreSteps);
    if (log_gate_ != 0.0f) add_to_prefix(rows, block.prefix_count, log_gate_);
    multiply<Operand>(rows, block.token_count, geometry_.steps, query,
                      geometry_.transposed(tokens_.keys_transposed),
                      {tile_ + offset, tile_stride_, scale, positions_.of_queries()}, kScoreSteps);
    positions_.add_of_keys(block, first_row, rows, tile_ + offset, tile_stride_);

    softmax_tile(block, first, rows);

    float* sums = sums_ + first * geometry_.right_words;
    const int64_t width = geometry_.right_words;
    if (block.prefix_count > 0) {
      multiply<Operand>(rows, problem_.head_dim, geometry_.row_steps(block.prefix_count),
                        {tile_, tile_stride_, 1}, geometry_.right(prefix.values),
                        {sums, width, prefix_factor, !is_first_block_});
    }
    if (block.token_count > 0) {
      const float* probabilities = tile_ + offset / Operand::depth;
      multiply<Operand>(rows, problem_.head_dim, geometry_.row_steps(block.token_count),
                        {probabilities, tile_stride_, 1}, geometry_.right(tokens_.values),
                        {sums, width, 1.0f, !is_first_block_ || block.prefix_count > 0});
    }
  }

  void add_to_prefix(int64_t rows, int64_t columns, float offset) {
    for (int64_t row = 0; row < rows; ++row) {
      float* scores = tile_ + row * tile_stride_;
      for (int64_t i = 0; i < columns; i += kLanes) {
        store(scores + i, load<Floats>(scores + i) + offset);
      }
    }
  }

  void softmax_tile(const Block& block, int64_t first, int64_t rows) {
    const bool drops = problem_.attention_dropout.drops;
    const auto sequence_head = static_cast<uint32_t>(sequence_.index * problem_.heads + head_);
    const bool limits = has_row_limits(problem_), has_bias = problem_.bias.data != nullptr;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t logical_row = first_row_ + first + row;
      if (drops) {
        fill_block_keep(keep_, problem_, block, static_cast<uint32_t>(logical_row), sequence_head);
      }
      if (limits) {
        fill_row_visible(row_visible_, visible_, problem_, sequence_, block, logical_row);
      }
      if (has_bias) fill_bias(bias_, problem_, sequence_, head_, block, logical_row);
      const float correction = softmax_row<Operand>(
          tile_ + row * tile_stride_, block.width(), limits ? row_visible_ : visible_,
          has_bias ? bias_ : nullptr, drops ? keep_ : nullptr, states_[first + row]);
      if (is_first_block_) continue;
      float* sums = sums_ + (first + row) * geometry_.right_words;
      for (int64_t i = 0; i < problem_.head_dim; i += kLanes) {
        store(sums + i, load<Floats>(sums + i) * correction);
      }
    }
  }

  void write_rows() {
    for (int64_t row = 0; row < rows_; ++row) {
      const RowState state = states_[row];
      float* sums = sums_ + row * geometry_.right_words;
      const bool empty = state.sum == 0.0f;
      if (empty) {
        for (int64_t i = 0; i < problem_.head_dim; i += kLanes) store(sums + i, Floats{});
      }
      const float factor = empty ? 0.0f : problem_.attention_dropout.factor / state.sum;
      store_row(row_pointer<Element>(problem_.out, sequence_, head_, first_row_ + row), sums,
                problem_.head_dim, factor);
      *statistic(problem_.lse, sequence_, head_, first_row_ + row) =
          empty ? -kInfinity : state.max + __builtin_logf(state.sum);
    }
  }

  const ForwardProblem& problem_;
  const Geometry<Operand> geometry_;
  Arena arena_;
  int64_t tile_stride_;
  float* tile_;       // [kForwardRows, tile_stride]: scores, then probabilities
  uint32_t* query_;   // [kForwardRows, left_words]
  float* sums_;       // [query_chunk, right_words]: unnormalised out
  RowState* states_;  // [query_chunk]
  int32_t* visible_;  // [tile_stride], likewise row_visible_
  int32_t* row_visible_;
  float* bias_;  // [tile_stride]
  int16_t* keep_;
  PackedColumns<Operand> tokens_;
  PrefixSource<Operand, Element> prefix_;
  Positions<Operand, Element> positions_;
  Sequence sequence_;
  int64_t head_, kv_head_, first_row_, rows_;
  float log_gate_;
  bool is_first_block_;
};

}  // namespace ptv2::PTV2_LEVEL
