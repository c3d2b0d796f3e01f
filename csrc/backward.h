// Backward: a task walks the sequences of one (batch chunk, key/value head) in order, and the query
// heads of each, so that every sum has a fixed order whatever the number of threads.
#pragma once

#include <cstddef>
#include <type_traits>

#include "backward_sums.h"
#include "gradients.h"
#include "positions.h"

namespace ptv2::PTV2_LEVEL {

constexpr int64_t kBackwardRows = 128;  // query rows of a tile; even

template <class Operand, class Element>
class Backward {
 public:
  static int64_t bytes(const BackwardProblem& problem) {
    return Backward(problem, nullptr).arena_.used();
  }

  static void run(const BackwardProblem& problem, int64_t task, char* scratch) {
    Backward(problem, scratch).run_task(task);
  }

 private:
  static constexpr bool kPairs = Operand::depth == 2;
  // Rows and columns around dS that a product with sliding runs reads: zeros.
  static constexpr int64_t kFoldRows = (kTileRows - 1) * Operand::depth;
  static constexpr int64_t kPairsBefore = 32;  // kFoldRows or more: a cache line

  Backward(const BackwardProblem& problem, char* scratch)
      : problem_(problem),
        geometry_(problem.head_dim),
        width_(geometry_.right_words),
        columns_(backward_columns(problem.head_dim)),
        tile_stride_(odd_lines(columns_ + 2 * kLanes + 2 * kFoldRows * folds_rows(problem))),
        arena_(scratch),
        positions_(geometry_, problem) {
    const int64_t tile = kBackwardRows * tile_stride_;
    const bool folds = positions_.of_queries() || positions_.of_keys();
    const int64_t beside = folds ? kFoldRows * tile_stride_ : 0;
    probabilities_ = arena_.take<float>(tile);
    score_gradients_ = arena_.take<float>(tile + beside, beside);
    score_gradient_pairs_ = arena_.take<Bfloat16>(kPairs ? tile : 0, folds ? kPairsBefore : 0);
    query_ = RowOperands::take(arena_, geometry_);
    grad_out_ = RowOperands::take(arena_, geometry_);
    rows_ = arena_.take<GradientRow>(problem.group * problem.queries);
    const bool keeps_query = problem.needs_query && problem.column_parts == 1;
    const int64_t query_rows = keeps_query ? problem.group * problem.queries : 0;
    grad_query_ = arena_.take<float>(query_rows * width_);
    const int64_t token_columns = smaller(columns_, problem.tokens);
    tile_grad_query_ = arena_.take<float>(folds_rows(problem) ? kBackwardRows * width_ : 0);
    grad_key_ = arena_.take<float>(problem.needs_key_value ? token_columns * width_ : 0);
    grad_value_ = arena_.take<float>(problem.needs_key_value ? token_columns * width_ : 0);
    const bool drops_prefix = problem.needs_prefix && problem.prefix_dropout.drops;
    prefix_sums_ = arena_.take<float>(drops_prefix ? 2 * problem.prefix * width_ : 0);
    gate_sums_ = arena_.take<float>(gated() ? problem.group * gate_columns() : 0);
    visible_ = arena_.take<int32_t>(tile_stride_);
    row_visible_ = arena_.take<int32_t>(has_row_limits(problem) ? 2 * tile_stride_ : 0);
    bias_ = arena_.take<float>(problem.bias.data != nullptr ? 2 * tile_stride_ : 0);
    keep_ = arena_.take<int16_t>(2 * (tile_stride_ + 2 * kColumnsPerStep) + problem.head_dim);
    tokens_ = PackedColumns<Operand>::take(arena_, geometry_, token_columns, true);
    prefix_ = PrefixSource<Operand, Element>::take(arena_, geometry_, problem, true);
    positions_.take(arena_, kBackwardRows, token_columns);
  }

  static bool folds_rows(const BackwardProblem& problem) {
    return problem.needs_query && problem.position_key.data != nullptr;
  }

  bool gated() const { return problem_.prefix_gate.data != nullptr; }

  int64_t gate_columns() const { return round_up(problem_.prefix, kLanes); }

  void run_task(int64_t task) {
    // Heads lie side by side in memory: neighbouring tasks share pages.
    kv_head_ = task % problem_.kv_heads();
    const int64_t chunk = task / problem_.kv_heads() % problem_.chunk_count;
    part_ = task / problem_.kv_heads() / problem_.chunk_count;
    if (problem_.needs_query || problem_.needs_key_value) positions_.use_head(kv_head_, true);
    const int64_t prefix_floats = problem_.prefix * width_;
    if (problem_.needs_prefix) {
      partial_key_ =
          problem_.partial + (chunk * problem_.kv_heads() + kv_head_) * 2 * prefix_floats;
      partial_value_ = partial_key_ + prefix_floats;
      if (part_ == 0) clear_rows(partial_key_, 2 * prefix_floats);
    }
    if (gated()) clear_rows(gate_sums_, problem_.group * gate_columns());
    const BatchChunk& sequences = problem_.chunks[chunk];
    for (int64_t i = sequences.first; i < sequences.last; ++i) {
      sequence_ = problem_.sequence(problem_.order[i]);
      if (part_ < parts_of(problem_, sequence_)) run_sequence();
    }
    if (gated() && problem_.needs_prefix && part_ == 0) write_gate_sums(chunk);
  }

  // Column by column, so that the sum does not follow how these were cut into blocks.
  void write_gate_sums(int64_t chunk) {
    for (int64_t member = 0; member < problem_.group; ++member) {
      const float* columns = gate_sums_ + member * gate_columns();
      float sum = 0.0f;
      for (int64_t i = 0; i < sequence_.prefix; ++i) sum += columns[i];
      problem_.gate_partial[chunk * problem_.heads + query_head(member)] = sum;
    }
  }

  void run_sequence() {
    const bool drops_prefix = part_ == 0 && problem_.needs_prefix && problem_.prefix_dropout.drops;
    const int64_t prefix_floats = problem_.prefix * width_;
    prefix_key_sums_ = drops_prefix ? prefix_sums_ : partial_key_;
    prefix_value_sums_ = drops_prefix ? prefix_sums_ + prefix_floats : partial_value_;
    if (drops_prefix) clear_rows(prefix_sums_, 2 * prefix_floats);
    if (part_ == 0 && (problem_.needs_query || problem_.needs_prefix)) {
      prefix_.prepare(geometry_, problem_, sequence_, kv_head_, keep_, true);
    }
    const TokenRange range = tokens_of(problem_, sequence_);
    if (problem_.needs_key_value && part_ == 0) {
      write_zeros(0, range.begin);
      write_zeros(range.end, sequence_.tokens);
    }
    for (int64_t member = 0; member < problem_.group; ++member) prepare_rows(member);
    const bool writes_query = problem_.needs_query && problem_.column_parts == 1;
    if (problem_.needs_query && !writes_query) {
      grad_query_ = problem_.query_partial +
                    partial_row(problem_, part_, sequence_.index, query_head(0), 0) * width_;
    }
    add_blocks(range);
    const int64_t head_floats = sequence_.queries * width_;
    if (problem_.needs_query && is_first_block_) {
      clear_rows(grad_query_, problem_.group * head_floats);
    }
    for (int64_t member = 0; writes_query && member < problem_.group; ++member) {
      write(problem_.grad_query, query_head(member), 0, sequence_.queries,
            grad_query_ + member * head_floats, problem_.scale);
    }
    if (drops_prefix) add_dropped_prefix();
  }

  // The blocks of this task's part; is_first_block_ stays true when there is none.
  void add_blocks(TokenRange range) {
    BlockWalk walk = walk_of(problem_, sequence_, range);
    int64_t part = 0;
    is_first_block_ = true;
    bool is_first = true;
    for (Block block; walk.next(block); is_first = false) {
      part += begins_part(block, is_first);
      if (problem_.column_parts > 1 && part != part_) continue;
      add_block(block);
      is_first_block_ = false;
    }
  }

  int64_t query_head(int64_t member) const { return kv_head_ * problem_.group + member; }

  void prepare_rows(int64_t member) {
    const int64_t queries = sequence_.queries, head = query_head(member);
    const auto out = rows_of<Element>(problem_.out, sequence_, head, 0, queries);
    const auto grad_out = rows_of<Element>(problem_.grad_out, sequence_, head, 0, queries);
    GradientRow* states = rows_ + member * queries;
    for (int64_t row = 0; row < queries; ++row) {
      out.prefetch(row + kRowsAhead, problem_.head_dim);
      grad_out.prefetch(row + kRowsAhead, problem_.head_dim);
      const float lse = *statistic(problem_.lse, sequence_, head, row);
      states[row].pivot = lse == -kInfinity ? kInfinity : lse;
      states[row].delta = dot(out.row(row), grad_out.row(row), problem_.head_dim);
      if (problem_.grad_lse.data != nullptr) {
        states[row].delta -= *statistic(problem_.grad_lse, sequence_, head, row);
      }
    }
  }

  void add_block(const Block& block) {
    fill_visible(visible_, problem_, sequence_, block);
    if (block.token_count > 0) {
      const auto key =
          rows_of<Element>(problem_.key, sequence_, kv_head_, block.token_first, block.token_count);
      const auto value = rows_of<Element>(problem_.value, sequence_, kv_head_, block.token_first,
                                          block.token_count);
      tokens_.pack(geometry_, key, value, true);
      positions_.pack_keys(key);
    }
    // Otherwise the first tile of the first query head writes what the others add to.
    sums_cleared_ = sequence_.queries == 0 || has_row_limits(problem_);
    if (problem_.needs_key_value && sums_cleared_) {
      clear_rows(grad_key_, block.token_count * width_);
      clear_rows(grad_value_, block.token_count * width_);
    }
    for (int64_t member = 0; member < problem_.group; ++member) {
      head_ = query_head(member);
      gate_ = {problem_.gate_of(sequence_.bank_row, head_), block.token_offset(),
               gated() ? gate_sums_ + member * gate_columns() + block.prefix_first : nullptr};
      states_ = rows_ + member * sequence_.queries;
      head_grad_query_ =
          grad_query_ + (problem_.needs_query ? member * sequence_.queries * width_ : 0);
      for (int64_t first = 0; first < sequence_.queries; first += kBackwardRows) {
        const int64_t rows = smaller(kBackwardRows, sequence_.queries - first);
        add_tile(visible_block(block, problem_, sequence_, first, rows), first, rows);
        sums_cleared_ = true;
      }
    }
    if (problem_.needs_key_value) {
      write(problem_.grad_key, kv_head_, block.token_first, block.token_count, grad_key_, 1.0f);
      write(problem_.grad_value, kv_head_, block.token_first, block.token_count, grad_value_, 1.0f);
    }
  }

  void add_tile(const Block& block, int64_t first, int64_t rows) {
    if (block.width() == 0) {
      const bool clears = problem_.needs_query && is_first_block_;
      if (clears) clear_rows(head_grad_query_ + first * width_, rows * width_);
      return;
    }
    query_.pack(geometry_, rows_of<Element>(problem_.query, sequence_, head_, first, rows));
    grad_out_.pack(geometry_, rows_of<Element>(problem_.grad_out, sequence_, head_, first, rows));
    const PackedColumns<Operand> prefix = prefix_.packed.from(geometry_, block.prefix_first);
    const float prefix_factor = problem_.prefix_dropout.factor;
    const bool adds = sums_cleared_;
    if (block.token_count > 0) {
      positions_.write_of_queries(block, first, rows, query_.as_left(geometry_),
                                  probabilities_ + block.token_offset(), tile_stride_);
    }
    if (block.prefix_count > 0) {
      compute_scores(prefix, 0, block.prefix_count, rows, prefix_factor, false);
    }
    if (block.token_count > 0) {
      const int64_t offset = block.token_offset();
      compute_scores(tokens_, offset, block.token_count, rows, 1.0f, positions_.of_queries());
      positions_.add_of_keys(block, first, rows, probabilities_ + offset, tile_stride_);
    }
    if (gated() && block.prefix_count > 0) {
      differentiate_tile<true>(block, first, rows);
    } else {
      differentiate_tile<false>(block, first, rows);
    }
    bool accumulate = !is_first_block_;
    if (block.prefix_count > 0) {
      const int64_t sums = block.prefix_first * width_;
      if (problem_.needs_prefix) {
        add_columns(0, block.prefix_count, rows, prefix_key_sums_ + sums, prefix_value_sums_ + sums,
                    true);
      }
      if (problem_.needs_query) {
        add_query(prefix, 0, block.prefix_count, first, rows, prefix_factor, accumulate);
      }
      accumulate = true;
    }
    if (block.token_count > 0) {
      const int64_t offset = block.token_offset();
      if (problem_.needs_key_value) {
        add_columns(offset, block.token_count, rows, grad_key_, grad_value_, adds);
        if (positions_.of_keys()) fold_columns(block, first, rows);
      }
      if (folds_rows(problem_)) {
        add_query_by_distance(block, first, rows, accumulate);
      } else if (problem_.needs_query) {
        add_query(tokens_, offset, block.token_count, first, rows, 1.0f, accumulate);
      }
    }
  }

  // Scores, and the gradient of the (kept) probabilities.
  void compute_scores(const PackedColumns<Operand>& columns, int64_t offset, int64_t count,
                      int64_t rows, float factor, bool accumulate) {
    multiply<Operand>(rows, count, geometry_.steps, query_.as_left(geometry_),
                      geometry_.transposed(columns.keys_transposed),
                      {probabilities_ + offset, tile_stride_, problem_.scale * factor, accumulate},
                      kScoreSteps);
    multiply<Operand>(rows, count, geometry_.steps, grad_out_.as_left(geometry_),
                      geometry_.transposed(columns.values_transposed),
                      {score_gradients_ + offset, tile_stride_,
                       problem_.attention_dropout.factor * factor, false});
  }

  // Turns scores and probability gradients into dropped probabilities and score gradients.
  template <bool kGated>
  void differentiate_tile(const Block& block, int64_t first, int64_t rows) {
    const bool drops = problem_.attention_dropout.drops;
    const auto sequence_head = static_cast<uint32_t>(sequence_.index * problem_.heads + head_);
    const int64_t keep_stride = tile_stride_ + 2 * kColumnsPerStep;
    for (int64_t row = 0; row < rows; row += Operand::depth) {
      for (int64_t i = 0; drops && i < Operand::depth; ++i) {
        fill_block_keep(keep_ + i * keep_stride, problem_, block,
                        static_cast<uint32_t>(first + row + i), sequence_head);
      }
      const int64_t at = row * tile_stride_;
      const ScoreRow scores{probabilities_ + at,
                            score_gradients_ + at,
                            row_visible(block, first + row, 0),
                            row_bias(block, first + row, 0),
                            drops ? keep_ : nullptr,
                            states_[first + row],
                            gate_};
      if constexpr (kPairs) {
        const bool has_second = row + 1 < rows;
        const int64_t next = first + row + has_second;
        const ScoreRow second{
            scores.scores + tile_stride_,          scores.gradients + tile_stride_,
            row_visible(block, next, 1),           row_bias(block, next, 1),
            drops ? keep_ + keep_stride : nullptr, states_[next],
            gate_};
        Bfloat16* pairs = score_gradient_pairs_ + at;
        differentiate_pair<kGated>({scores, second, has_second, pairs, pairs + tile_stride_},
                           block.width());
      } else {
        differentiate_row<kGated>(scores, block.width());
      }
    }
  }

  const int32_t* row_visible(const Block& block, int64_t row, int64_t slot) {
    if (!has_row_limits(problem_)) return visible_;
    int32_t* filled = row_visible_ + slot * tile_stride_;
    fill_row_visible(filled, visible_, problem_, sequence_, block, row);
    return filled;
  }

  const float* row_bias(const Block& block, int64_t row, int64_t slot) {
    if (problem_.bias.data == nullptr) return nullptr;
    float* filled = bias_ + slot * tile_stride_;
    fill_bias(filled, problem_, sequence_, head_, block, row);
    return filled;
  }

  // grad_key += scale * dS^T query, grad_value += P^T grad_out for columns that lie at offset.
  void add_columns(int64_t offset, int64_t count, int64_t rows, float* grad_key, float* grad_value,
                   bool accumulate) {
    const int64_t steps = geometry_.row_steps(rows);
    const int64_t step_stride = Operand::depth * tile_stride_;
    multiply<Operand>(count, problem_.head_dim, steps, {probabilities_ + offset, 1, step_stride},
                      geometry_.right(grad_out_.right),
                      {grad_value, width_, problem_.attention_dropout.factor, accumulate});
    multiply<Operand>(count, problem_.head_dim, steps, {score_gradients_ + offset, 1, step_stride},
                      geometry_.right(query_.right),
                      {grad_key, width_, problem_.scale, accumulate});
  }

  // grad_query += dS key; the scale is left to the end.
  void add_query(const PackedColumns<Operand>& columns, int64_t offset, int64_t count,
                 int64_t first, int64_t rows, float factor, bool accumulate) {
    multiply_by_keys(columns, offset, count, rows,
                     {head_grad_query_ + first * width_, width_, factor, accumulate});
  }

  void multiply_by_keys(const PackedColumns<Operand>& columns, int64_t offset, int64_t count,
                        int64_t rows, Output sums) {
    multiply<Operand>(rows, problem_.head_dim, geometry_.row_steps(count), gradient_rows(offset),
                      geometry_.right(columns.keys), sums);
  }

  // dS as an operand whose sum runs over the columns.
  LeftOperand gradient_rows(int64_t offset) const {
    if constexpr (kPairs) return {score_gradient_pairs_ + offset, tile_stride_ / 2, 1};
    return {score_gradients_ + offset, tile_stride_, 1};
  }

  // grad_query += dS key + what flows through position_key. The block's part is summed by itself: a
  // task that has the later blocks only rounds likewise.
  void add_query_by_distance(const Block& block, int64_t first, int64_t rows, bool accumulate) {
    const int64_t offset = block.token_offset();
    float* total = head_grad_query_ + first * width_;
    float* sums = accumulate ? tile_grad_query_ : total;
    multiply_by_keys(tokens_, offset, block.token_count, rows, {sums, width_, 1.0f, false});
    // Zeros beside the tokens, where the prefix and an earlier, wider tile had theirs.
    const LeftOperand gradients = gradient_rows(offset);
    using Gradient = std::conditional_t<kPairs, Bfloat16, float>;
    auto* tokens = static_cast<Gradient*>(const_cast<void*>(gradients.data));
    for (int64_t row = 0; row < rows; ++row, tokens += tile_stride_) {
      __builtin_memset(tokens - kFoldRows, 0, kFoldRows * sizeof(Gradient));
      __builtin_memset(tokens + block.token_count, 0, (kFoldRows + 1) * sizeof(Gradient));
    }
    positions_.fold_rows(block, first, rows, gradients, sums);
    if (!accumulate) return;
    for (int64_t i = 0; i < rows * width_; i += kLanes) {
      store(total + i, load<Floats>(total + i) + load<Floats>(sums + i));
    }
  }

  // grad_key += what flows through position_query.
  void fold_columns(const Block& block, int64_t first, int64_t rows) {
    float* tokens = score_gradients_ + block.token_offset();
    const int64_t end = round_up(rows, Operand::depth);
    for (int64_t row = 0; row < kFoldRows; ++row) {
      clear_rows(tokens - (row + 1) * tile_stride_, block.token_count);
      clear_rows(tokens + (end + row) * tile_stride_, block.token_count);
    }
    const LeftOperand gradients{tokens, 1, Operand::depth * tile_stride_};
    positions_.fold_columns(block, first, rows, gradients, grad_key_);
  }

  // This sequence's prefix gradient, with the dropout of its prefix, onto the sum over the batch.
  void add_dropped_prefix() {
    const auto sequence_head =
        static_cast<uint32_t>(sequence_.index * problem_.kv_heads() + kv_head_);
    for (int64_t row = 0; row < sequence_.prefix; ++row) {
      const auto logical_row = static_cast<uint32_t>(row);
      const int64_t at = row * width_;
      add_kept(partial_key_ + at, prefix_key_sums_ + at, {logical_row, sequence_head, kPrefixKey});
      add_kept(partial_value_ + at, prefix_value_sums_ + at,
               {logical_row, sequence_head, kPrefixValue});
    }
  }

  void add_kept(float* destination, const float* source, DropoutRow at) {
    fill_keep(keep_, 0, problem_.head_dim, problem_.prefix_dropout, at);
    for (int64_t i = 0; i < problem_.head_dim; ++i) {
      if (keep_[i]) destination[i] += source[i] * problem_.prefix_dropout.factor;
    }
  }

  void write(const Tokens& tokens, int64_t head, int64_t first, int64_t count, const float* rows,
             float factor) {
    for (int64_t row = 0; row < count; ++row) {
      store_row(row_pointer<Element>(tokens, sequence_, head, first + row), rows + row * width_,
                problem_.head_dim, factor);
    }
  }

  void write_zeros(int64_t first, int64_t end) {
    const size_t bytes = problem_.head_dim * sizeof(Element);
    for (int64_t row = first; row < end; ++row) {
      __builtin_memset(row_pointer<Element>(problem_.grad_key, sequence_, kv_head_, row), 0, bytes);
      __builtin_memset(row_pointer<Element>(problem_.grad_value, sequence_, kv_head_, row), 0,
                       bytes);
    }
  }

  // Rows of query or grad_out as both operands; floats serve as either.
  struct RowOperands {
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

  const BackwardProblem& problem_;
  const Geometry<Operand> geometry_;
  const int64_t width_;    // row stride of the fp32 sums
  const int64_t columns_;  // of a block
  const int64_t tile_stride_;
  Arena arena_;
  float* probabilities_;    // [kBackwardRows, tile_stride]: scores, then dropped probabilities
  float* score_gradients_;  // [kBackwardRows, tile_stride]: dP, then dS
  Bfloat16* score_gradient_pairs_;  // [kBackwardRows, tile_stride], pairs only: dS
  RowOperands query_, grad_out_;
  GradientRow* rows_;  // [group, T]
  float* grad_query_;  // [group, T, width]
  float* tile_grad_query_;  // [kBackwardRows, width]
  float* grad_key_;    // [columns, width], likewise grad_value_
  float* grad_value_;
  float* prefix_sums_;  // [2, P, width], prefix dropout only
  float* gate_sums_;    // [group, gate_columns]
  int32_t* visible_;
  int32_t* row_visible_;  // of two rows
  float* bias_;           // of two rows
  int16_t* keep_;
  PackedColumns<Operand> tokens_;
  PrefixSource<Operand, Element> prefix_;
  Positions<Operand, Element> positions_;
  Sequence sequence_;
  int64_t kv_head_, head_, part_;
  GradientRow* states_;  // of head_, likewise head_grad_query_ and gate_
  RowGate gate_;
  float* head_grad_query_;
  float *partial_key_ = nullptr, *partial_value_ = nullptr;
  float *prefix_key_sums_ = nullptr, *prefix_value_sums_ = nullptr;
  bool is_first_block_, sums_cleared_;
};

}  // namespace ptv2::PTV2_LEVEL
