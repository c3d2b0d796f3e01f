"""Who sees what: padding, context lengths and windows; and the bias on the scores of tokens."""

import triton
import triton.language as tl


@triton.jit
def load_context(extras, sequence):
    """The context length of a sequence; without the tensor any number serves."""
    if extras.context_lengths_ptr is None:
        return 0
    else:
        return tl.load(extras.context_lengths_ptr + sequence)


@triton.jit
def seen_columns(extras, context, first_row, last_row, tokens):
    """[begin, end) of the token columns that some row from first_row to last_row sees."""
    begin = 0
    end = tokens
    if extras.context_lengths_ptr is not None:
        end = tl.minimum(end, tl.maximum(context, last_row + 1))
    if extras.window is not None:
        begin = tl.maximum(0, first_row - extras.window)
        end = tl.minimum(end, last_row + extras.window + 1)
    return begin, end


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
def unmasked_columns(extras, sequence, columns, tokens, mask_stride):
    """Which token columns are inside the sequence and not masked."""
    visible = columns < tokens
    if extras.key_mask_ptr is not None:
        row_ptr = extras.key_mask_ptr + sequence.to(tl.int64) * mask_stride
        visible = tl.load(row_ptr + columns, mask=visible, other=0) != 0
    return visible


@triton.jit
def shown_columns(extras, unmasked, context, rows, columns):
    """[rows, columns]: `unmasked`, and what context length and window show each row."""
    shown = unmasked[None, :]
    if extras.context_lengths_ptr is not None:
        shown = shown & ((columns < context)[None, :] | (columns[None, :] <= rows[:, None]))
    if extras.window is not None:
        distance = rows[:, None] - columns[None, :]
        shown = shown & (distance <= extras.window) & (distance >= -extras.window)
    return shown


@triton.jit
def load_bias(extras, sequence, head, rows, columns, row_count, column_count):
    """[rows, columns] of the bias, in float32."""
    strides = extras.bias_strides
    head_ptr = extras.bias_ptr + sequence.to(tl.int64) * strides[0]
    head_ptr += head.to(tl.int64) * strides[1]
    offsets = rows[:, None].to(tl.int64) * strides[2] + columns[None, :]
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(head_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
