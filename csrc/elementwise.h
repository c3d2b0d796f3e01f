// The elementwise operators of ops/elementwise.py on CPU tensors; see there for their arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace ptv2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor bias_gelu(Tensor input, std::optional<Tensor> bias);

Tensor bias_gelu_backward(Tensor grad_out, Tensor input, std::optional<Tensor> bias);

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm(Tensor input, std::optional<Tensor> bias,
                                                          Tensor residual, Tensor weight,
                                                          Tensor beta, double epsilon,
                                                          std::optional<Tensor> seed,
                                                          std::optional<Tensor> coordinates,
                                                          double dropout_p, int64_t stream);

std::tuple<Tensor, Tensor> dropout_add_layer_norm_backward(
    Tensor grad_out, std::optional<Tensor> grad_other, Tensor total, Tensor statistics,
    Tensor weight, std::optional<Tensor> seed, std::optional<Tensor> coordinates, double dropout_p,
    int64_t stream, ScalarType input_dtype);

Tensor layer_norm_again(Tensor total, Tensor statistics, Tensor weight, Tensor beta);

}  // namespace ptv2
