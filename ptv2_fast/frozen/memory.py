"""Bytes that a training step of the frozen block keeps and needs, and policies that fit a budget.

Per token, with X = bytes of an element in the matrix products and R = in the residual stream, the
backward pass of a block reads q, k, v and out (hidden X each), u (intermediate X), total_1 and
total_2 (hidden R each), lse (4 per head) and the statistics of two LayerNorms (8 each). A policy
keeps some of them and computes the others again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

POLICIES = ("none", "ffn", "ffn+qkv", "block")  # in the order of falling memory
_STATISTICS_BYTES = 8  # mean and 1 / deviation of one row, fp32
_LSE_BYTES = 4


@dataclass(frozen=True)
class BlockShape:
    """Sizes of an encoder block.

    Args:
        hidden, intermediate, heads: of the encoder's configuration.
        element_bytes: of the matrix products' dtype.
        residual_bytes: of the residual stream's dtype, which differs under autocast only.
    """

    hidden: int
    intermediate: int
    heads: int
    element_bytes: int
    residual_bytes: int

    @property
    def row_bytes(self) -> int:
        """Of `hidden` elements of a product."""
        return self.hidden * self.element_bytes

    @property
    def residual_row_bytes(self) -> int:
        """Of `hidden` elements of the residual stream."""
        return self.hidden * self.residual_bytes

    @property
    def intermediate_row_bytes(self) -> int:
        """Of `intermediate` elements of a product."""
        return self.intermediate * self.element_bytes


def kept_bytes_per_token(policy: str, shape: BlockShape, *, is_lowest: bool = False) -> int:
    """Bytes that one block saves for its backward pass, per row of the packed layout.

    With h = hidden and a = heads, bf16: 20h + 4a + 16, 12h + 4a + 16, 6h + 4a + 16 and 2h + 8.

    Args:
        policy: one of POLICIES.
        shape: of the block.
        is_lowest: nothing below needs a gradient. Such a block reads no k and no v backward, and
            it has no total_2 of a block below to compute its input from: "ffn+qkv" keeps q, which
            is no larger than the input, and so is "ffn"; "block" keeps the input.
    """
    attention = _LSE_BYTES * shape.heads + shape.row_bytes
    total_1 = shape.residual_row_bytes + _STATISTICS_BYTES
    bytes_kept = shape.residual_row_bytes + _STATISTICS_BYTES  # total_2
    if policy == "block":
        return bytes_kept + is_lowest * shape.residual_row_bytes
    bytes_kept += attention + total_1
    if is_lowest:
        bytes_kept += shape.row_bytes
    elif policy != "ffn+qkv":
        bytes_kept += 3 * shape.row_bytes
    return bytes_kept + (policy == "none") * shape.intermediate_row_bytes


def transient_bytes(policy: str, shape: BlockShape, tokens: int, chunk: int) -> int:
    """Bytes that the backward pass of one block needs for a while, beside what was kept.

    What the policy computes for the whole block, and the larger of two phases: the attention with
    the gradients of output, residual, out, q, k, v and input; or the last chunk of the
    feed-forward network with its u and two gradients of that size, beside the gradients of output,
    residual and both ends of the network. The forward pass needs less.

    Args:
        policy: one of POLICIES.
        shape: of the block.
        tokens: rows of the packed layout.
        chunk: tokens that go through the feed-forward network at a time.
    """
    row, residual_row = shape.row_bytes, shape.residual_row_bytes
    recomputed = 0
    if policy in ("ffn+qkv", "block"):
        recomputed += 3 * row
    if policy == "block":
        recomputed += row + _LSE_BYTES * shape.heads + residual_row + _STATISTICS_BYTES
    attention = tokens * (2 * residual_row + 5 * row)
    per_chunk_token = 2 * shape.intermediate_row_bytes
    if policy != "none":
        per_chunk_token += shape.intermediate_row_bytes + row
    feed_forward = tokens * (2 * residual_row + 2 * row) + min(chunk, tokens) * per_chunk_token
    return tokens * recomputed + max(attention, feed_forward)


def recompute_flops_per_token(policy: str, shape: BlockShape, columns: int) -> int:
    """Flops that a policy adds to the 48 hidden^2 of forward and backward.

    Args:
        policy: one of POLICIES.
        shape: of the block.
        columns: that a row attends to on average, prefix included.
    """
    feed_forward = 2 * shape.hidden * shape.intermediate
    query_key_value = 6 * shape.hidden**2
    attention = 2 * shape.hidden**2 + 4 * shape.hidden * columns
    parts = {"none": 0, "ffn": 1, "ffn+qkv": 2, "block": 3}[policy]
    return sum((feed_forward, query_key_value, attention)[:parts])


# Runs of (policy, number of blocks) from the lowest block upwards.
_Runs = tuple[tuple[str, int], ...]


def choose_policies(
    budget_bytes: int,
    tokens: int,
    shape: BlockShape,
    layers: int,
    lowest: int,
    *,
    chunk: int = 1024,
    columns: int = 512,
) -> tuple[str, ...]:
    """The policies that recompute least among those whose peak fits a budget.

    All blocks but the lowest are alike, so of any linear trade of memory against flops at most two
    policies are mixed. Those mixtures are tried; one of three could save less than the step of one
    block. The block that keeps less runs lower: its transient falls into the end of the backward
    pass, when the blocks above have freed theirs.

    Args:
        budget_bytes: for what the blocks keep and need for a while.
        tokens: of the batch that are no padding.
        shape: of the blocks.
        layers: of the encoder.
        lowest: index of the lowest block whose backward pass runs.
        chunk: tokens that go through the feed-forward network at a time.
        columns: that a row attends to on average, prefix included; weighs "block" against the rest.

    Returns:
        One of POLICIES for each of the blocks `lowest` to `layers` - 1.

    Raises:
        ValueError: when no choice fits; the message names the least budget that can.
    """
    if lowest == layers:
        return ()
    best, best_cost, least = None, 0, None
    for runs in _mixtures(layers - lowest):
        peak = _peak_bytes(runs, tokens, shape, chunk)
        least = peak if least is None else min(least, peak)
        cost = sum(recompute_flops_per_token(name, shape, columns) * count for name, count in runs)
        if peak <= budget_bytes and (best is None or cost < best_cost):
            best, best_cost = runs, cost
    if best is None:
        raise ValueError(
            f"memory_budget: expected at least {least} bytes for {tokens} tokens, "
            f"got {budget_bytes}"
        )
    return tuple(name for name, count in best for _ in range(count))


def peak_bytes(policies: tuple[str, ...], tokens: int, shape: BlockShape, chunk: int) -> int:
    """The most that the blocks hold at a time in the backward pass, kept and transient.

    Args:
        policies: of the blocks from the lowest whose backward pass runs upwards.
        tokens, shape, chunk: as for `transient_bytes`.
    """
    return _peak_bytes(tuple((name, 1) for name in policies), tokens, shape, chunk)


def _mixtures(blocks: int) -> Iterator[_Runs]:
    """The lowest block with any policy, the others with one or two."""
    for lowest in POLICIES:
        for upper, lower in combinations_with_replacement(POLICIES, 2):
            for count in range(blocks):
                yield (lowest, 1), (lower, count), (upper, blocks - 1 - count)


def _peak_bytes(runs: _Runs, tokens: int, shape: BlockShape, chunk: int) -> int:
    """Within a run the highest block has the peak, since the kept bytes only add up."""
    kept, peak = 0, 0
    for place, (policy, count) in enumerate(runs):
        if count:
            is_lowest = place == 0
            kept += tokens * count * kept_bytes_per_token(policy, shape, is_lowest=is_lowest)
            peak = max(peak, kept + transient_bytes(policy, shape, tokens, chunk))
    return peak
