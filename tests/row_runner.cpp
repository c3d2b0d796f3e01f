// Runs the kernels of the elementwise operators without torch: rows of many lengths, every
// activation and option, with 1, 2 and 4 threads that must agree to the bit. What they compute is
// tested elsewhere; here they must write every element of their results and nothing beside them.
#include <exception>
#include <iostream>
#include <map>
#include <random>

#include "dispatch.h"
#include "runner_memory.h"

namespace {

constexpr int64_t kRows = 5;
constexpr int64_t kHeads = 3;
constexpr int64_t kBehind = 5;  // columns behind the rotated heads

struct Element {
  bool is_float;
  int64_t bytes() const { return is_float ? 4 : 2; }
};

// Buffers by name, filled anew from the same seed for every number of threads.
class Buffers {
 public:
  explicit Buffers(int64_t missing) : missing_(missing) {}

  // Numbers from -4 to 4, in whose bits a bfloat16 and a float differ by zeros only.
  char* input(const char* name, int64_t count, Element element) {
    char* data = add(name, count, element, false);
    for (int64_t i = 0; i < count; ++i) set(data, i, element, values_(random_));
    return data;
  }

  const float* floats(const char* name, int64_t count) {
    return reinterpret_cast<const float*>(input(name, count, {true}));
  }

  const int32_t* integers(const char* name, int64_t count) {
    char* data = add(name, count, {true}, false);
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<int32_t*>(data)[i] = 7 * i;
    return reinterpret_cast<const int32_t*>(data);
  }

  // One element too short, when that is asked for.
  char* output(const char* name, int64_t count, Element element) {
    return add(name, std::max<int64_t>(0, count - missing_), element, true);
  }

  // Numbers on `width` columns of every row of `stride`, NaN behind them.
  char* in_place(const char* name, int64_t width, int64_t stride, Element element) {
    char* data = add(name, (kRows - 1) * stride + width + kBehind, element, true);
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t i = 0; i < width; ++i) set(data, row * stride + i, element, values_(random_));
    }
    return data;
  }

  void remember() {
    for (const auto& [name, buffer] : buffers_) {
      if (!buffer.is_output) before_[name] = bytes_of(buffer);
    }
  }

  // The bytes of all results.
  std::string check() const {
    std::string results;
    for (const auto& [name, buffer] : buffers_) {
      buffer.memory->check(name.c_str());
      if (buffer.is_output) {
        results += bytes_of(buffer);
      } else if (bytes_of(buffer) != before_.at(name)) {
        throw std::runtime_error(name + ": an input was written to");
      }
    }
    return results;
  }

  void check_all_written(const char* name) const {
    const Buffer& buffer = buffers_.at(name);
    const int64_t count = buffer.memory->bytes() / buffer.element.bytes();
    for (int64_t i = 0; i < count; ++i) {
      if (is_poison(name, i)) {
        throw std::runtime_error(std::string(name) + ": nothing was written to an element");
      }
    }
  }

  bool is_poison(const char* name, int64_t index) const {
    const Buffer& buffer = buffers_.at(name);
    const int64_t bytes = buffer.element.bytes();
    const char* at = buffer.memory->data() + index * bytes;
    return std::all_of(at, at + bytes,
                       [](char byte) { return static_cast<unsigned char>(byte) == kPoison; });
  }

 private:
  struct Buffer {
    std::unique_ptr<Memory> memory;
    Element element;
    bool is_output;
  };

  static std::string bytes_of(const Buffer& buffer) {
    return {buffer.memory->data(), static_cast<size_t>(buffer.memory->bytes())};
  }

  static void set(char* data, int64_t index, Element element, float value) {
    const auto* bytes = reinterpret_cast<const char*>(&value);
    std::memcpy(data + index * element.bytes(), bytes + 4 - element.bytes(), element.bytes());
  }

  char* add(const char* name, int64_t count, Element element, bool is_output) {
    Buffer& buffer = buffers_[name];
    buffer = {std::make_unique<Memory>(count * element.bytes()), element, is_output};
    return buffer.memory->data();
  }

  int64_t missing_;
  std::mt19937 random_{1};
  std::uniform_real_distribution<float> values_{-4.0f, 4.0f};
  std::map<std::string, Buffer> buffers_;
  std::map<std::string, std::string> before_;
};

// What runs the rows of a call.
template <class Kernel>
auto with(Kernel kernel, const ptv2::NormRows& call) {
  return [kernel, call](int64_t first, int64_t last, char* scratch) {
    kernel(call, first, last, scratch);
  };
}

class Runner {
 public:
  explicit Runner(int64_t missing) : missing_(missing) {}

  void run_all() {
    const ptv2::Level& level = ptv2::cpu_level();
    for (int64_t columns : {1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 387}) {
      all_of(level.float_rows, {true}, {true}, columns);
      all_of(level.bfloat16_rows, {false}, {false}, columns);
      all_of(level.mixed_rows, {false}, {true}, columns);
    }
    std::cout << calls_ << " calls at level " << level.name << "\n";
  }

 private:
  void all_of(const ptv2::RowKernels& kernels, Element input, Element residual, int64_t columns) {
    for (const ptv2::ActivationKernels& activation : kernels.activations) {
      for (int options = 0; options < 4; ++options) {
        activate(activation, input, columns, options & 1, options & 2);
      }
    }
    for (int options = 0; options < 8; ++options) {
      norms(kernels, input, residual, columns, options & 1, options & 2, options & 4);
    }
    for (int options = 0; options < 4; ++options) {
      rotate(kernels, input, columns, options & 1, options & 2);
    }
  }

  // make(buffers) fills a call and gives what runs its rows; all results must be written.
  template <class Make>
  void check(int64_t scratch_bytes, std::initializer_list<const char*> outputs, const Make& make) {
    std::string first;
    for (const int64_t threads : kThreads) {
      Buffers buffers(missing_);
      const auto run = make(buffers);
      buffers.remember();
      ThreadedMachine machine(threads);
      ptv2::run_tasks(machine, kRows, scratch_bytes,
                      [&](int64_t row, char* scratch) { run(row, row + 1, scratch); });
      machine.check();
      const std::string results = buffers.check();
      for (const char* name : outputs) buffers.check_all_written(name);
      if (threads == kThreads[0]) first = results;
      if (results != first) throw std::runtime_error("other bits with more threads");
    }
    ++calls_;
  }

  void activate(const ptv2::ActivationKernels& kernels, Element element, int64_t columns,
                bool has_bias, bool activated_first) {
    const auto each = [&](ptv2::ActivationKernels::Run run, int64_t inputs, bool is_backward) {
      check(0, {"result"}, [&, run, inputs, is_backward](Buffers& buffers) {
        ptv2::ActivationRows call{};
        call.input = buffers.input("input", kRows * inputs * columns, element);
        call.bias = has_bias ? buffers.floats("bias", inputs * columns) : nullptr;
        call.columns = columns;
        call.activated_first = activated_first;
        if (is_backward) {
          call.grad_out = buffers.input("grad_out", kRows * columns, element);
        }
        const int64_t results = is_backward ? inputs : 1;
        call.result = buffers.output("result", kRows * results * columns, element);
        return [call, run](int64_t first, int64_t last, char*) { run(call, first, last); };
      });
    };
    each(kernels.forward, 1, false);
    each(kernels.backward, 1, true);
    each(kernels.gated, 2, false);
    each(kernels.gated_backward, 2, true);
  }

  ptv2::NormRows norm_call(Buffers& buffers, int64_t columns, bool drops, bool subtract_mean) {
    ptv2::NormRows call{};
    call.columns = columns;
    call.subtract_mean = subtract_mean;
    call.epsilon = 1e-5f;
    call.dropout = {drops, 20000, drops ? 1.44f : 1.0f, {3, 5}};
    call.stream = 4;
    call.coordinates = drops ? buffers.integers("coordinates", 2 * kRows) : nullptr;
    return call;
  }

  void norms(const ptv2::RowKernels& kernels, Element input, Element residual, int64_t columns,
             bool drops, bool subtract_mean, bool extras) {
    const int64_t count = kRows * columns, scratch_bytes = kernels.norm_scratch_bytes(columns);
    const auto addition = [&](Buffers& buffers) {
      ptv2::NormRows call = norm_call(buffers, columns, drops, subtract_mean);
      call.input = buffers.input("input", count, input);
      call.residual = buffers.input("residual", count, residual);
      call.bias = extras ? buffers.floats("bias", columns) : nullptr;
      call.total = buffers.output("total", count, residual);
      return call;
    };
    check(scratch_bytes, {"total", "out", "statistics"}, [&](Buffers& buffers) {
      ptv2::NormRows call = addition(buffers);
      call.weight = buffers.floats("weight", columns);
      call.beta = extras ? buffers.floats("beta", columns) : nullptr;
      call.out = buffers.output("out", count, residual);
      char* statistics = buffers.output("statistics", 2 * kRows, {true});
      call.statistics = reinterpret_cast<float*>(statistics);
      return with(kernels.add_norm, call);
    });
    check(scratch_bytes, {"total"},
          [&](Buffers& buffers) { return with(kernels.add, addition(buffers)); });
    check(scratch_bytes, {"grad_input"}, [&](Buffers& buffers) {
      ptv2::NormRows call = norm_call(buffers, columns, drops, subtract_mean);
      call.grad_total = buffers.input("grad_total", count, residual);
      call.grad_input = buffers.output("grad_input", count, input);
      return with(kernels.add_backward, call);
    });
    const auto normalised = [&](Buffers& buffers) {
      ptv2::NormRows call = norm_call(buffers, columns, drops, subtract_mean);
      call.total = buffers.input("total", count, residual);
      char* statistics = buffers.input("statistics", 2 * kRows, {true});
      call.statistics = reinterpret_cast<float*>(statistics);
      call.weight = buffers.floats("weight", columns);
      return call;
    };
    check(0, {"out"}, [&](Buffers& buffers) {
      ptv2::NormRows call = normalised(buffers);
      call.beta = extras ? buffers.floats("beta", columns) : nullptr;
      call.out = buffers.output("out", count, residual);
      return
          [call, &kernels](int64_t first, int64_t last, char*) { kernels.norm(call, first, last); };
    });
    check(scratch_bytes, {"grad_residual"}, [&](Buffers& buffers) {
      ptv2::NormRows call = normalised(buffers);
      call.grad_out = extras ? nullptr : buffers.input("grad_out", count, residual);
      if (extras) {
        call.grad_other = buffers.input("grad_other", count, input);
        call.grad_total = buffers.input("grad_total", count, residual);
      }
      call.grad_residual = buffers.output("grad_residual", count, residual);
      call.grad_input = drops ? buffers.output("grad_input", count, input) : nullptr;
      return with(kernels.add_norm_backward, call);
    });
  }

  void rotate(const ptv2::RowKernels& kernels, Element element, int64_t pairs, bool interleaved,
              bool inverse) {
    const int64_t head_dim = 2 * pairs + 3, width = kHeads * head_dim, stride = width + 2 * kBehind;
    check(kernels.rotate_scratch_bytes(pairs), {}, [&](Buffers& buffers) {
      const ptv2::RotaryRows call{buffers.in_place("packed", width, stride, element),
                                  stride,
                                  buffers.floats("cosine", kRows * pairs),
                                  buffers.floats("sine", kRows * pairs),
                                  pairs,
                                  kHeads,
                                  head_dim,
                                  interleaved,
                                  inverse};
      return [call, &kernels, &buffers, width, stride](int64_t first, int64_t last, char* scratch) {
        kernels.rotate(call, first, last, scratch);
        for (int64_t i = width; i < width + kBehind; ++i) {
          if (!buffers.is_poison("packed", first * stride + i)) {
            throw std::runtime_error("packed: written behind the heads");
          }
        }
      };
    });
  }

  int64_t missing_, calls_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: row_runner MISSING, by how many elements results are too short; "
                 "PTV2_CPU_LEVEL picks the level\n";
    return 2;
  }
  try {
    Runner(std::atoll(argv[1])).run_all();
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
