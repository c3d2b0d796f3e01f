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
def draw(seed, sequence_head, row, first_column, stream, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The four words of every call, [ROWS, COLUMNS // 8]; each row may have its own coordinates."""
    groups = first_column // 8 + tl.arange(0, COLUMNS // 8)
    zeros = tl.zeros((ROWS, COLUMNS // 8), tl.int32)
    return tl.philox(
        seed,
        zeros + groups[None, :],
        zeros + row,
        zeros + sequence_head,
        zeros + stream,
        n_rounds=PHILOX_ROUNDS,
    )


@triton.jit
def keep_mask(
    seed, sequence_head, first_row, first_column, threshold,
    STREAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Which of [ROWS, COLUMNS] are kept; one Philox call decides eight columns by 16 bits each."""
    rows = (first_row + tl.arange(0, ROWS))[:, None]
    word_0, word_1, word_2, word_3 = draw(
        seed, sequence_head, rows, first_column, STREAM, ROWS, COLUMNS
    )
    # Four decisions each, [ROWS, COLUMNS // 8, 2]: a thread has both halves of its call, and the
    # four threads that share a row of an MMA tile have a call each.
    nibbles = tl.join(
        decide(word_0, threshold) | (decide(word_1, threshold) << 2),
        decide(word_2, threshold) | (decide(word_3, threshold) << 2),
    )
    # They travel between threads as the bits of one number: 32 columns, or 16 if no more.
    WIDTH: tl.constexpr = 32 if COLUMNS >= 32 else 16
    nibbles = tl.reshape(nibbles, (ROWS, COLUMNS // WIDTH, WIDTH // 4))
    bits = tl.sum(nibbles << (4 * tl.arange(0, WIDTH // 4))[None, None, :], axis=2)
    columns = tl.full((WIDTH,), 1, tl.int32) << tl.arange(0, WIDTH)
    return tl.reshape((bits[:, :, None] & columns[None, None, :]) != 0, (ROWS, COLUMNS))


@triton.jit
def decide(word, threshold):
    """The decisions of both halves of a word as two bits, the low half first."""
    low = ((word & 0xFFFF) >= threshold).to(tl.int32)
    high = ((word >> 16) >= threshold).to(tl.int32)
    return low | (high << 1)


@triton.jit
def drop_prefix(tile, extras, place, first_row, STREAM: tl.constexpr):
    """Element-wise dropout of the prefix of one sequence, or of its gradient.

    It only puts zeros: the factor of what is kept would be rounded to the dtype of the prefix, and
    is left to float32 results instead (`undropped_prefix`).
    """
    if extras.prefix_threshold is None:
        return tile
    else:
        dropped = ()
        sequence_head = place.sequence * place.kv_heads + place.kv_head
        for chunk in tl.static_range(len(tile)):
            keep = keep_mask(
                place.seed, sequence_head, first_row, chunk * tile[0].shape[1],
                extras.prefix_threshold, STREAM, tile[chunk].shape[0], tile[chunk].shape[1],
            )  # fmt: skip
            dropped = widened(dropped, tl.where(keep, tile[chunk], 0.0).to(tile[chunk].dtype))
        return dropped


@triton.jit
def drop_hidden(tile, dropout, first_row, row_count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Dropout of a float32 tile [ROWS, COLUMNS] of hidden states that begins at column 0."""
    if dropout.threshold is None:
        return tile
    else:
        inside = tl.arange(0, ROWS) < row_count - first_row
        coordinates = dropout.coordinates_ptr + tl.cast(first_row, tl.int64) * 2
        coordinates += tl.arange(0, ROWS) * 2
        sequence = tl.load(coordinates, mask=inside, other=0)[:, None]
        row = tl.load(coordinates + 1, mask=inside, other=0)[:, None]
        word_0, word_1, word_2, word_3 = draw(
            tl.load(dropout.seed_ptr), sequence, row, 0, dropout.stream, ROWS, COLUMNS
        )
        # A thread that holds eight neighbouring columns, 16 bytes, has their call to itself.
        decisions = decide(word_0, dropout.threshold) | (decide(word_1, dropout.threshold) << 2)
        decisions |= decide(word_2, dropout.threshold) << 4
        decisions |= decide(word_3, dropout.threshold) << 6
        columns = tl.full((8,), 1, tl.int32) << tl.arange(0, 8)
        keep = (decisions[:, :, None] & columns[None, None, :]) != 0
        return tl.where(tl.reshape(keep, (ROWS, COLUMNS)), tile * dropout.multiplier, 0.0)
