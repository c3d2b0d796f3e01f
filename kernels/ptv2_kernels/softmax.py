"""Scores, the online softmax over tiles of columns, and its recomputation from the saved lse.

Base-2 values carry the suffix _log2: the softmax runs on exp2, with log2(e) folded into the scale.
"""

import triton
import triton.language as tl

from ptv2_kernels.dropout import (
    PREFIX_KEY_STREAM,
    PREFIX_STREAM,
    PREFIX_VALUE_STREAM,
    drop_prefix,
    keep_mask,
)
from ptv2_kernels.places import row_pointers
from ptv2_kernels.positions import add_position_scores
from ptv2_kernels.tiles import add_product, inner_products, load_tile, scale_tile
from ptv2_kernels.visibility import load_bias

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The largest exponent of a weight without its gate: of a gate of 0 nothing else bounds it.
MOST_EXPONENT_LOG2 = tl.constexpr(115.0)


@triton.jit
def load_prefix(
    prefix_key, prefix_value, extras, place, bank_row, first_column, length,
    COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr,
):  # fmt: skip
    """One tile of the prefix as a sequence reads it: keys and values, dropped."""
    head = place.kv_head
    key = load_tile(prefix_key, bank_row, head, first_column, length, COLUMNS, HEAD_DIM, BLOCK_DIMS)
    value = load_tile(
        prefix_value, bank_row, head, first_column, length, COLUMNS, HEAD_DIM, BLOCK_DIMS
    )
    return drop_pair(key, value, extras, place, first_column)


@triton.jit
def drop_pair(key, value, extras, place, first_column):
    """Prefix dropout of keys and values, or of their gradients."""
    return (
        drop_prefix(key, extras, place, first_column, PREFIX_KEY_STREAM),
        drop_prefix(value, extras, place, first_column, PREFIX_VALUE_STREAM),
    )


@triton.jit
def load_gate(extras, place, bank_row):
    """The gate of a head; without gates any number serves."""
    if extras.gate_ptr is None:
        return 1.0
    else:
        return tl.load(extras.gate_ptr + bank_row * place.heads + place.head)


@triton.jit
def prefix_scores(query, key, extras, scale_log2, INPUT_PRECISION: tl.constexpr):
    """(scores, factor > 0): their product is in base 2. A factor costs nothing inside exp2."""
    if extras.prefix_threshold is not None:
        scale_log2 = scale_log2 * extras.prefix_multiplier
    return scaled(inner_products(query, key, INPUT_PRECISION), extras, scale_log2)


@triton.jit
def gated_scores(scores, factor, extras, gate):
    """What `prefix_scores` gives, with the logarithm of the gate: -inf for one of 0."""
    if extras.gate_ptr is None:
        return scores, factor
    else:
        return tl.fma(scores, factor, tl.log2(gate)), 1.0


@triton.jit
def scaled(scores, extras, scale_log2):
    if extras.any_scale is None:
        return scores, scale_log2
    else:
        return scores * scale_log2, 1.0


@triton.jit
def token_scores(
    query, key, extras, place, first_row, first_column, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """As `prefix_scores`, with those by distance and with the bias."""
    scores = inner_products(query, key, INPUT_PRECISION)
    if extras.slots_ptr is not None:
        scores = add_position_scores(
            scores, query, key, extras, place, first_row, first_column,
            HEAD_DIM, BLOCK_DIMS, INPUT_PRECISION,
        )  # fmt: skip
    scores, factor = scaled(scores, extras, scale_log2)
    if extras.bias_ptr is None:
        return scores, factor
    else:
        bias = load_bias(extras, place, first_row, first_column, scores.shape[0], scores.shape[1])
        return tl.fma(bias, LOG2_E, scores), factor


@triton.jit
def attend(
    state, scores, factor, value, extras, place, first_row, first_column,
    STREAM: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (Milakov & Gimelshein 2018), and of what it weighs.

    What dropout keeps gets its factor at the end, by `undropped`. A row without a visible
    column so far keeps a finite pivot, hence no NaN.
    """
    running_max, running_sum, accumulator = state
    new_max = tl.maximum(running_max, tl.max(scores, axis=1) * factor)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    probabilities = tl.exp2(tl.fma(scores, factor, -pivot[:, None]))
    rescale = tl.exp2(running_max - pivot)
    running_sum = tl.fma(running_sum, rescale, tl.sum(probabilities, axis=1))
    if extras.threshold is not None:
        keep = keep_scores(scores, extras, place, first_row, first_column, STREAM)
        probabilities = tl.where(keep, probabilities, 0.0)
    rescaled = scale_tile(accumulator, rescale[:, None])
    return new_max, running_sum, add_product(probabilities, value, rescaled, INPUT_PRECISION)


@triton.jit
def keep_scores(scores, extras, place, first_row, first_column, STREAM: tl.constexpr):
    """Which probabilities of a tile dropout keeps."""
    return keep_mask(
        place.seed, place.sequence * place.heads + place.head, first_row, first_column,
        extras.threshold, STREAM, scores.shape[0], scores.shape[1],
    )  # fmt: skip


@triton.jit
def recompute(
    scores, factor, value, grad_out, statistics, extras, place, first_row, first_column,
    STREAM: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Dropped probabilities and unscaled gradients of the scores of one tile, both float32.

    dP = keep * (grad_out @ value^T) / (1 - p);  dS = P * (dP - delta). Of the dropped ones the
    factor 1 / (1 - p) is left to `undropped`. Of a prefix with gates, P is without its gate: the
    gate times what is returned are those two, and dS the gradient of the gate.
    """
    lse_log2, delta = statistics
    exponents = tl.fma(scores, factor, -lse_log2[:, None])
    if STREAM == PREFIX_STREAM and extras.gate_ptr is not None:
        exponents = tl.where(exponents > MOST_EXPONENT_LOG2, MOST_EXPONENT_LOG2, exponents)
    probabilities = tl.exp2(exponents)
    grad_probabilities = inner_products(grad_out, value, INPUT_PRECISION)
    if STREAM == PREFIX_STREAM and extras.prefix_threshold is not None:
        grad_probabilities = grad_probabilities * extras.prefix_multiplier
    if extras.threshold is None:
        return probabilities, probabilities * (grad_probabilities - delta[:, None])
    else:
        keep = keep_scores(scores, extras, place, first_row, first_column, STREAM)
        dropped = tl.where(keep, probabilities, 0.0)
        kept = tl.where(keep, grad_probabilities, 0.0)
        grad_scores = probabilities * tl.fma(kept, extras.multiplier, -delta[:, None])
        return dropped, grad_scores


@triton.jit
def undropped(tile, extras):
    """A sum over dropped probabilities, times the factor of those that were kept."""
    if extras.threshold is None:
        return tile
    else:
        return scale_tile(tile, extras.multiplier)


@triton.jit
def undropped_prefix(tile, extras):
    """A sum over dropped elements of the prefix, times the factor of those that were kept."""
    if extras.prefix_threshold is None:
        return tile
    else:
        return scale_tile(tile, extras.prefix_multiplier)


@triton.jit
def load_statistics(lse_ptr, delta_ptr, extras, place, first_row, ROWS: tl.constexpr):
    """lse in base 2 (0 for a row without a visible column) and delta of a tile of query rows.

    Rows outside have lse inf, hence probabilities of 0 whatever their scores are.
    """
    inside = tl.arange(0, ROWS) < place.row_count - first_row
    lse_ptrs = row_pointers(lse_ptr, extras, place, first_row, ROWS)
    delta_ptrs = row_pointers(delta_ptr, extras, place, first_row, ROWS)
    lse = tl.load(lse_ptrs, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptrs, mask=inside, other=0.0)
    if extras.gate_ptr is None:
        hidden = 0.0
    else:
        hidden = float("inf")  # a prefix whose gate is 0 has finite scores
    return tl.where(lse == float("-inf"), hidden, lse * LOG2_E), delta
