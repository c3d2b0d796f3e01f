// Which columns are visible to the rows of a tile, and what is added to their scores.
//
// Two words, here and in the Triton kernels. A column is *visible* to a row that attends to it: a
// prefix column always, a token column as key_mask, context_lengths and window say; others are
// hidden from it. An element is *inside* when there is one: what a tile or a vector has beyond its
// sequence, its prefix or head_dim is padding, neither read nor counted.
#pragma once

#include "pack.h"

namespace ptv2::PTV2_LEVEL {

// Columns that lie side by side in a tile: prefix columns, then token columns at token_offset.
struct Block {
  int64_t prefix_first, prefix_count, token_first, token_count;

  int64_t token_offset() const { return round_up(prefix_count, kLanes); }
  int64_t width() const { return token_offset() + round_up(token_count, kLanes); }
};

struct TokenRange {
  int64_t begin, end;
};

// The columns between the first (rounded down to a Philox call) and the last visible token.
inline TokenRange visible_tokens(const Problem& problem, const Sequence& sequence) {
  TokenRange range{0, sequence.tokens};
  if (problem.key_mask == nullptr) return range;
  const bool* mask = problem.key_mask + sequence.index * problem.mask_batch_stride;
  const int64_t stride = problem.mask_column_stride;
  while (range.end > 0 && !mask[(range.end - 1) * stride]) --range.end;
  while (range.begin < range.end && !mask[range.begin * stride]) ++range.begin;
  range.begin -= range.begin % kColumnsPerCall;
  return range;
}

// Cuts [prefix ; tokens] into blocks of at most `columns` columns, about equal in length.
class BlockWalk {
 public:
  BlockWalk(int64_t prefix, TokenRange tokens, int64_t columns) : prefix_(prefix), tokens_(tokens) {
    const int64_t total = prefix + tokens.end - tokens.begin;
    const int64_t blocks = larger(1, (total + columns - 1) / columns);
    columns_ = round_up((total + blocks - 1) / blocks, larger(kPanel, kColumnsPerCall));
  }

  bool next(Block& block) {
    if (next_prefix_ == prefix_ && tokens_.begin == tokens_.end) return false;
    block.prefix_first = next_prefix_;
    block.prefix_count = smaller(columns_, prefix_ - next_prefix_);
    next_prefix_ += block.prefix_count;
    const int64_t left = columns_ - round_up(block.prefix_count, kColumnsPerCall);
    block.token_first = tokens_.begin;
    block.token_count = smaller(left, tokens_.end - tokens_.begin);
    tokens_.begin += block.token_count;
    return true;
  }

 private:
  int64_t prefix_;
  TokenRange tokens_;
  int64_t columns_, next_prefix_ = 0;
};

// -1 for the columns of a block that key_mask leaves visible, 0 for others and for padding.
inline void fill_visible(int32_t* visible, const Problem& problem, const Sequence& sequence,
                         const Block& block) {
  const int64_t offset = block.token_offset();
  for (int64_t i = 0; i < offset; ++i) visible[i] = i < block.prefix_count ? -1 : 0;
  const int64_t stride = problem.mask_column_stride;
  const bool* mask = problem.key_mask;
  if (mask != nullptr)
    mask += sequence.index * problem.mask_batch_stride + block.token_first * stride;
  const int64_t width = block.width();
  for (int64_t i = 0; offset + i < width; ++i) {
    const bool inside = i < block.token_count;
    visible[offset + i] = inside && (mask == nullptr || mask[i * stride]) ? -1 : 0;
  }
}

// Whether rows differ in the tokens that are visible to them.
inline bool has_row_limits(const Problem& problem) {
  return problem.context_lengths != nullptr || problem.window >= 0;
}

// The tokens that context_lengths and window leave visible to a row: one run, whose ends grow with
// the row.
inline TokenRange visible_to_row(const Problem& problem, const Sequence& sequence, int64_t row) {
  TokenRange range{0, sequence.tokens};
  if (problem.context_lengths != nullptr) {
    range.end = smaller(range.end, larger(problem.context_lengths[sequence.index], row + 1));
  }
  if (problem.window >= 0) {
    range.begin = larger(0, row - problem.window);
    range.end = smaller(range.end, row + problem.window + 1);
  }
  return range;
}

// The block without the tokens at its end that are hidden from all rows of [first, first + rows);
// without any token when all of them are.
inline Block visible_block(Block block, const Problem& problem, const Sequence& sequence,
                           int64_t first, int64_t rows) {
  if (!has_row_limits(problem)) return block;
  const int64_t end = visible_to_row(problem, sequence, first + rows - 1).end - block.token_first;
  const int64_t begin = visible_to_row(problem, sequence, first).begin - block.token_first;
  block.token_count = begin >= block.token_count ? 0 : larger(0, smaller(block.token_count, end));
  return block;
}

// What is visible to one row of a block, out of what key_mask leaves visible.
inline void fill_row_visible(int32_t* row_visible, const int32_t* visible, const Problem& problem,
                             const Sequence& sequence, const Block& block, int64_t row) {
  const TokenRange range = visible_to_row(problem, sequence, row);
  const int64_t offset = block.token_offset(), width = block.width();
  const int64_t begin = larger(0, smaller(range.begin - block.token_first, width - offset));
  const int64_t end = larger(begin, smaller(range.end - block.token_first, width - offset));
  for (int64_t i = 0; i < offset; ++i) row_visible[i] = visible[i];
  for (int64_t i = offset; i < offset + begin; ++i) row_visible[i] = 0;
  for (int64_t i = offset + begin; i < offset + end; ++i) row_visible[i] = visible[i];
  for (int64_t i = offset + end; i < width; ++i) row_visible[i] = 0;
}

// The bias of one row of a block; 0 for prefix columns and for padding.
template <class Element>
void copy_bias(float* row_bias, const Element* source, const Block& block) {
  const int64_t offset = block.token_offset(), width = block.width();
  for (int64_t i = 0; i < offset; ++i) row_bias[i] = 0.0f;
  for (int64_t i = 0; i < block.token_count; ++i) row_bias[offset + i] = to_float(source[i]);
  for (int64_t i = offset + block.token_count; i < width; ++i) row_bias[i] = 0.0f;
}

inline void fill_bias(float* row_bias, const Problem& problem, const Sequence& sequence,
                      int64_t head, const Block& block, int64_t row) {
  const Bias& bias = problem.bias;
  const int64_t at = sequence.index * bias.batch_stride + head * bias.head_stride +
                     row * bias.row_stride + block.token_first;
  if (bias.is_float) {
    copy_bias(row_bias, static_cast<const float*>(bias.data) + at, block);
  } else {
    copy_bias(row_bias, static_cast<const Bfloat16*>(bias.data) + at, block);
  }
}

}  // namespace ptv2::PTV2_LEVEL
