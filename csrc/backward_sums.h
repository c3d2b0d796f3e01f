// How a backward pass is cut into tasks, and the sums that its tasks leave to be added: of the
// prefix gradient by chunks of the batch, of grad_query by parts of the columns.
#pragma once

#include "columns.h"

namespace ptv2::PTV2_LEVEL {

PTV2_INLINE int64_t backward_columns(int64_t head_dim) {
  return larger(64, smaller(192, 12288 / head_dim / 64 * 64));
}

PTV2_INLINE void clear_rows(float* rows, int64_t count) {
  __builtin_memset(rows, 0, count * sizeof(float));
}

inline BlockWalk walk_of(const BackwardProblem& problem, const Sequence& sequence,
                         TokenRange tokens) {
  const bool uses_prefix = problem.needs_query || problem.needs_prefix;
  return BlockWalk(uses_prefix ? sequence.prefix : 0, tokens, backward_columns(problem.head_dim));
}

inline TokenRange tokens_of(const BackwardProblem& problem, const Sequence& sequence) {
  const bool uses_tokens = problem.needs_query || problem.needs_key_value;
  return uses_tokens ? visible_tokens(problem, sequence) : TokenRange{0, 0};
}

// Part 0 has every block with prefix columns, and each block after them is a part: then a row of
// grad_query is one sum to a later part, and adding parts rounds as adding blocks does.
inline bool begins_part(const Block& block, bool is_first) {
  return !is_first && block.prefix_count == 0;
}

inline int64_t parts_of(const BackwardProblem& problem, const Sequence& sequence) {
  BlockWalk walk = walk_of(problem, sequence, tokens_of(problem, sequence));
  int64_t parts = 1;
  bool is_first = true;
  for (Block block; walk.next(block); is_first = false) parts += begins_part(block, is_first);
  return parts;
}

// Where a row stands in query_partial: [parts, sequences, H, queries of the sequence].
inline int64_t partial_row(const BackwardProblem& problem, int64_t part, int64_t sequence,
                           int64_t head, int64_t row) {
  const auto rows_before = [&](int64_t index) {
    return problem.starts != nullptr ? problem.starts[index] : index * problem.queries;
  };
  return (part * rows_before(problem.batch) + rows_before(sequence)) * problem.heads +
         head * problem.sequence(sequence).queries + row;
}

template <class Operand>
int64_t partial_bytes(const BackwardProblem& problem) {
  const Geometry<Operand> geometry(problem.head_dim);
  const int64_t rows = problem.chunk_count * problem.kv_heads() * 2 * problem.prefix;
  return problem.needs_prefix ? rows * geometry.right_words * sizeof(float) : 0;
}

// Into how many parts the columns of the longest sequence can be cut.
inline int64_t column_parts(const BackwardProblem& problem) {
  int64_t most = 1;
  for (int64_t i = 0; i < problem.batch; ++i) {
    most = larger(most, parts_of(problem, problem.sequence(i)));
  }
  return most;
}

template <class Operand>
int64_t query_partial_bytes(const BackwardProblem& problem) {
  if (problem.column_parts == 1 || !problem.needs_query) return 0;
  return partial_row(problem, problem.column_parts, 0, 0, 0) *
         Geometry<Operand>(problem.head_dim).right_words * sizeof(float);
}

// grad_query of one (sequence, head): the sums of its parts, added in order.
template <class Operand, class Element>
void reduce_query(const BackwardProblem& problem, int64_t task) {
  const int64_t width = Geometry<Operand>(problem.head_dim).right_words;
  const Sequence sequence = problem.sequence(task / problem.heads);
  const int64_t head = task % problem.heads, parts = parts_of(problem, sequence);
  for (int64_t row = 0; row < sequence.queries; ++row) {
    float sums[kMaxHeadDim + kLanes] = {};
    for (int64_t part = 0; part < parts; ++part) {
      const float* rows =
          problem.query_partial + partial_row(problem, part, sequence.index, head, row) * width;
      for (int64_t i = 0; i < problem.head_dim; ++i) {
        sums[i] = part == 0 ? rows[i] : sums[i] + rows[i];
      }
    }
    store_row(row_pointer<Element>(problem.grad_query, sequence, head, row), sums, problem.head_dim,
              problem.scale);
  }
}

// The gradient of the gates of the query heads that share a head of a row of the bank: the sums of
// the chunks, added in order.
inline void reduce_gates(const BackwardProblem& problem, int64_t bank_row, int64_t kv_head) {
  if (problem.prefix_gate.data == nullptr) return;
  for (int64_t member = 0; member < problem.group; ++member) {
    const int64_t head = kv_head * problem.group + member;
    float sum = 0.0f;
    for (int64_t chunk = 0; chunk < problem.chunk_count; ++chunk) {
      if (problem.chunks[chunk].slot != problem.slot_of_row[bank_row]) continue;
      sum += problem.gate_partial[chunk * problem.heads + head];
    }
    problem.grad_prefix_gate[bank_row * problem.heads + head] = sum;
  }
}

// The chunks' sums of one head of a row of the bank, added in the order of the chunks.
template <class Operand, class Element>
void reduce_prefix(const BackwardProblem& problem, int64_t bank_row, int64_t head) {
  const int64_t width = Geometry<Operand>(problem.head_dim).right_words;
  const int64_t head_rows = 2 * problem.prefix, head_dim = problem.head_dim;
  const int64_t first = (bank_row * problem.kv_heads() + head) * problem.prefix;
  for (int64_t row = 0; row < head_rows; ++row) {
    float sums[kMaxHeadDim + kLanes] = {};
    for (int64_t chunk = 0; chunk < problem.chunk_count; ++chunk) {
      if (problem.chunks[chunk].slot != problem.slot_of_row[bank_row]) continue;
      const float* part =
          problem.partial + ((chunk * problem.kv_heads() + head) * head_rows + row) * width;
      for (int64_t i = 0; i < head_dim; ++i) sums[i] += part[i];
    }
    const bool is_key = row < problem.prefix;
    void* gradient = is_key ? problem.grad_prefix_key : problem.grad_prefix_value;
    const int64_t prefix_row = first + (is_key ? row : row - problem.prefix);
    store_row(static_cast<Element*>(gradient) + prefix_row * head_dim, sums, head_dim, 1.0f);
  }
  reduce_gates(problem, bank_row, head);
}

}  // namespace ptv2::PTV2_LEVEL
