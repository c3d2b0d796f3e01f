"""The prefix gradient: a sum over every query of the whole batch, in two stages without atomics.

Stage one splits the batch: the program of (prefix tile, head, split) adds up its sequences in order
into float32 partials. Stage two adds the partials in order and rounds once. The number of splits
follows the number of processors, not the batch. Keys and values of tokens are never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptv2_kernels.configs import (
    COMPILER_OPTIONS,
    DROPOUT_FLAGS,
    INTERPRETED,
    RUNTIME_SIZES,
    launch_options,
    tunable,
)
from ptv2_kernels.forward import LOG2_E
from ptv2_kernels.tiles import (
    PREFIX_KEY_STREAM,
    PREFIX_STREAM,
    PREFIX_VALUE_STREAM,
    drop_prefix,
    head_pointer,
    keep_mask,
    load_statistics,
    load_strided_tile,
    load_tile,
    recompute,
    store_tile,
)

REDUCE_BLOCK = 1024


@tunable
@triton.heuristics(DROPOUT_FLAGS)
@triton.jit(do_not_specialize=[*RUNTIME_SIZES, "batch", "sequences_per_split"])
def _grad_prefix_kernel(
    query_ptr,
    prefix_key_ptr,
    prefix_value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    partial_ptr,
    query_strides,
    prefix_key_strides,
    prefix_value_strides,
    grad_out_strides,
    batch,
    heads,
    group,
    queries,
    prefix_length,
    sequences_per_split,
    scale,
    scale_log2,
    threshold,
    multiplier,
    prefix_threshold,
    prefix_multiplier,
    HEAD_DIM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_PREFIX_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Partial sums [splits, 2, H_kv, P, HEAD_DIM]; grid (prefix tiles, H_kv, splits)."""
    kv_head, split = tl.program_id(1), tl.program_id(2)
    first_column = tl.program_id(0) * BLOCK_KEYS
    columns = first_column + tl.arange(0, BLOCK_KEYS)
    prefix_key_ptr += kv_head.to(tl.int64) * prefix_key_strides[0]
    prefix_value_ptr += kv_head.to(tl.int64) * prefix_value_strides[0]
    shared_key = load_tile(
        prefix_key_ptr, columns, prefix_length, prefix_key_strides[1], HEAD_DIM, BLOCK_DIM
    )
    shared_value = load_tile(
        prefix_value_ptr, columns, prefix_length, prefix_value_strides[1], HEAD_DIM, BLOCK_DIM
    )
    seed = 0
    if HAS_DROPOUT or HAS_PREFIX_DROPOUT:
        seed = tl.load(seed_ptr)
    total_key = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    total_value = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)

    first_sequence = split * sequences_per_split
    for step in range(tl.minimum(sequences_per_split, batch - first_sequence)):
        sequence = first_sequence + step
        sequence_kv_head = sequence * (heads // group) + kv_head
        key, value = shared_key, shared_value
        grad_key, grad_value = total_key, total_value
        if HAS_PREFIX_DROPOUT:
            key = drop_prefix(
                key, seed, sequence_kv_head, columns, prefix_threshold, prefix_multiplier,
                PREFIX_KEY_STREAM, BLOCK_KEYS, BLOCK_DIM,
            )  # fmt: skip
            value = drop_prefix(
                value, seed, sequence_kv_head, columns, prefix_threshold, prefix_multiplier,
                PREFIX_VALUE_STREAM, BLOCK_KEYS, BLOCK_DIM,
            )  # fmt: skip
            grad_key = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
            grad_value = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
        tiles = tl.cdiv(queries, BLOCK_QUERIES)
        for tile in range(group * tiles):
            # Query heads in order, the tiles of each in order.
            head = kv_head * group + tile // tiles
            sequence_head = sequence * heads + head
            first_row = sequence_head.to(tl.int64) * queries
            query_head_ptr = head_pointer(query_ptr, query_strides, sequence, head)
            grad_out_head_ptr = head_pointer(grad_out_ptr, grad_out_strides, sequence, head)
            first_query = tile % tiles * BLOCK_QUERIES
            rows = first_query + tl.arange(0, BLOCK_QUERIES)
            query = load_tile(query_head_ptr, rows, queries, query_strides[2], HEAD_DIM, BLOCK_DIM)
            grad_out = load_strided_tile(
                grad_out_head_ptr, rows, queries, grad_out_strides[2], grad_out_strides[3],
                HEAD_DIM, BLOCK_DIM,
            )  # fmt: skip
            lse_log2, delta = load_statistics(lse_ptr, delta_ptr, first_row, rows, queries)
            dropped, grad_scores = recompute(
                query, key, value, grad_out, lse_log2, delta, (columns < prefix_length)[None, :],
                scale_log2, seed, sequence_head, rows, first_column, threshold, multiplier,
                HAS_DROPOUT, PREFIX_STREAM, INPUT_PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
            )  # fmt: skip
            grad_value = tl.dot(
                tl.trans(dropped.to(grad_out.dtype)), grad_out, grad_value,
                input_precision=INPUT_PRECISION,
            )  # fmt: skip
            grad_key = tl.dot(
                tl.trans(grad_scores.to(query.dtype)), query, grad_key,
                input_precision=INPUT_PRECISION,
            )  # fmt: skip
        if HAS_PREFIX_DROPOUT:
            # Each sequence has a mask of its own, applied before the sum over the batch.
            keep = keep_mask(
                seed, sequence_kv_head, columns, 0, prefix_threshold,
                PREFIX_KEY_STREAM, BLOCK_KEYS, BLOCK_DIM,
            )  # fmt: skip
            total_key += tl.where(keep, grad_key * prefix_multiplier, 0.0)
            keep = keep_mask(
                seed, sequence_kv_head, columns, 0, prefix_threshold,
                PREFIX_VALUE_STREAM, BLOCK_KEYS, BLOCK_DIM,
            )  # fmt: skip
            total_value += tl.where(keep, grad_value * prefix_multiplier, 0.0)
        else:
            total_key, total_value = grad_key, grad_value

    head_size = prefix_length.to(tl.int64) * HEAD_DIM
    key_partial_ptr = partial_ptr + ((split * 2) * (heads // group) + kv_head) * head_size
    value_partial_ptr = partial_ptr + ((split * 2 + 1) * (heads // group) + kv_head) * head_size
    store_tile(
        key_partial_ptr, total_key * scale, columns, prefix_length, HEAD_DIM, HEAD_DIM, BLOCK_DIM
    )
    store_tile(
        value_partial_ptr, total_value, columns, prefix_length, HEAD_DIM, HEAD_DIM, BLOCK_DIM
    )


@triton.jit(do_not_specialize=["size", "splits"])
def _sum_partials_kernel(
    partial_ptr, grad_prefix_key_ptr, grad_prefix_value_ptr, size, splits, BLOCK: tl.constexpr
):
    """Adds the partials of one gradient in order; grid (tiles of heads * P * HEAD_DIM, 2)."""
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


def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED or device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def count_splits(batch: int, heads: int, prefix_tiles: int, multiprocessors: int) -> int:
    """Enough programs for two waves, and at most one split per sequence."""
    wanted = triton.cdiv(2 * multiprocessors, max(1, heads * prefix_tiles))
    return max(1, min(wanted, batch))


def launch_backward_prefix(
    grad_out: Tensor,  # [B, H, T, D], any strides
    query: Tensor,  # [B, H, T, D]
    prefix_key: Tensor,  # [H_kv, P, D]
    prefix_value: Tensor,  # [H_kv, P, D]
    lse: Tensor,  # [B, H, T]
    delta: Tensor,  # [B, H, T]
    seed: Tensor | None,
    scale: float,
    dropout: dict[str, float],
) -> tuple[Tensor, Tensor]:
    """grad_prefix_key and grad_prefix_value [H, P, D] in the dtype of the prefix."""
    batch, heads, queries, _ = query.shape
    kv_heads, prefix_length, _ = prefix_key.shape
    grad_prefix_key, grad_prefix_value = (prefix_key.new_empty(prefix_key.shape) for _ in range(2))
    if grad_prefix_key.numel() == 0:
        return grad_prefix_key, grad_prefix_value
    prefix_tiles = triton.cdiv(prefix_length, 32)
    splits = count_splits(batch, kv_heads, prefix_tiles, _multiprocessors(query.device))
    partial = query.new_empty(splits, 2, *prefix_key.shape, dtype=torch.float32)

    def grid(meta):
        return triton.cdiv(prefix_length, meta["BLOCK_KEYS"]), kv_heads, splits

    _grad_prefix_kernel[grid](
        query,
        prefix_key,
        prefix_value,
        grad_out,
        lse,
        delta,
        seed,
        partial,
        query.stride()[:3],
        prefix_key.stride()[:2],
        prefix_value.stride()[:2],
        grad_out.stride(),
        batch,
        heads,
        heads // kv_heads,
        queries,
        prefix_length,
        triton.cdiv(batch, splits),
        scale,
        scale * LOG2_E,
        **dropout,
        **launch_options("prefix", query),
    )
    size = grad_prefix_key.numel()
    _sum_partials_kernel[(triton.cdiv(size, REDUCE_BLOCK), 2)](
        partial,
        grad_prefix_key,
        grad_prefix_value,
        size,
        splits,
        BLOCK=REDUCE_BLOCK,
        **COMPILER_OPTIONS,
    )
    return grad_prefix_key, grad_prefix_value
