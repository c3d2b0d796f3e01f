#include "run.h"

#include <algorithm>
#include <vector>

namespace ptv2 {
namespace {

constexpr int64_t kMaxBatchChunks = 8;
constexpr int64_t kBackwardTasks = 64;  // as many keep a large processor busy
constexpr int64_t kMaxQueryChunk = 512;
constexpr int64_t kMinQueryChunk = 48;
constexpr int64_t kTasksPerThread = 4;

// The rows of the bank that are read, numbered in their order.
struct Slots {
  std::vector<int32_t> of_row, rows;
  std::vector<int64_t> readers;  // sequences that read each slot

  explicit Slots(const Problem& problem) : of_row(problem.bank_rows, -1) {
    std::vector<int64_t> readers_of_row(problem.bank_rows, 0);
    for (int64_t i = 0; i < problem.batch; ++i) ++readers_of_row[problem.sequence(i).bank_row];
    for (int64_t row = 0; row < problem.bank_rows; ++row) {
      if (readers_of_row[row] == 0) continue;
      of_row[row] = static_cast<int32_t>(rows.size());
      rows.push_back(static_cast<int32_t>(row));
      readers.push_back(readers_of_row[row]);
    }
  }
};

void pack_prefix(Problem& problem, const Slots& slots, const Kernels& kernels, Machine& machine,
                 bool backward) {
  const int64_t bytes = kernels.prefix_bytes(problem, backward);
  const int64_t heads = problem.kv_heads();
  const int64_t areas = static_cast<int64_t>(slots.rows.size()) * heads;
  problem.slot_of_row = slots.of_row.data();
  problem.packed_prefix = areas * bytes == 0 ? nullptr : machine.allocate(areas * bytes);
  run_tasks(machine, bytes > 0 ? areas : 0, 0, [&](int64_t area, char*) {
    kernels.pack_prefix(problem, backward, slots.rows[area / heads], area % heads);
  });
}

void pack_positions(Problem& problem, const Kernels& kernels, Machine& machine, bool backward) {
  const int64_t bytes = kernels.position_bytes(problem, backward);
  if (bytes * problem.heads == 0) return;
  problem.packed_positions = machine.allocate(bytes * problem.heads);
  run_tasks(machine, problem.heads, 0,
            [&](int64_t head, char*) { kernels.pack_positions(problem, backward, head); });
}

int64_t query_chunk(const Problem& problem, int64_t threads) {
  const int64_t heads = problem.batch * problem.heads;
  const int64_t parts =
      threads == 1 || heads == 0 ? 1 : divide_up(kTasksPerThread * threads, heads);
  const int64_t chunk = divide_up(problem.queries, parts);
  return std::clamp(chunk, kMinQueryChunk, kMaxQueryChunk);
}

// The batch in chunks whose prefix gradients are summed one by one: their number follows the
// problem only, so that the bits do not depend on the number of threads.
struct BatchPlan {
  std::vector<int32_t> order;
  std::vector<BatchChunk> chunks;

  BatchPlan(const Problem& problem, const Slots& slots) : order(problem.batch) {
    const int64_t wanted = divide_up(kBackwardTasks, std::max<int64_t>(problem.kv_heads(), 1));
    const int64_t most = std::min({wanted, kMaxBatchChunks, problem.batch});
    std::vector<int64_t> next(slots.rows.size(), 0);
    int64_t first = 0;
    for (size_t slot = 0; slot < slots.rows.size(); ++slot) {
      const int64_t count = slots.readers[slot];
      const int64_t pieces = divide_up(most * count, problem.batch);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        chunks.push_back({static_cast<int64_t>(slot), first + count * piece / pieces,
                          first + count * (piece + 1) / pieces});
      }
      next[slot] = first;
      first += count;
    }
    for (int64_t i = 0; i < problem.batch; ++i) {
      const int32_t slot = slots.of_row[problem.sequence(i).bank_row];
      order[next[slot]++] = static_cast<int32_t>(i);
    }
  }
};

}  // namespace

void run_forward(ForwardProblem& problem, const Kernels& kernels, Machine& machine) {
  const Slots slots(problem);
  pack_prefix(problem, slots, kernels, machine, false);
  pack_positions(problem, kernels, machine, false);
  problem.query_chunk = query_chunk(problem, machine.threads());
  const int64_t chunks = divide_up(problem.queries, problem.query_chunk);
  run_tasks(machine, problem.batch * problem.heads * chunks, kernels.forward_scratch_bytes(problem),
            [&](int64_t task, char* scratch) { kernels.forward(problem, task, scratch); });
}

void run_backward(BackwardProblem& problem, const Kernels& kernels, Machine& machine) {
  if (!problem.needs_query && !problem.needs_key_value && !problem.needs_prefix) return;
  const Slots slots(problem);
  const BatchPlan plan(problem, slots);
  pack_prefix(problem, slots, kernels, machine, true);
  if (problem.needs_query || problem.needs_key_value) {
    pack_positions(problem, kernels, machine, true);
  }
  problem.order = plan.order.data();
  problem.chunks = plan.chunks.data();
  problem.chunk_count = static_cast<int64_t>(plan.chunks.size());
  problem.partial = reinterpret_cast<float*>(machine.allocate(kernels.partial_bytes(problem)));
  if (problem.prefix_gate.data != nullptr && problem.needs_prefix) {
    const int64_t sums = problem.chunk_count * problem.heads;
    problem.gate_partial = reinterpret_cast<float*>(machine.allocate(sums * sizeof(float)));
  }
  const int64_t heads = problem.kv_heads(), tasks = problem.chunk_count * heads;
  const int64_t parts = machine.threads() > tasks ? kernels.column_parts(problem) : 1;
  problem.column_parts = parts;
  const int64_t query_bytes = kernels.query_partial_bytes(problem);
  if (query_bytes > 0) {
    problem.query_partial = reinterpret_cast<float*>(machine.allocate(query_bytes));
  }
  run_tasks(machine, parts * tasks, kernels.backward_scratch_bytes(problem),
            [&](int64_t task, char* scratch) { kernels.backward(problem, task, scratch); });
  run_tasks(machine, query_bytes > 0 ? problem.batch * problem.heads : 0, 0,
            [&](int64_t task, char*) { kernels.reduce_query(problem, task); });
  if (!problem.needs_prefix) return;
  run_tasks(machine, problem.bank_rows * heads, 0, [&](int64_t task, char*) {
    kernels.reduce_prefix(problem, task / heads, task % heads);
  });
}

}  // namespace ptv2
