// A whole forward or backward call: what is packed, which tasks there are, who sums their results.
// Knows no tensors, so that the tests can run it without torch.
#pragma once

#include <algorithm>
#include <atomic>
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

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs the tasks on the machine's threads, each with scratch of its own. Tasks are handed out one
// by one: results do not depend on who runs which.
template <class Task>
void run_tasks(Machine& machine, int64_t tasks, int64_t scratch_bytes, const Task& task) {
  if (tasks == 0) return;
  const int64_t workers = std::min(machine.threads(), tasks);
  const int64_t stride = divide_up(scratch_bytes, 64) * 64;
  char* scratch = stride == 0 ? nullptr : machine.allocate(workers * stride);
  std::atomic<int64_t> next{0};
  machine.parallel(workers, [&](int64_t worker) {
    for (int64_t index = next++; index < tasks; index = next++) {
      task(index, scratch + worker * stride);
    }
  });
}

void run_forward(ForwardProblem& problem, const Kernels& kernels, Machine& machine);
void run_backward(BackwardProblem& problem, const Kernels& kernels, Machine& machine);

}  // namespace ptv2
