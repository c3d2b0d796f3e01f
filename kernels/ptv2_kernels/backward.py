"""Backward pass from the saved lse: probabilities are recomputed, nothing of size T x S is stored.

    delta = rowsum(out * grad_out) - grad_lse
    dP = keep * (grad_out @ value^T) / (1 - p);  dS = P * (dP - delta)
    grad_query = scale * dS @ key;  grad_key = scale * dS^T @ query;  grad_value = P~^T @ grad_out

One kernel per owner of a result (query tile, key tile, and in `backward_prefix` prefix tile), so
that every result is written once, without atomics: the bits are the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptv2_kernels.backward_prefix import launch_backward_prefix
from ptv2_kernels.configs import (
    COMPILER_OPTIONS,
    DROPOUT_FLAGS,
    RUNTIME_SIZES,
    head_dim_class,
    launch_options,
    tunable,
)
from ptv2_kernels.forward import LOG2_E, dropout_arguments, mask_strides, window_argument
from ptv2_kernels.tiles import (
    PREFIX_KEY_STREAM,
    PREFIX_STREAM,
    PREFIX_VALUE_STREAM,
    TOKEN_STREAM,
    drop_prefix,
    head_pointer,
    load_context,
    load_statistics,
    load_strided_tile,
    load_tile,
    recompute,
    row_visibility,
    seeing_rows,
    seen_columns,
    store_tile,
    token_visibility,
)


@triton.jit(do_not_specialize=["queries"])
def _delta_kernel(
    out_ptr,
    grad_out_ptr,
    grad_lse_ptr,
    delta_ptr,
    out_strides,
    grad_out_strides,
    heads,
    queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """delta[b, h, t] = rowsum(out * grad_out) - grad_lse; grid (query tiles, heads, batch)."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    out = load_tile(
        head_pointer(out_ptr, out_strides, sequence, head),
        rows, queries, out_strides[2], HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    grad_out = load_strided_tile(
        head_pointer(grad_out_ptr, grad_out_strides, sequence, head),
        rows, queries, grad_out_strides[2], grad_out_strides[3], HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    first_row = (sequence * heads + head).to(tl.int64) * queries
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + first_row + rows, mask=rows < queries, other=0.0)
    tl.store(delta_ptr + first_row + rows, delta, mask=rows < queries)


@tunable
@triton.heuristics(DROPOUT_FLAGS)
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _grad_query_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    prefix_key_ptr,
    prefix_value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    key_mask_ptr,
    context_lengths_ptr,
    seed_ptr,
    grad_query_ptr,
    query_strides,
    key_strides,
    value_strides,
    prefix_key_strides,
    prefix_value_strides,
    grad_out_strides,
    key_mask_strides,
    grad_query_strides,
    heads,
    group,
    queries,
    tokens,
    prefix_length,
    window,
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
    """grad_query of one query tile over prefix and tokens; grid (query tiles, heads, batch)."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    kv_head = head // group
    sequence_head = sequence * heads + head
    rows = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    query = load_tile(
        head_pointer(query_ptr, query_strides, sequence, head),
        rows, queries, query_strides[2], HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    grad_out = load_strided_tile(
        head_pointer(grad_out_ptr, grad_out_strides, sequence, head),
        rows, queries, grad_out_strides[2], grad_out_strides[3], HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    first_row = sequence_head.to(tl.int64) * queries
    lse_log2, delta = load_statistics(lse_ptr, delta_ptr, first_row, rows, queries)
    seed = 0
    if HAS_DROPOUT or HAS_PREFIX_DROPOUT:
        seed = tl.load(seed_ptr)
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
        _, grad_scores = recompute(
            query, key, value, grad_out, lse_log2, delta, (columns < prefix_length)[None, :],
            scale_log2, seed, sequence_head, rows, first_column, threshold, multiplier,
            HAS_DROPOUT, PREFIX_STREAM, INPUT_PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
        )  # fmt: skip
        accumulator = tl.dot(
            grad_scores.to(key.dtype), key, accumulator, input_precision=INPUT_PRECISION
        )

    key_head_ptr = head_pointer(key_ptr, key_strides, sequence, kv_head)
    value_head_ptr = head_pointer(value_ptr, value_strides, sequence, kv_head)
    context = load_context(context_lengths_ptr, sequence)
    tile_row = tl.program_id(0) * BLOCK_QUERIES
    begin, end = seen_columns(
        context_lengths_ptr, context, window, tile_row, tile_row + BLOCK_QUERIES - 1, tokens
    )
    for first_column in range(begin // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS):
        columns = first_column + tl.arange(0, BLOCK_KEYS)
        key = load_tile(key_head_ptr, columns, tokens, key_strides[2], HEAD_DIM, BLOCK_DIM)
        value = load_tile(value_head_ptr, columns, tokens, value_strides[2], HEAD_DIM, BLOCK_DIM)
        visible = token_visibility(key_mask_ptr, key_mask_strides, sequence, columns, tokens)
        visible = row_visibility(visible, context_lengths_ptr, context, window, rows, columns)
        _, grad_scores = recompute(
            query, key, value, grad_out, lse_log2, delta, visible, scale_log2,
            seed, sequence_head, rows, first_column, threshold, multiplier,
            HAS_DROPOUT, TOKEN_STREAM, INPUT_PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
        )  # fmt: skip
        accumulator = tl.dot(
            grad_scores.to(key.dtype), key, accumulator, input_precision=INPUT_PRECISION
        )

    store_tile(
        head_pointer(grad_query_ptr, grad_query_strides, sequence, head),
        accumulator * scale, rows, queries, grad_query_strides[2], HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip


@tunable
@triton.heuristics(DROPOUT_FLAGS)
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _grad_key_value_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    key_mask_ptr,
    context_lengths_ptr,
    seed_ptr,
    grad_key_ptr,
    grad_value_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    key_mask_strides,
    grad_key_strides,
    grad_value_strides,
    heads,
    group,
    queries,
    tokens,
    window,
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
    """grad_key and grad_value of one tile of tokens; grid (key tiles, key/value heads, batch)."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    first_column = tl.program_id(0) * BLOCK_KEYS
    columns = first_column + tl.arange(0, BLOCK_KEYS)
    key = load_tile(
        head_pointer(key_ptr, key_strides, sequence, kv_head),
        columns, tokens, key_strides[2], HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    value = load_tile(
        head_pointer(value_ptr, value_strides, sequence, kv_head),
        columns, tokens, value_strides[2], HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    visible = token_visibility(key_mask_ptr, key_mask_strides, sequence, columns, tokens)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    grad_key = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    grad_value = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)

    context = load_context(context_lengths_ptr, sequence)
    begin, end = seeing_rows(
        context_lengths_ptr, context, window, first_column, first_column + BLOCK_KEYS - 1, queries
    )
    first_tile = begin // BLOCK_QUERIES
    tiles = tl.maximum(0, tl.cdiv(end, BLOCK_QUERIES) - first_tile)
    for step in range(group * tiles):
        # Query heads in order, the tiles of each in order.
        head = kv_head * group + step // tiles
        sequence_head = sequence * heads + head
        first_row = sequence_head.to(tl.int64) * queries
        query_head_ptr = head_pointer(query_ptr, query_strides, sequence, head)
        grad_out_head_ptr = head_pointer(grad_out_ptr, grad_out_strides, sequence, head)
        first_query = (first_tile + step % tiles) * BLOCK_QUERIES
        rows = first_query + tl.arange(0, BLOCK_QUERIES)
        query = load_tile(query_head_ptr, rows, queries, query_strides[2], HEAD_DIM, BLOCK_DIM)
        grad_out = load_strided_tile(
            grad_out_head_ptr, rows, queries, grad_out_strides[2], grad_out_strides[3],
            HEAD_DIM, BLOCK_DIM,
        )  # fmt: skip
        lse_log2, delta = load_statistics(lse_ptr, delta_ptr, first_row, rows, queries)
        shown = row_visibility(visible, context_lengths_ptr, context, window, rows, columns)
        dropped, grad_scores = recompute(
            query, key, value, grad_out, lse_log2, delta, shown, scale_log2,
            seed, sequence_head, rows, first_column, threshold, multiplier,
            HAS_DROPOUT, TOKEN_STREAM, INPUT_PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
        )  # fmt: skip
        grad_value = tl.dot(
            tl.trans(dropped.to(grad_out.dtype)), grad_out, grad_value,
            input_precision=INPUT_PRECISION,
        )  # fmt: skip
        grad_key = tl.dot(
            tl.trans(grad_scores.to(query.dtype)), query, grad_key, input_precision=INPUT_PRECISION
        )

    store_tile(
        head_pointer(grad_key_ptr, grad_key_strides, sequence, kv_head),
        grad_key * scale, columns, tokens, grad_key_strides[2], HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    store_tile(
        head_pointer(grad_value_ptr, grad_value_strides, sequence, kv_head),
        grad_value, columns, tokens, grad_value_strides[2], HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip


def _launch_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    batch, heads, queries, head_dim = out.shape
    delta = out.new_empty(batch, heads, queries, dtype=torch.float32)
    if delta.numel():
        _delta_kernel[(triton.cdiv(queries, 64), heads, batch)](
            out,
            grad_out,
            None if grad_lse is None else grad_lse.contiguous(),
            delta,
            out.stride()[:3],
            grad_out.stride(),
            heads,
            queries,
            HEAD_DIM=head_dim,
            BLOCK_DIM=head_dim_class(head_dim),
            BLOCK_QUERIES=64,
            **COMPILER_OPTIONS,
        )
    return delta


def launch_backward(
    grad_out: Tensor,  # [B, H, T, D], any strides
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, S, D]
    value: Tensor,  # [B, H_kv, S, D]
    prefix_key: Tensor,  # [H_kv, P, D]
    prefix_value: Tensor,  # [H_kv, P, D]
    out: Tensor,  # [B, H, T, D]
    lse: Tensor,  # [B, H, T]
    key_mask: Tensor | None,  # bool [B, S]
    seed: Tensor | None,  # int64 [1]
    scale: float,
    dropout_p: float,
    prefix_dropout_p: float,
    needs_query: bool,
    needs_key_value: bool,
    needs_prefix: bool,
    context_lengths: Tensor | None = None,  # int32 [B]
    window: int = -1,
    grad_lse: Tensor | None = None,  # [B, H, T]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients that are needed; an empty(0) stands for one that is not."""
    batch, heads, queries, head_dim = query.shape
    _, kv_heads, tokens, _ = key.shape
    group = heads // max(1, kv_heads)

    def token_gradient(like: Tensor, needed: bool) -> Tensor:
        if not needed:
            return query.new_empty(0)
        _, like_heads, length, _ = like.shape
        return query.new_empty(batch, length, like_heads, head_dim).transpose(1, 2)

    grad_query = token_gradient(query, needs_query)
    grad_key, grad_value = (token_gradient(key, needs_key_value) for _ in range(2))
    delta = _launch_delta(out, grad_out, grad_lse)
    dropout = dropout_arguments(dropout_p, prefix_dropout_p)
    if grad_query.numel():
        _grad_query_kernel[
            lambda meta: (triton.cdiv(queries, meta["BLOCK_QUERIES"]), heads, batch)
        ](
            query,
            key,
            value,
            prefix_key,
            prefix_value,
            grad_out,
            lse,
            delta,
            key_mask,
            context_lengths,
            seed,
            grad_query,
            query.stride()[:3],
            key.stride()[:3],
            value.stride()[:3],
            prefix_key.stride()[:2],
            prefix_value.stride()[:2],
            grad_out.stride(),
            mask_strides(key_mask),
            grad_query.stride()[:3],
            heads,
            group,
            queries,
            tokens,
            prefix_key.shape[1],
            window_argument(window),
            scale,
            scale * LOG2_E,
            **dropout,
            **launch_options("query", query),
        )
    if grad_key.numel():
        _grad_key_value_kernel[
            lambda meta: (triton.cdiv(tokens, meta["BLOCK_KEYS"]), kv_heads, batch)
        ](
            query,
            key,
            value,
            grad_out,
            lse,
            delta,
            key_mask,
            context_lengths,
            seed,
            grad_key,
            grad_value,
            query.stride()[:3],
            key.stride()[:3],
            value.stride()[:3],
            grad_out.stride(),
            mask_strides(key_mask),
            grad_key.stride()[:3],
            grad_value.stride()[:3],
            heads,
            group,
            queries,
            tokens,
            window_argument(window),
            scale,
            scale * LOG2_E,
            **dropout,
            **launch_options("key_value", query),
        )
    if needs_prefix:
        grad_prefix_key, grad_prefix_value = launch_backward_prefix(
            grad_out, query, prefix_key, prefix_value, lse, delta, seed, scale, dropout
        )
    else:
        grad_prefix_key, grad_prefix_value = query.new_empty(0), query.new_empty(0)
    return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value
