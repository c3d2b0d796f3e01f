"""The prefix gradient: a sum over every query of the whole batch, in two stages without atomics.

Stage one splits the batch: the program of (prefix tile, head, row of the bank, split) adds up its
sequences in order into float32 partials; of a bank it skips those that read another row. Stage two
adds the partials in order and rounds once; gates, of which each tile, sequence and head leaves one
sum, are added up by a kernel of their own. The number of splits follows the number of processors,
not the batch. Keys and values of tokens are never read.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptv2_kernels.arguments import LOG2_E, RUNTIME_SIZES, Call, Strided, strided
from ptv2_kernels.configs import COMPILER_OPTIONS, INTERPRETED, launch_options
from ptv2_kernels.dropout import PREFIX_STREAM
from ptv2_kernels.launching import Launcher
from ptv2_kernels.places import length_of_prefix, load_seed, locate, with_head
from ptv2_kernels.softmax import (
    LN_2,
    drop_pair,
    load_gate,
    load_statistics,
    prefix_scores,
    recompute,
    undropped,
    undropped_prefix,
)
from ptv2_kernels.tiles import (
    add_product,
    add_tiles,
    keep_rows,
    load_queries,
    load_tile,
    scale_tile,
    store_tile,
    sum_rows,
    zero_tile,
)

REDUCE_BLOCK = 1024
REDUCE_OPTIONS = {"BLOCK": REDUCE_BLOCK, **COMPILER_OPTIONS}
GATE_OPTIONS = {"BLOCK": 256, **COMPILER_OPTIONS}


@triton.jit
def reading_rows(extras, sequence, bank_row, row_count):
    """How many rows of a sequence read a row of the bank: all or none."""
    if extras.prefix_index_ptr is not None:
        reads = tl.load(extras.prefix_index_ptr + sequence) == bank_row
        row_count = tl.where(reads, row_count, 0)
    return row_count


@triton.jit(do_not_specialize=[*RUNTIME_SIZES, "batch", "bank_rows", "sequences_per_split"])
def _grad_prefix_kernel(
    query,
    prefix_key,
    prefix_value,
    grad_out,
    partial,
    gate_partial_ptr,
    lse_ptr,
    delta_ptr,
    extras,
    heads,
    group,
    queries,
    tokens,
    prefix_length,
    batch,
    bank_rows,
    sequences_per_split,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Partial sums [splits * 2 * R, H_kv, P, D], and of the gates, where there are some, [H, B,
    prefix tiles]; grid (prefix tiles, H_kv, splits * R).
    """
    kv_head, split, bank_row = tl.program_id(1), tl.program_id(2), 0
    if extras.prefix_index_ptr is not None:
        split, bank_row = split // bank_rows, split % bank_rows
    first_column = tl.program_id(0) * BLOCK_KEYS
    length = length_of_prefix(extras, bank_row, prefix_length)
    shared_key = load_tile(
        prefix_key, bank_row, kv_head, first_column, length, BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS
    )
    shared_value = load_tile(
        prefix_value, bank_row, kv_head, first_column, length, BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS
    )
    seed = load_seed(extras)
    key_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)
    value_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)

    first_sequence = split * sequences_per_split
    for step in range(tl.minimum(sequences_per_split, batch - first_sequence)):
        sequence = first_sequence + step
        shared = locate(
            extras, sequence, kv_head * group, kv_head, heads, group, queries, tokens, seed
        )
        key_tile, value_tile = drop_pair(shared_key, shared_value, extras, shared, first_column)
        total_key, total_value = key_gradient, value_gradient
        if extras.prefix_threshold is not None:
            key_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)
            value_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)
        tiles = tl.cdiv(reading_rows(extras, sequence, bank_row, shared.row_count), BLOCK_QUERIES)
        for member in range(group):
            place = with_head(shared, kv_head * group + member)
            gate = load_gate(extras, place, bank_row)
            gate_gradient = tl.zeros((BLOCK_QUERIES,), tl.float32)
            for tile in range(tiles):
                first_row = tile * BLOCK_QUERIES
                query_tile = load_queries(
                    query, place, first_row, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS
                )
                grad_out_tile = load_queries(
                    grad_out, place, first_row, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS
                )
                statistics = load_statistics(
                    lse_ptr, delta_ptr, extras, place, first_row, BLOCK_QUERIES
                )
                scores, factor = prefix_scores(
                    query_tile, key_tile, extras, scale_log2, INPUT_PRECISION
                )
                dropped, grad_scores = recompute(
                    scores, factor, value_tile, grad_out_tile, statistics, extras, place,
                    first_row, first_column, PREFIX_STREAM, INPUT_PRECISION,
                )  # fmt: skip
                if extras.gate_ptr is not None:
                    inside = (tl.arange(0, BLOCK_KEYS) < length - first_column)[None, :]
                    gate_gradient += sum_rows(tl.where(inside, grad_scores, 0.0))
                    dropped, grad_scores = dropped * gate, grad_scores * gate
                value_gradient = add_product(
                    tl.trans(dropped), grad_out_tile, value_gradient, INPUT_PRECISION
                )
                key_gradient = add_product(
                    tl.trans(grad_scores), query_tile, key_gradient, INPUT_PRECISION
                )
            if extras.gate_ptr is not None:
                # [H, B, prefix tiles]
                slot = (tl.cast(place.head, tl.int64) * batch + sequence) * tl.num_programs(0)
                slot += tl.program_id(0) + tl.arange(0, 1)
                reads = reading_rows(extras, sequence, bank_row, tl.full((1,), 1, tl.int32)) > 0
                tl.store(gate_partial_ptr + slot, sum_rows(gate_gradient[None, :]), mask=reads)
        if extras.prefix_threshold is not None:
            # Each sequence has a mask of its own, applied before the sum over the batch.
            key_gradient, value_gradient = drop_pair(
                key_gradient, value_gradient, extras, shared, first_column
            )
            key_gradient = add_tiles(total_key, key_gradient)
            value_gradient = add_tiles(total_value, value_gradient)

    if extras.prefix_lengths_ptr is not None:
        inside = tl.arange(0, BLOCK_KEYS) < length - first_column
        key_gradient = keep_rows(key_gradient, inside)
        value_gradient = keep_rows(value_gradient, inside)
    key_gradient = undropped_prefix(scale_tile(key_gradient, scale_log2 * LN_2), extras)
    value_gradient = undropped_prefix(undropped(value_gradient, extras), extras)
    key_slot = split * 2 * bank_rows + bank_row
    store_tile(
        partial, key_gradient, key_slot, kv_head, first_column, prefix_length,
        BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS,
    )  # fmt: skip
    value_slot = key_slot + bank_rows
    store_tile(
        partial, value_gradient, value_slot, kv_head, first_column, prefix_length,
        BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size", "splits"])
def _sum_partials_kernel(
    partial_ptr, grad_prefix_key_ptr, grad_prefix_value_ptr, size, splits, BLOCK: tl.constexpr
):
    """Adds the partials of one gradient in order; grid (tiles of R * H_kv * P * D, 2)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    in_range = offsets < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        first = (split * 2 + which).to(tl.int64) * size
        total += tl.load(partial_ptr + first + offsets, mask=in_range, other=0.0)
    result = total.to(grad_prefix_key_ptr.dtype.element_ty)
    if which == 0:
        tl.store(grad_prefix_key_ptr + offsets, result, mask=in_range)
    else:
        tl.store(grad_prefix_value_ptr + offsets, result, mask=in_range)


@triton.jit(do_not_specialize=["batch", "tiles"])
def _sum_gates_kernel(
    partial_ptr, prefix_index_ptr, grad_prefix_gate_ptr, batch, tiles, BLOCK: tl.constexpr
):
    """Adds up [H, B, prefix tiles] by the row of the bank that each sequence reads; grid (H, R)."""
    head, bank_row = tl.program_id(0), tl.program_id(1)
    first_ptr = partial_ptr + tl.cast(head, tl.int64) * batch * tiles
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, batch * tiles, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        counts = offsets < batch * tiles
        if prefix_index_ptr is not None:
            index = tl.load(prefix_index_ptr + offsets // tiles, mask=counts, other=-1)
            counts = counts & (index == bank_row)
        total += tl.load(first_ptr + offsets, mask=counts, other=0.0)
    result_ptr = grad_prefix_gate_ptr + bank_row * tl.num_programs(0) + head
    tl.store(result_ptr + tl.arange(0, 1), sum_rows(total[None, :]))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED or device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def count_splits(batch: int, programs: int, multiprocessors: int) -> int:
    """Enough times `programs` for two waves, and at most one split per sequence."""
    wanted = -(-2 * multiprocessors // max(1, programs))
    return max(1, min(wanted, batch))


_grad_prefix = Launcher(_grad_prefix_kernel)
_sum_partials = Launcher(_sum_partials_kernel)
_sum_gates = Launcher(_sum_gates_kernel)


def launch_backward_prefix(
    call: Call,  # with the extras of the prefix alone
    query: Tensor,  # [B, H, T, D]; packed: [N, H, D]
    prefix_key: Tensor,  # [R, H_kv, P, D]
    prefix_value: Tensor,
    grad_out: Tensor,  # as query, any strides
    lse: Tensor,  # [B, H, T]; packed: [N, H]
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_prefix_key and grad_prefix_value [R, H_kv, P, D] in the dtype of the prefix.

    The third is that of the gate, float32 [R, H], or an empty(0).
    """
    bank_rows, kv_heads, prefix_length, _ = prefix_key.shape
    grad_prefix_key, grad_prefix_value = (prefix_key.new_empty(prefix_key.shape) for _ in range(2))
    size, gate = grad_prefix_key.numel(), call.extras.gate_ptr
    grad_gate = lse.new_empty(0) if gate is None else torch.zeros_like(gate)
    if size == 0:
        return grad_prefix_key, grad_prefix_value, grad_gate
    options = launch_options("prefix", query, call.extras, prefix_length)
    prefix_tiles = -(-prefix_length // options["BLOCK_KEYS"])
    programs = kv_heads * prefix_tiles * bank_rows
    splits = count_splits(call.batch, programs, _multiprocessors(query.device))
    shape = (splits, 2, *prefix_key.shape)
    partial = torch.empty(shape, dtype=torch.float32, device=query.device)
    heads, gate_partial = query.shape[1], None
    if gate is not None:
        gate_partial = lse.new_empty(heads, call.batch, prefix_tiles)

    _grad_prefix(
        (prefix_tiles, kv_heads, splits * bank_rows),
        options,
        strided(query),
        strided(prefix_key),
        strided(prefix_value),
        strided(grad_out),
        Strided(partial, partial.stride()[2:]),
        gate_partial,
        lse,
        delta,
        call.extras,
        *call.sizes.values(),
        call.batch,
        bank_rows,
        -(-call.batch // splits),
        call.scale * LOG2_E,
    )
    _sum_partials(
        (-(-size // REDUCE_BLOCK), 2, 1),
        REDUCE_OPTIONS,
        partial,
        grad_prefix_key,
        grad_prefix_value,
        size,
        splits,
    )
    if gate_partial is not None and grad_gate.numel():
        _sum_gates(
            (heads, bank_rows, 1),
            GATE_OPTIONS,
            gate_partial,
            call.extras.prefix_index_ptr,
            grad_gate,
            call.batch,
            prefix_tiles,
        )
    return grad_prefix_key, grad_prefix_value, grad_gate
