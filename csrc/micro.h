// Single steps of the kernels as operators, for their tests and benchmarks: the exponential,
// counter-based dropout and packing.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace ptv2 {

using torch::stable::Tensor;

// e^input, fp32, on one thread.
Tensor micro_exp(Tensor input);

// input [B, H, rows, columns] times its dropout factors in a stream of ops/dropout.py.
Tensor micro_dropout(Tensor input, Tensor seed, double p, int64_t stream);

// The panels of key [B, H, S, D] as keys and values of a forward pass, as bytes.
Tensor micro_pack(Tensor key);

}  // namespace ptv2
