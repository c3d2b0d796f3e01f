// Level avx512: AVX-512 F, BW, DQ, VL; bfloat16 computed in floats.
#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define PTV2_X86
#define PTV2_AVX512
#define PTV2_LEVEL avx512
#define PTV2_VECTOR_BYTES 64
#define PTV2_TILE_VECTORS 4
#define PTV2_PAIRS 0
#include "level.h"

namespace ptv2 {
extern const Level avx512_level = avx512::make_level("avx512");
}  // namespace ptv2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
