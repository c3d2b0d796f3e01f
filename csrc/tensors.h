// From tensors to the plain data of problem.h, and torch's memory and threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "run.h"

namespace ptv2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Errors name the argument, what was expected and what was given.
void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape);
void check_operand(const char* name, const Tensor& tensor, ScalarType dtype,
                   const std::vector<int64_t>& shape);

// [B, H, rows, D], or packed [N, H, D].
Tokens tokens_of(const Tensor& tensor);

// [B, H, rows], or packed [N, H].
Statistics statistics_of(const Tensor& tensor);

// [R, H_kv, P, D]
Prefix prefix_of(const Tensor& tensor);

// The entries of an optional int32 vector, each from least to most; null without one. Checked here
// too: compiled graphs leave out the checks in Python.
const int32_t* integers(const char* name, const std::optional<Tensor>& tensor, int64_t count,
                        int64_t least, int64_t most);

Dropout dropout_of(double p, const std::optional<Tensor>& seed);

// The kernels of the CPU's level for a dtype, float32 or bfloat16.
const Kernels& kernels_for(const Tensor& query);

// Torch's allocator and threads.
class TorchMachine : public Machine {
 public:
  explicit TorchMachine(const Tensor& like) : like_(like) {}

  int64_t threads() const override { return torch::stable::get_num_threads(); }

  char* allocate(int64_t bytes) override {
    pieces_.push_back(torch::stable::new_empty(like_, {bytes + 64}, ScalarType::Byte));
    const auto address = reinterpret_cast<uintptr_t>(pieces_.back().mutable_data_ptr());
    return reinterpret_cast<char*>((address + 63) & ~static_cast<uintptr_t>(63));
  }

  void parallel(int64_t workers, const std::function<void(int64_t)>& work) override {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work(worker);
    });
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> pieces_;
};

}  // namespace ptv2
