// What one call of the operator is, in plain data: filled by attention.cpp, read by every CPU
// level. Strides count elements; the last stride of every tensor is 1.
#pragma once

#include <cstdint>

namespace ptv2 {

// [B, H, rows, D]
struct Tokens {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// [H_kv, P, D]
struct Prefix {
  void* data;
  int64_t head_stride, row_stride;
};

// Counter-based dropout (Philox-4x32-7): an element is dropped when its 16 bits are <=
// last_dropped.
struct Dropout {
  bool drops;
  uint16_t last_dropped;
  float factor;  // 1 / (1 - p)
  uint32_t key[2];
};

struct Problem {
  int64_t batch, heads, queries, tokens, prefix, head_dim;
  int64_t group;  // query heads that share a key/value head; heads is a multiple of it
  Tokens query, key, value;
  Prefix prefix_key, prefix_value;
  const bool* key_mask;  // [B, S], true = attend, or null
  int64_t mask_batch_stride, mask_column_stride;
  const int32_t* context_lengths;  // [B], or null: bidirectional
  int64_t window;                  // half-width over tokens, negative = none
  float scale;
  Dropout attention_dropout, prefix_dropout;
  Tokens out;
  float* lse;           // [B, H, T], natural logarithm
  char* packed_prefix;  // [H_kv] areas filled by pack_prefix, unused with prefix dropout

  int64_t kv_heads() const { return heads / group; }
};

struct ForwardProblem : Problem {
  int64_t query_chunk;  // rows of a task
};

struct BackwardProblem : Problem {
  bool needs_query, needs_key_value, needs_prefix;
  int64_t batch_chunks;
  Tokens grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse;  // [B, H, T], or null
  float* partial;         // fp32 sums of the prefix gradient by chunk of the batch
};

// The entry points for one dtype. Sizes are in bytes and depend on the problem only.
struct Kernels {
  int64_t (*prefix_bytes)(const Problem&, bool backward);
  void (*pack_prefix)(const Problem&, bool backward, int64_t head);
  int64_t (*forward_scratch_bytes)(const ForwardProblem&);
  void (*forward)(const ForwardProblem&, int64_t task, char* scratch);
  int64_t (*backward_scratch_bytes)(const BackwardProblem&);
  void (*backward)(const BackwardProblem&, int64_t task, char* scratch);
  int64_t (*partial_bytes)(const BackwardProblem&);
  void (*reduce_prefix)(const BackwardProblem&, int64_t head, void* grad_key, void* grad_value);
};

// A set of CPU instructions and the kernels built for it.
struct Level {
  const char* name;
  Kernels float_kernels, bfloat16_kernels;
};

}  // namespace ptv2
