"""LayerNorm(residual + dropout(input + bias)): forward, backward, and `out` once more.

    total = residual + dropout(input + bias), rounded;  normal = (total - mean) * inverse_deviation
    out = normal * weight + beta;  scaled = weight * (grad_out + grad_other)
    grad_residual = inverse_deviation * (scaled - mean(scaled) - normal * mean(scaled * normal))
    grad_input = dropout(grad_residual)

One program owns whole rows and holds them in registers in float32: every element is read once.
Bytes per row of C elements, x of them in input's dtype and r in residual's:

    forward                C (x + 3 r) + 8
    backward               C (3 r) + 8; C x more for each of grad_other and grad_input, if given
    layer_norm_again       C (2 r) + 8

8 more for the coordinates with dropout, and for all rows together 4 C for each of bias, weight
and beta, which stay in the caches.
"""

import triton
import triton.language as tl

from ptv2_kernels.dropout import drop_hidden
from ptv2_kernels.tiles import chunk_mask


@triton.jit
def _locate(rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(first row, its offset, offsets from there, mask) of this program's rows."""
    first_row = tl.program_id(0) * ROWS
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, WIDTH)[None, :]
    mask = chunk_mask(first_row, rows, ROWS, 0, WIDTH, COLUMNS)
    return first_row, tl.cast(first_row, tl.int64) * COLUMNS, offsets, mask


@triton.jit
def _load_rows(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(ptr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """A weight [1, WIDTH], zeros behind COLUMNS."""
    columns = tl.arange(0, WIDTH)
    return tl.load(ptr + columns, mask=columns < COLUMNS, other=0.0)[None, :]


@triton.jit
def _row_mean(tile, COLUMNS: tl.constexpr):
    """[ROWS, 1] of a tile whose padding is 0.

    The remainder makes the division exact: of a constant row, nothing is left that
    1 / sqrt(epsilon) would blow up.
    """
    INVERSE: tl.constexpr = 1.0 / COLUMNS
    total = tl.sum(tile, axis=1)
    quotient = total * INVERSE
    remainder = tl.fma(quotient, -COLUMNS * 1.0, total)
    return tl.fma(remainder, INVERSE, quotient)[:, None]


@triton.jit
def _affine(total, mean, inverse_deviation, weight, beta):
    """The end of forward and of `layer_norm_again`; fused explicitly: the same bits in both."""
    return tl.fma((total - mean) * inverse_deviation, weight, beta)


@triton.jit
def _load_statistics(statistics_ptr, first_row, rows, ROWS: tl.constexpr):
    """mean and inverse_deviation, [ROWS, 1] each."""
    pointers = statistics_ptr + tl.cast(first_row, tl.int64) * 2 + tl.arange(0, ROWS) * 2
    inside = tl.arange(0, ROWS) < rows - first_row
    mean = tl.load(pointers, mask=inside, other=0.0)
    inverse_deviation = tl.load(pointers + 1, mask=inside, other=0.0)
    return mean[:, None], inverse_deviation[:, None]


@triton.jit(do_not_specialize=["rows"])
def _dropout_add_layer_norm_kernel(
    input_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    beta_ptr,
    out_ptr,
    total_ptr,
    statistics_ptr,
    dropout,
    epsilon,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row, first, offsets, mask = _locate(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    added = _load_rows(input_ptr + first, offsets, mask)
    residual = _load_rows(residual_ptr + first, offsets, mask)
    if bias_ptr is not None:
        added += _load_vector(bias_ptr, COLUMNS, BLOCK_COLUMNS)
    added = drop_hidden(added, dropout, first_row, rows, BLOCK_ROWS, BLOCK_COLUMNS)
    rounded = (residual + added).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + first + offsets, rounded, mask=mask)

    total = rounded.to(tl.float32)
    mean = _row_mean(total, COLUMNS)
    centred = total - mean
    if BLOCK_COLUMNS > COLUMNS:
        centred = tl.where((tl.arange(0, BLOCK_COLUMNS) < COLUMNS)[None, :], centred, 0.0)
    inverse_deviation = tl.rsqrt(_row_mean(centred * centred, COLUMNS) + epsilon)
    row_index = tl.arange(0, BLOCK_ROWS)[:, None]
    statistics_ptrs = statistics_ptr + tl.cast(first_row, tl.int64) * 2 + row_index * 2
    inside = row_index < rows - first_row
    tl.store(statistics_ptrs, mean, mask=inside)
    tl.store(statistics_ptrs + 1, inverse_deviation, mask=inside)

    weight = _load_vector(weight_ptr, COLUMNS, BLOCK_COLUMNS)
    beta = _load_vector(beta_ptr, COLUMNS, BLOCK_COLUMNS)
    out = _affine(total, mean, inverse_deviation, weight, beta)
    tl.store(out_ptr + first + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _dropout_add_layer_norm_backward_kernel(
    grad_out_ptr,
    grad_other_ptr,
    total_ptr,
    statistics_ptr,
    weight_ptr,
    grad_residual_ptr,
    grad_input_ptr,
    dropout,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row, first, offsets, mask = _locate(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    grad_out = _load_rows(grad_out_ptr + first, offsets, mask)
    if grad_other_ptr is not None:
        grad_out += _load_rows(grad_other_ptr + first, offsets, mask)
    total = _load_rows(total_ptr + first, offsets, mask)
    mean, inverse_deviation = _load_statistics(statistics_ptr, first_row, rows, BLOCK_ROWS)
    normal = (total - mean) * inverse_deviation
    # Zero in the padding, where normal is not.
    scaled = grad_out * _load_vector(weight_ptr, COLUMNS, BLOCK_COLUMNS)
    along = _row_mean(scaled * normal, COLUMNS)
    grad = inverse_deviation * (scaled - _row_mean(scaled, COLUMNS) - normal * along)
    grad_residual = grad.to(grad_residual_ptr.dtype.element_ty)
    tl.store(grad_residual_ptr + first + offsets, grad_residual, mask=mask)
    if grad_input_ptr is not None:
        grad = drop_hidden(grad, dropout, first_row, rows, BLOCK_ROWS, BLOCK_COLUMNS)
        grad_input = grad.to(grad_input_ptr.dtype.element_ty)
        tl.store(grad_input_ptr + first + offsets, grad_input, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_again_kernel(
    total_ptr,
    statistics_ptr,
    weight_ptr,
    beta_ptr,
    out_ptr,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row, first, offsets, mask = _locate(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    total = _load_rows(total_ptr + first, offsets, mask)
    mean, inverse_deviation = _load_statistics(statistics_ptr, first_row, rows, BLOCK_ROWS)
    weight = _load_vector(weight_ptr, COLUMNS, BLOCK_COLUMNS)
    beta = _load_vector(beta_ptr, COLUMNS, BLOCK_COLUMNS)
    out = _affine(total, mean, inverse_deviation, weight, beta)
    tl.store(out_ptr + first + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
