// The CPU levels of this build and the choice among them.
#pragma once

#include "problem.h"

namespace ptv2 {

extern const Level generic_level;
#if defined(__x86_64__)
extern const Level avx2_level;
extern const Level avx512_level;
extern const Level avx512_bf16_level;
extern const Level emulated_level;
#endif

// The best level of this CPU, or the one that PTV2_CPU_LEVEL names; decided at the first call.
// Throws std::runtime_error for one that is unknown or that this CPU lacks.
const Level& cpu_level();

}  // namespace ptv2
