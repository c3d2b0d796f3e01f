// A whole forward or backward call: what is packed, which tasks there are, who sums their results.
// Knows no tensors, so that the tests can run it without torch.
#pragma once

#include <functional>

#include "problem.h"

namespace ptv2 {

// Where memory and threads come from.
class Machine {
 public:
  virtual ~Machine() = default;
  virtual int64_t threads() const = 0;
  // Aligned to a cache line; lives as long as the machine.
  virtual char* allocate(int64_t bytes) = 0;
  // Calls work(0) to work(workers - 1), at the same time where it can.
  virtual void parallel(int64_t workers, const std::function<void(int64_t)>& work) = 0;
};

void run_forward(ForwardProblem& problem, const Kernels& kernels, Machine& machine);
void run_backward(BackwardProblem& problem, const Kernels& kernels, Machine& machine);

}  // namespace ptv2
