// The columns of one sequence, [prefix ; visible tokens], cut into blocks that fit the cache.
#pragma once

#include "pack.h"

namespace ptv2::PTV2_LEVEL {

// Hands out aligned pieces of a scratch area; with a null base it only counts bytes.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Row lengths in words for one head_dim.
template <class Operand>
struct Geometry {
  explicit Geometry(int64_t head_dim)
      : head_dim(head_dim),
        steps(head_dim / Operand::depth),
        left_words(odd_lines(steps)),
        right_words(odd_lines(round_up(head_dim, kLanes))) {}

  int64_t head_dim;
  int64_t steps;        // words of a row whose sum runs over head_dim
  int64_t left_words;   // row stride of pack_left
  int64_t right_words;  // row stride of pack_right and of fp32 accumulators

  int64_t row_steps(int64_t rows) const { return (rows + Operand::depth - 1) / Operand::depth; }
  LeftOperand left(const uint32_t* packed) const { return {packed, left_words, 1}; }
  RightOperand right(const uint32_t* packed) const { return {packed, kPanel, right_words}; }
  RightOperand transposed(const uint32_t* packed) const { return {packed, steps * kPanel, kPanel}; }
};

// K and V of a run of columns, packed for the products of a direction.
template <class Operand>
struct PackedColumns {
  uint32_t* keys_transposed;
  uint32_t* values_transposed;  // backward
  uint32_t* keys;               // backward
  uint32_t* values;             // forward

  static PackedColumns take(Arena& arena, const Geometry<Operand>& geometry, int64_t count,
                            bool backward) {
    const int64_t transposed = round_up(count, kPanel) * geometry.steps;
    const int64_t rows = geometry.row_steps(count) * geometry.right_words;
    PackedColumns packed{};
    packed.keys_transposed = arena.take<uint32_t>(transposed);
    packed.values_transposed = arena.take<uint32_t>(backward ? transposed : 0);
    packed.keys = arena.take<uint32_t>(backward ? rows : 0);
    packed.values = arena.take<uint32_t>(backward ? 0 : rows);
    return packed;
  }

  template <class Element>
  void pack(const Geometry<Operand>& geometry, Rows<Element> key, Rows<Element> value,
            bool backward) const {
    pack_transposed<Operand>(keys_transposed, key, geometry.head_dim);
    if (backward) {
      pack_transposed<Operand>(values_transposed, value, geometry.head_dim);
      pack_right<Operand>(keys, geometry.right_words, key, geometry.head_dim);
    } else {
      pack_right<Operand>(values, geometry.right_words, value, geometry.head_dim);
    }
  }

  // The same columns without the first ones, a multiple of kPanel.
  PackedColumns from(const Geometry<Operand>& geometry, int64_t first) const {
    const int64_t transposed = first * geometry.steps;
    const int64_t rows = geometry.row_steps(first) * geometry.right_words;
    return {keys_transposed + transposed, values_transposed + transposed, keys + rows,
            values + rows};
  }
};

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
inline TokenRange visible_tokens(const Problem& problem, int64_t sequence) {
  TokenRange range{0, problem.tokens};
  if (problem.key_mask == nullptr) return range;
  const bool* mask = problem.key_mask + sequence * problem.mask_batch_stride;
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

// -1 for visible columns of a block, 0 for masked ones and for padding.
inline void fill_visible(int32_t* visible, const Problem& problem, int64_t sequence,
                         const Block& block) {
  const int64_t offset = block.token_offset();
  for (int64_t i = 0; i < offset; ++i) visible[i] = i < block.prefix_count ? -1 : 0;
  const int64_t stride = problem.mask_column_stride;
  const bool* mask = problem.key_mask;
  if (mask != nullptr) mask += sequence * problem.mask_batch_stride + block.token_first * stride;
  const int64_t width = block.width();
  for (int64_t i = 0; offset + i < width; ++i) {
    const bool shown = i < block.token_count && (mask == nullptr || mask[i * stride]);
    visible[offset + i] = shown ? -1 : 0;
  }
}

// Whether rows differ in the tokens that they see.
inline bool has_row_limits(const Problem& problem) {
  return problem.context_lengths != nullptr || problem.window >= 0;
}

// The tokens that context_lengths and window show to a row: one run, whose ends grow with the row.
inline TokenRange row_tokens(const Problem& problem, int64_t sequence, int64_t row) {
  TokenRange range{0, problem.tokens};
  if (problem.context_lengths != nullptr) {
    range.end = smaller(range.end, larger(problem.context_lengths[sequence], row + 1));
  }
  if (problem.window >= 0) {
    range.begin = larger(0, row - problem.window);
    range.end = smaller(range.end, row + problem.window + 1);
  }
  return range;
}

// The block without the tokens at its end that no row of [first, first + rows) sees; without any
// token when none of them is seen.
inline Block seen_block(Block block, const Problem& problem, int64_t sequence, int64_t first,
                        int64_t rows) {
  if (!has_row_limits(problem)) return block;
  const int64_t end = row_tokens(problem, sequence, first + rows - 1).end - block.token_first;
  const int64_t begin = row_tokens(problem, sequence, first).begin - block.token_first;
  block.token_count = begin >= block.token_count ? 0 : larger(0, smaller(block.token_count, end));
  return block;
}

// What one row sees of a block, out of what the padding mask shows.
inline void fill_row_visible(int32_t* row_visible, const int32_t* visible, const Problem& problem,
                             int64_t sequence, const Block& block, int64_t row) {
  const TokenRange range = row_tokens(problem, sequence, row);
  const int64_t offset = block.token_offset(), width = block.width();
  const int64_t begin = larger(0, smaller(range.begin - block.token_first, width - offset));
  const int64_t end = larger(begin, smaller(range.end - block.token_first, width - offset));
  for (int64_t i = 0; i < offset; ++i) row_visible[i] = visible[i];
  for (int64_t i = offset; i < offset + begin; ++i) row_visible[i] = 0;
  for (int64_t i = offset + begin; i < offset + end; ++i) row_visible[i] = visible[i];
  for (int64_t i = offset + end; i < width; ++i) row_visible[i] = 0;
}

// Decisions for one row of a tile; the token part overwrites what the prefix part wrote too far.
inline void fill_block_keep(int16_t* keep, const Problem& problem, const Block& block, uint32_t row,
                            uint32_t sequence_head) {
  const Dropout& dropout = problem.attention_dropout;
  fill_keep(keep, block.prefix_first, block.prefix_count, dropout, {row, sequence_head, kPrefix});
  fill_keep(keep + block.token_offset(), block.token_first, block.token_count, dropout,
            {row, sequence_head, kTokens});
}

template <class Element>
Rows<Element> rows_of(const Tokens& tokens, int64_t sequence, int64_t head, int64_t first,
                      int64_t count) {
  const auto* data = static_cast<const Element*>(tokens.data);
  return {
      data + sequence * tokens.batch_stride + head * tokens.head_stride + first * tokens.row_stride,
      tokens.row_stride, count};
}

template <class Element>
Element* row_pointer(const Tokens& tokens, int64_t sequence, int64_t head, int64_t row) {
  return static_cast<Element*>(tokens.data) + sequence * tokens.batch_stride +
         head * tokens.head_stride + row * tokens.row_stride;
}

template <class Element>
Rows<Element> rows_of(const Prefix& prefix, int64_t head, int64_t count) {
  return {static_cast<const Element*>(prefix.data) + head * prefix.head_stride, prefix.row_stride,
          count};
}

template <class Operand>
int64_t prefix_bytes(const Problem& problem, bool backward) {
  if (problem.prefix_dropout.drops) return 0;
  Arena arena(nullptr);
  const Geometry<Operand> geometry(problem.head_dim);
  PackedColumns<Operand>::take(arena, geometry, problem.prefix, backward);
  return arena.used();
}

// The area of one head in the prefix that is packed once per call.
template <class Operand>
PackedColumns<Operand> shared_prefix(const Geometry<Operand>& geometry, const Problem& problem,
                                     bool backward, int64_t head) {
  Arena arena(problem.packed_prefix + head * prefix_bytes<Operand>(problem, backward));
  return PackedColumns<Operand>::take(arena, geometry, problem.prefix, backward);
}

// The packed prefix of a (sequence, key/value head): shared by the batch, or masked for this
// sequence.
template <class Operand, class Element>
struct PrefixSource {
  PackedColumns<Operand> packed;
  Element* key;
  Element* value;

  static PrefixSource take(Arena& arena, const Geometry<Operand>& geometry, const Problem& problem,
                           bool backward) {
    const bool drops = problem.prefix_dropout.drops;
    const int64_t elements = drops ? problem.prefix * problem.head_dim : 0;
    PrefixSource source;
    source.key = arena.take<Element>(elements);
    source.value = arena.take<Element>(elements);
    source.packed =
        PackedColumns<Operand>::take(arena, geometry, drops ? problem.prefix : 0, backward);
    return source;
  }

  void prepare(const Geometry<Operand>& geometry, const Problem& problem, int64_t sequence,
               int64_t head, int16_t* keep, bool backward) {
    if (!problem.prefix_dropout.drops) {
      packed = shared_prefix(geometry, problem, backward, head);
      return;
    }
    const auto sequence_head = static_cast<uint32_t>(sequence * problem.kv_heads() + head);
    const auto kept_key = drop_elements(
        key, rows_of<Element>(problem.prefix_key, head, problem.prefix), problem.head_dim, keep,
        problem.prefix_dropout, {0, sequence_head, kPrefixKey});
    const auto kept_value = drop_elements(
        value, rows_of<Element>(problem.prefix_value, head, problem.prefix), problem.head_dim, keep,
        problem.prefix_dropout, {0, sequence_head, kPrefixValue});
    packed.pack(geometry, kept_key, kept_value, backward);
  }
};

}  // namespace ptv2::PTV2_LEVEL
