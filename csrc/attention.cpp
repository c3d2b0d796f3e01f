#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>

#include "dispatch.h"

namespace ptv2 {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kMaxBatchChunks = 8;
constexpr int64_t kMaxQueryChunk = 512;
constexpr int64_t kMinQueryChunk = 48;
constexpr int64_t kTasksPerThread = 4;

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, ": expected ",
                  shape.size(), " dimensions, got ", tensor.dim());
  int64_t dimension = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(tensor.size(dimension) == size, name, ": expected size ", size,
                    " in dimension ", dimension, ", got ", tensor.size(dimension));
    ++dimension;
  }
}

void check_operand(const char* name, const Tensor& tensor, ScalarType dtype,
                   std::initializer_list<int64_t> shape) {
  check_shape(name, tensor, shape);
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, name,
                  ": expected a CPU tensor of query's dtype");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.stride(tensor.dim() - 1) == 1, name,
                  ": expected last stride 1, got ", tensor.stride(tensor.dim() - 1));
}

Tokens tokens_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

Prefix prefix_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

Dropout dropout_of(double p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout: expected a probability in [0, 1), got ", p);
  // 16 bits below the threshold drop; nearbyint rounds half to even, as Python's round does.
  const auto threshold = static_cast<int64_t>(std::nearbyint(65536.0 * p));
  Dropout dropout{};
  dropout.factor = static_cast<float>(1.0 / (1.0 - p));
  dropout.drops = threshold > 0;
  if (!dropout.drops) return dropout;
  STD_TORCH_CHECK(seed.has_value() && seed->is_cpu() && seed->scalar_type() == ScalarType::Long &&
                      seed->numel() == 1,
                  "seed: expected an int64 tensor [1] on the CPU when dropout is on");
  const auto bits = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  dropout.last_dropped = static_cast<uint16_t>(threshold - 1);
  dropout.key[0] = static_cast<uint32_t>(bits);
  dropout.key[1] = static_cast<uint32_t>(bits >> 32);
  return dropout;
}

// Whatever the forward and the backward call share.
void fill_problem(Problem& problem, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& prefix_key, const Tensor& prefix_value,
                  const std::optional<Tensor>& key_mask, const std::optional<Tensor>& seed,
                  double scale, double dropout_p, double prefix_dropout_p,
                  const std::optional<Tensor>& context_lengths, int64_t window) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && prefix_key.dim() == 3,
                  "expected query and key with 4 dimensions and prefix_key with 3, got ",
                  query.dim(), ", ", key.dim(), " and ", prefix_key.dim());
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "query: expected dtype float32 or bfloat16 on the CPU");
  problem.batch = query.size(0);
  problem.heads = query.size(1);
  problem.queries = query.size(2);
  problem.head_dim = query.size(3);
  problem.tokens = key.size(2);
  problem.prefix = prefix_key.size(1);
  const int64_t batch = problem.batch, heads = problem.heads, head_dim = problem.head_dim;
  const int64_t kv_heads = key.size(1);
  STD_TORCH_CHECK(heads == kv_heads || (kv_heads > 0 && heads % kv_heads == 0),
                  "key: expected heads that divide query's ", heads, ", got ", kv_heads);
  problem.group = heads == 0 ? 1 : heads / kv_heads;
  STD_TORCH_CHECK(head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0,
                  "query: expected head_dim a multiple of 8 up to 256, got ", head_dim);
  check_operand("query", query, dtype, {batch, heads, problem.queries, head_dim});
  check_operand("key", key, dtype, {batch, kv_heads, problem.tokens, head_dim});
  check_operand("value", value, dtype, {batch, kv_heads, problem.tokens, head_dim});
  check_operand("prefix_key", prefix_key, dtype, {kv_heads, problem.prefix, head_dim});
  check_operand("prefix_value", prefix_value, dtype, {kv_heads, problem.prefix, head_dim});
  problem.query = tokens_of(query);
  problem.key = tokens_of(key);
  problem.value = tokens_of(value);
  problem.prefix_key = prefix_of(prefix_key);
  problem.prefix_value = prefix_of(prefix_value);
  problem.key_mask = nullptr;
  if (key_mask.has_value()) {
    check_shape("key_mask", *key_mask, {batch, problem.tokens});
    STD_TORCH_CHECK(key_mask->is_cpu() && key_mask->scalar_type() == ScalarType::Bool,
                    "key_mask: expected a bool tensor on the CPU");
    problem.key_mask = static_cast<const bool*>(key_mask->const_data_ptr());
    problem.mask_batch_stride = key_mask->stride(0);
    problem.mask_column_stride = key_mask->stride(1);
  }
  problem.context_lengths = nullptr;
  if (context_lengths.has_value()) {
    check_shape("context_lengths", *context_lengths, {batch});
    STD_TORCH_CHECK(context_lengths->is_cpu() && context_lengths->is_contiguous() &&
                        context_lengths->scalar_type() == ScalarType::Int,
                    "context_lengths: expected a contiguous int32 tensor on the CPU");
    problem.context_lengths = static_cast<const int32_t*>(context_lengths->const_data_ptr());
  }
  problem.window = window;
  problem.scale = static_cast<float>(scale);
  problem.attention_dropout = dropout_of(dropout_p, seed);
  problem.prefix_dropout = dropout_of(prefix_dropout_p, seed);
}

const Kernels& kernels_for(const Tensor& query) {
  const Level& level = cpu_level();
  return query.scalar_type() == ScalarType::Float ? level.float_kernels : level.bfloat16_kernels;
}

Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// [B, H, rows, D] whose [B, rows, H, D] view is contiguous.
Tensor empty_token_major(const Tensor& like) {
  const Tensor buffer =
      torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)});
  return torch::stable::transpose(buffer, 1, 2);
}

char* aligned(const Tensor& bytes) {
  const auto address = reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr());
  return reinterpret_cast<char*>((address + 63) & ~static_cast<uintptr_t>(63));
}

// Runs the tasks on torch's threads, each with scratch of its own. Tasks are handed out one by one:
// results do not depend on who runs which.
template <class Task>
void run_tasks(const Tensor& like, int64_t tasks, int64_t scratch_bytes, const Task& task) {
  if (tasks == 0) return;
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = threads < tasks ? threads : tasks;
  const int64_t stride = (scratch_bytes + 63) / 64 * 64;
  const Tensor scratch = empty_bytes(like, workers * stride + 64);
  char* base = aligned(scratch);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t index = next++; index < tasks; index = next++) {
        task(index, base + worker * stride);
      }
    }
  });
}

// Packs the prefix of every head; the returned tensor owns the memory.
Tensor pack_prefix(const Kernels& kernels, Problem& problem, const Tensor& like, bool backward) {
  const int64_t bytes = kernels.prefix_bytes(problem, backward);
  const Tensor packed = empty_bytes(like, problem.kv_heads() * bytes + 64);
  problem.packed_prefix = aligned(packed);
  run_tasks(like, bytes > 0 ? problem.kv_heads() : 0, 0,
            [&](int64_t head, char*) { kernels.pack_prefix(problem, backward, head); });
  return packed;
}

int64_t query_chunk(const Problem& problem) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t heads = problem.batch * problem.heads;
  const int64_t parts =
      threads == 1 || heads == 0 ? 1 : (kTasksPerThread * threads - 1) / heads + 1;
  const int64_t chunk = (problem.queries + parts - 1) / parts;
  return chunk < kMinQueryChunk ? kMinQueryChunk : chunk > kMaxQueryChunk ? kMaxQueryChunk : chunk;
}

}  // namespace

std::tuple<Tensor, Tensor> prefix_attention_forward(
    Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value,
    std::optional<Tensor> key_mask, std::optional<Tensor> seed, double scale, double dropout_p,
    double prefix_dropout_p, std::optional<Tensor> context_lengths, int64_t window) {
  ForwardProblem problem{};
  fill_problem(problem, query, key, value, prefix_key, prefix_value, key_mask, seed, scale,
               dropout_p, prefix_dropout_p, context_lengths, window);
  const Kernels& kernels = kernels_for(query);
  Tensor out = empty_token_major(query);
  Tensor lse = torch::stable::new_empty(query, {problem.batch, problem.heads, problem.queries},
                                        ScalarType::Float);
  problem.out = tokens_of(out);
  problem.lse = static_cast<float*>(lse.mutable_data_ptr());
  problem.query_chunk = query_chunk(problem);
  const Tensor packed = pack_prefix(kernels, problem, query, false);
  const int64_t chunks = (problem.queries + problem.query_chunk - 1) / problem.query_chunk;
  run_tasks(query, problem.batch * problem.heads * chunks, kernels.forward_scratch_bytes(problem),
            [&](int64_t task, char* scratch) { kernels.forward(problem, task, scratch); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value,
    Tensor out, Tensor lse, std::optional<Tensor> key_mask, std::optional<Tensor> seed,
    double scale, double dropout_p, double prefix_dropout_p, bool needs_query, bool needs_key_value,
    bool needs_prefix, std::optional<Tensor> context_lengths, int64_t window,
    std::optional<Tensor> grad_lse) {
  BackwardProblem problem{};
  fill_problem(problem, query, key, value, prefix_key, prefix_value, key_mask, seed, scale,
               dropout_p, prefix_dropout_p, context_lengths, window);
  const Kernels& kernels = kernels_for(query);
  const int64_t batch = problem.batch, heads = problem.heads, head_dim = problem.head_dim;
  const int64_t kv_heads = problem.kv_heads();
  if (grad_out.numel() > 0 && grad_out.stride(grad_out.dim() - 1) != 1) {
    grad_out = torch::stable::contiguous(grad_out);  // an expanded one has stride 0
  }
  const auto dtype = query.scalar_type();
  check_operand("grad_out", grad_out, dtype, {batch, heads, problem.queries, head_dim});
  check_operand("out", out, dtype, {batch, heads, problem.queries, head_dim});
  check_shape("lse", lse, {batch, heads, problem.queries});
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(),
                  "lse: expected a contiguous float32 tensor");

  problem.grad_lse = nullptr;
  if (grad_lse.has_value()) {
    check_shape("grad_lse", *grad_lse, {batch, heads, problem.queries});
    STD_TORCH_CHECK(grad_lse->scalar_type() == ScalarType::Float,
                    "grad_lse: expected a float32 tensor");
    grad_lse = torch::stable::contiguous(*grad_lse);
    problem.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
  }

  const auto token_gradient = [&](const Tensor& like, bool needed) {
    return needed ? empty_token_major(like) : torch::stable::new_empty(like, {0});
  };
  const auto prefix_gradient = [&] {
    return needs_prefix ? torch::stable::new_empty(query, {kv_heads, problem.prefix, head_dim})
                        : torch::stable::new_empty(query, {0});
  };
  Tensor grad_query = token_gradient(query, needs_query);
  Tensor grad_key = token_gradient(key, needs_key_value);
  Tensor grad_value = token_gradient(key, needs_key_value);
  Tensor grad_prefix_key = prefix_gradient(), grad_prefix_value = prefix_gradient();

  problem.needs_query = needs_query;
  problem.needs_key_value = needs_key_value;
  problem.needs_prefix = needs_prefix;
  problem.out = tokens_of(out);
  problem.grad_out = tokens_of(grad_out);
  problem.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  if (needs_query) problem.grad_query = tokens_of(grad_query);
  if (needs_key_value) {
    problem.grad_key = tokens_of(grad_key);
    problem.grad_value = tokens_of(grad_value);
  }
  problem.batch_chunks = batch < kMaxBatchChunks ? batch : kMaxBatchChunks;
  const Tensor partial = empty_bytes(query, kernels.partial_bytes(problem) + 64);
  problem.partial = reinterpret_cast<float*>(aligned(partial));

  const Tensor packed = pack_prefix(kernels, problem, query, true);
  const bool anything = needs_query || needs_key_value || needs_prefix;
  run_tasks(query, anything ? kv_heads * problem.batch_chunks : 0,
            kernels.backward_scratch_bytes(problem),
            [&](int64_t task, char* scratch) { kernels.backward(problem, task, scratch); });
  if (needs_prefix) {
    void* key_sum = grad_prefix_key.mutable_data_ptr();
    void* value_sum = grad_prefix_value.mutable_data_ptr();
    run_tasks(query, kv_heads, 0, [&](int64_t head, char*) {
      kernels.reduce_prefix(problem, head, key_sum, value_sum);
    });
  }
  return {grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value};
}

}  // namespace ptv2
