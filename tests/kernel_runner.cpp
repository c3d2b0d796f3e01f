// Runs the CPU kernels without torch: forward and backward of every case in a file, with 1, 2 and 4
// threads that must agree to the bit, results into a second file. kernel_runner.py writes and reads
// these files.
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "run.h"
#include "runner_memory.h"

namespace {

using ptv2::BackwardProblem;
using ptv2::ForwardProblem;

// The two structures and their order are those of kernel_runner.py.
struct Header {
  int64_t is_bfloat16, batch, heads, head_dim, queries, tokens, group, bank_rows, prefix, window;
  int64_t position_reach;
  int64_t needs_query, needs_key_value, needs_prefix;
  int64_t attention_threshold, prefix_threshold;  // of 65536, 0 = no dropout
  uint64_t seed;
  double scale, attention_factor, prefix_factor;
};

// clang-format off
enum TensorName {
  kQuery, kKey, kValue, kPrefixKey, kPrefixValue, kGradOut, kGradLse, kBias, kMask, kStarts,
  kPrefixIndex, kPrefixLengths, kContextLengths, kPositionKey, kPositionQuery, kSlots, kPrefixGate, kOut, kLse, kGradQuery, kGradKey, kGradValue,
  kGradPrefixKey, kGradPrefixValue, kGradPrefixGate, kTensors
};
// clang-format on

struct TensorRecord {
  int64_t buffer;  // or -1: no such tensor
  int64_t first_byte, element_bytes;
  int64_t strides[3];  // 0 behind the last one
};

template <class T>
T read(std::istream& file) {
  T value;
  if (!file.read(reinterpret_cast<char*>(&value), sizeof(T))) {
    throw std::runtime_error("the file of cases ends too early");
  }
  return value;
}

struct Case {
  Header header;
  TensorRecord tensors[kTensors];
  std::vector<std::string> buffers;  // as they are before the call
  std::vector<bool> is_output;

  explicit Case(std::istream& file) : header(read<Header>(file)) {
    for (TensorRecord& tensor : tensors) tensor = read<TensorRecord>(file);
    const auto count = read<int64_t>(file);
    for (int64_t i = 0; i < count; ++i) {
      is_output.push_back(read<int64_t>(file) != 0);
      std::string bytes(read<int64_t>(file), '\0');
      if (!file.read(bytes.data(), bytes.size())) throw std::runtime_error("a buffer is cut off");
      buffers.push_back(std::move(bytes));
    }
  }
};

ptv2::Dropout dropout_of(int64_t threshold, double factor, uint64_t seed) {
  ptv2::Dropout dropout{};
  dropout.factor = static_cast<float>(factor);
  dropout.drops = threshold > 0;
  if (!dropout.drops) return dropout;
  dropout.last_dropped = static_cast<uint16_t>(threshold - 1);
  dropout.key[0] = static_cast<uint32_t>(seed);
  dropout.key[1] = static_cast<uint32_t>(seed >> 32);
  return dropout;
}

// One call with buffers of its own.
class Call {
 public:
  explicit Call(const Case& from) : case_(from) {
    for (const std::string& bytes : from.buffers) {
      memory_.push_back(std::make_unique<Memory>(bytes.size()));
      std::memcpy(memory_.back()->data(), bytes.data(), bytes.size());
    }
  }

  void run(int64_t threads) {
    const ptv2::Level& level = ptv2::cpu_level();
    const ptv2::Kernels& kernels =
        case_.header.is_bfloat16 ? level.bfloat16_kernels : level.float_kernels;
    ForwardProblem forward{};
    fill(forward);
    ThreadedMachine forward_machine(threads);
    ptv2::run_forward(forward, kernels, forward_machine);
    forward_machine.check();

    const Header& header = case_.header;
    BackwardProblem backward{};
    fill(backward);
    backward.needs_query = header.needs_query;
    backward.needs_key_value = header.needs_key_value;
    backward.needs_prefix = header.needs_prefix;
    backward.grad_out = tokens(kGradOut);
    backward.grad_lse = statistics(kGradLse);
    backward.grad_query = tokens(kGradQuery);
    backward.grad_key = tokens(kGradKey);
    backward.grad_value = tokens(kGradValue);
    backward.grad_prefix_key = data(kGradPrefixKey);
    backward.grad_prefix_value = data(kGradPrefixValue);
    backward.grad_prefix_gate = static_cast<float*>(data(kGradPrefixGate));
    ThreadedMachine backward_machine(threads);
    ptv2::run_backward(backward, kernels, backward_machine);
    backward_machine.check();
    for (const auto& memory : memory_) memory->check("tensor");
    check_inputs();
  }

  std::string outputs() const {
    std::string bytes;
    for (size_t i = 0; i < memory_.size(); ++i) {
      if (case_.is_output[i]) bytes.append(memory_[i]->data(), memory_[i]->bytes());
    }
    return bytes;
  }

 private:
  void fill(ptv2::Problem& problem) const {
    const Header& header = case_.header;
    problem.batch = header.batch;
    problem.heads = header.heads;
    problem.head_dim = header.head_dim;
    problem.queries = header.queries;
    problem.tokens = header.tokens;
    problem.group = header.group;
    problem.bank_rows = header.bank_rows;
    problem.prefix = header.prefix;
    problem.query = tokens(kQuery);
    problem.key = tokens(kKey);
    problem.value = tokens(kValue);
    problem.prefix_key = prefix(kPrefixKey);
    problem.prefix_value = prefix(kPrefixValue);
    problem.key_mask = static_cast<const bool*>(data(kMask));
    problem.mask_batch_stride = stride(kMask, 0);
    problem.mask_column_stride = stride(kMask, 1);
    problem.starts = static_cast<const int32_t*>(data(kStarts));
    problem.prefix_index = static_cast<const int32_t*>(data(kPrefixIndex));
    problem.prefix_lengths = static_cast<const int32_t*>(data(kPrefixLengths));
    problem.context_lengths = static_cast<const int32_t*>(data(kContextLengths));
    problem.window = header.window;
    problem.bias = {data(kBias), case_.tensors[kBias].element_bytes == 4, stride(kBias, 0),
                    stride(kBias, 1), stride(kBias, 2)};
    problem.position_key = table(kPositionKey);
    problem.position_query = table(kPositionQuery);
    problem.position_slots = static_cast<const int32_t*>(data(kSlots));
    problem.position_reach = header.position_reach;
    problem.prefix_gate = {static_cast<const float*>(data(kPrefixGate)), stride(kPrefixGate, 0),
                           stride(kPrefixGate, 1)};
    problem.scale = static_cast<float>(header.scale);
    problem.attention_dropout =
        dropout_of(header.attention_threshold, header.attention_factor, header.seed);
    problem.prefix_dropout = dropout_of(header.prefix_threshold, header.prefix_factor, header.seed);
    problem.out = tokens(kOut);
    problem.lse = statistics(kLse);
  }

  void* data(TensorName name) const {
    const TensorRecord& tensor = case_.tensors[name];
    if (tensor.buffer < 0) return nullptr;
    return memory_[tensor.buffer]->data() + tensor.first_byte;
  }

  int64_t stride(TensorName name, int index) const { return case_.tensors[name].strides[index]; }

  ptv2::Tokens tokens(TensorName name) const {
    return {data(name), stride(name, 0), stride(name, 1), stride(name, 2)};
  }

  ptv2::Statistics statistics(TensorName name) const {
    return {static_cast<float*>(data(name)), stride(name, 0), stride(name, 1), stride(name, 2)};
  }

  ptv2::Prefix prefix(TensorName name) const {
    return {data(name), stride(name, 0), stride(name, 1), stride(name, 2)};
  }

  ptv2::Table table(TensorName name) const {
    return {data(name), stride(name, 0), stride(name, 1)};
  }

  void check_inputs() const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      const std::string& before = case_.buffers[i];
      if (case_.is_output[i]) continue;
      if (std::memcmp(before.data(), memory_[i]->data(), before.size()) != 0) {
        throw std::runtime_error("an input was written to");
      }
    }
  }

  const Case& case_;
  std::vector<std::unique_ptr<Memory>> memory_;
};

std::string results_of(const Case& one) {
  std::string first;
  for (const int64_t threads : kThreads) {
    Call call(one);
    call.run(threads);
    if (threads == kThreads[0]) {
      first = call.outputs();
    } else if (call.outputs() != first) {
      throw std::runtime_error("other bits with " + std::to_string(threads) + " threads");
    }
  }
  return first;
}

void run_file(const char* cases_path, const char* results_path) {
  std::ifstream cases(cases_path, std::ios::binary);
  std::ofstream results(results_path, std::ios::binary);
  const auto count = read<int64_t>(cases);
  for (int64_t index = 0; index < count; ++index) {
    const Case one(cases);
    try {
      const std::string bytes = results_of(one);
      results.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("case " + std::to_string(index) + ": " + error.what());
    }
  }
  if (!results.flush()) throw std::runtime_error("the results could not be written");
  std::cout << count << " cases at level " << ptv2::cpu_level().name << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: kernel_runner CASES RESULTS; PTV2_CPU_LEVEL picks the level\n";
    return 2;
  }
  try {
    run_file(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
