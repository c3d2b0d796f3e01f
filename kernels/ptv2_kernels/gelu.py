"""Bias + GELU, forward and backward.

    out = x * Phi(x), x = input + bias;  grad_input = grad_out * (Phi(x) + x * phi(x))

Phi and phi are the normal distribution and its density. One program computes one tile of rows and
columns. Bytes per row of C elements of e bytes, each moved once: forward 2 C e, backward 3 C e;
beside them the bias, 4 C for all rows.
"""

import triton
import triton.language as tl

from ptv2_kernels.tiles import locate_tile

BLOCK_ROWS = 8
BLOCK_COLUMNS = 256  # divides the width of every common feed-forward network
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _locate(rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(offset of the first row, offsets from there, columns, mask) of this program's tile."""
    first_column, row_tile = locate_tile(COLUMNS, WIDTH)
    first_row = row_tile * ROWS
    columns = first_column + tl.arange(0, WIDTH)
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + columns[None, :]
    mask = (tl.arange(0, ROWS) < rows - first_row)[:, None]
    if COLUMNS % WIDTH != 0:
        mask = mask & (columns < COLUMNS)[None, :]
    return tl.cast(first_row, tl.int64) * COLUMNS, offsets, columns, mask


@triton.jit
def _load_biased(input_ptr, bias_ptr, offsets, columns, mask, COLUMNS: tl.constexpr):
    """input + bias in float32."""
    biased = tl.load(input_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        biased += tl.load(bias_ptr + columns, mask=columns < COLUMNS, other=0.0)[None, :]
    return biased


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_kernel(
    input_ptr,
    bias_ptr,
    out_ptr,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first, offsets, columns, mask = _locate(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    biased = _load_biased(input_ptr + first, bias_ptr, offsets, columns, mask, COLUMNS)
    out = 0.5 * biased * (1.0 + tl.erf(biased * SQRT_HALF))
    tl.store(out_ptr + first + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_backward_kernel(
    grad_out_ptr,
    input_ptr,
    bias_ptr,
    grad_input_ptr,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first, offsets, columns, mask = _locate(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    biased = _load_biased(input_ptr + first, bias_ptr, offsets, columns, mask, COLUMNS)
    grad_out = tl.load(grad_out_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(biased * SQRT_HALF))
    density = tl.exp(-0.5 * biased * biased) * DENSITY_AT_0
    grad = grad_out * (below + biased * density)
    tl.store(grad_input_ptr + first + offsets, grad.to(grad_input_ptr.dtype.element_ty), mask=mask)
