"""Forward pass.

    scores = scale * (query @ [prefix_key ; key]^T + [0 ; those by distance]) + [log(gate) ; bias]
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
    strided,
    tile_grid,
)
from ptv2_kernels.configs import launch_options
from ptv2_kernels.dropout import PREFIX_STREAM, TOKEN_STREAM
from ptv2_kernels.launching import Launcher
from ptv2_kernels.places import (
    load_seed,
    locate,
    locate_prefix,
    locate_tile,
    prefix_end,
    row_pointers,
)
from ptv2_kernels.softmax import (
    LN_2,
    attend,
    gated_scores,
    load_gate,
    load_prefix,
    prefix_scores,
    token_scores,
    undropped,
    undropped_prefix,
)
from ptv2_kernels.tiles import load_queries, load_tokens, scale_tile, store_tile, zero_tile
from ptv2_kernels.visibility import hide_behind, hide_tokens, visible_range


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
    BLOCK_PREFIX: tl.constexpr,
    ONE_PREFIX_TILE: tl.constexpr,
):
    """Online softmax over two sources of columns; grid (query tiles * batch, heads)."""
    first_row, sequence = locate_tile(queries, BLOCK_QUERIES)
    head, seed = tl.program_id(1), load_seed(extras)
    place = locate(extras, sequence, head, head // group, heads, group, queries, tokens, seed)
    if first_row >= place.row_count:
        return
    query_tile = load_queries(query, place, first_row, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS)
    state = (
        tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_QUERIES,), tl.float32),
        zero_tile(BLOCK_QUERIES, BLOCK_DIMS),
    )

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
            scores, factor = gated_scores(scores, factor, extras, gate)
            scores = hide_behind(scores, length - first_column)
            state = attend(
                state, scores, factor, value_tile, extras, place, first_row, first_column,
                PREFIX_STREAM, INPUT_PRECISION,
            )  # fmt: skip
        state = state[0], state[1], undropped_prefix(state[2], extras)

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
            state = attend(
                state, scores, factor, value_tile, extras, place, first_row, first_column,
                TOKEN_STREAM, INPUT_PRECISION,
            )  # fmt: skip

    running_max, running_sum, accumulator = state
    empty = running_sum == 0.0
    safe_sum = tl.where(empty, 1.0, running_sum)
    lse = tl.where(empty, float("-inf"), (running_max + tl.log2(safe_sum)) * LN_2)
    lse_ptrs = row_pointers(lse_ptr, extras, place, first_row, BLOCK_QUERIES)
    tl.store(lse_ptrs, lse, mask=tl.arange(0, BLOCK_QUERIES) < place.row_count - first_row)
    out_tile = undropped(scale_tile(accumulator, 1.0 / safe_sum[:, None]), extras)
    store_tile(
        out, out_tile, place.start, place.head, first_row, place.row_count,
        BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS,
    )  # fmt: skip


_launch = Launcher(_prefix_attention_forward_kernel)


def launch_forward(
    query: Tensor,  # [B, H, T, D]; packed: [N, H, D]
    key: Tensor,  # [B, H_kv, S, D]; packed: [N, H_kv, D]
    value: Tensor,
    prefix_key: Tensor,  # [R, H_kv, P, D]
    prefix_value: Tensor,
    *call_options,
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D] with a contiguous [B, T, H, D] view, and lse [B, H, T] (float32).

    Packed: [N, H, D] and [N, H]. `call_options`: those of `describe_call`, from key_mask on.
    """
    call = describe_call(query, key, prefix_key, *call_options)
    heads = query.shape[1]
    out, lse = empty_token_major(query, heads), empty_statistics(query)
    if lse.numel() == 0:
        return out, lse
    options = launch_options("forward", query, call.extras, prefix_key.shape[2])
    _launch(
        tile_grid(call, call.longest, options["BLOCK_QUERIES"], heads),
        options,
        strided(query),
        strided(key),
        strided(value),
        strided(prefix_key),
        strided(prefix_value),
        strided(out),
        lse,
        call.extras,
        *call.sizes.values(),
        call.scale * LOG2_E,
    )
    return out, lse
