"""Named real shapes of the benchmarks."""

from tests.inputs import Shape

# batch, heads, queries, tokens, prefix, head_dim
ATTENTION_SHAPES = {
    "minilm-b32-t32-p100": Shape(32, 12, 32, 32, 100, 32),
    "base-b16-t64-p8": Shape(16, 12, 64, 64, 8, 64),
    "base-b8-t128-p20": Shape(8, 12, 128, 128, 20, 64),
    "base-b4-t128-p128": Shape(4, 12, 128, 128, 128, 64),
    "base-b2-t384-p16": Shape(2, 12, 384, 384, 16, 64),
    "base-b2-t512-p128": Shape(2, 12, 512, 512, 128, 64),
    "large-b4-t128-p128": Shape(4, 16, 128, 128, 128, 64),
    "large-b1-t512-p20": Shape(1, 16, 512, 512, 20, 64),
}
