#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ptv2 {
namespace {

struct Candidate {
  const Level* level;
  bool supported;
};

const Level& choose() {
  // Best first; the last one is never chosen by itself.
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Candidate candidates[] = {
      {&avx512_bf16_level, avx512 && __builtin_cpu_supports("avx512bf16")},
      {&avx512_level, avx512},
      {&avx2_level, avx2},
      {&generic_level, true},
      {&emulated_level, avx2}};
#else
  const Candidate candidates[] = {{&generic_level, true}};
#endif
  const Candidate* best = candidates;
  while (!best->supported) ++best;

  const char* wanted = std::getenv("PTV2_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return *best->level;
  for (const Candidate& candidate : candidates) {
    if (std::strcmp(candidate.level->name, wanted) != 0) continue;
    if (candidate.supported) return *candidate.level;
    throw std::runtime_error(
        std::string("PTV2_CPU_LEVEL: this CPU lacks the instructions of level ") + wanted +
        ", its best level is " + best->level->name);
  }
  throw std::runtime_error(
      std::string("PTV2_CPU_LEVEL: expected generic, avx2, avx512 or avx512_bf16, got ") + wanted +
      "; the best level of this CPU is " + best->level->name);
}

}  // namespace

const Level& cpu_level() {
  static const Level& chosen = choose();
  return chosen;
}

}  // namespace ptv2
