#include "elementwise.h"

#include <string>

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

void check_dtype(const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name,
                  ": expected dtype Float or BFloat16 on the CPU, got ",
                  torch::headeronly::toString(dtype));
}

// [R, C] of a dtype that has kernels: the tensor whose size and dtype the others are held to.
std::vector<int64_t> check_first(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check_dtype(name, dtype);
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

const float* check_optional(const char* name, const std::optional<Tensor>& tensor,
                            int64_t columns) {
  return tensor.has_value() ? check_columns(name, *tensor, columns) : nullptr;
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

NormRows norm_rows_of(const std::vector<int64_t>& shape, const std::optional<Tensor>& seed,
                      const std::optional<Tensor>& coordinates, double dropout_p, int64_t stream) {
  NormRows call{};
  call.columns = shape[1];
  call.dropout = dropout_of(dropout_p, seed);
  call.stream = static_cast<uint32_t>(stream);
  if (!call.dropout.drops) return call;
  STD_TORCH_CHECK(coordinates.has_value(),
                  "coordinates: expected an int32 tensor [R, 2] when dropout is on, got None");
  check_rows("coordinates", *coordinates, ScalarType::Int, {shape[0], 2});
  call.coordinates = data_of<int32_t>(*coordinates);
  return call;
}

// The operands of an addition and what takes its result; the kernels for their dtypes.
const RowKernels& fill_addition(NormRows& call, const Tensor& input,
                                const std::optional<Tensor>& bias, const Tensor& residual,
                                const Tensor& total) {
  check_rows("residual", residual, residual.scalar_type(), {input.size(0), call.columns});
  call.input = input.const_data_ptr();
  call.bias = check_optional("bias", bias, call.columns);
  call.residual = residual.const_data_ptr();
  call.total = total.mutable_data_ptr();
  return kernels_of(input.scalar_type(), residual.scalar_type());
}

const void* check_grad(const char* name, const std::optional<Tensor>& grad, ScalarType dtype,
                       const std::vector<int64_t>& shape) {
  if (!grad.has_value()) return nullptr;
  check_rows(name, *grad, dtype, shape);
  return grad->const_data_ptr();
}

bool is_same(ScalarType residual, double dropout_p, ScalarType input) {
  return dropout_p == 0.0 && input == residual;
}

// The kernels for the activation of a name, which is released. Torch's own conversion of a string
// leaks one at every call.
const ActivationKernels& activation_of(StringHandle name, ScalarType dtype) {
  const char* data = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &data));
  TORCH_ERROR_CODE_CHECK(torch_string_length(name, &length));
  const std::string given(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(name));
  std::string known;
  for (int i = 0; i < kActivations; ++i) {
    if (given == kActivationNames[i]) return kernels_of(dtype, dtype).activations[i];
    known += (i == 0 ? "" : ", ") + std::string(kActivationNames[i]);
  }
  STD_TORCH_CHECK(false, "activation: expected one of ", known, ", got '", given, "'");
}

Tensor run_activation(ActivationKernels::Run run, ActivationRows call, const Tensor& input,
                      const std::optional<Tensor>& bias, int64_t result_columns) {
  Tensor result = torch::stable::new_empty(input, {input.size(0), result_columns});
  call.input = input.const_data_ptr();
  call.bias = check_optional("bias", bias, input.size(1));
  call.result = result.mutable_data_ptr();
  run_rows(input, 0, [&](int64_t first, int64_t last, char*) { run(call, first, last); });
  return result;
}

// C of an input [R, 2C].
int64_t half_columns(const Tensor& input) {
  const int64_t columns = check_first("input", input)[1];
  STD_TORCH_CHECK(columns % 2 == 0, "input: expected an even number of columns, got ", columns);
  return columns / 2;
}

}  // namespace

Tensor bias_activation(Tensor input, std::optional<Tensor> bias, StringHandle activation) {
  const ActivationKernels& kernels = activation_of(activation, input.scalar_type());
  ActivationRows call{};
  call.columns = check_first("input", input)[1];
  return run_activation(kernels.forward, call, input, bias, call.columns);
}

Tensor bias_activation_backward(Tensor grad_out, Tensor input, std::optional<Tensor> bias,
                                StringHandle activation) {
  const ActivationKernels& kernels = activation_of(activation, input.scalar_type());
  const std::vector<int64_t> shape = check_first("input", input);
  ActivationRows call{};
  call.columns = shape[1];
  call.grad_out = check_grad("grad_out", grad_out, input.scalar_type(), shape);
  return run_activation(kernels.backward, call, input, bias, call.columns);
}

Tensor gated_activation(Tensor input, std::optional<Tensor> bias, StringHandle activation,
                        bool activated_first) {
  const ActivationKernels& kernels = activation_of(activation, input.scalar_type());
  ActivationRows call{};
  call.columns = half_columns(input);
  call.activated_first = activated_first;
  return run_activation(kernels.gated, call, input, bias, call.columns);
}

Tensor gated_activation_backward(Tensor grad_out, Tensor input, std::optional<Tensor> bias,
                                 StringHandle activation, bool activated_first) {
  const ActivationKernels& kernels = activation_of(activation, input.scalar_type());
  ActivationRows call{};
  call.columns = half_columns(input);
  call.activated_first = activated_first;
  call.grad_out =
      check_grad("grad_out", grad_out, input.scalar_type(), {input.size(0), call.columns});
  return run_activation(kernels.gated_backward, call, input, bias, 2 * call.columns);
}

std::tuple<Tensor, Tensor, Tensor> dropout_add_norm(Tensor input, std::optional<Tensor> bias,
                                                    Tensor residual, Tensor weight,
                                                    std::optional<Tensor> beta, double epsilon,
                                                    bool subtract_mean, std::optional<Tensor> seed,
                                                    std::optional<Tensor> coordinates,
                                                    double dropout_p, int64_t stream) {
  const std::vector<int64_t> shape = check_first("input", input);
  Tensor out = torch::stable::new_empty(residual, shape);
  Tensor total = torch::stable::new_empty(residual, shape);
  Tensor statistics = torch::stable::new_empty(residual, {shape[0], 2}, ScalarType::Float);
  NormRows call = norm_rows_of(shape, seed, coordinates, dropout_p, stream);
  const RowKernels& kernels = fill_addition(call, input, bias, residual, total);
  call.weight = check_columns("weight", weight, shape[1]);
  call.beta = check_optional("beta", beta, shape[1]);
  call.epsilon = static_cast<float>(epsilon);
  call.subtract_mean = subtract_mean;
  call.out = out.mutable_data_ptr();
  call.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  run_rows(input, kernels.norm_scratch_bytes(shape[1]),
           [&](int64_t first, int64_t last, char* scratch) {
             kernels.add_norm(call, first, last, scratch);
           });
  return {out, total, statistics};
}

std::tuple<Tensor, Tensor> dropout_add_norm_backward(
    std::optional<Tensor> grad_out, std::optional<Tensor> grad_other,
    std::optional<Tensor> grad_total, Tensor total, Tensor statistics, Tensor weight,
    bool subtract_mean, std::optional<Tensor> seed, std::optional<Tensor> coordinates,
    double dropout_p, int64_t stream, ScalarType input_dtype) {
  const std::vector<int64_t> shape = check_first("total", total);
  const ScalarType dtype = total.scalar_type();
  const RowKernels& kernels = kernels_of(input_dtype, dtype);
  STD_TORCH_CHECK(grad_out.has_value() || grad_other.has_value(),
                  "grad_out, grad_other: expected at least one of the two, got None twice");
  check_rows("statistics", statistics, ScalarType::Float, {shape[0], 2});
  const bool same = is_same(dtype, dropout_p, input_dtype);
  Tensor grad_residual = torch::stable::new_empty(total, shape);
  Tensor grad_input =
      torch::stable::new_empty(total, same ? std::vector<int64_t>{0} : shape, input_dtype);
  NormRows call = norm_rows_of(shape, seed, coordinates, dropout_p, stream);
  call.grad_out = check_grad("grad_out", grad_out, dtype, shape);
  call.grad_other = check_grad("grad_other", grad_other, input_dtype, shape);
  call.grad_total = check_grad("grad_total", grad_total, dtype, shape);
  call.total = const_cast<void*>(total.const_data_ptr());
  call.statistics = const_cast<float*>(data_of<float>(statistics));
  call.weight = check_columns("weight", weight, shape[1]);
  call.subtract_mean = subtract_mean;
  call.grad_residual = grad_residual.mutable_data_ptr();
  call.grad_input = same ? nullptr : grad_input.mutable_data_ptr();
  run_rows(total, kernels.norm_scratch_bytes(shape[1]),
           [&](int64_t first, int64_t last, char* scratch) {
             kernels.add_norm_backward(call, first, last, scratch);
           });
  return {grad_residual, grad_input};
}

Tensor norm_from_stats(Tensor total, Tensor statistics, Tensor weight, std::optional<Tensor> beta) {
  const std::vector<int64_t> shape = check_first("total", total);
  check_rows("statistics", statistics, ScalarType::Float, {shape[0], 2});
  Tensor out = torch::stable::new_empty(total, shape);
  NormRows call{};
  call.total = const_cast<void*>(total.const_data_ptr());
  call.statistics = const_cast<float*>(data_of<float>(statistics));
  call.weight = check_columns("weight", weight, shape[1]);
  call.beta = check_optional("beta", beta, shape[1]);
  call.columns = shape[1];
  call.out = out.mutable_data_ptr();
  const RowKernels& kernels = kernels_of(total.scalar_type(), total.scalar_type());
  run_rows(total, 0, [&](int64_t first, int64_t last, char*) { kernels.norm(call, first, last); });
  return out;
}

Tensor dropout_add(Tensor input, std::optional<Tensor> bias, Tensor residual,
                   std::optional<Tensor> seed, std::optional<Tensor> coordinates, double dropout_p,
                   int64_t stream) {
  const std::vector<int64_t> shape = check_first("input", input);
  Tensor total = torch::stable::new_empty(residual, shape);
  NormRows call = norm_rows_of(shape, seed, coordinates, dropout_p, stream);
  const RowKernels& kernels = fill_addition(call, input, bias, residual, total);
  run_rows(
      input, kernels.norm_scratch_bytes(shape[1]),
      [&](int64_t first, int64_t last, char* scratch) { kernels.add(call, first, last, scratch); });
  return total;
}

Tensor dropout_backward(Tensor grad_total, std::optional<Tensor> seed,
                        std::optional<Tensor> coordinates, double dropout_p, int64_t stream,
                        ScalarType input_dtype) {
  const std::vector<int64_t> shape = check_first("grad_total", grad_total);
  const RowKernels& kernels = kernels_of(input_dtype, grad_total.scalar_type());
  if (is_same(grad_total.scalar_type(), dropout_p, input_dtype)) {
    return torch::stable::new_empty(grad_total, {0});
  }
  Tensor grad_input = torch::stable::new_empty(grad_total, shape, input_dtype);
  NormRows call = norm_rows_of(shape, seed, coordinates, dropout_p, stream);
  call.grad_total = grad_total.const_data_ptr();
  call.grad_input = grad_input.mutable_data_ptr();
  run_rows(grad_total, kernels.norm_scratch_bytes(shape[1]),
           [&](int64_t first, int64_t last, char* scratch) {
             kernels.add_backward(call, first, last, scratch);
           });
  return grad_input;
}

void rotate_(Tensor packed, Tensor cosine, Tensor sine, int64_t heads, int64_t head_dim,
             bool interleaved, bool inverse) {
  const ScalarType dtype = packed.scalar_type();
  check_dtype("packed", dtype);
  STD_TORCH_CHECK(packed.is_cpu() && packed.dim() == 2, "packed: expected [R, columns] on the CPU");
  STD_TORCH_CHECK(heads >= 0 && head_dim > 0 && heads * head_dim <= packed.size(1),
                  "heads, head_dim: expected at most ", packed.size(1), " columns of packed, got ",
                  heads, " heads of ", head_dim);
  const int64_t rows = packed.size(0), width = heads * head_dim;
  STD_TORCH_CHECK(width <= 1 || packed.stride(1) == 1, "packed: expected last stride 1, got ",
                  packed.stride(1));
  STD_TORCH_CHECK(rows <= 1 || packed.stride(0) >= width || -packed.stride(0) >= width,
                  "packed: expected rows that lie apart, got stride ", packed.stride(0), " for ",
                  width, " columns");
  STD_TORCH_CHECK(cosine.dim() == 2, "cosine: expected 2 dimensions, got ", cosine.dim());
  const int64_t pairs = cosine.size(1);
  STD_TORCH_CHECK(2 * pairs <= head_dim, "cosine: expected at most ", head_dim / 2,
                  " columns, half of head_dim, got ", pairs);
  check_rows("cosine", cosine, ScalarType::Float, {rows, pairs});
  check_rows("sine", sine, ScalarType::Float, {rows, pairs});
  if (width == 0 || pairs == 0) return;
  const RotaryRows call{packed.mutable_data_ptr(),
                        packed.stride(0),
                        data_of<float>(cosine),
                        data_of<float>(sine),
                        pairs,
                        heads,
                        head_dim,
                        interleaved,
                        inverse};
  const RowKernels& kernels = kernels_of(dtype, dtype);
  run_rows(packed, kernels.rotate_scratch_bytes(pairs),
           [&](int64_t first, int64_t last, char* scratch) {
             kernels.rotate(call, first, last, scratch);
           });
}

}  // namespace ptv2
