"""Gated activations with a bias, forward and backward.

    a, b = halves of input + bias;  out = act(a) * b, or a * act(b) unless ACTIVATED_FIRST

`input` is [R, 2 C], `out` [R, C]. One program computes one tile of rows and columns of both halves:
a backward pass reads them once and writes both gradients. Bytes per row of C results of e bytes,
each moved once: forward 3 C e, backward 5 C e; beside them the bias, 8 C for all rows together.
"""

import triton
import triton.language as tl

from ptv2_kernels.activations import (
    activate,
    activate_with_gradient,
    load_biased,
    locate_columns,
)


@triton.jit(do_not_specialize=["rows"])
def _gated_activation_kernel(
    input_ptr,
    bias_ptr,
    out_ptr,
    rows,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATED_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    ACTIVATED: tl.constexpr = 0 if ACTIVATED_FIRST else COLUMNS
    GATE: tl.constexpr = COLUMNS if ACTIVATED_FIRST else 0
    first_row, offsets, columns, mask = locate_columns(
        rows, COLUMNS, 2 * COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS
    )
    row_ptr = input_ptr + first_row * (2 * COLUMNS)
    activated = load_biased(row_ptr, bias_ptr, offsets, columns, mask, ACTIVATED, COLUMNS)
    gate = load_biased(row_ptr, bias_ptr, offsets, columns, mask, GATE, COLUMNS)
    out = activate(activated, ACTIVATION) * gate
    offsets = tl.arange(0, BLOCK_ROWS)[:, None] * COLUMNS + columns[None, :]
    out_ptrs = out_ptr + first_row * COLUMNS + offsets
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gated_activation_backward_kernel(
    grad_out_ptr,
    input_ptr,
    bias_ptr,
    grad_input_ptr,
    rows,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATED_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    ACTIVATED: tl.constexpr = 0 if ACTIVATED_FIRST else COLUMNS
    GATE: tl.constexpr = COLUMNS if ACTIVATED_FIRST else 0
    first_row, offsets, columns, mask = locate_columns(
        rows, COLUMNS, 2 * COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS
    )
    first = first_row * (2 * COLUMNS)
    activated = load_biased(input_ptr + first, bias_ptr, offsets, columns, mask, ACTIVATED, COLUMNS)
    gate = load_biased(input_ptr + first, bias_ptr, offsets, columns, mask, GATE, COLUMNS)
    grad_offsets = tl.arange(0, BLOCK_ROWS)[:, None] * COLUMNS + columns[None, :]
    grad_ptrs = grad_out_ptr + first_row * COLUMNS + grad_offsets
    grad_out = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)

    value, gradient = activate_with_gradient(activated, ACTIVATION)
    grad_activated = (grad_out * gate * gradient).to(grad_input_ptr.dtype.element_ty)
    grad_gate = (grad_out * value).to(grad_input_ptr.dtype.element_ty)
    tl.store(grad_input_ptr + first + ACTIVATED + offsets, grad_activated, mask=mask)
    tl.store(grad_input_ptr + first + GATE + offsets, grad_gate, mask=mask)
