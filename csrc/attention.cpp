#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace ptv2 {
namespace {

// Batch, queries and tokens of a padded or a packed call. Rows behind the last packed sequence are
// neither read nor written.
void fill_layout(Problem& problem, const Tensor& query, const Tensor& key,
                 const AttentionOptions& options) {
  const int64_t rank = options.cu_seqlens.has_value() ? 3 : 4;
  STD_TORCH_CHECK(query.dim() == rank && key.dim() == rank, "query and key: expected ", rank,
                  " dimensions, got ", query.dim(), " and ", key.dim());
  problem.heads = query.size(1);
  problem.head_dim = query.size(rank - 1);
  problem.starts = nullptr;
  if (!options.cu_seqlens.has_value()) {
    problem.batch = query.size(0);
    problem.queries = query.size(2);
    problem.tokens = key.size(2);
    return;
  }
  const int64_t total = query.size(0), entries = options.cu_seqlens->numel();
  problem.starts = integers("cu_seqlens", options.cu_seqlens, entries, 0, total);
  problem.batch = entries - 1;
  problem.queries = problem.tokens = options.max_seqlen;
  STD_TORCH_CHECK(entries > 0 && problem.starts[0] == 0 && problem.starts[entries - 1] <= total,
                  "cu_seqlens: expected values from 0 to at most ", total);
  for (int64_t i = 0; i < problem.batch; ++i) {
    const int64_t length = problem.starts[i + 1] - problem.starts[i];
    STD_TORCH_CHECK(length >= 0 && length <= options.max_seqlen,
                    "cu_seqlens: expected lengths in 0..", options.max_seqlen, ", got ", length);
  }
}

void fill_bias(Problem& problem, const AttentionOptions& options) {
  problem.bias.data = nullptr;
  if (!options.bias.has_value()) return;
  const Tensor& bias = *options.bias;
  const bool shared = bias.dim() == 4 && bias.size(0) == 1;
  check_shape("bias", bias,
              {shared ? 1 : problem.batch, problem.heads, problem.queries, problem.tokens});
  const bool is_float = bias.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(bias.is_cpu() && (is_float || bias.scalar_type() == ScalarType::BFloat16),
                  "bias: expected float32 or bfloat16 on the CPU");
  STD_TORCH_CHECK(bias.numel() == 0 || bias.stride(3) == 1, "bias: expected last stride 1, got ",
                  bias.stride(3));
  problem.bias = {bias.const_data_ptr(), is_float, shared ? 0 : bias.stride(0), bias.stride(1),
                  bias.stride(2)};
}

// The tables of disentangled attention: [H, slots, D], as many slots in both.
void fill_positions(Problem& problem, const Tensor& query, const AttentionOptions& options) {
  problem.position_key = problem.position_query = Table{};
  problem.position_slots = nullptr;
  const auto& slots = options.position_slots;
  if (!slots.has_value()) return;
  STD_TORCH_CHECK(options.position_key.has_value() || options.position_query.has_value(),
                  "position_key, position_query: expected at least one with position_slots");
  STD_TORCH_CHECK(problem.group == 1, "key: expected query's ", problem.heads,
                  " heads with position_slots, got ", problem.kv_heads());
  STD_TORCH_CHECK(problem.queries == problem.tokens, "position_slots: expected None unless S = T");
  STD_TORCH_CHECK(problem.window < 0, "window: expected none with position_slots");
  STD_TORCH_CHECK(problem.context_lengths == nullptr,
                  "context_lengths: expected None with position_slots");
  STD_TORCH_CHECK(problem.bias.data == nullptr, "bias: expected None with position_slots");
  const Tensor& first = options.position_key.has_value() ? *options.position_key
                                                         : *options.position_query;
  const int64_t count = first.dim() == 3 ? first.size(1) : 0;
  const auto table = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) return Table{};
    check_operand(name, *tensor, query.scalar_type(), {problem.heads, count, problem.head_dim});
    return Table{tensor->const_data_ptr(), tensor->stride(0), tensor->stride(1)};
  };
  problem.position_key = table("position_key", options.position_key);
  problem.position_query = table("position_query", options.position_query);
  const int64_t distances = slots->numel();
  STD_TORCH_CHECK(distances % 2 == 1 && distances >= 2 * problem.tokens - 1,
                  "position_slots: expected an odd number of entries, at least ",
                  2 * problem.tokens - 1, ", got ", distances);
  problem.position_slots = integers("position_slots", slots, distances, 0, count - 1);
  problem.position_reach = distances / 2;
}

void fill_gate(Problem& problem, const AttentionOptions& options) {
  problem.prefix_gate = Gate{};
  if (!options.prefix_gate.has_value()) return;
  const Tensor& gate = *options.prefix_gate;
  check_shape("prefix_gate", gate, {problem.bank_rows, problem.heads});
  STD_TORCH_CHECK(gate.is_cpu() && gate.scalar_type() == ScalarType::Float,
                  "prefix_gate: expected a float32 tensor on the CPU");
  problem.prefix_gate = {static_cast<const float*>(gate.const_data_ptr()), gate.stride(0),
                         gate.stride(1)};
}

// Shape of [B, heads, rows, D] or [N, heads, D].
std::vector<int64_t> token_shape(const Tensor& like, int64_t heads, int64_t rows) {
  if (like.dim() == 3) return {like.size(0), heads, like.size(2)};
  return {like.size(0), heads, rows, like.size(3)};
}

// Whatever the forward and the backward call share.
void fill_problem(Problem& problem, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& prefix_key, const Tensor& prefix_value,
                  const AttentionOptions& options) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "query: expected dtype float32 or bfloat16 on the CPU");
  fill_layout(problem, query, key, options);
  STD_TORCH_CHECK(prefix_key.dim() == 4, "prefix_key: expected 4 dimensions [R, H_kv, P, D], got ",
                  prefix_key.dim());
  problem.bank_rows = prefix_key.size(0);
  problem.prefix = prefix_key.size(2);
  const int64_t heads = problem.heads, head_dim = problem.head_dim, kv_heads = key.size(1);
  STD_TORCH_CHECK(heads == kv_heads || (kv_heads > 0 && heads % kv_heads == 0),
                  "key: expected heads that divide query's ", heads, ", got ", kv_heads);
  problem.group = heads == 0 ? 1 : heads / kv_heads;
  STD_TORCH_CHECK(head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0,
                  "query: expected head_dim a multiple of 8 up to 256, got ", head_dim);
  check_operand("query", query, dtype, token_shape(query, heads, problem.queries));
  check_operand("key", key, dtype, token_shape(query, kv_heads, problem.tokens));
  check_operand("value", value, dtype, token_shape(query, kv_heads, problem.tokens));
  const std::vector<int64_t> bank{problem.bank_rows, kv_heads, problem.prefix, head_dim};
  check_operand("prefix_key", prefix_key, dtype, bank);
  check_operand("prefix_value", prefix_value, dtype, bank);
  problem.query = tokens_of(query);
  problem.key = tokens_of(key);
  problem.value = tokens_of(value);
  problem.prefix_key = prefix_of(prefix_key);
  problem.prefix_value = prefix_of(prefix_value);
  problem.key_mask = nullptr;
  if (options.key_mask.has_value()) {
    const Tensor& key_mask = *options.key_mask;
    check_shape("key_mask", key_mask, {problem.batch, problem.tokens});
    STD_TORCH_CHECK(key_mask.is_cpu() && key_mask.scalar_type() == ScalarType::Bool,
                    "key_mask: expected a bool tensor on the CPU");
    STD_TORCH_CHECK(problem.starts == nullptr, "key_mask: expected None with cu_seqlens");
    problem.key_mask = static_cast<const bool*>(key_mask.const_data_ptr());
    problem.mask_batch_stride = key_mask.stride(0);
    problem.mask_column_stride = key_mask.stride(1);
  }
  STD_TORCH_CHECK(options.prefix_index.has_value() || problem.bank_rows == 1,
                  "prefix_index: expected one with a bank of ", problem.bank_rows, " rows");
  problem.prefix_index =
      integers("prefix_index", options.prefix_index, problem.batch, 0, problem.bank_rows - 1);
  problem.prefix_lengths =
      integers("prefix_lengths", options.prefix_lengths, problem.bank_rows, 0, problem.prefix);
  problem.context_lengths =
      integers("context_lengths", options.context_lengths, problem.batch, 0, problem.tokens);
  problem.window = options.window;
  fill_bias(problem, options);
  fill_positions(problem, query, options);
  fill_gate(problem, options);
  problem.scale = static_cast<float>(options.scale);
  problem.attention_dropout = dropout_of(options.dropout_p, options.seed);
  problem.prefix_dropout = dropout_of(options.prefix_dropout_p, options.seed);
}

// [B, heads, rows, D] whose [B, rows, heads, D] view is contiguous, or [N, heads, D].
Tensor empty_tokens(const Tensor& like, int64_t heads) {
  if (like.dim() == 3) {
    return torch::stable::new_empty(like, {like.size(0), heads, like.size(2)});
  }
  const Tensor buffer =
      torch::stable::new_empty(like, {like.size(0), like.size(2), heads, like.size(3)});
  return torch::stable::transpose(buffer, 1, 2);
}

}  // namespace

std::tuple<Tensor, Tensor> prefix_attention_forward(const AttentionOptions& options, Tensor query,
                                                    Tensor key, Tensor value, Tensor prefix_key,
                                                    Tensor prefix_value) {
  ForwardProblem problem{};
  fill_problem(problem, query, key, value, prefix_key, prefix_value, options);
  Tensor out = empty_tokens(query, problem.heads);
  std::vector<int64_t> rows{query.size(0), problem.heads};
  if (query.dim() == 4) rows.push_back(problem.queries);
  Tensor lse = torch::stable::new_empty(query, rows, ScalarType::Float);
  problem.out = tokens_of(out);
  problem.lse = statistics_of(lse);
  TorchMachine machine(query);
  run_forward(problem, kernels_for(query), machine);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    const AttentionOptions& options, Tensor grad_out, Tensor query, Tensor key, Tensor value,
    Tensor prefix_key, Tensor prefix_value, Tensor out, Tensor lse, std::optional<Tensor> grad_lse,
    bool needs_query, bool needs_key_value, bool needs_prefix, bool joint) {
  BackwardProblem problem{};
  fill_problem(problem, query, key, value, prefix_key, prefix_value, options);
  const int64_t heads = problem.heads, kv_heads = problem.kv_heads();
  if (grad_out.numel() > 0 && grad_out.stride(grad_out.dim() - 1) != 1) {
    grad_out = torch::stable::contiguous(grad_out);  // an expanded one has stride 0
  }
  const std::vector<int64_t> shape = token_shape(query, heads, problem.queries);
  const std::vector<int64_t> rows(shape.begin(), shape.end() - 1);
  check_operand("grad_out", grad_out, query.scalar_type(), shape);
  check_operand("out", out, query.scalar_type(), shape);
  check_operand("lse", lse, ScalarType::Float, rows);
  problem.out = tokens_of(out);
  problem.grad_out = tokens_of(grad_out);
  problem.lse = statistics_of(lse);
  problem.grad_lse.data = nullptr;
  if (grad_lse.has_value()) {
    check_shape("grad_lse", *grad_lse, rows);
    STD_TORCH_CHECK(grad_lse->scalar_type() == ScalarType::Float,
                    "grad_lse: expected a float32 tensor");
    problem.grad_lse = statistics_of(*grad_lse);
  }

  Tensor grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, grad_prefix_gate;
  if (joint) {
    STD_TORCH_CHECK(needs_query && needs_key_value && problem.queries == problem.tokens,
                    "joint: expected T = S and gradients of query, key and value");
    grad_query = empty_tokens(query, heads + 2 * kv_heads);
    // The heads of key and value stand behind those of query.
    problem.grad_query = problem.grad_key = problem.grad_value = tokens_of(grad_query);
    const int64_t size = query.element_size() * problem.grad_query.head_stride;
    auto* first = static_cast<char*>(problem.grad_query.data);
    problem.grad_key.data = first + heads * size;
    problem.grad_value.data = first + (heads + kv_heads) * size;
  } else {
    if (needs_query) problem.grad_query = tokens_of(grad_query = empty_tokens(query, heads));
    if (needs_key_value) {
      problem.grad_key = tokens_of(grad_key = empty_tokens(key, kv_heads));
      problem.grad_value = tokens_of(grad_value = empty_tokens(key, kv_heads));
    }
  }
  if (needs_prefix) {
    const std::vector<int64_t> bank{problem.bank_rows, kv_heads, problem.prefix, problem.head_dim};
    grad_prefix_key = torch::stable::new_empty(query, bank);
    grad_prefix_value = torch::stable::new_empty(query, bank);
    problem.grad_prefix_key = grad_prefix_key.mutable_data_ptr();
    problem.grad_prefix_value = grad_prefix_value.mutable_data_ptr();
    if (options.prefix_gate.has_value()) {
      grad_prefix_gate = torch::stable::new_empty(*options.prefix_gate, {problem.bank_rows, heads});
      problem.grad_prefix_gate = static_cast<float*>(grad_prefix_gate.mutable_data_ptr());
    }
  }
  // One each: results of an operator may not share memory.
  for (Tensor* gradient :
       {&grad_query, &grad_key, &grad_value, &grad_prefix_key, &grad_prefix_value}) {
    if (!gradient->defined()) *gradient = torch::stable::new_empty(query, {0});
  }
  if (!grad_prefix_gate.defined()) {
    grad_prefix_gate = torch::stable::new_empty(query, {0}, ScalarType::Float);
  }
  problem.needs_query = needs_query;
  problem.needs_key_value = needs_key_value;
  problem.needs_prefix = needs_prefix;
  TorchMachine machine(query);
  run_backward(problem, kernels_for(query), machine);
  return {grad_query,      grad_key,          grad_value,
          grad_prefix_key, grad_prefix_value, grad_prefix_gate};
}

}  // namespace ptv2
