"""residual + dropout(input + bias) where no norm follows, and the dropout of its gradient.

    total = residual + dropout(input + bias);  grad_input = dropout(grad_total)

Bytes per row of C elements, x of them in input's dtype and r in residual's: forward C (x + 2 r),
backward C (r + x); 8 more for the coordinates with dropout, and 4 C for the bias for all rows
together.
"""

import triton
import triton.language as tl

from ptv2_kernels.dropout import drop_hidden
from ptv2_kernels.rows import load_rows, load_total, locate_rows, store_rows


@triton.jit(do_not_specialize=["rows"])
def _dropout_add_kernel(
    input_ptr,
    bias_ptr,
    residual_ptr,
    total_ptr,
    dropout,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row, first, offsets, mask = locate_rows(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    total = load_total(
        input_ptr + first, bias_ptr, residual_ptr + first, dropout, first_row, rows, offsets, mask,
        COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    store_rows(total_ptr + first, total, offsets, mask)


@triton.jit(do_not_specialize=["rows"])
def _dropout_backward_kernel(
    grad_total_ptr,
    grad_input_ptr,
    dropout,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row, first, offsets, mask = locate_rows(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    grad = load_rows(grad_total_ptr + first, offsets, mask)
    grad = drop_hidden(grad, dropout, first_row, rows, BLOCK_ROWS, BLOCK_COLUMNS)
    store_rows(grad_input_ptr + first, grad, offsets, mask)
