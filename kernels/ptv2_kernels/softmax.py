"""Scores, the online softmax over tiles of columns, and its recomputation from the saved lse.

Base-2 values carry the suffix _log2: the softmax runs on exp2, with log2(e) folded into the scale.
"""

import triton
import triton.language as tl

from ptv2_kernels.dropout import (
    PREFIX_KEY_STREAM,
    PREFIX_VALUE_STREAM,
    drop_prefix,
    keep_mask,
)
from ptv2_kernels.tiles import add_product, inner_products, load_tile, row_offsets, scale_tile
from ptv2_kernels.visibility import load_bias

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_prefix(
    prefix_key, prefix_value, extras, seed, bank_row, kv_head, sequence_kv_head, columns, length,
    HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr,
):  # fmt: skip
    """One tile of the prefix as a sequence sees it: keys and values, dropped."""
    key = load_tile(prefix_key, bank_row, kv_head, columns, length, HEAD_DIM, BLOCK_DIMS)
    value = load_tile(prefix_value, bank_row, kv_head, columns, length, HEAD_DIM, BLOCK_DIMS)
    return drop_pair(key, value, extras, seed, sequence_kv_head, columns)


@triton.jit
def drop_pair(key, value, extras, seed, sequence_kv_head, columns):
    """Prefix dropout of keys and values, or of their gradients."""
    return (
        drop_prefix(key, extras, seed, sequence_kv_head, columns, PREFIX_KEY_STREAM),
        drop_prefix(value, extras, seed, sequence_kv_head, columns, PREFIX_VALUE_STREAM),
    )


@triton.jit
def prefix_scores(query, key, columns, length, scale_log2, INPUT_PRECISION: tl.constexpr):
    scores_log2 = inner_products(query, key, INPUT_PRECISION) * scale_log2
    return tl.where((columns < length)[None, :], scores_log2, float("-inf"))


@triton.jit
def token_scores(
    query, key, extras, sequence, head, rows, columns, row_count, column_count, shown, scale_log2,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Biased scores of one tile of tokens; -inf where not shown."""
    scores_log2 = inner_products(query, key, INPUT_PRECISION) * scale_log2
    if extras.bias_ptr is not None:
        bias = load_bias(extras, sequence, head, rows, columns, row_count, column_count)
        scores_log2 += bias * LOG2_E
    return tl.where(shown, scores_log2, float("-inf"))


@triton.jit
def attend(
    state, scores_log2, value, extras, seed, sequence_head, rows, first_column,
    STREAM: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (Milakov & Gimelshein 2018), and of what it weighs.

    A row that has seen no visible column keeps a finite pivot, hence no NaN.
    """
    running_max, running_sum, accumulator = state
    new_max = tl.maximum(running_max, tl.max(scores_log2, axis=1))
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    probabilities = tl.exp2(scores_log2 - pivot[:, None])
    rescale = tl.exp2(running_max - pivot)
    running_sum = running_sum * rescale + tl.sum(probabilities, axis=1)
    if extras.threshold is not None:
        keep = keep_mask(
            seed, sequence_head, rows, first_column, extras.threshold, STREAM,
            scores_log2.shape[1],
        )  # fmt: skip
        probabilities = tl.where(keep, probabilities * extras.multiplier, 0.0)
    rescaled = scale_tile(accumulator, rescale[:, None])
    return new_max, running_sum, add_product(probabilities, value, rescaled, INPUT_PRECISION)


@triton.jit
def recompute(
    scores_log2, value, grad_out, statistics, extras, seed, sequence_head, rows, first_column,
    STREAM: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Dropped probabilities and unscaled gradients of the scores of one tile, both float32.

    dP = keep * (grad_out @ value^T) / (1 - p);  dS = P * (dP - delta).
    """
    lse_log2, delta = statistics
    probabilities = tl.exp2(scores_log2 - lse_log2[:, None])
    grad_probabilities = inner_products(grad_out, value, INPUT_PRECISION)
    dropped = probabilities
    if extras.threshold is not None:
        keep = keep_mask(
            seed, sequence_head, rows, first_column, extras.threshold, STREAM,
            scores_log2.shape[1],
        )  # fmt: skip
        dropped = tl.where(keep, probabilities * extras.multiplier, 0.0)
        grad_probabilities = tl.where(keep, grad_probabilities * extras.multiplier, 0.0)
    return dropped, probabilities * (grad_probabilities - delta[:, None])


@triton.jit
def load_statistics(lse_ptr, delta_ptr, extras, start, head, rows, row_count, heads, queries):
    """lse in base 2 (0 for a row without a visible column) and delta of a tile of query rows."""
    offsets = row_offsets(extras, start, head, rows, heads, queries)
    lse = tl.load(lse_ptr + offsets, mask=rows < row_count, other=0.0)
    delta = tl.load(delta_ptr + offsets, mask=rows < row_count, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E), delta
