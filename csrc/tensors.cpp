#include "tensors.h"

#include <cmath>

#include "dispatch.h"

namespace ptv2 {

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, ": expected ",
                  shape.size(), " dimensions, got ", tensor.dim());
  for (size_t i = 0; i < shape.size(); ++i) {
    STD_TORCH_CHECK(tensor.size(i) == shape[i], name, ": expected size ", shape[i],
                    " in dimension ", i, ", got ", tensor.size(i));
  }
}

void check_operand(const char* name, const Tensor& tensor, ScalarType dtype,
                   const std::vector<int64_t>& shape) {
  check_shape(name, tensor, shape);
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, name,
                  ": expected a CPU tensor of query's dtype");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.stride(tensor.dim() - 1) == 1, name,
                  ": expected last stride 1, got ", tensor.stride(tensor.dim() - 1));
}

Tokens tokens_of(const Tensor& tensor) {
  void* data = const_cast<void*>(tensor.const_data_ptr());
  const bool packed = tensor.dim() == 3;
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(packed ? 0 : 2)};
}

Statistics statistics_of(const Tensor& tensor) {
  auto* data = static_cast<float*>(const_cast<void*>(tensor.const_data_ptr()));
  const bool packed = tensor.dim() == 2;
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(packed ? 0 : 2)};
}

Prefix prefix_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

const int32_t* integers(const char* name, const std::optional<Tensor>& tensor, int64_t count,
                        int64_t least, int64_t most) {
  if (!tensor.has_value()) return nullptr;
  check_shape(name, *tensor, {count});
  STD_TORCH_CHECK(
      tensor->is_cpu() && tensor->is_contiguous() && tensor->scalar_type() == ScalarType::Int, name,
      ": expected a contiguous int32 tensor on the CPU");
  const auto* values = static_cast<const int32_t*>(tensor->const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(values[i] >= least && values[i] <= most, name, ": expected values in ", least,
                    "..", most, ", got ", values[i]);
  }
  return values;
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

const Kernels& kernels_for(const Tensor& query) {
  const Level& level = cpu_level();
  return query.scalar_type() == ScalarType::Float ? level.float_kernels : level.bfloat16_kernels;
}

}  // namespace ptv2
