#include "micro.h"

#include "dispatch.h"
#include "tensors.h"

namespace ptv2 {

Tensor micro_exp(Tensor input) {
  STD_TORCH_CHECK(
      input.is_cpu() && input.is_contiguous() && input.scalar_type() == ScalarType::Float,
      "input: expected a contiguous float32 tensor on the CPU");
  Tensor result = torch::stable::empty_like(input);
  cpu_level().exp(static_cast<const float*>(input.const_data_ptr()),
                  static_cast<float*>(result.mutable_data_ptr()), input.numel());
  return result;
}

Tensor micro_dropout(Tensor input, Tensor seed, double p, int64_t stream) {
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && input.is_contiguous(),
                  "input: expected a contiguous tensor [B, H, rows, columns] on the CPU");
  const Kernels& kernels = kernels_for(input);
  Tensor result = torch::stable::empty_like(input);
  const Dropout dropout = dropout_of(p, seed);
  const int64_t rows = input.size(2), columns = input.size(3);
  const int64_t row_bytes = columns * input.element_size();
  const auto* source = static_cast<const char*>(input.const_data_ptr());
  auto* destination = static_cast<char*>(result.mutable_data_ptr());
  TorchMachine machine(input);
  run_tasks(machine, input.size(0) * input.size(1), kernels.keep_bytes(columns),
            [&](int64_t sequence_head, char* scratch) {
              for (int64_t row = 0; row < rows; ++row) {
                const int64_t at = (sequence_head * rows + row) * row_bytes;
                kernels.drop_row(destination + at, source + at, columns, dropout,
                                 {static_cast<uint32_t>(row), static_cast<uint32_t>(sequence_head),
                                  static_cast<uint32_t>(stream)},
                                 scratch);
              }
            });
  return result;
}

Tensor micro_pack(Tensor key) {
  STD_TORCH_CHECK(key.is_cpu() && key.dim() == 4, "key: expected [B, H, S, D] on the CPU");
  // A bank with one row for each sequence.
  Problem problem{};
  problem.batch = problem.bank_rows = key.size(0);
  problem.heads = key.size(1);
  problem.group = 1;
  problem.prefix = key.size(2);
  problem.head_dim = key.size(3);
  problem.prefix_key = problem.prefix_value = prefix_of(key);
  std::vector<int32_t> slots(problem.batch);
  for (int64_t i = 0; i < problem.batch; ++i) slots[i] = static_cast<int32_t>(i);
  problem.slot_of_row = slots.data();
  const Kernels& kernels = kernels_for(key);
  const int64_t areas = problem.batch * problem.heads;
  const int64_t bytes = kernels.prefix_bytes(problem, false);
  Tensor packed = torch::stable::new_empty(key, {areas * bytes}, ScalarType::Byte);
  problem.packed_prefix = static_cast<char*>(packed.mutable_data_ptr());
  TorchMachine machine(key);
  run_tasks(machine, areas, 0, [&](int64_t area, char*) {
    kernels.pack_prefix(problem, false, area / problem.heads, area % problem.heads);
  });
  return packed;
}

}  // namespace ptv2
