#include "elementwise.h"

#include "dispatch.h"
#include "tensors.h"

namespace ptv2 {
namespace {

constexpr int64_t kTaskBytes = 32768;  // of one operand: a task's rows fit the second-level cache

void check_rows(const char* name, const Tensor& tensor, ScalarType dtype,
                const std::vector<int64_t>& shape) {
  check_shape(name, tensor, shape);
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name,
                  ": expected a contiguous tensor on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// [R, C] of a dtype that has kernels: the tensor whose size and dtype the others are held to.
std::vector<int64_t> check_first(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name,
                  ": expected dtype Float or BFloat16 on the CPU, got ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
  const std::vector<int64_t> shape{tensor.size(0), tensor.size(1)};
  STD_TORCH_CHECK(shape[1] > 0, name, ": expected at least one column, got none");
  check_rows(name, tensor, dtype, shape);
  return shape;
}

template <class Value>
const Value* data_of(const Tensor& tensor) {
  return static_cast<const Value*>(tensor.const_data_ptr());
}

const float* check_columns(const char* name, const Tensor& tensor, int64_t columns) {
  check_rows(name, tensor, ScalarType::Float, {columns});
  return data_of<float>(tensor);
}

const float* check_bias(const std::optional<Tensor>& bias, int64_t columns) {
  return bias.has_value() ? check_columns("bias", *bias, columns) : nullptr;
}

const RowKernels& kernels_of(ScalarType input, ScalarType residual) {
  const Level& level = cpu_level();
  if (input == residual) {
    return input == ScalarType::Float ? level.float_rows : level.bfloat16_rows;
  }
  STD_TORCH_CHECK(input == ScalarType::BFloat16 && residual == ScalarType::Float,
                  "input: expected the residual's dtype ", torch::headeronly::toString(residual),
                  ", or BFloat16 with a Float one, got ", torch::headeronly::toString(input));
  return level.mixed_rows;
}

// work(first row, last row, scratch) over blocks of rows.
template <class Work>
void run_rows(const Tensor& like, int64_t scratch_bytes, const Work& work) {
  const int64_t rows = like.size(0);
  const int64_t block =
      std::max<int64_t>(1, kTaskBytes / (like.size(1) * static_cast<int64_t>(like.element_size())));
  TorchMachine machine(like);
  run_tasks(machine, divide_up(rows, block), scratch_bytes, [&](int64_t task, char* scratch) {
    work(task * block, std::min(rows, (task + 1) * block), scratch);
  });
}

void fill_dropout(LayerNormRows& call, const std::optional<Tensor>& seed,
                  const std::optional<Tensor>& coordinates, double dropout_p, int64_t stream,
                  int64_t rows) {
  call.dropout = dropout_of(dropout_p, seed);
  call.stream = static_cast<uint32_t>(stream);
  if (!call.dropout.drops) return;
  STD_TORCH_CHECK(coordinates.has_value(),
                  "coordinates: expected an int32 tensor [R, 2] when dropout is on, got None");
  check_rows("coordinates", *coordinates, ScalarType::Int, {rows, 2});
  call.coordinates = data_of<int32_t>(*coordinates);
}

}  // namespace

Tensor bias_gelu(Tensor input, std::optional<Tensor> bias) {
  const std::vector<int64_t> shape = check_first("input", input);
  Tensor result = torch::stable::new_empty(input, shape);
  const GeluRows call{input.const_data_ptr(), check_bias(bias, shape[1]), nullptr,
                      result.mutable_data_ptr(), shape[1]};
  const RowKernels& kernels = kernels_of(input.scalar_type(), input.scalar_type());
  run_rows(input, 0, [&](int64_t first, int64_t last, char*) { kernels.gelu(call, first, last); });
  return result;
}

Tensor bias_gelu_backward(Tensor grad_out, Tensor input, std::optional<Tensor> bias) {
  const std::vector<int64_t> shape = check_first("input", input);
  check_rows("grad_out", grad_out, input.scalar_type(), shape);
  Tensor result = torch::stable::new_empty(input, shape);
  const GeluRows call{input.const_data_ptr(), check_bias(bias, shape[1]), grad_out.const_data_ptr(),
                      result.mutable_data_ptr(), shape[1]};
  const RowKernels& kernels = kernels_of(input.scalar_type(), input.scalar_type());
  run_rows(input, 0,
           [&](int64_t first, int64_t last, char*) { kernels.gelu_backward(call, first, last); });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm(Tensor input, std::optional<Tensor> bias,
                                                          Tensor residual, Tensor weight,
                                                          Tensor beta, double epsilon,
                                                          std::optional<Tensor> seed,
                                                          std::optional<Tensor> coordinates,
                                                          double dropout_p, int64_t stream) {
  const std::vector<int64_t> shape = check_first("input", input);
  check_rows("residual", residual, residual.scalar_type(), shape);
  const RowKernels& kernels = kernels_of(input.scalar_type(), residual.scalar_type());
  Tensor out = torch::stable::new_empty(residual, shape);
  Tensor total = torch::stable::new_empty(residual, shape);
  Tensor statistics = torch::stable::new_empty(residual, {shape[0], 2}, ScalarType::Float);
  LayerNormRows call{};
  call.input = input.const_data_ptr();
  call.bias = check_bias(bias, shape[1]);
  call.residual = residual.const_data_ptr();
  call.weight = check_columns("weight", weight, shape[1]);
  call.beta = check_columns("beta", beta, shape[1]);
  call.epsilon = static_cast<float>(epsilon);
  fill_dropout(call, seed, coordinates, dropout_p, stream, shape[0]);
  call.columns = shape[1];
  call.out = out.mutable_data_ptr();
  call.total = total.mutable_data_ptr();
  call.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  run_rows(input, kernels.scratch_bytes(shape[1]), [&](int64_t first, int64_t last, char* scratch) {
    kernels.add_layer_norm(call, first, last, scratch);
  });
  return {out, total, statistics};
}

std::tuple<Tensor, Tensor> dropout_add_layer_norm_backward(
    Tensor grad_out, std::optional<Tensor> grad_other, Tensor total, Tensor statistics,
    Tensor weight, std::optional<Tensor> seed, std::optional<Tensor> coordinates, double dropout_p,
    int64_t stream, ScalarType input_dtype) {
  const std::vector<int64_t> shape = check_first("total", total);
  const ScalarType dtype = total.scalar_type();
  const RowKernels& kernels = kernels_of(input_dtype, dtype);
  check_rows("grad_out", grad_out, dtype, shape);
  if (grad_other.has_value()) check_rows("grad_other", *grad_other, input_dtype, shape);
  check_rows("statistics", statistics, ScalarType::Float, {shape[0], 2});
  const bool is_same = dropout_p == 0.0 && input_dtype == dtype;
  Tensor grad_residual = torch::stable::new_empty(total, shape);
  Tensor grad_input =
      torch::stable::new_empty(total, is_same ? std::vector<int64_t>{0} : shape, input_dtype);
  LayerNormRows call{};
  call.grad_out = grad_out.const_data_ptr();
  call.grad_other = grad_other.has_value() ? grad_other->const_data_ptr() : nullptr;
  call.total = const_cast<void*>(total.const_data_ptr());
  call.statistics = const_cast<float*>(data_of<float>(statistics));
  call.weight = check_columns("weight", weight, shape[1]);
  fill_dropout(call, seed, coordinates, dropout_p, stream, shape[0]);
  call.columns = shape[1];
  call.grad_residual = grad_residual.mutable_data_ptr();
  call.grad_input = is_same ? nullptr : grad_input.mutable_data_ptr();
  run_rows(total, kernels.scratch_bytes(shape[1]), [&](int64_t first, int64_t last, char* scratch) {
    kernels.add_layer_norm_backward(call, first, last, scratch);
  });
  return {grad_residual, grad_input};
}

Tensor layer_norm_again(Tensor total, Tensor statistics, Tensor weight, Tensor beta) {
  const std::vector<int64_t> shape = check_first("total", total);
  check_rows("statistics", statistics, ScalarType::Float, {shape[0], 2});
  Tensor out = torch::stable::new_empty(total, shape);
  LayerNormRows call{};
  call.total = const_cast<void*>(total.const_data_ptr());
  call.statistics = const_cast<float*>(data_of<float>(statistics));
  call.weight = check_columns("weight", weight, shape[1]);
  call.beta = check_columns("beta", beta, shape[1]);
  call.columns = shape[1];
  call.out = out.mutable_data_ptr();
  const RowKernels& kernels = kernels_of(total.scalar_type(), total.scalar_type());
  run_rows(total, 0,
           [&](int64_t first, int64_t last, char*) { kernels.layer_norm(call, first, last); });
  return out;
}

}  // namespace ptv2
