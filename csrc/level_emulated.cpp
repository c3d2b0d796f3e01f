// Level emulated, for tests only: avx512_bf16's vector width and pair layout run by AVX2.
#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define PTV2_X86
#define PTV2_LEVEL emulated
#define PTV2_VECTOR_BYTES 64
#define PTV2_TILE_VECTORS 4
#define PTV2_PAIRS 1
#include "level.h"

namespace ptv2 {
extern const Level emulated_level = emulated::make_level("emulated");
}  // namespace ptv2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
