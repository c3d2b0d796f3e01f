"""The gradients of keys and values: one program owns one tile of tokens of one key/value head.

grad_key = scale * dS^T @ query;  grad_value = P~^T @ grad_out
"""

import triton
import triton.language as tl

from ptv2_kernels.arguments import RUNTIME_SIZES
from ptv2_kernels.configs import tunable
from ptv2_kernels.dropout import TOKEN_STREAM, load_seed
from ptv2_kernels.softmax import LN_2, load_statistics, recompute, token_scores
from ptv2_kernels.tiles import (
    add_product,
    load_tile,
    locate_sequence,
    locate_tile,
    scale_tile,
    store_tile,
    zero_tile,
)
from ptv2_kernels.visibility import load_context, seeing_rows, shown_columns, unmasked_columns


@tunable
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
    columns = first_column + tl.arange(0, BLOCK_KEYS)
    key_tile = load_tile(key, start, kv_head, columns, column_count, HEAD_DIM, BLOCK_DIMS)
    value_tile = load_tile(value, start, kv_head, columns, column_count, HEAD_DIM, BLOCK_DIMS)
    unmasked = unmasked_columns(extras, sequence, columns, column_count, tokens)
    seed = load_seed(extras)
    key_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)
    value_gradient = zero_tile(BLOCK_KEYS, BLOCK_DIMS)

    context = load_context(extras, sequence)
    begin, end = seeing_rows(
        extras, context, first_column, first_column + BLOCK_KEYS - 1, row_count
    )
    first_tile = begin // BLOCK_QUERIES
    tiles = tl.maximum(0, tl.cdiv(end, BLOCK_QUERIES) - first_tile)
    for step in range(group * tiles):
        # Query heads in order, the tiles of each in order.
        head = kv_head * group + step // tiles
        rows = (first_tile + step % tiles) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        query_tile = load_tile(query, start, head, rows, row_count, HEAD_DIM, BLOCK_DIMS)
        grad_out_tile = load_tile(grad_out, start, head, rows, row_count, HEAD_DIM, BLOCK_DIMS)
        statistics = load_statistics(
            lse_ptr, delta_ptr, extras, start, head, rows, row_count, heads, queries
        )
        shown = shown_columns(extras, unmasked, context, rows, columns)
        scores_log2 = token_scores(
            query_tile, key_tile, extras, sequence, head, rows, columns, row_count, column_count,
            shown, scale_log2, INPUT_PRECISION,
        )  # fmt: skip
        dropped, grad_scores = recompute(
            scores_log2, value_tile, grad_out_tile, statistics, extras, seed,
            sequence * heads + head, rows, first_column, TOKEN_STREAM, INPUT_PRECISION,
        )  # fmt: skip
        value_gradient = add_product(
            tl.trans(dropped), grad_out_tile, value_gradient, INPUT_PRECISION
        )
        key_gradient = add_product(tl.trans(grad_scores), query_tile, key_gradient, INPUT_PRECISION)

    gradient = scale_tile(key_gradient, scale_log2 * LN_2)
    store_tile(grad_key, gradient, start, kv_head, columns, column_count, HEAD_DIM, BLOCK_DIMS)
    store_tile(
        grad_value, value_gradient, start, kv_head, columns, column_count, HEAD_DIM, BLOCK_DIMS
    )
