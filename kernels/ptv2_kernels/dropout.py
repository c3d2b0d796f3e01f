"""Counter-based dropout: decisions are a pure function of logical coordinates, whatever the tiles.

The definition, and the numbers of the streams, are those of `ptv2_fast.ops.dropout`.
"""

import triton
import triton.language as tl

from ptv2_kernels.tiles import widened

TOKEN_STREAM = tl.constexpr(0)
PREFIX_STREAM = tl.constexpr(1)
PREFIX_KEY_STREAM = tl.constexpr(2)
PREFIX_VALUE_STREAM = tl.constexpr(3)
PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def load_seed(extras):
    """The seed; without dropout any number serves."""
    if extras.seed_ptr is None:
        return 0
    else:
        return tl.load(extras.seed_ptr)


@triton.jit
def keep_mask(
    seed, sequence_head, first_row, first_column, threshold,
    STREAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Which of [ROWS, COLUMNS] are kept; one Philox call decides eight columns by 16 bits each."""
    groups = first_column // 8 + tl.arange(0, COLUMNS // 8)
    zeros = tl.zeros((ROWS, COLUMNS // 8), tl.int32)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed,
        zeros + groups[None, :],
        zeros + (first_row + tl.arange(0, ROWS))[:, None],
        zeros + sequence_head,
        zeros + STREAM,
        n_rounds=PHILOX_ROUNDS,
    )
    # join makes a new last dimension; this order gives word 0, 1, 2, 3, the low half first.
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (ROWS, COLUMNS)) >= threshold


@triton.jit
def drop_prefix(tile, extras, seed, sequence_kv_head, first_row, STREAM: tl.constexpr):
    """Element-wise dropout of the prefix of one sequence, or of its gradient, in their dtype."""
    if extras.prefix_threshold is None:
        return tile
    else:
        dropped = ()
        for chunk in tl.static_range(len(tile)):
            keep = keep_mask(
                seed, sequence_kv_head, first_row, chunk * tile[0].shape[1],
                extras.prefix_threshold, STREAM, tile[chunk].shape[0], tile[chunk].shape[1],
            )  # fmt: skip
            kept = tile[chunk].to(tl.float32) * extras.prefix_multiplier
            dropped = widened(dropped, tl.where(keep, kept, 0.0).to(tile[chunk].dtype))
        return dropped
