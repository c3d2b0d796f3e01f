"""Tiles of whole rows, held in registers in float32: a program reads every element once."""

import triton
import triton.language as tl

from ptv2_kernels.dropout import drop_hidden
from ptv2_kernels.tiles import chunk_mask


@triton.jit
def locate_rows(rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(first row, its offset, offsets from there, mask) of this program's rows."""
    first_row = tl.program_id(0) * ROWS
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, WIDTH)[None, :]
    mask = chunk_mask(first_row, rows, ROWS, 0, WIDTH, COLUMNS)
    return first_row, tl.cast(first_row, tl.int64) * COLUMNS, offsets, mask


@triton.jit
def load_rows(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, tile, offsets, mask):
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """A weight [1, WIDTH], zeros behind COLUMNS."""
    columns = tl.arange(0, WIDTH)
    return tl.load(ptr + columns, mask=columns < COLUMNS, other=0.0)[None, :]


@triton.jit
def load_total(
    input_ptr, bias_ptr, residual_ptr, dropout, first_row, rows, offsets, mask,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """residual + dropout(input + bias); input_ptr and residual_ptr: those of the first row."""
    added = load_rows(input_ptr, offsets, mask)
    residual = load_rows(residual_ptr, offsets, mask)
    if bias_ptr is not None:
        added += load_vector(bias_ptr, COLUMNS, WIDTH)
    return residual + drop_hidden(added, dropout, first_row, rows, ROWS, WIDTH)
