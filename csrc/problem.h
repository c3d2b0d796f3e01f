// What one call of the operator is, in plain data: filled by attention.cpp, completed by run.cpp,
// read by every CPU level. Strides count elements; the last stride of every tensor is 1.
#pragma once

#include <cstdint>

namespace ptv2 {

// [starts, H, rows, D]: a start is a sequence, or in the packed layout the first token of one (and
// start_stride is row_stride).
struct Tokens {
  void* data;
  int64_t start_stride, head_stride, row_stride;
};

// lse and its gradient: [starts, H, rows]
struct Statistics {
  float* data;
  int64_t start_stride, head_stride, row_stride;
};

// [R, H_kv, P, D]
struct Prefix {
  void* data;
  int64_t bank_stride, head_stride, row_stride;
};

// [1|B, H, T, S]
struct Bias {
  const void* data;  // or null
  bool is_float;     // else bfloat16
  int64_t batch_stride, head_stride, row_stride;
};

// [H, slots, D], of disentangled attention
struct Table {
  const void* data;  // or null
  int64_t head_stride, row_stride;
};

// [R, H], 0 or more: by what the weights of prefix columns are multiplied.
struct Gate {
  const float* data;  // or null: 1
  int64_t bank_stride, head_stride;
};

// Counter-based dropout (Philox-4x32-7): an element is dropped when its 16 bits are <=
// last_dropped.
struct Dropout {
  bool drops;
  uint16_t last_dropped;
  float factor;  // 1 / (1 - p)
  uint32_t key[2];
};

// Where a row of dropout decisions stands: see ops/dropout.py.
struct DropoutRow {
  uint32_t row, sequence_head, stream;
};

struct Sequence {
  int64_t index;  // in the batch
  int64_t start;  // of its rows in Tokens and Statistics
  int64_t queries, tokens;
  int64_t bank_row, prefix;  // the row of the bank that it reads, and how many columns that has
};

struct Problem {
  int64_t batch, heads, head_dim;
  int64_t queries, tokens;  // of a sequence; in the packed layout of the longest one
  int64_t group;            // query heads that share a key/value head; heads is a multiple of it
  int64_t bank_rows, prefix;
  Tokens query, key, value;
  Prefix prefix_key, prefix_value;
  const bool* key_mask;  // [B, S], true = attend, or null
  int64_t mask_batch_stride, mask_column_stride;
  const int32_t* starts;           // [B + 1]: the packed layout, or null
  const int32_t* prefix_index;     // [B], or null: all read row 0
  const int32_t* prefix_lengths;   // [R], or null: all have `prefix` columns
  const int32_t* context_lengths;  // [B], or null: bidirectional
  int64_t window;                  // half-width over tokens, negative = none
  Bias bias;
  Table position_key, position_query;
  const int32_t* position_slots;  // the slot of distance d at d + position_reach, or null
  int64_t position_reach;         // tokens - 1 or more
  Gate prefix_gate;
  float scale;
  Dropout attention_dropout, prefix_dropout;
  Tokens out;
  Statistics lse;  // natural logarithm

  // Filled by run.cpp. Rows of the bank that some sequence reads are numbered by slots.
  const int32_t* slot_of_row;  // [R], -1 for a row that no sequence reads
  char* packed_prefix;         // [slots, H_kv] areas, unused with prefix dropout
  char* packed_positions;      // [H] areas

  int64_t kv_heads() const { return heads / group; }

  int64_t prefix_of_row(int64_t row) const {
    return prefix_lengths == nullptr ? prefix : prefix_lengths[row];
  }

  float gate_of(int64_t bank_row, int64_t head) const {
    if (prefix_gate.data == nullptr) return 1.0f;
    return prefix_gate.data[bank_row * prefix_gate.bank_stride + head * prefix_gate.head_stride];
  }

  Sequence sequence(int64_t index) const {
    Sequence sequence{index, index, queries, tokens, 0, 0};
    if (starts != nullptr) {
      sequence.start = starts[index];
      sequence.queries = sequence.tokens = starts[index + 1] - starts[index];
    }
    if (prefix_index != nullptr) sequence.bank_row = prefix_index[index];
    sequence.prefix = prefix_of_row(sequence.bank_row);
    return sequence;
  }
};

struct ForwardProblem : Problem {
  int64_t query_chunk;  // rows of a task
};

// Sequences order[first] to order[last - 1], which read the same row of the bank.
struct BatchChunk {
  int64_t slot, first, last;
};

struct BackwardProblem : Problem {
  bool needs_query, needs_key_value, needs_prefix;
  Tokens grad_out, grad_query, grad_key, grad_value;
  Statistics grad_lse;                        // data may be null
  void *grad_prefix_key, *grad_prefix_value;  // [R, H_kv, P, D] without gaps
  float* grad_prefix_gate;                    // [R, H] without gaps

  // Filled by run.cpp.
  const int32_t* order;  // [B]: the sequences by slot, each slot's in the order of the batch
  const BatchChunk* chunks;
  int64_t chunk_count;
  float* partial;        // [chunks, H_kv] fp32 sums of the prefix gradient
  float* gate_partial;   // [chunks, H] fp32 sums of the gate's gradient
  int64_t column_parts;  // tasks to a (chunk, head); 1 unless there are more threads than those
  float* query_partial;  // [column_parts] fp32 sums of grad_query, unused for one part
};

// The entry points for one dtype. Sizes are in bytes and depend on the problem only.
struct Kernels {
  int64_t (*prefix_bytes)(const Problem&, bool backward);
  void (*pack_prefix)(const Problem&, bool backward, int64_t bank_row, int64_t head);
  int64_t (*position_bytes)(const Problem&, bool backward);
  void (*pack_positions)(const Problem&, bool backward, int64_t head);
  int64_t (*forward_scratch_bytes)(const ForwardProblem&);
  void (*forward)(const ForwardProblem&, int64_t task, char* scratch);
  int64_t (*backward_scratch_bytes)(const BackwardProblem&);
  void (*backward)(const BackwardProblem&, int64_t task, char* scratch);
  int64_t (*partial_bytes)(const BackwardProblem&);
  int64_t (*column_parts)(const BackwardProblem&);
  int64_t (*query_partial_bytes)(const BackwardProblem&);
  void (*reduce_query)(const BackwardProblem&, int64_t task);
  void (*reduce_prefix)(const BackwardProblem&, int64_t bank_row, int64_t head);
  int64_t (*keep_bytes)(int64_t columns);
  void (*drop_row)(void* destination, const void* source, int64_t columns, const Dropout&,
                   DropoutRow, char* scratch);
};

// bias_activation, gated_activation and their gradients: grad_out [R, C], or the result of those
// without it; input, or the gradient of it, [R, C], of the gated ones [R, 2C]. All without gaps.
struct ActivationRows {
  const void* input;
  const float* bias;     // as long as a row of input, or null
  const void* grad_out;  // of the gradients only
  void* result;
  int64_t columns;       // C
  bool activated_first;  // of the gated ones: the first half of a row is the activated one
};

// dropout_add_norm, its gradient and its parts: [R, C] without gaps. Each fills what it reads and
// writes.
struct NormRows {
  const void *input, *residual;
  const float *bias, *weight, *beta;  // [C]; bias and beta may be null
  float epsilon;
  bool subtract_mean;  // LayerNorm, and not RMSNorm
  Dropout dropout;
  const int32_t* coordinates;  // [R, 2]: the sequence of a row, and its row in it
  uint32_t stream;
  int64_t columns;
  void *out, *total;
  float* statistics;                               // [R, 2]
  const void *grad_out, *grad_other, *grad_total;  // each may be null
  void *grad_residual, *grad_input;                // grad_input may be null
};

// rotate_: the first `heads` heads of every row.
struct RotaryRows {
  void* packed;  // [R, heads, head_dim]
  int64_t row_stride;
  const float *cosine, *sine;  // [R, pairs]
  int64_t pairs, heads, head_dim;
  bool interleaved, inverse;
};

// The entry points for one activation, over the rows from first to last - 1.
struct ActivationKernels {
  using Run = void (*)(const ActivationRows&, int64_t first, int64_t last);
  Run forward, backward, gated, gated_backward;
};

// In the order of RowKernels::activations.
constexpr const char* kActivationNames[] = {"gelu", "gelu_tanh", "silu", "relu", "quick_gelu"};
constexpr int kActivations = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

// The entry points for the dtypes of input and residual, over the rows from first to last - 1.
struct RowKernels {
  ActivationKernels activations[kActivations];
  int64_t (*norm_scratch_bytes)(int64_t columns);
  void (*add_norm)(const NormRows&, int64_t first, int64_t last, char* scratch);
  void (*add_norm_backward)(const NormRows&, int64_t first, int64_t last, char* scratch);
  void (*norm)(const NormRows&, int64_t first, int64_t last);
  void (*add)(const NormRows&, int64_t first, int64_t last, char* scratch);
  void (*add_backward)(const NormRows&, int64_t first, int64_t last, char* scratch);
  int64_t (*rotate_scratch_bytes)(int64_t pairs);
  void (*rotate)(const RotaryRows&, int64_t first, int64_t last, char* scratch);
};

// A set of CPU instructions and the kernels built for it.
struct Level {
  const char* name;
  Kernels float_kernels, bfloat16_kernels;
  RowKernels float_rows, bfloat16_rows, mixed_rows;  // mixed: a bfloat16 input, a float residual
  void (*exp)(const float* source, float* destination, int64_t count);
};

}  // namespace ptv2
