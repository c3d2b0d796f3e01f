"""The gradients of keys and values: one program owns one tile of tokens of one key/value head.

grad_key = scale * dS^T @ query;  grad_value = P~^T @ grad_out

Scores by distance add scale * dS[i, j] * position_query[slot of i - j] to grad_key.
"""

import triton
import triton.language as tl

from ptv2_kernels.arguments import RUNTIME_SIZES
from ptv2_kernels.dropout import TOKEN_STREAM
from ptv2_kernels.places import load_seed, locate, locate_tile, with_head
from ptv2_kernels.positions import add_position_gradient
from ptv2_kernels.softmax import LN_2, load_statistics, recompute, token_scores, undropped
from ptv2_kernels.tiles import (
    add_product,
    keep_rows,
    load_queries,
    load_tokens,
    scale_tile,
    store_tile,
    zero_tile,
)
from ptv2_kernels.visibility import attending_rows, hide_from_rows, visible_columns


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _grad_key_value_kernel(
    query,
    key,
    value,
    grad_out,
    grad_key,
    grad_value,
    lse_ptr,
    delta_ptr,
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
    """Loops over the rows that attend to the tile; grid (key tiles * batch, key/value heads)."""
    first_column, sequence = locate_tile(tokens, BLOCK_KEYS)
    kv_head, seed = tl.program_id(1), load_seed(extras)
    shared = locate(extras, sequence, kv_head * group, kv_head, heads, group, queries, tokens, seed)
    if first_column >= shared.column_count:
        return
    key_tile, value_tile = load_tokens(
        key, value, shared, first_column, BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS, False
    )
    visible = visible_columns(extras, shared, first_column, BLOCK_KEYS)
    key_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)
    value_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)

    begin, end = attending_rows(extras, shared, first_column, BLOCK_KEYS)
    first_tile = begin // BLOCK_QUERIES
    end = tl.where(tl.max(visible.to(tl.int32), axis=0) > 0, end, 0)
    for member in range(group):
        place = with_head(shared, kv_head * group + member)
        for tile in range(first_tile, tl.cdiv(end, BLOCK_QUERIES)):
            first_row = tile * BLOCK_QUERIES
            query_tile = load_queries(query, place, first_row, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS)
            grad_out_tile = load_queries(
                grad_out, place, first_row, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS
            )
            statistics = load_statistics(
                lse_ptr, delta_ptr, extras, place, first_row, BLOCK_QUERIES
            )
            scores, factor = token_scores(
                query_tile, key_tile, extras, place, first_row, first_column, scale_log2,
                HEAD_DIM, BLOCK_DIMS, INPUT_PRECISION,
            )  # fmt: skip
            scores = hide_from_rows(scores, extras, place, first_row, first_column)
            dropped, grad_scores = recompute(
                scores, factor, value_tile, grad_out_tile, statistics, extras, place,
                first_row, first_column, TOKEN_STREAM, INPUT_PRECISION,
            )  # fmt: skip
            value_gradient = add_product(
                tl.trans(dropped), grad_out_tile, value_gradient, INPUT_PRECISION
            )
            grad_scores = tl.trans(grad_scores)
            key_gradient = add_product(grad_scores, query_tile, key_gradient, INPUT_PRECISION)
            key_gradient = add_position_gradient(
                grad_scores, key_gradient, extras.position_query, extras, place, first_row,
                first_column, True, HEAD_DIM, BLOCK_DIMS, INPUT_PRECISION,
            )  # fmt: skip

    # What is computed for a hidden column stays in its own row: the loop needs no mask.
    key_gradient = keep_rows(key_gradient, visible)
    value_gradient = keep_rows(value_gradient, visible)
    value_gradient = undropped(value_gradient, extras)
    gradient = scale_tile(key_gradient, scale_log2 * LN_2)
    store_tile(
        grad_key, gradient, shared.start, kv_head, first_column, shared.column_count,
        BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS,
    )  # fmt: skip
    store_tile(
        grad_value, value_gradient, shared.start, kv_head, first_column, shared.column_count,
        BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS,
    )  # fmt: skip
