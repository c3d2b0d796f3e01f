"""The gradients of keys and values: one program owns one tile of tokens of one key/value head.

grad_key = scale * dS^T @ query;  grad_value = P~^T @ grad_out

Scores by distance add scale * dS[i, j] * position_query[slot of i - j] to grad_key.
"""

import triton
import triton.language as tl

from ptv2_kernels.arguments import RUNTIME_SIZES
from ptv2_kernels.dropout import TOKEN_STREAM, load_seed
from ptv2_kernels.positions import add_position_gradient
from ptv2_kernels.softmax import LN_2, load_statistics, recompute, token_scores, undropped
from ptv2_kernels.tiles import (
    add_product,
    keep_rows,
    load_tile,
    locate_sequence,
    locate_tile,
    scale_tile,
    store_tile,
    zero_tile,
)
from ptv2_kernels.visibility import hide_from_rows, load_context, seeing_rows, unmasked_columns


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
    """Loops over the rows that see the tile; grid (key tiles * batch, key/value heads)."""
    first_column, sequence = locate_tile(tokens, BLOCK_KEYS)
    start, row_count, column_count = locate_sequence(extras, sequence, queries, tokens)
    if first_column >= column_count:
        return
    kv_head = tl.program_id(1)
    key_tile = load_tile(
        key, start, kv_head, first_column, column_count, BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS
    )
    value_tile = load_tile(
        value, start, kv_head, first_column, column_count, BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS
    )
    unmasked = unmasked_columns(extras, sequence, first_column, column_count, tokens, BLOCK_KEYS)
    seed = load_seed(extras)
    key_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)
    value_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)

    context = load_context(extras, sequence)
    begin, end = seeing_rows(
        extras, context, first_column, first_column + BLOCK_KEYS - 1, row_count
    )
    first_tile = begin // BLOCK_QUERIES
    end = tl.where(tl.max(unmasked.to(tl.int32), axis=0) > 0, end, 0)
    for member in range(group):
        head = kv_head * group + member
        for tile in range(first_tile, tl.cdiv(end, BLOCK_QUERIES)):
            first_row = tile * BLOCK_QUERIES
            query_tile = load_tile(
                query, start, head, first_row, row_count, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS
            )
            grad_out_tile = load_tile(
                grad_out, start, head, first_row, row_count, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS
            )
            statistics = load_statistics(
                lse_ptr, delta_ptr, extras, start, head, first_row, row_count, heads, queries,
                BLOCK_QUERIES,
            )  # fmt: skip
            scores, factor = token_scores(
                query_tile, key_tile, extras, sequence, head, first_row, first_column,
                row_count, column_count, scale_log2, HEAD_DIM, BLOCK_DIMS, INPUT_PRECISION,
            )  # fmt: skip
            scores = hide_from_rows(scores, extras, context, first_row, first_column)
            dropped, grad_scores = recompute(
                scores, factor, value_tile, grad_out_tile, statistics, extras, seed,
                sequence * heads + head, first_row, first_column, TOKEN_STREAM, INPUT_PRECISION,
            )  # fmt: skip
            value_gradient = add_product(
                tl.trans(dropped), grad_out_tile, value_gradient, INPUT_PRECISION
            )
            grad_scores = tl.trans(grad_scores)
            key_gradient = add_product(grad_scores, query_tile, key_gradient, INPUT_PRECISION)
            key_gradient = add_position_gradient(
                grad_scores, key_gradient, extras.position_query, extras, head, first_row,
                first_column, row_count, True, HEAD_DIM, BLOCK_DIMS, INPUT_PRECISION,
            )  # fmt: skip

    # A column that nobody sees spoils its own row only, so that the loop needs no mask.
    key_gradient = keep_rows(key_gradient, unmasked)
    value_gradient = keep_rows(value_gradient, unmasked)
    value_gradient = undropped(value_gradient, extras)
    gradient = scale_tile(key_gradient, scale_log2 * LN_2)
    store_tile(
        grad_key,
        gradient,
        start,
        kv_head,
        first_column,
        column_count,
        BLOCK_KEYS,
        HEAD_DIM,
        BLOCK_DIMS,
    )
    store_tile(
        grad_value,
        value_gradient,
        start,
        kv_head,
        first_column,
        column_count,
        BLOCK_KEYS,
        HEAD_DIM,
        BLOCK_DIMS,
    )
