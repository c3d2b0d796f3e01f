// Level avx512_bf16: AVX-512 with bfloat16 dot products of pairs.
#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#define PTV2_X86
#define PTV2_AVX512
#define PTV2_LEVEL avx512_bf16
#define PTV2_VECTOR_BYTES 64
#define PTV2_TILE_VECTORS 4
#define PTV2_PAIRS 1
#define PTV2_NATIVE_PAIRS
#include "level.h"

namespace ptv2 {
extern const Level avx512_bf16_level = avx512_bf16::make_level("avx512_bf16");
}  // namespace ptv2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
