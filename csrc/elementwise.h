// The elementwise operators of ops/elementwise.py on CPU tensors; see there for their arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace ptv2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor bias_activation(Tensor input, std::optional<Tensor> bias, StringHandle activation);

Tensor bias_activation_backward(Tensor grad_out, Tensor input, std::optional<Tensor> bias,
                                StringHandle activation);

Tensor gated_activation(Tensor input, std::optional<Tensor> bias, StringHandle activation,
                        bool activated_first);

Tensor gated_activation_backward(Tensor grad_out, Tensor input, std::optional<Tensor> bias,
                                 StringHandle activation, bool activated_first);

std::tuple<Tensor, Tensor, Tensor> dropout_add_norm(Tensor input, std::optional<Tensor> bias,
                                                    Tensor residual, Tensor weight,
                                                    std::optional<Tensor> beta, double epsilon,
                                                    bool subtract_mean, std::optional<Tensor> seed,
                                                    std::optional<Tensor> coordinates,
                                                    double dropout_p, int64_t stream);

std::tuple<Tensor, Tensor> dropout_add_norm_backward(
    std::optional<Tensor> grad_out, std::optional<Tensor> grad_other,
    std::optional<Tensor> grad_total, Tensor total, Tensor statistics, Tensor weight,
    bool subtract_mean, std::optional<Tensor> seed, std::optional<Tensor> coordinates,
    double dropout_p, int64_t stream, ScalarType input_dtype);

Tensor norm_from_stats(Tensor total, Tensor statistics, Tensor weight, std::optional<Tensor> beta);

Tensor dropout_add(Tensor input, std::optional<Tensor> bias, Tensor residual,
                   std::optional<Tensor> seed, std::optional<Tensor> coordinates, double dropout_p,
                   int64_t stream);

Tensor dropout_backward(Tensor grad_total, std::optional<Tensor> seed,
                        std::optional<Tensor> coordinates, double dropout_p, int64_t stream,
                        ScalarType input_dtype);

void rotate_(Tensor packed, Tensor cosine, Tensor sine, int64_t heads, int64_t head_dim,
             bool interleaved, bool inverse);

}  // namespace ptv2
