"""The gradient of the queries: one program owns one tile of query rows of one head.

grad_query = scale * dS @ [prefix_key ; key],  dS = P * (dP - delta)

Scores by distance add scale * dS[i, j] * position_key[slot of i - j].
"""

import triton
import triton.language as tl

from ptv2_kernels.arguments import RUNTIME_SIZES
from ptv2_kernels.dropout import PREFIX_STREAM, TOKEN_STREAM
from ptv2_kernels.places import load_seed, locate, locate_prefix, locate_tile, prefix_end
from ptv2_kernels.positions import add_position_gradient
from ptv2_kernels.softmax import (
    LN_2,
    load_gate,
    load_prefix,
    load_statistics,
    prefix_scores,
    recompute,
    token_scores,
    undropped_prefix,
)
from ptv2_kernels.tiles import (
    add_product,
    load_queries,
    load_tokens,
    scale_tile,
    store_tile,
    zero_tile,
)
from ptv2_kernels.visibility import hide_behind, hide_tokens, visible_range


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _grad_query_kernel(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    grad_out,
    grad_query,
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
    BLOCK_PREFIX: tl.constexpr,
    ONE_PREFIX_TILE: tl.constexpr,
):
    """One query tile over prefix and tokens; grid (query tiles * batch, heads)."""
    first_row, sequence = locate_tile(queries, BLOCK_QUERIES)
    head, seed = tl.program_id(1), load_seed(extras)
    place = locate(extras, sequence, head, head // group, heads, group, queries, tokens, seed)
    if first_row >= place.row_count:
        return
    query_tile = load_queries(query, place, first_row, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS)
    grad_out_tile = load_queries(grad_out, place, first_row, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS)
    statistics = load_statistics(lse_ptr, delta_ptr, extras, place, first_row, BLOCK_QUERIES)
    accumulator = zero_tile(BLOCK_QUERIES, BLOCK_DIMS)

    bank_row, length = locate_prefix(extras, sequence, prefix_length)
    gate = load_gate(extras, place, bank_row)
    if BLOCK_PREFIX > 0:
        for first_column in range(
            0, prefix_end(length, BLOCK_PREFIX, ONE_PREFIX_TILE), BLOCK_PREFIX
        ):
            key_tile, value_tile = load_prefix(
                prefix_key, prefix_value, extras, place, bank_row, first_column, length,
                BLOCK_PREFIX, HEAD_DIM, BLOCK_DIMS,
            )  # fmt: skip
            scores, factor = prefix_scores(
                query_tile, key_tile, extras, scale_log2, INPUT_PRECISION
            )
            scores = hide_behind(scores, length - first_column)
            _, grad_scores = recompute(
                scores, factor, value_tile, grad_out_tile, statistics, extras, place,
                first_row, first_column, PREFIX_STREAM, INPUT_PRECISION,
            )  # fmt: skip
            if extras.gate_ptr is not None:
                grad_scores *= gate
            accumulator = add_product(grad_scores, key_tile, accumulator, INPUT_PRECISION)
        accumulator = undropped_prefix(accumulator, extras)

    bounds = visible_range(extras, place, first_row, BLOCK_QUERIES, BLOCK_KEYS)
    # First the tiles that need no mask, then the others.
    for part in tl.static_range(2):
        for first_column in range(bounds[part], bounds[part + 1], BLOCK_KEYS):
            key_tile, value_tile = load_tokens(
                key, value, place, first_column, BLOCK_KEYS, HEAD_DIM, BLOCK_DIMS, part == 0
            )
            scores, factor = token_scores(
                query_tile, key_tile, extras, place, first_row, first_column, scale_log2,
                HEAD_DIM, BLOCK_DIMS, INPUT_PRECISION,
            )  # fmt: skip
            scores = hide_tokens(scores, extras, place, first_row, first_column, part == 0)
            _, grad_scores = recompute(
                scores, factor, value_tile, grad_out_tile, statistics, extras, place,
                first_row, first_column, TOKEN_STREAM, INPUT_PRECISION,
            )  # fmt: skip
            accumulator = add_product(grad_scores, key_tile, accumulator, INPUT_PRECISION)
            accumulator = add_position_gradient(
                grad_scores, accumulator, extras.position_key, extras, place, first_row,
                first_column, False, HEAD_DIM, BLOCK_DIMS, INPUT_PRECISION,
            )  # fmt: skip

    gradient = scale_tile(accumulator, scale_log2 * LN_2)
    store_tile(
        grad_query, gradient, place.start, place.head, first_row, place.row_count,
        BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS,
    )  # fmt: skip
