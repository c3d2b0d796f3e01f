"""LayerNorm or RMSNorm of residual + dropout(input + bias): forward, backward, and `out` again.

    total = residual + dropout(input + bias), rounded;  normal = (total - mean) * inverse_deviation
    out = normal * weight + beta;  scaled = weight * (grad_out + grad_other)
    grad_residual = inverse_deviation * (scaled - mean(scaled) - normal * mean(scaled * normal))
                    + grad_total
    grad_input = dropout(grad_residual)

RMSNorm, SUBTRACT_MEAN = False, takes 0 for mean and for mean(scaled). One program owns whole rows.
Bytes per row of C elements, x of them in input's dtype and r in residual's:

    dropout_add_norm            C (x + 3 r) + 8
    dropout_add_norm_backward   C (2 r) + 8; C r more for each of grad_out and grad_total, C x more
                                for each of grad_other and grad_input, if given
    norm_from_stats             C (2 r) + 8

8 more for the coordinates with dropout, and for all rows together 4 C for each of bias, weight
and beta, which stay in the caches.
"""

import triton
import triton.language as tl

from ptv2_kernels.dropout import drop_hidden
from ptv2_kernels.rows import load_rows, load_total, load_vector, locate_rows, store_rows


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
def _statistics(
    total, epsilon, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SUBTRACT_MEAN: tl.constexpr
):
    """mean and inverse_deviation, [ROWS, 1] each."""
    if SUBTRACT_MEAN:
        mean = _row_mean(total, COLUMNS)
        centred = total - mean
        if WIDTH > COLUMNS:
            centred = tl.where((tl.arange(0, WIDTH) < COLUMNS)[None, :], centred, 0.0)
        return mean, tl.rsqrt(_row_mean(centred * centred, COLUMNS) + epsilon)
    else:
        mean_square = _row_mean(total * total, COLUMNS)
        return tl.zeros_like(mean_square), tl.rsqrt(mean_square + epsilon)


@triton.jit
def _affine(total, mean, inverse_deviation, weight_ptr, beta_ptr, COLUMNS, WIDTH: tl.constexpr):
    """`out` of forward and of `norm_from_stats`."""
    normal = (total - mean) * inverse_deviation
    weight = load_vector(weight_ptr, COLUMNS, WIDTH)
    if beta_ptr is None:
        return normal * weight
    else:
        return tl.fma(normal, weight, load_vector(beta_ptr, COLUMNS, WIDTH))


@triton.jit
def _statistics_pointers(statistics_ptr, first_row, rows, ROWS: tl.constexpr):
    """Where the means of these rows lie, and which of them there are, [ROWS, 1]."""
    row_index = tl.arange(0, ROWS)[:, None]
    pointers = statistics_ptr + tl.cast(first_row, tl.int64) * 2 + row_index * 2
    return pointers, row_index < rows - first_row


@triton.jit
def _load_statistics(statistics_ptr, first_row, rows, ROWS: tl.constexpr):
    """mean and inverse_deviation, [ROWS, 1] each."""
    pointers, inside = _statistics_pointers(statistics_ptr, first_row, rows, ROWS)
    mean = tl.load(pointers, mask=inside, other=0.0)
    return mean, tl.load(pointers + 1, mask=inside, other=0.0)


@triton.jit
def _load_sum(grad_out_ptr, grad_other_ptr, first, offsets, mask):
    """Of those of the two that are given."""
    if grad_out_ptr is None:
        return load_rows(grad_other_ptr + first, offsets, mask)
    elif grad_other_ptr is None:
        return load_rows(grad_out_ptr + first, offsets, mask)
    else:
        grad_out = load_rows(grad_out_ptr + first, offsets, mask)
        return grad_out + load_rows(grad_other_ptr + first, offsets, mask)


@triton.jit(do_not_specialize=["rows"])
def _dropout_add_norm_kernel(
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
    SUBTRACT_MEAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row, first, offsets, mask = locate_rows(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    total = load_total(
        input_ptr + first, bias_ptr, residual_ptr + first, dropout, first_row, rows, offsets, mask,
        COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    rounded = total.to(total_ptr.dtype.element_ty)
    store_rows(total_ptr + first, rounded, offsets, mask)

    total = rounded.to(tl.float32)
    mean, inverse_deviation = _statistics(total, epsilon, COLUMNS, BLOCK_COLUMNS, SUBTRACT_MEAN)
    pointers, inside = _statistics_pointers(statistics_ptr, first_row, rows, BLOCK_ROWS)
    tl.store(pointers, mean, mask=inside)
    tl.store(pointers + 1, inverse_deviation, mask=inside)
    out = _affine(total, mean, inverse_deviation, weight_ptr, beta_ptr, COLUMNS, BLOCK_COLUMNS)
    store_rows(out_ptr + first, out, offsets, mask)


@triton.jit(do_not_specialize=["rows"])
def _dropout_add_norm_backward_kernel(
    grad_out_ptr,
    grad_other_ptr,
    grad_total_ptr,
    total_ptr,
    statistics_ptr,
    weight_ptr,
    grad_residual_ptr,
    grad_input_ptr,
    dropout,
    rows,
    COLUMNS: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row, first, offsets, mask = locate_rows(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    grad_out = _load_sum(grad_out_ptr, grad_other_ptr, first, offsets, mask)
    total = load_rows(total_ptr + first, offsets, mask)
    mean, inverse_deviation = _load_statistics(statistics_ptr, first_row, rows, BLOCK_ROWS)
    normal = (total - mean) * inverse_deviation
    # Zero in the padding, where normal is not.
    scaled = grad_out * load_vector(weight_ptr, COLUMNS, BLOCK_COLUMNS)
    along = _row_mean(scaled * normal, COLUMNS)
    if SUBTRACT_MEAN:
        scaled -= _row_mean(scaled, COLUMNS)
    grad = inverse_deviation * tl.fma(-normal, along, scaled)
    if grad_total_ptr is not None:
        grad += load_rows(grad_total_ptr + first, offsets, mask)
    store_rows(grad_residual_ptr + first, grad, offsets, mask)
    if grad_input_ptr is not None:
        grad = drop_hidden(grad, dropout, first_row, rows, BLOCK_ROWS, BLOCK_COLUMNS)
        store_rows(grad_input_ptr + first, grad, offsets, mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_from_stats_kernel(
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
    first_row, first, offsets, mask = locate_rows(rows, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    total = load_rows(total_ptr + first, offsets, mask)
    mean, inverse_deviation = _load_statistics(statistics_ptr, first_row, rows, BLOCK_ROWS)
    out = _affine(total, mean, inverse_deviation, weight_ptr, beta_ptr, COLUMNS, BLOCK_COLUMNS)
    store_rows(out_ptr + first, out, offsets, mask)
