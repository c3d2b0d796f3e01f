"""Forward pass.

    scores = scale * query @ [prefix_key ; key]^T + [0 ; bias]
    out = dropout(softmax(scores)) @ [prefix_value ; value]

One program computes one tile of query rows of one head of one sequence. It walks the prefix tiles,
which all sequences share, then the token tiles of its own sequence; scores, softmax state and the
output accumulator stay in registers in float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from ptv2_kernels.arguments import (
    LOG2_E,
    RUNTIME_SIZES,
    describe_call,
    empty_statistics,
    empty_token_major,
    row_grid,
    strided,
)
from ptv2_kernels.configs import launch_options, tunable
from ptv2_kernels.dropout import PREFIX_STREAM, TOKEN_STREAM, load_seed
from ptv2_kernels.softmax import LN_2, attend, load_prefix, prefix_scores, token_scores
from ptv2_kernels.tiles import (
    load_tile,
    locate_prefix,
    locate_sequence,
    locate_tile,
    row_offsets,
    scale_tile,
    store_tile,
    zero_tile,
)
from ptv2_kernels.visibility import load_context, seen_columns, shown_columns, unmasked_columns


@tunable
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _prefix_attention_forward_kernel(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    out,
    lse_ptr,
    extras,
    heads,
    group,
    queries,
    tokens,
    prefix_length,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Online softmax over two sources of columns; grid (query tiles * batch, heads)."""
    first_row, sequence = locate_tile(queries, BLOCK_QUERIES)
    start, row_count, column_count = locate_sequence(extras, sequence, queries, tokens)
    if first_row >= row_count:
        return
    head = tl.program_id(1)
    kv_head = head // group
    sequence_head = sequence * heads + head
    sequence_kv_head = sequence * (heads // group) + kv_head
    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    query_tile = load_tile(query, start, head, rows, row_count, HEAD_DIM, BLOCK_DIMS)
    seed = load_seed(extras)
    state = (
        tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_QUERIES,), tl.float32),
        zero_tile(BLOCK_QUERIES, BLOCK_DIMS),
    )

    bank_row, length = locate_prefix(extras, sequence, prefix_length)
    for first_column in range(0, length, BLOCK_KEYS):
        columns = first_column + tl.arange(0, BLOCK_KEYS)
        key_tile, value_tile = load_prefix(
            prefix_key, prefix_value, extras, seed, bank_row, kv_head, sequence_kv_head,
            columns, length, HEAD_DIM, BLOCK_DIMS,
        )  # fmt: skip
        scores_log2 = prefix_scores(
            query_tile, key_tile, columns, length, scale_log2, INPUT_PRECISION
        )
        state = attend(
            state, scores_log2, value_tile, extras, seed, sequence_head, rows, first_column,
            PREFIX_STREAM, INPUT_PRECISION,
        )  # fmt: skip

    context = load_context(extras, sequence)
    begin, end = seen_columns(
        extras, context, first_row, first_row + BLOCK_QUERIES - 1, column_count
    )
    for first_column in range(begin // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS):
        columns = first_column + tl.arange(0, BLOCK_KEYS)
        key_tile = load_tile(key, start, kv_head, columns, column_count, HEAD_DIM, BLOCK_DIMS)
        value_tile = load_tile(value, start, kv_head, columns, column_count, HEAD_DIM, BLOCK_DIMS)
        unmasked = unmasked_columns(extras, sequence, columns, column_count, tokens)
        shown = shown_columns(extras, unmasked, context, rows, columns)
        scores_log2 = token_scores(
            query_tile, key_tile, extras, sequence, head, rows, columns, row_count, column_count,
            shown, scale_log2, INPUT_PRECISION,
        )  # fmt: skip
        state = attend(
            state, scores_log2, value_tile, extras, seed, sequence_head, rows, first_column,
            TOKEN_STREAM, INPUT_PRECISION,
        )  # fmt: skip

    running_max, running_sum, accumulator = state
    empty = running_sum == 0.0
    safe_sum = tl.where(empty, 1.0, running_sum)
    lse = tl.where(empty, float("-inf"), (running_max + tl.log2(safe_sum)) * LN_2)
    offsets = row_offsets(extras, start, head, rows, heads, queries)
    tl.store(lse_ptr + offsets, lse, mask=rows < row_count)
    out_tile = scale_tile(accumulator, 1.0 / safe_sum[:, None])
    store_tile(out, out_tile, start, head, rows, row_count, HEAD_DIM, BLOCK_DIMS)


def launch_forward(
    query: Tensor,  # [B, H, T, D]; packed: [N, H, D]
    key: Tensor,  # [B, H_kv, S, D]; packed: [N, H_kv, D]
    value: Tensor,
    prefix_key: Tensor,  # [R, H_kv, P, D]
    prefix_value: Tensor,
    *options,
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D] with a contiguous [B, T, H, D] view, and lse [B, H, T] (float32).

    Packed: [N, H, D] and [N, H]. `options`: those of `describe_call`, from key_mask on.
    """
    call = describe_call(query, key, prefix_key, *options)
    heads = query.shape[1]
    out, lse = empty_token_major(query, heads), empty_statistics(query)
    if lse.numel() == 0:
        return out, lse
    _prefix_attention_forward_kernel[row_grid(call, heads)](
        strided(query),
        strided(key),
        strided(value),
        strided(prefix_key),
        strided(prefix_value),
        strided(out),
        lse,
        call.extras,
        **call.sizes,
        scale_log2=call.scale * LOG2_E,
        **launch_options("forward", query),
    )
    return out, lse
