// Packed columns, and where the rows of a sequence and the prefix that it reads lie.
#pragma once

#include "visibility.h"

#if defined(__SANITIZE_ADDRESS__)
#define PTV2_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PTV2_ADDRESS_SANITIZER
#endif
#endif
#if defined(PTV2_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

namespace ptv2::PTV2_LEVEL {

// Hands out aligned pieces of a scratch area; with a null base it only counts bytes. Under
// AddressSanitizer no piece may be left for the next one: what lies between them is poisoned.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  // `before`: elements in front of the returned address.
  template <class T>
  T* take(int64_t count, int64_t before = 0) {
    const int64_t size = static_cast<int64_t>(sizeof(T));
    const int64_t begin = used_, end = begin + (before + count) * size;
    used_ = round_up(end, 64) + kGap;
    if (base_ == nullptr) return nullptr;
#if defined(PTV2_ADDRESS_SANITIZER)
    ASAN_POISON_MEMORY_REGION(base_ + end, used_ - end);
#endif
    return reinterpret_cast<T*>(base_ + begin + before * size);
  }

  int64_t used() const { return used_; }

 private:
#if defined(PTV2_ADDRESS_SANITIZER)
  static constexpr int64_t kGap = 128;
#else
  static constexpr int64_t kGap = 0;
#endif
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

// Decisions for one row of a tile; the token part overwrites what the prefix part wrote too far.
inline void fill_block_keep(int16_t* keep, const Problem& problem, const Block& block, uint32_t row,
                            uint32_t sequence_head) {
  const Dropout& dropout = problem.attention_dropout;
  fill_keep(keep, block.prefix_first, block.prefix_count, dropout, {row, sequence_head, kPrefix});
  fill_keep(keep + block.token_offset(), block.token_first, block.token_count, dropout,
            {row, sequence_head, kTokens});
}

template <class Element>
Element* row_pointer(const Tokens& tokens, const Sequence& sequence, int64_t head, int64_t row) {
  return static_cast<Element*>(tokens.data) + sequence.start * tokens.start_stride +
         head * tokens.head_stride + row * tokens.row_stride;
}

inline float* statistic(const Statistics& statistics, const Sequence& sequence, int64_t head,
                        int64_t row) {
  return statistics.data + sequence.start * statistics.start_stride +
         head * statistics.head_stride + row * statistics.row_stride;
}

template <class Element>
Rows<Element> rows_of(const Tokens& tokens, const Sequence& sequence, int64_t head, int64_t first,
                      int64_t count) {
  return {row_pointer<Element>(tokens, sequence, head, first), tokens.row_stride, count};
}

template <class Element>
Rows<Element> rows_of(const Prefix& prefix, int64_t bank_row, int64_t head, int64_t count) {
  return {static_cast<const Element*>(prefix.data) + bank_row * prefix.bank_stride +
              head * prefix.head_stride,
          prefix.row_stride, count};
}

template <class Operand>
int64_t prefix_bytes(const Problem& problem, bool backward) {
  if (problem.prefix_dropout.drops) return 0;
  Arena arena(nullptr);
  const Geometry<Operand> geometry(problem.head_dim);
  PackedColumns<Operand>::take(arena, geometry, problem.prefix, backward);
  return arena.used();
}

// The area of a (row of the bank, head) in the prefixes that are packed once per call.
template <class Operand>
PackedColumns<Operand> shared_prefix(const Geometry<Operand>& geometry, const Problem& problem,
                                     bool backward, int64_t bank_row, int64_t head) {
  const int64_t area = problem.slot_of_row[bank_row] * problem.kv_heads() + head;
  Arena arena(problem.packed_prefix + area * prefix_bytes<Operand>(problem, backward));
  return PackedColumns<Operand>::take(arena, geometry, problem.prefix, backward);
}

// The packed prefix of a (sequence, key/value head): shared by all that read it, or with this
// sequence's dropout.
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

  void prepare(const Geometry<Operand>& geometry, const Problem& problem, const Sequence& sequence,
               int64_t head, int16_t* keep, bool backward) {
    if (!problem.prefix_dropout.drops) {
      packed = shared_prefix(geometry, problem, backward, sequence.bank_row, head);
      return;
    }
    const auto sequence_head = static_cast<uint32_t>(sequence.index * problem.kv_heads() + head);
    const auto drop = [&](Element* destination, const Prefix& prefix, Stream stream) {
      const auto rows = rows_of<Element>(prefix, sequence.bank_row, head, sequence.prefix);
      return drop_elements(destination, rows, problem.head_dim, keep, problem.prefix_dropout,
                           {0, sequence_head, stream});
    };
    const auto kept_key = drop(key, problem.prefix_key, kPrefixKey);
    const auto kept_value = drop(value, problem.prefix_value, kPrefixValue);
    packed.pack(geometry, kept_key, kept_value, backward);
  }
};

}  // namespace ptv2::PTV2_LEVEL
