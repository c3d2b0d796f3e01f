"""What is visible: padding, context lengths and windows; and the bias on the scores of tokens.

Two words, here and in csrc/visibility.h. A column is *visible* to a row that attends to it: a
prefix column always, a token column as key_mask, context_lengths and window say; others are hidden
from it. An element is *inside* when there is one: what a tile has beyond its sequence, its prefix
or head_dim is padding, neither read nor counted.
"""

import triton
import triton.language as tl

SCANNED_AT_ONCE = tl.constexpr(512)


@triton.jit
def visible_range(extras, place, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(begin, middle, end): outside of them token columns are hidden from all rows of a tile.

    Up to the middle, whole tiles of columns, every column is visible to every row.
    """
    begin, middle, end = 0, place.column_count, place.column_count
    if extras.key_mask_ptr is not None:
        middle, end = scan_key_mask(extras, place)
    if extras.context_lengths_ptr is not None:
        middle = tl.minimum(middle, tl.maximum(place.context, first_row + 1))
        end = tl.minimum(end, tl.maximum(place.context, first_row + ROWS))
    if extras.window is not None:
        begin = tl.maximum(0, first_row - extras.window) // COLUMNS * COLUMNS
        end = tl.minimum(end, first_row + ROWS + extras.window)
    if extras.window is None:
        middle = middle // COLUMNS * COLUMNS
    else:
        middle = begin
    return begin, middle, end


@triton.jit
def scan_key_mask(extras, place):
    """(first hidden column, one behind the last visible column) of a sequence.

    With right padding that is its length: the columns before need no mask, those behind no work.
    """
    tokens, row_ptr = place.column_count, mask_row(extras, place)
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
def mask_row(extras, place):
    """Where the key mask [B, S] of a sequence begins."""
    return extras.key_mask_ptr + place.sequence.to(tl.int64) * place.tokens


@triton.jit
def attending_rows(extras, place, first_column, COLUMNS: tl.constexpr):
    """[begin, end): to rows outside of them the token columns of a tile are hidden."""
    begin, end, last_column = 0, place.row_count, first_column + COLUMNS - 1
    if extras.context_lengths_ptr is not None:
        begin = tl.where(first_column < place.context, 0, first_column)
    if extras.window is not None:
        begin = tl.maximum(begin, first_column - extras.window)
        end = tl.minimum(end, last_column + extras.window + 1)
    return begin, end


@triton.jit
def visible_columns(extras, place, first_column, COLUMNS: tl.constexpr):
    """Which token columns of a tile are inside, and left visible by key_mask."""
    offsets = tl.arange(0, COLUMNS)
    visible = offsets < place.column_count - first_column
    if extras.key_mask_ptr is not None:
        first_ptr = mask_row(extras, place) + first_column
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
def hide_from_rows(scores, extras, place, first_row, first_column):
    """Scores of one tile of tokens with -inf where context length or window hides the column."""
    rows = (first_row + tl.arange(0, scores.shape[0]))[:, None]
    columns = (first_column + tl.arange(0, scores.shape[1]))[None, :]
    if extras.context_lengths_ptr is not None:
        scores = tl.where((columns < place.context) | (columns <= rows), scores, float("-inf"))
    if extras.window is not None:
        distance = rows - columns
        near = (distance <= extras.window) & (distance >= -extras.window)
        scores = tl.where(near, scores, float("-inf"))
    return scores


@triton.jit
def hide_tokens(scores, extras, place, first_row, first_column, WHOLE: tl.constexpr):
    """Scores of one tile of tokens with -inf where hidden; of a WHOLE tile all are visible."""
    if WHOLE:
        return scores
    else:
        visible = visible_columns(extras, place, first_column, scores.shape[1])
        scores = tl.where(visible[None, :], scores, float("-inf"))
        return hide_from_rows(scores, extras, place, first_row, first_column)


@triton.jit
def load_bias(extras, place, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of the bias, in float32."""
    strides = extras.bias_strides
    tile_ptr = extras.bias_ptr + place.sequence.to(tl.int64) * strides[0]
    tile_ptr += place.head.to(tl.int64) * strides[1]
    tile_ptr += tl.cast(first_row, tl.int64) * strides[2] + first_column
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_inside = (rows < place.row_count - first_row)[:, None]
    column_inside = (columns < place.column_count - first_column)[None, :]
    offsets = rows[:, None] * strides[2] + columns[None, :]
    inside = row_inside & column_inside
    return tl.load(tile_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
