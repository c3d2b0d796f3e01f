"""Forward pass.

    out = dropout(softmax(scale * query @ [prefix_key ; key]^T)) @ [prefix_value ; value]

One program computes one tile of query rows of one head of one sequence. It walks the prefix tiles,
which all sequences share, then the token tiles of its own sequence; scores, softmax state and the
output accumulator stay in registers in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptv2_kernels.configs import DROPOUT_FLAGS, RUNTIME_SIZES, launch_options, tunable
from ptv2_kernels.tiles import (
    LN_2,
    PREFIX_KEY_STREAM,
    PREFIX_STREAM,
    PREFIX_VALUE_STREAM,
    TOKEN_STREAM,
    attend,
    drop_prefix,
    head_pointer,
    load_context,
    load_tile,
    row_visibility,
    seen_columns,
    store_tile,
    token_visibility,
)

LOG2_E = 1.4426950408889634


@tunable
@triton.heuristics(DROPOUT_FLAGS)
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _prefix_attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    prefix_key_ptr,
    prefix_value_ptr,
    key_mask_ptr,
    context_lengths_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    query_strides,
    key_strides,
    value_strides,
    prefix_key_strides,
    prefix_value_strides,
    key_mask_strides,
    out_strides,
    heads,
    group,
    queries,
    tokens,
    prefix_length,
    window,
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
    """Online softmax over two sources of columns; grid (query tiles, heads, batch)."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    kv_head = head // group
    sequence_head = sequence * heads + head
    rows = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    query_head_ptr = head_pointer(query_ptr, query_strides, sequence, head)
    query = load_tile(query_head_ptr, rows, queries, query_strides[2], HEAD_DIM, BLOCK_DIM)
    seed = 0
    if HAS_DROPOUT or HAS_PREFIX_DROPOUT:
        seed = tl.load(seed_ptr)

    running_max = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
    accumulator = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)

    prefix_key_ptr += kv_head.to(tl.int64) * prefix_key_strides[0]
    prefix_value_ptr += kv_head.to(tl.int64) * prefix_value_strides[0]
    for first_column in range(0, prefix_length, BLOCK_KEYS):
        columns = first_column + tl.arange(0, BLOCK_KEYS)
        key = load_tile(
            prefix_key_ptr, columns, prefix_length, prefix_key_strides[1], HEAD_DIM, BLOCK_DIM
        )
        value = load_tile(
            prefix_value_ptr, columns, prefix_length, prefix_value_strides[1], HEAD_DIM, BLOCK_DIM
        )
        if HAS_PREFIX_DROPOUT:
            key = drop_prefix(
                key, seed, sequence * (heads // group) + kv_head, columns, prefix_threshold,
                prefix_multiplier, PREFIX_KEY_STREAM, BLOCK_KEYS, BLOCK_DIM,
            )  # fmt: skip
            value = drop_prefix(
                value, seed, sequence * (heads // group) + kv_head, columns, prefix_threshold,
                prefix_multiplier, PREFIX_VALUE_STREAM, BLOCK_KEYS, BLOCK_DIM,
            )  # fmt: skip
        running_max, running_sum, accumulator = attend(
            query, key, value, (columns < prefix_length)[None, :], running_max, running_sum,
            accumulator, scale_log2, seed, sequence_head, rows, first_column, threshold, multiplier,
            HAS_DROPOUT, PREFIX_STREAM, INPUT_PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
        )  # fmt: skip

    key_head_ptr = head_pointer(key_ptr, key_strides, sequence, kv_head)
    value_head_ptr = head_pointer(value_ptr, value_strides, sequence, kv_head)
    context = load_context(context_lengths_ptr, sequence)
    first_row = tl.program_id(0) * BLOCK_QUERIES
    begin, end = seen_columns(
        context_lengths_ptr, context, window, first_row, first_row + BLOCK_QUERIES - 1, tokens
    )
    for first_column in range(begin // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS):
        columns = first_column + tl.arange(0, BLOCK_KEYS)
        key = load_tile(key_head_ptr, columns, tokens, key_strides[2], HEAD_DIM, BLOCK_DIM)
        value = load_tile(value_head_ptr, columns, tokens, value_strides[2], HEAD_DIM, BLOCK_DIM)
        visible = token_visibility(key_mask_ptr, key_mask_strides, sequence, columns, tokens)
        visible = row_visibility(visible, context_lengths_ptr, context, window, rows, columns)
        running_max, running_sum, accumulator = attend(
            query, key, value, visible, running_max, running_sum, accumulator,
            scale_log2, seed, sequence_head, rows, first_column, threshold, multiplier,
            HAS_DROPOUT, TOKEN_STREAM, INPUT_PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
        )  # fmt: skip

    empty = running_sum == 0.0
    safe_sum = tl.where(empty, 1.0, running_sum)
    lse = tl.where(empty, float("-inf"), (running_max + tl.log2(safe_sum)) * LN_2)
    lse_row_ptr = lse_ptr + sequence_head.to(tl.int64) * queries
    tl.store(lse_row_ptr + rows, lse, mask=rows < queries)
    out_head_ptr = head_pointer(out_ptr, out_strides, sequence, head)
    out = accumulator / safe_sum[:, None]
    store_tile(out_head_ptr, out, rows, queries, out_strides[2], HEAD_DIM, BLOCK_DIM)


def dropout_arguments(dropout_p: float, prefix_dropout_p: float) -> dict[str, float]:
    """The 16-bit thresholds below which a decision drops, and the factors of what is kept."""
    return {
        "threshold": round(65536 * dropout_p),
        "multiplier": 1.0 / (1.0 - dropout_p),
        "prefix_threshold": round(65536 * prefix_dropout_p),
        "prefix_multiplier": 1.0 / (1.0 - prefix_dropout_p),
    }


def mask_strides(key_mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if key_mask is None else key_mask.stride()


def window_argument(window: int) -> int | None:
    """None compiles the window out."""
    return None if window < 0 else window


def launch_forward(
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, S, D]
    value: Tensor,  # [B, H_kv, S, D]
    prefix_key: Tensor,  # [H_kv, P, D]
    prefix_value: Tensor,  # [H_kv, P, D]
    key_mask: Tensor | None,  # bool [B, S]
    seed: Tensor | None,  # int64 [1]
    scale: float,
    dropout_p: float,
    prefix_dropout_p: float,
    context_lengths: Tensor | None = None,  # int32 [B]
    window: int = -1,
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D] with a contiguous [B, T, H, D] view, and lse [B, H, T] (float32)."""
    batch, heads, queries, head_dim = query.shape
    out = query.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse

    def grid(meta):
        return triton.cdiv(queries, meta["BLOCK_QUERIES"]), heads, batch

    _prefix_attention_forward_kernel[grid](
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        key_mask,
        context_lengths,
        seed,
        out,
        lse,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        prefix_key.stride()[:2],
        prefix_value.stride()[:2],
        mask_strides(key_mask),
        out.stride()[:3],
        heads,
        heads // max(1, key.shape[1]),
        queries,
        key.shape[2],
        prefix_key.shape[1],
        window_argument(window),
        scale * LOG2_E,
        **dropout_arguments(dropout_p, prefix_dropout_p),
        **launch_options("forward", query),
    )
    return out, lse
