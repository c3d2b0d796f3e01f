// Level generic: 16-byte vectors, which every x86-64 (SSE2) and arm64 (NEON) has.
#include "dispatch.h"

#define PTV2_LEVEL generic
#define PTV2_VECTOR_BYTES 16
#define PTV2_TILE_VECTORS 2
#define PTV2_PAIRS 0
#include "level.h"

namespace ptv2 {
extern const Level generic_level = generic::make_level("generic");
}  // namespace ptv2
