// The operators on tensors: checks, allocation and tasks around the kernels of the chosen level.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace ptv2 {

using torch::stable::Tensor;

// What a call takes beside the five tensors, in the order of the schema: AttentionOptions of
// ptv2_fast/ops/options.py.
struct AttentionOptions {
  std::optional<Tensor> key_mask, seed;
  double scale, dropout_p, prefix_dropout_p;
  std::optional<Tensor> context_lengths;
  int64_t window;
  std::optional<Tensor> prefix_index, prefix_lengths, cu_seqlens;
  int64_t max_seqlen;
  std::optional<Tensor> bias, position_key, position_query, position_slots, prefix_gate;
};

// See ptv2_fast/ops/registration.py for the schemas and ops/reference.py for the definition.
std::tuple<Tensor, Tensor> prefix_attention_forward(const AttentionOptions& options, Tensor query,
                                                    Tensor key, Tensor value, Tensor prefix_key,
                                                    Tensor prefix_value);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    const AttentionOptions& options, Tensor grad_out, Tensor query, Tensor key, Tensor value,
    Tensor prefix_key, Tensor prefix_value, Tensor out, Tensor lse, std::optional<Tensor> grad_lse,
    bool needs_query, bool needs_key_value, bool needs_prefix, bool joint);

// An operator as the dispatcher calls it: the options one by one, behind the other arguments.
template <auto function>
struct WithOptions;

template <class Result, class... Arguments,
          Result (*function)(const AttentionOptions&, Arguments...)>
struct WithOptions<function> {
  static Result call(Arguments... arguments, std::optional<Tensor> key_mask,
                     std::optional<Tensor> seed, double scale, double dropout_p,
                     double prefix_dropout_p, std::optional<Tensor> context_lengths, int64_t window,
                     std::optional<Tensor> prefix_index, std::optional<Tensor> prefix_lengths,
                     std::optional<Tensor> cu_seqlens, int64_t max_seqlen,
                     std::optional<Tensor> bias, std::optional<Tensor> position_key,
                     std::optional<Tensor> position_query, std::optional<Tensor> position_slots,
                     std::optional<Tensor> prefix_gate) {
    return function({key_mask, seed, scale, dropout_p, prefix_dropout_p, context_lengths, window,
                     prefix_index, prefix_lengths, cu_seqlens, max_seqlen, bias, position_key,
                     position_query, position_slots, prefix_gate},
                    arguments...);
  }
};

}  // namespace ptv2
