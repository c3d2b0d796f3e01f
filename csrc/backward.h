// Backward: a task walks the sequences of one (batch chunk, key/value head) in order, and the query
// heads of each, so that every sum has a fixed order whatever the number of threads.
#pragma once

#include <cstddef>

#include "backward_tile.h"

namespace ptv2::PTV2_LEVEL {

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
  Backward(const BackwardProblem& problem, char* scratch)
      : problem_(problem),
        sizes_(problem),
        arena_(scratch),
        scratch_(BackwardScratch<Operand, Element>::take(arena_, sizes_, problem)),
        positions_(sizes_.geometry, problem),
        tiles_(problem, sizes_, scratch_, positions_) {
    positions_.take(arena_, kBackwardRows, sizes_.token_columns);
  }

  void run_task(int64_t task) {
    // Heads lie side by side in memory: neighbouring tasks share pages.
    kv_head_ = task % problem_.kv_heads();
    const int64_t chunk = task / problem_.kv_heads() % problem_.chunk_count;
    part_ = task / problem_.kv_heads() / problem_.chunk_count;
    if (problem_.needs_query || problem_.needs_key_value) positions_.use_head(kv_head_, true);
    if (problem_.needs_prefix) {
      const int64_t sums = (chunk * problem_.kv_heads() + kv_head_) * 2 * sizes_.prefix_floats;
      task_sums_ = sums_at(problem_.partial + sums);
      if (part_ == 0) clear_rows(task_sums_.key, 2 * sizes_.prefix_floats);
    }
    if (sizes_.gated) clear_rows(scratch_.gate_sums, problem_.group * sizes_.gate_columns);
    const BatchChunk& sequences = problem_.chunks[chunk];
    for (int64_t i = sequences.first; i < sequences.last; ++i) {
      sequence_ = problem_.sequence(problem_.order[i]);
      if (part_ < parts_of(problem_, sequence_)) run_sequence();
    }
    if (sizes_.gated && problem_.needs_prefix && part_ == 0) write_gate_sums(chunk);
  }

  PrefixSums sums_at(float* sums) const { return {sums, sums + sizes_.prefix_floats}; }

  // Column by column, so that the sum does not follow how these were cut into blocks.
  void write_gate_sums(int64_t chunk) {
    for (int64_t member = 0; member < problem_.group; ++member) {
      const float* columns = scratch_.gate_sums + member * sizes_.gate_columns;
      float sum = 0.0f;
      for (int64_t i = 0; i < sequence_.prefix; ++i) sum += columns[i];
      problem_.gate_partial[chunk * problem_.heads + query_head(member)] = sum;
    }
  }

  void run_sequence() {
    const bool drops_prefix = part_ == 0 && problem_.needs_prefix && problem_.prefix_dropout.drops;
    sequence_sums_ = drops_prefix ? sums_at(scratch_.prefix_sums) : task_sums_;
    if (drops_prefix) clear_rows(sequence_sums_.key, 2 * sizes_.prefix_floats);
    if (part_ == 0 && (problem_.needs_query || problem_.needs_prefix)) {
      scratch_.prefix.prepare(sizes_.geometry, problem_, sequence_, kv_head_, scratch_.keep, true);
    }
    const TokenRange range = tokens_of(problem_, sequence_);
    if (problem_.needs_key_value && part_ == 0) {
      write_zeros(0, range.begin);
      write_zeros(range.end, sequence_.tokens);
    }
    for (int64_t member = 0; member < problem_.group; ++member) prepare_rows(member);
    const bool writes_query = problem_.needs_query && problem_.column_parts == 1;
    grad_query_ = scratch_.grad_query;
    if (problem_.needs_query && !writes_query) {
      grad_query_ = problem_.query_partial +
                    partial_row(problem_, part_, sequence_.index, query_head(0), 0) * sizes_.width;
    }
    add_blocks(range);
    const int64_t head_floats = sequence_.queries * sizes_.width;
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

  // A query head of the sequence, for the columns of a block.
  QueryHead head_of(int64_t member, const Block& block) const {
    const int64_t index = query_head(member), first = member * sequence_.queries;
    const int64_t gate_column = member * sizes_.gate_columns + block.prefix_first;
    return {index,
            scratch_.rows + first,
            problem_.needs_query ? grad_query_ + first * sizes_.width : nullptr,
            {problem_.gate_of(sequence_.bank_row, index), block.token_offset(),
             sizes_.gated ? scratch_.gate_sums + gate_column : nullptr}};
  }

  void prepare_rows(int64_t member) {
    const int64_t queries = sequence_.queries, head = query_head(member);
    const auto out = rows_of<Element>(problem_.out, sequence_, head, 0, queries);
    const auto grad_out = rows_of<Element>(problem_.grad_out, sequence_, head, 0, queries);
    GradientRow* rows = scratch_.rows + member * queries;
    for (int64_t row = 0; row < queries; ++row) {
      out.prefetch(row + kRowsAhead, problem_.head_dim);
      grad_out.prefetch(row + kRowsAhead, problem_.head_dim);
      const float lse = *statistic(problem_.lse, sequence_, head, row);
      rows[row].pivot = lse == -kInfinity ? kInfinity : lse;
      rows[row].delta = dot(out.row(row), grad_out.row(row), problem_.head_dim);
      if (problem_.grad_lse.data != nullptr) {
        rows[row].delta -= *statistic(problem_.grad_lse, sequence_, head, row);
      }
    }
  }

  void add_block(const Block& block) {
    fill_visible(scratch_.visible, problem_, sequence_, block);
    if (block.token_count > 0) {
      const auto key =
          rows_of<Element>(problem_.key, sequence_, kv_head_, block.token_first, block.token_count);
      const auto value = rows_of<Element>(problem_.value, sequence_, kv_head_, block.token_first,
                                          block.token_count);
      scratch_.tokens.pack(sizes_.geometry, key, value, true);
      positions_.pack_keys(key);
    }
    // Otherwise the first tile of the first query head writes what the others add to.
    sums_cleared_ = sequence_.queries == 0 || has_row_limits(problem_);
    if (problem_.needs_key_value && sums_cleared_) {
      clear_rows(scratch_.grad_key, block.token_count * sizes_.width);
      clear_rows(scratch_.grad_value, block.token_count * sizes_.width);
    }
    for (int64_t member = 0; member < problem_.group; ++member) {
      const QueryHead head = head_of(member, block);
      for (int64_t first = 0; first < sequence_.queries; first += kBackwardRows) {
        const int64_t rows = smaller(kBackwardRows, sequence_.queries - first);
        add_tile(head, visible_block(block, problem_, sequence_, first, rows), first, rows);
        sums_cleared_ = true;
      }
    }
    if (problem_.needs_key_value) {
      write(problem_.grad_key, kv_head_, block.token_first, block.token_count, scratch_.grad_key,
            1.0f);
      write(problem_.grad_value, kv_head_, block.token_first, block.token_count,
            scratch_.grad_value, 1.0f);
    }
  }

  void add_tile(const QueryHead& head, const Block& block, int64_t first, int64_t rows) {
    if (block.width() > 0) {
      PrefixSums sums{};
      if (problem_.needs_prefix) sums = sequence_sums_.from(block.prefix_first * sizes_.width);
      tiles_.add({sequence_, head, block, first, rows, !is_first_block_, sums_cleared_, sums});
    } else if (problem_.needs_query && is_first_block_) {
      clear_rows(head.grad_query + first * sizes_.width, rows * sizes_.width);
    }
  }

  // This sequence's prefix gradient, with the dropout of its prefix, onto the sum over the batch.
  void add_dropped_prefix() {
    const auto sequence_head =
        static_cast<uint32_t>(sequence_.index * problem_.kv_heads() + kv_head_);
    for (int64_t row = 0; row < sequence_.prefix; ++row) {
      const auto logical_row = static_cast<uint32_t>(row);
      const int64_t at = row * sizes_.width;
      add_kept(task_sums_.key + at, sequence_sums_.key + at,
               {logical_row, sequence_head, kPrefixKey});
      add_kept(task_sums_.value + at, sequence_sums_.value + at,
               {logical_row, sequence_head, kPrefixValue});
    }
  }

  void add_kept(float* destination, const float* source, DropoutRow at) {
    int16_t* keep = scratch_.keep;
    fill_keep(keep, 0, problem_.head_dim, problem_.prefix_dropout, at);
    for (int64_t i = 0; i < problem_.head_dim; ++i) {
      if (keep[i]) destination[i] += source[i] * problem_.prefix_dropout.factor;
    }
  }

  void write(const Tokens& tokens, int64_t head, int64_t first, int64_t count, const float* rows,
             float factor) {
    for (int64_t row = 0; row < count; ++row) {
      store_row(row_pointer<Element>(tokens, sequence_, head, first + row),
                rows + row * sizes_.width, problem_.head_dim, factor);
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

  const BackwardProblem& problem_;
  const BackwardSizes<Operand> sizes_;
  Arena arena_;
  BackwardScratch<Operand, Element> scratch_;
  Positions<Operand, Element> positions_;
  const TileGradients<Operand, Element> tiles_;

  // Of the task.
  int64_t kv_head_, part_;
  PrefixSums task_sums_{};  // over the sequences of the chunk

  // Of the sequence.
  Sequence sequence_;
  PrefixSums sequence_sums_{};  // those of the task, or with prefix dropout its own
  float* grad_query_;           // [group, queries, width]

  // Of the block.
  bool is_first_block_;  // of the sequence: its grad_query holds nothing yet
  bool sums_cleared_;    // scratch's grad_key and grad_value may be added to
};

}  // namespace ptv2::PTV2_LEVEL
