// Level avx2: AVX2 and FMA, bfloat16 computed in floats.
#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define PTV2_X86
#define PTV2_LEVEL avx2
#define PTV2_VECTOR_BYTES 32
#define PTV2_TILE_VECTORS 2
#define PTV2_PAIRS 0
#include "level.h"

namespace ptv2 {
extern const Level avx2_level = avx2::make_level("avx2");
}  // namespace ptv2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
