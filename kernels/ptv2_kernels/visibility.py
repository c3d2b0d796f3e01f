"""Who sees what: padding, context lengths and windows; and the bias on the scores of tokens."""

import triton
import triton.language as tl

SCANNED_AT_ONCE = tl.constexpr(512)


@triton.jit
def load_context(extras, sequence):
    """The context length of a sequence; without the tensor any number serves."""
    if extras.context_lengths_ptr is None:
        return 0
    else:
        return tl.load(extras.context_lengths_ptr + sequence)


@triton.jit
def seen_columns(
    extras, sequence, context, first_row, column_count, mask_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(begin, middle, end) of the token columns that some row of a tile sees.

    Up to the middle, whole tiles of columns, every row sees every column.
    """
    begin, middle, end = 0, column_count, column_count
    if extras.key_mask_ptr is not None:
        middle, end = scan_key_mask(extras, sequence, column_count, mask_stride)
    if extras.context_lengths_ptr is not None:
        middle = tl.minimum(middle, tl.maximum(context, first_row + 1))
        end = tl.minimum(end, tl.maximum(context, first_row + ROWS))
    if extras.window is not None:
        begin = tl.maximum(0, first_row - extras.window) // COLUMNS * COLUMNS
        end = tl.minimum(end, first_row + ROWS + extras.window)
    if extras.window is None:
        middle = middle // COLUMNS * COLUMNS
    else:
        middle = begin
    return begin, middle, end


@triton.jit
def scan_key_mask(extras, sequence, tokens, mask_stride):
    """(first hidden column, one behind the last visible column) of a sequence.

    With right padding that is its length: the columns before need no mask, those behind no work.
    """
    row_ptr = extras.key_mask_ptr + sequence.to(tl.int64) * mask_stride
    columns = tl.arange(0, SCANNED_AT_ONCE)
    first_hidden = tl.full((SCANNED_AT_ONCE,), 0, tl.int32) + tokens
    end = tl.zeros((SCANNED_AT_ONCE,), tl.int32)
    for first_column in range(0, tokens, SCANNED_AT_ONCE):
        inside = columns < tokens - first_column
        visible = tl.load(row_ptr + first_column + columns, mask=inside, other=0) != 0
        hidden_column = tl.where(visible, tokens, first_column + columns)
        first_hidden = tl.minimum(first_hidden, hidden_column)
        end = tl.maximum(end, tl.where(visible, first_column + columns + 1, 0))
    return tl.min(first_hidden, axis=0), tl.max(end, axis=0)


@triton.jit
def seeing_rows(extras, context, first_column, last_column, queries):
    """[begin, end) of the rows that see some token column from first_column to last_column."""
    begin = 0
    end = queries
    if extras.context_lengths_ptr is not None:
        begin = tl.where(first_column < context, 0, first_column)
    if extras.window is not None:
        begin = tl.maximum(begin, first_column - extras.window)
        end = tl.minimum(end, last_column + extras.window + 1)
    return begin, end


@triton.jit
def unmasked_columns(extras, sequence, first_column, tokens, mask_stride, COLUMNS: tl.constexpr):
    """Which token columns are inside the sequence and not masked."""
    offsets = tl.arange(0, COLUMNS)
    visible = offsets < tokens - first_column
    if extras.key_mask_ptr is not None:
        first_ptr = extras.key_mask_ptr + sequence.to(tl.int64) * mask_stride + first_column
        loaded = tl.load(first_ptr + offsets[None, :], mask=visible[None, :], other=0)
        # Triton orders the sums of a product by the narrowest load that its operands come of, but
        # looks through no reduction: without this one, a mask of bytes would change their bits.
        visible = tl.max(loaded.to(tl.int32), axis=0) != 0
    return visible


@triton.jit
def hide_behind(scores, column_count):
    """Scores with -inf from a column on."""
    inside = (tl.arange(0, scores.shape[1]) < column_count)[None, :]
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def hide_from_rows(scores, extras, context, first_row, first_column):
    """Scores of one tile of tokens with -inf where context length or window hides the column."""
    rows = (first_row + tl.arange(0, scores.shape[0]))[:, None]
    columns = (first_column + tl.arange(0, scores.shape[1]))[None, :]
    if extras.context_lengths_ptr is not None:
        scores = tl.where((columns < context) | (columns <= rows), scores, float("-inf"))
    if extras.window is not None:
        distance = rows - columns
        near = (distance <= extras.window) & (distance >= -extras.window)
        scores = tl.where(near, scores, float("-inf"))
    return scores


@triton.jit
def hide_tokens(
    scores, extras, sequence, context, first_row, first_column, column_count, mask_stride,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of tokens with -inf where a row does not see it; it sees a WHOLE tile."""
    if WHOLE:
        return scores
    else:
        unmasked = unmasked_columns(
            extras, sequence, first_column, column_count, mask_stride, scores.shape[1]
        )
        scores = tl.where(unmasked[None, :], scores, float("-inf"))
        return hide_from_rows(scores, extras, context, first_row, first_column)


@triton.jit
def load_bias(
    extras, sequence, head, first_row, first_column, row_count, column_count,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of the bias, in float32."""
    strides = extras.bias_strides
    tile_ptr = extras.bias_ptr + sequence.to(tl.int64) * strides[0]
    tile_ptr += head.to(tl.int64) * strides[1]
    tile_ptr += tl.cast(first_row, tl.int64) * strides[2] + first_column
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < row_count - first_row)[:, None] & (columns < column_count - first_column)[
        None, :
    ]
    offsets = rows[:, None] * strides[2] + columns[None, :]
    return tl.load(tile_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
