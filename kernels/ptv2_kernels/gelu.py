"""Bias + GELU, forward and backward.

    out = x * Phi(x), x = input + bias;  grad_input = grad_out * (Phi(x) + x * phi(x))

Phi and phi are the normal distribution and its density, computed from |x| by Phi(x) = 1 - Phi(-x)
with the polynomials of csrc/gelu.h. libdevice's erf takes twice the instructions, by whose count
the arithmetic of bf16 would outlast its memory traffic. One program computes one tile of rows and
columns. Bytes per row of C elements of e bytes, each moved once: forward 2 C e, backward 3 C e;
beside them the bias, 4 C for all rows together.
"""

import triton
import triton.language as tl

from ptv2_kernels.tiles import locate_tile

BLOCK_ROWS = 8
BLOCK_COLUMNS = 256  # divides the width of every common feed-forward network
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
# Where the polynomials end; beyond it their value there is used, of results below 1e-6.
TAIL = tl.constexpr(5.5)
# q of Phi(-a) = 2^(q(a) - a^2 log2(e) / 2), constant term first.
BELOW = tl.constexpr(
    (
        -0.999999884, -1.15111105, 0.262189099, -0.052651741, 0.00729458556, -0.000318102138,
        -0.000109667762, 2.29925673e-05, -1.4456176e-06,
    )
)  # fmt: skip
# m of Phi(-a) = e^(-a^2 / 2) m(a).
RATIO = tl.constexpr(
    (
        0.499999964, -0.398938949, 0.249949781, -0.132685599, 0.0616059595, -0.0249922766,
        0.00856352528, -0.00233655072, 0.00047207694, -6.47131064e-05, 5.28369982e-06,
        -1.91843008e-07,
    )
)  # fmt: skip


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


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    total = tl.zeros_like(x) + COEFFICIENTS[DEGREE]
    for step in tl.static_range(DEGREE):
        total = total * x + COEFFICIENTS[DEGREE - 1 - step]
    return total


@triton.jit
def _gelu(x):
    """max(x, 0) - |x| Phi(-|x|)"""
    size = tl.abs(x)
    inner = tl.minimum(size, TAIL)
    below = tl.exp2(_polynomial(inner, BELOW, 8) - size * size * HALF_LOG2_E)
    return tl.maximum(x, 0.0) - inner * below


@triton.jit
def _gelu_gradient(x):
    """At -|x|, which is what the one at |x| lacks of 1: e^(-x^2 / 2) (m(|x|) - |x| phi(0))."""
    size = tl.abs(x)
    inner = tl.minimum(size, TAIL)
    ratio = _polynomial(inner, RATIO, 11) - size * DENSITY_AT_0
    below = tl.exp2(size * size * -HALF_LOG2_E) * ratio
    return tl.where(x > 0.0, 1.0 - below, below)


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
    tl.store(out_ptr + first + offsets, _gelu(biased).to(out_ptr.dtype.element_ty), mask=mask)


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
    grad = grad_out * _gelu_gradient(biased)
    tl.store(grad_input_ptr + first + offsets, grad.to(grad_input_ptr.dtype.element_ty), mask=mask)
