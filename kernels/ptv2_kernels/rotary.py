"""Rotary position embedding of packed heads, in place.

    (x, y) -> (x cos - y sin, x sin + y cos), INVERSE: with -sin

The pairs of a head are elements i and HALF + i, or 2 i and 2 i + 1 if INTERLEAVED, where HALF is
rotary_dim / 2; what lies behind rotary_dim is not touched. A program owns all heads of its rows,
and so reads an angle once; it has read a tile of them before it writes it, and nobody else reads
or writes there. Bytes per row of elements of e bytes, each moved once: 2 heads rotary_dim e, and
4 rotary_dim for cosine and sine.
"""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ptv2_kernels.configs import pair_options
from ptv2_kernels.launching import Launcher


@triton.jit
def _load_angles(ptr, row, inside, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """[ROWS, 1, PAIRS] of cosine or sine."""
    pairs = tl.arange(0, PAIRS)[None, None, :]
    return tl.load(ptr + row * HALF + pairs, mask=inside & (pairs < HALF), other=0.0)


@triton.jit
def _rotate_halves(head_ptrs, inside, cosine, sine, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """The pairs of [ROWS, HEADS] heads, HALF apart."""
    pairs = tl.arange(0, PAIRS)[None, None, :]
    if PAIRS > HALF:
        inside = inside & (pairs < HALF)
    pointers = head_ptrs + pairs
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(pointers + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = head_ptrs.dtype.scalar.element_ty
    tl.store(pointers, (x * cosine - y * sine).to(dtype), mask=inside)
    tl.store(pointers + HALF, (x * sine + y * cosine).to(dtype), mask=inside)


@triton.jit
def _rotate_neighbours(
    head_ptrs, inside, cosine, sine, HALF: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The pairs of [ROWS, HEADS] heads, side by side: loaded together, for wide loads."""
    columns = tl.arange(0, 2 * PAIRS)[None, None, :]
    if PAIRS > HALF:
        inside = inside & (columns < 2 * HALF)
    pointers = head_ptrs + columns
    loaded = tl.load(pointers, mask=inside, other=0.0)
    x, y = tl.split(tl.reshape(loaded, (ROWS, HEADS, PAIRS, 2)).to(tl.float32))
    rotated = tl.join(x * cosine - y * sine, x * sine + y * cosine).to(loaded.dtype)
    tl.store(pointers, tl.reshape(rotated, (ROWS, HEADS, 2 * PAIRS)), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _rotate_kernel(
    packed_ptr,
    cosine_ptr,
    sine_ptr,
    row_stride,
    rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,  # divides HEADS
    BLOCK_PAIRS: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None, None]
    inside, row = row < rows, row.to(tl.int64)
    cosine = _load_angles(cosine_ptr, row, inside, HALF, BLOCK_PAIRS)
    sine = _load_angles(sine_ptr, row, inside, HALF, BLOCK_PAIRS)
    if INVERSE:
        sine = -sine
    row_ptrs = packed_ptr + row * row_stride
    for first_head in range(0, HEADS, BLOCK_HEADS):
        heads = first_head + tl.arange(0, BLOCK_HEADS)[None, :, None]
        head_ptrs = row_ptrs + heads * HEAD_DIM
        if INTERLEAVED:
            _rotate_neighbours(
                head_ptrs, inside, cosine, sine, HALF, BLOCK_ROWS, BLOCK_HEADS, BLOCK_PAIRS
            )
        else:
            _rotate_halves(head_ptrs, inside, cosine, sine, HALF, BLOCK_PAIRS)


_rotate = Launcher(_rotate_kernel)


def launch_rotate_(
    packed: Tensor,  # [R, >= heads * head_dim], rows contiguous
    cosine: Tensor,  # float32 [R, rotary_dim / 2]
    sine: Tensor,
    heads: int,
    head_dim: int,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Rotates the first heads of every row.

    Raises:
        ValueError: where it would write elsewhere.
    """
    rows, half = packed.shape[0], cosine.shape[1]
    _check_fit(packed, cosine, sine, heads, head_dim)
    if rows * heads * half == 0:
        return
    options = _options(heads, head_dim, half, interleaved, inverse)
    _rotate(
        (-(-rows // options["BLOCK_ROWS"]), 1, 1), options,
        packed, cosine.contiguous(), sine.contiguous(), packed.stride(0), rows,
    )  # fmt: skip


@functools.cache
def _options(
    heads: int, head_dim: int, half: int, interleaved: bool, inverse: bool
) -> dict[str, Any]:
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "INTERLEAVED": interleaved,
        "INVERSE": inverse,
        **pair_options(heads, half),
    }


def _check_fit(packed: Tensor, cosine: Tensor, sine: Tensor, heads: int, head_dim: int) -> None:
    (rows, columns), width = packed.shape, heads * head_dim
    if width > columns:
        raise ValueError(
            f"heads, head_dim: expected at most {columns} columns of packed, got {heads} heads of "
            f"{head_dim}"
        )
    if width > 1 and packed.stride(1) != 1:
        raise ValueError(f"packed: expected last stride 1, got {packed.stride(1)}")
    if rows > 1 and abs(packed.stride(0)) < width:
        raise ValueError(
            f"packed: expected rows that lie apart, got stride {packed.stride(0)} for {width} "
            "columns"
        )
    half = cosine.shape[1]
    if 2 * half > head_dim:
        raise ValueError(
            f"cosine: expected at most {head_dim // 2} columns, half of head_dim, got {half}"
        )
    for name, angles in (("cosine", cosine), ("sine", sine)):
        if angles.shape != (rows, half):
            raise ValueError(f"{name}: expected shape {[rows, half]}, got {list(angles.shape)}")
