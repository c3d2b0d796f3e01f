"""Bytes that a training step of frozen blocks keeps and needs, and policies that fit a budget."""

from collections.abc import Iterator
from itertools import combinations_with_replacement

from ptv2_fast.frozen.spec import POLICIES, UPPER_BLOCK, BlockShape, Surroundings, kept_names


def kept_bytes_per_token(policy: str, shape: BlockShape, around: Surroundings = UPPER_BLOCK) -> int:
    """Bytes that one block saves for its backward pass, per row of the packed layout.

    In BERT, with h = hidden and a = heads, bf16: 20h + 4a + 16, 12h + 4a + 16, 6h + 4a + 16 and
    2h + 8.

    Args:
        policy: one of POLICIES.
        shape: of the block.
        around: what stands around it.
    """
    return sum(shape.bytes_per_token(name) for name in kept_names(policy, around))


def transient_bytes(policy: str, shape: BlockShape, tokens: int, chunk: int) -> int:
    """Bytes that the backward pass of one block needs for a while, beside what was kept.

    What the policy computes for the whole block, and the larger of two phases: the attention with
    the gradients of output, residual, out, q, k, v and input; or the last chunk of the
    feed-forward network with its first product and the gradients of that and of the activation,
    beside the gradients of output, residual and both ends of the network. The forward pass needs
    less.

    Args:
        policy: one of POLICIES.
        shape: of the block.
        tokens: rows of the packed layout.
        chunk: tokens that go through the feed-forward network at a time.
    """
    product, residual = shape.element_bytes, shape.hidden * shape.residual_bytes
    row, out = shape.hidden * product, shape.bytes_per_token("attention_out")
    query_key_value, expanded = shape.query_key_value * product, shape.expanded * product
    recomputed = 0
    if policy in ("ffn+qkv", "block"):
        recomputed += query_key_value
    if policy == "block":
        names = ("attention_out", "lse", "attention_sum", "attention_stats")
        recomputed += sum(shape.bytes_per_token(name) for name in names)
    attention = tokens * (2 * residual + out + query_key_value + row)
    per_chunk_token = expanded + shape.intermediate * product
    if policy != "none":
        per_chunk_token += expanded + row
    feed_forward = tokens * (2 * residual + 2 * row) + min(chunk, tokens) * per_chunk_token
    return tokens * recomputed + max(attention, feed_forward)


def recompute_flops_per_token(policy: str, shape: BlockShape, columns: int) -> int:
    """Flops that a policy adds to those of forward and backward, in BERT 48 hidden^2.

    Args:
        policy: one of POLICIES.
        shape: of the block.
        columns: that a row attends to on average, prefix included.
    """
    heads = shape.heads * shape.head_dim
    feed_forward = 2 * shape.hidden * shape.expanded
    query_key_value = 2 * shape.hidden * shape.query_key_value
    attention = 2 * shape.hidden * heads + 4 * heads * columns
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
    around: Surroundings = UPPER_BLOCK,
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
        around: what stands around every block but the lowest.

    Returns:
        One of POLICIES for each of the blocks `lowest` to `layers` - 1.

    Raises:
        ValueError: when no choice fits; the message names the least budget that can.
    """
    if lowest == layers:
        return ()
    best, best_cost, least = None, 0, None
    for runs in _mixtures(layers - lowest):
        peak = _peak_bytes(runs, tokens, shape, chunk, around)
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


def peak_bytes(
    policies: tuple[str, ...],
    tokens: int,
    shape: BlockShape,
    chunk: int,
    around: Surroundings = UPPER_BLOCK,
) -> int:
    """The most that the blocks hold at a time in the backward pass, kept and transient.

    Args:
        policies: of the blocks from the lowest whose backward pass runs upwards.
        tokens, shape, chunk: as for `transient_bytes`.
        around: what stands around every block but the lowest.
    """
    return _peak_bytes(tuple((name, 1) for name in policies), tokens, shape, chunk, around)


def _mixtures(blocks: int) -> Iterator[_Runs]:
    """The lowest block with any policy, the others with one or two."""
    for lowest in POLICIES:
        for upper, lower in combinations_with_replacement(POLICIES, 2):
            for count in range(blocks):
                yield (lowest, 1), (lower, count), (upper, blocks - 1 - count)


def _peak_bytes(
    runs: _Runs, tokens: int, shape: BlockShape, chunk: int, around: Surroundings
) -> int:
    """Within a run the highest block has the peak, since the kept bytes only add up."""
    kept, peak = 0, 0
    for place, (policy, count) in enumerate(runs):
        if count:
            place_of_block = around.of_lowest() if place == 0 else around
            kept += tokens * count * kept_bytes_per_token(policy, shape, place_of_block)
            peak = max(peak, kept + transient_bytes(policy, shape, tokens, chunk))
    return peak
