"""Activations with a bias, forward and backward, and what gated ones share with them.

    out = act(x), x = input + bias;  grad_input = grad_out * act'(x)

    gelu        x Phi(x), Phi the normal distribution
    gelu_tanh   x sigmoid(z), z = sqrt(8 / pi) (x + 0.044715 x^3): half of 1 + tanh(z / 2)
    silu        x sigmoid(x)
    quick_gelu  x sigmoid(1.702 x)
    relu        max(x, 0)

Phi and its density are computed from |x| by Phi(x) = 1 - Phi(-x) with the polynomials of
csrc/activations.h. libdevice's erf takes twice the instructions, by whose count the arithmetic of
bf16 would outlast its memory traffic. One program computes one tile of rows and columns. Bytes per
row of C elements of e bytes, each moved once: forward 2 C e, backward 3 C e; beside them the bias,
4 C for all rows together.
"""

import triton
import triton.language as tl

from ptv2_kernels.places import locate_tile

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "quick_gelu")
BLOCK_ROWS = 8
BLOCK_COLUMNS = 256  # divides the width of every common feed-forward network
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
TANH_CUBIC = tl.constexpr(0.044715)
QUICK = tl.constexpr(1.702)
NO_POWER = tl.constexpr(128.0)  # e^-128 is 0 in float32
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
def locate_columns(
    rows, COLUMNS: tl.constexpr, PITCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """(first row, offsets from its start, columns, mask) of this program's tile.

    PITCH: from row to row; `columns` and the mask are of rows of COLUMNS.
    """
    first_column, row_tile = locate_tile(COLUMNS, WIDTH)
    first_row = row_tile * ROWS
    columns = first_column + tl.arange(0, WIDTH)
    offsets = tl.arange(0, ROWS)[:, None] * PITCH + columns[None, :]
    mask = (tl.arange(0, ROWS) < rows - first_row)[:, None]
    if COLUMNS % WIDTH != 0:
        mask = mask & (columns < COLUMNS)[None, :]
    return tl.cast(first_row, tl.int64), offsets, columns, mask


@triton.jit
def load_biased(
    input_ptr, bias_ptr, offsets, columns, mask, FIRST: tl.constexpr, COLUMNS: tl.constexpr
):
    """COLUMNS of input + bias from column FIRST on, in float32."""
    biased = tl.load(input_ptr + FIRST + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + FIRST + columns, mask=columns < COLUMNS, other=0.0)
        biased += bias[None, :]
    return biased


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    total = tl.zeros_like(x) + COEFFICIENTS[DEGREE]
    for step in tl.static_range(DEGREE):
        total = tl.fma(total, x, COEFFICIENTS[DEGREE - 1 - step])
    return total


@triton.jit
def _gelu(x):
    """max(x, 0) - |x| Phi(-|x|)"""
    size = tl.abs(x)
    inner = tl.minimum(size, TAIL)
    below = tl.exp2(tl.fma(size * size, -HALF_LOG2_E, _polynomial(inner, BELOW, 8)))
    return tl.fma(-inner, below, tl.maximum(x, 0.0))


@triton.jit
def _gelu_with_gradient(x):
    """The gradient at -|x|, e^(-x^2 / 2) (m(|x|) - |x| phi(0)), is what the one at |x| lacks of 1.

    The value comes of the same m: beside the gradient, `_gelu` would be another polynomial.
    """
    size = tl.abs(x)
    inner = tl.minimum(size, TAIL)
    ratio = _polynomial(inner, RATIO, 11)
    density = tl.exp2(size * size * -HALF_LOG2_E)
    below = density * tl.fma(size, -DENSITY_AT_0, ratio)
    gradient = tl.where(x > 0.0, 1.0 - below, below)
    return tl.fma(-inner, density * ratio, tl.maximum(x, 0.0)), gradient


@triton.jit
def _sigmoids(x, ACTIVATION: tl.constexpr):
    """sigmoid(z), and its product with sigmoid(-z), of the activations x sigmoid(z).

    Both come of e^-|z|: nothing cancels or overflows. What is lost when |z| log2(e) is rounded, a
    small number times the power, is added to it again.
    """
    size = tl.abs(x)
    if ACTIVATION == "gelu_tanh":
        size *= tl.fma(size * size, SQRT_8_OVER_PI * TANH_CUBIC, SQRT_8_OVER_PI)
    elif ACTIVATION == "quick_gelu":
        size = size * QUICK
    else:
        tl.static_assert(ACTIVATION == "silu")
    size = tl.minimum(size, NO_POWER)
    exponent = size * -LOG2_E
    power = tl.exp2(exponent)
    power = tl.fma(power, tl.fma(exponent, -LN_2, -size), power)
    above = 1.0 / (1.0 + power)
    below = power * above
    return tl.where(x > 0.0, above, below), above * below


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """dz / dx of the activations x sigmoid(z)."""
    if ACTIVATION == "gelu_tanh":
        return tl.fma(x * x, 3.0 * SQRT_8_OVER_PI * TANH_CUBIC, SQRT_8_OVER_PI)
    elif ACTIVATION == "quick_gelu":
        return tl.zeros_like(x) + QUICK
    else:
        return tl.zeros_like(x) + 1.0


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) of a float32 tile; NaN stays NaN."""
    if ACTIVATION == "gelu":
        return _gelu(x)
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    else:
        opened, _ = _sigmoids(x, ACTIVATION)
        return x * opened


@triton.jit
def activate_with_gradient(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)) of a float32 tile; what is not used of them is not computed."""
    if ACTIVATION == "gelu":
        return _gelu_with_gradient(x)
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x), (x > 0.0).to(tl.float32)
    else:
        opened, product = _sigmoids(x, ACTIVATION)
        return x * opened, tl.fma(x * product, _slope(x, ACTIVATION), opened)


@triton.jit(do_not_specialize=["rows"])
def _bias_activation_kernel(
    input_ptr,
    bias_ptr,
    out_ptr,
    rows,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row, offsets, columns, mask = locate_columns(
        rows, COLUMNS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS
    )
    first = first_row * COLUMNS
    biased = load_biased(input_ptr + first, bias_ptr, offsets, columns, mask, 0, COLUMNS)
    out = activate(biased, ACTIVATION)
    tl.store(out_ptr + first + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _bias_activation_backward_kernel(
    grad_out_ptr,
    input_ptr,
    bias_ptr,
    grad_input_ptr,
    rows,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row, offsets, columns, mask = locate_columns(
        rows, COLUMNS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS
    )
    first = first_row * COLUMNS
    biased = load_biased(input_ptr + first, bias_ptr, offsets, columns, mask, 0, COLUMNS)
    grad_out = tl.load(grad_out_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
    _, gradient = activate_with_gradient(biased, ACTIVATION)
    grad = grad_out * gradient
    tl.store(grad_input_ptr + first + offsets, grad.to(grad_input_ptr.dtype.element_ty), mask=mask)
