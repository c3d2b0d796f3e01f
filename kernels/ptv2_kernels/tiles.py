"""The jit primitives that the kernels share: tiles, online softmax, dropout, recomputation.

Tensors are addressed by one tuple of strides each, last stride 1 unless a function says otherwise.
Base-2 values carry the suffix _log2: the softmax runs on exp2, with log2(e) folded into the scale.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TOKEN_STREAM = tl.constexpr(0)
PREFIX_STREAM = tl.constexpr(1)
PREFIX_KEY_STREAM = tl.constexpr(2)
PREFIX_VALUE_STREAM = tl.constexpr(3)
PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def head_pointer(tensor_ptr, strides, sequence, head):
    """Where head `head` of sequence `sequence` begins in a [B, H, ...] tensor."""
    return tensor_ptr + sequence.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def tile_offsets(rows, row_stride, column_stride, BLOCK_DIM: tl.constexpr):
    columns = tl.arange(0, BLOCK_DIM)
    return rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride


@triton.jit
def tile_mask(rows, row_count, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    return (rows < row_count)[:, None] & (tl.arange(0, BLOCK_DIM) < HEAD_DIM)[None, :]


@triton.jit
def load_tile(
    head_ptr, rows, row_count, row_stride, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Rows of a [rows, HEAD_DIM] matrix; zeros outside it."""
    offsets = tile_offsets(rows, row_stride, 1, BLOCK_DIM)
    return tl.load(
        head_ptr + offsets, mask=tile_mask(rows, row_count, HEAD_DIM, BLOCK_DIM), other=0.0
    )


@triton.jit
def load_strided_tile(
    head_ptr,
    rows,
    row_count,
    row_stride,
    column_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """As `load_tile`, for any column stride (an expanded gradient has stride 0)."""
    offsets = tile_offsets(rows, row_stride, column_stride, BLOCK_DIM)
    return tl.load(
        head_ptr + offsets, mask=tile_mask(rows, row_count, HEAD_DIM, BLOCK_DIM), other=0.0
    )


@triton.jit
def store_tile(
    head_ptr, tile, rows, row_count, row_stride, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    offsets = tile_offsets(rows, row_stride, 1, BLOCK_DIM)
    mask = tile_mask(rows, row_count, HEAD_DIM, BLOCK_DIM)
    tl.store(head_ptr + offsets, tile.to(head_ptr.dtype.element_ty), mask=mask)


@triton.jit
def token_visibility(key_mask_ptr, key_mask_strides, sequence, columns, tokens):
    """Which token columns a query sees: inside the sequence and not masked."""
    in_range = columns < tokens
    if key_mask_ptr is None:
        visible = in_range
    else:
        row_ptr = key_mask_ptr + sequence.to(tl.int64) * key_mask_strides[0]
        offsets = columns.to(tl.int64) * key_mask_strides[1]
        visible = tl.load(row_ptr + offsets, mask=in_range, other=0) != 0
    return visible


@triton.jit
def load_context(context_lengths_ptr, sequence):
    """The context length of a sequence; without the tensor any number serves."""
    if context_lengths_ptr is None:
        context = 0
    else:
        context = tl.load(context_lengths_ptr + sequence)
    return context


@triton.jit
def seen_columns(context_lengths_ptr, context, window, first_row, last_row, tokens):
    """[begin, end) of the token columns that some row from first_row to last_row sees."""
    begin = 0
    end = tokens
    if context_lengths_ptr is not None:
        end = tl.minimum(end, tl.maximum(context, last_row + 1))
    if window is not None:
        begin = tl.maximum(0, first_row - window)
        end = tl.minimum(end, last_row + window + 1)
    return begin, end


@triton.jit
def seeing_rows(context_lengths_ptr, context, window, first_column, last_column, queries):
    """[begin, end) of the rows that see some token column from first_column to last_column."""
    begin = 0
    end = queries
    if context_lengths_ptr is not None:
        begin = tl.where(first_column < context, 0, first_column)
    if window is not None:
        begin = tl.maximum(begin, first_column - window)
        end = tl.minimum(end, last_column + window + 1)
    return begin, end


@triton.jit
def row_visibility(visible, context_lengths_ptr, context, window, rows, columns):
    """[rows, columns]: the padding mask and what context length and window show each row."""
    visible = visible[None, :]
    if context_lengths_ptr is not None:
        shown = (columns < context)[None, :] | (columns[None, :] <= rows[:, None])
        visible = visible & shown
    if window is not None:
        distance = rows[:, None] - columns[None, :]
        visible = visible & (distance <= window) & (distance >= -window)
    return visible


@triton.jit
def keep_mask(
    seed,
    sequence_head,
    rows,
    first_column,
    threshold,
    STREAM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Dropout decisions [BLOCK_ROWS, BLOCK_COLUMNS], a pure function of logical coordinates.

    One Philox-4x32-7 call decides eight neighbouring columns by 16 bits each.
    """
    groups = first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8)
    zeros = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS // 8), tl.int32)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed,
        zeros + groups[None, :],
        zeros + rows[:, None],
        zeros + sequence_head,
        zeros + STREAM,
        n_rounds=PHILOX_ROUNDS,
    )
    # join makes a new last dimension; this order gives word 0, 1, 2, 3, the low half first.
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    decisions = tl.reshape(halves, (BLOCK_ROWS, BLOCK_COLUMNS))
    return decisions >= threshold.to(tl.uint32)


@triton.jit
def drop_prefix(
    tile,
    seed,
    sequence_head,
    rows,
    threshold,
    multiplier,
    STREAM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The element-wise prefix dropout of one sequence, in the dtype of the tile."""
    keep = keep_mask(seed, sequence_head, rows, 0, threshold, STREAM, BLOCK_ROWS, BLOCK_DIM)
    return tl.where(keep, tile.to(tl.float32) * multiplier, 0.0).to(tile.dtype)


@triton.jit
def online_softmax_step(scores_log2, running_max, running_sum):
    """One step of the online softmax (Milakov & Gimelshein 2018).

    Returns the unnormalised probabilities, the factor that rescales what was accumulated before,
    and the new state. A row that has seen no visible column keeps a finite pivot, hence no NaN.
    """
    new_max = tl.maximum(running_max, tl.max(scores_log2, axis=1))
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    probabilities = tl.exp2(scores_log2 - pivot[:, None])
    rescale = tl.exp2(running_max - pivot)
    return probabilities, rescale, new_max, running_sum * rescale + tl.sum(probabilities, axis=1)


@triton.jit
def attend(
    query,
    key,
    value,
    visible,
    running_max,
    running_sum,
    accumulator,
    scale_log2,
    seed,
    sequence_head,
    rows,
    first_column,
    threshold,
    multiplier,
    HAS_DROPOUT: tl.constexpr,
    STREAM: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """One tile of columns of the forward pass; returns the new softmax state and accumulator."""
    scores_log2 = tl.dot(query, tl.trans(key), input_precision=INPUT_PRECISION) * scale_log2
    scores_log2 = tl.where(visible, scores_log2, float("-inf"))
    probabilities, rescale, running_max, running_sum = online_softmax_step(
        scores_log2, running_max, running_sum
    )
    if HAS_DROPOUT:
        keep = keep_mask(
            seed, sequence_head, rows, first_column, threshold, STREAM, BLOCK_QUERIES, BLOCK_KEYS
        )
        probabilities = tl.where(keep, probabilities * multiplier, 0.0)
    accumulator = tl.dot(
        probabilities.to(value.dtype),
        value,
        accumulator * rescale[:, None],
        input_precision=INPUT_PRECISION,
    )
    return running_max, running_sum, accumulator


@triton.jit
def recompute(
    query,
    key,
    value,
    grad_out,
    lse_log2,
    delta,
    visible,
    scale_log2,
    seed,
    sequence_head,
    rows,
    first_column,
    threshold,
    multiplier,
    HAS_DROPOUT: tl.constexpr,
    STREAM: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Dropped probabilities and unscaled gradients of the scores of one tile, both float32.

    dP = keep * (grad_out @ value^T) / (1 - p);  dS = P * (dP - delta).
    """
    scores_log2 = tl.dot(query, tl.trans(key), input_precision=INPUT_PRECISION) * scale_log2
    probabilities = tl.where(visible, tl.exp2(scores_log2 - lse_log2[:, None]), 0.0)
    grad_probabilities = tl.dot(grad_out, tl.trans(value), input_precision=INPUT_PRECISION)
    dropped = probabilities
    if HAS_DROPOUT:
        keep = keep_mask(
            seed, sequence_head, rows, first_column, threshold, STREAM, BLOCK_QUERIES, BLOCK_KEYS
        )
        dropped = tl.where(keep, probabilities * multiplier, 0.0)
        grad_probabilities = tl.where(keep, grad_probabilities * multiplier, 0.0)
    return dropped, probabilities * (grad_probabilities - delta[:, None])


@triton.jit
def load_statistics(lse_ptr, delta_ptr, first_row, rows, row_count):
    """lse in base 2 (0 for a row without a visible column) and delta of a tile of query rows."""
    lse = tl.load(lse_ptr + first_row + rows, mask=rows < row_count, other=0.0)
    delta = tl.load(delta_ptr + first_row + rows, mask=rows < row_count, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E), delta
