"""Counter-based dropout: keep masks as a pure function of (seed, sequence, head, row, column).

Philox-4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One call
yields four 32-bit words, used as eight 16-bit decisions for eight neighbouring columns. Every
backend draws the same bits, whatever its tiling, so that each is tested with dropout on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TOKEN_STREAM = 0  # attention probabilities over token columns
PREFIX_STREAM = 1  # attention probabilities over prefix columns
PREFIX_KEY_STREAM = 2  # elements of prefix_key, one mask per sequence
PREFIX_VALUE_STREAM = 3  # elements of prefix_value, one mask per sequence
ATTENTION_OUTPUT_STREAM = 4  # hidden states: the output projection of the attention
FEED_FORWARD_STREAM = 5  # hidden states: the output of the feed-forward network
ACTIVATION_STREAM = 6  # the activation inside the feed-forward network

_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def dropout_threshold(dropout_p: float) -> int:
    """The 16-bit value below which a decision drops its column."""
    return round(65536 * dropout_p)


def philox_4x32(counters: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Philox-4x32-7 on int64 tensors that hold 32-bit words; seed is an int64 tensor [1]."""
    c0, c1, c2, c3 = counters
    key_0 = seed & _LOW_32
    key_1 = (seed >> 32) & _LOW_32
    for _ in range(_ROUNDS):
        # int64 products wrap, but their bits are those of the unsigned product.
        product_0 = c0 * _MULTIPLIERS[0]
        product_1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _LOW_32) ^ c1 ^ key_0,
            product_1 & _LOW_32,
            ((product_0 >> 32) & _LOW_32) ^ c3 ^ key_1,
            product_0 & _LOW_32,
        )
        key_0 = (key_0 + _KEY_INCREMENTS[0]) & _LOW_32
        key_1 = (key_1 + _KEY_INCREMENTS[1]) & _LOW_32
    return [c0, c1, c2, c3]


def dropout_multiplier(
    shape: Sequence[int],
    dropout_p: float,
    seed: Tensor,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """0 where a value is dropped and 1 / (1 - dropout_p) where it is kept.

    Args:
        shape: (batch, heads, rows, columns) of the values.
        seed: int64 tensor [1] on the device of the values.
        stream: one of the stream constants of this module.

    Returns:
        Tensor of `shape` and `dtype`.
    """
    batch, heads, rows, columns = shape
    groups = -(-columns // 8)

    def counter(size: int, dimension: int) -> Tensor:
        view = [1, 1, 1, 1]
        view[dimension] = size
        return torch.arange(size, device=seed.device).view(view)

    sequence_head = counter(batch, 0) * heads + counter(heads, 1)
    shape_of_calls = (batch, heads, rows, groups)
    counters = (
        counter(groups, 3).expand(shape_of_calls),
        counter(rows, 2).expand(shape_of_calls),
        sequence_head.expand(shape_of_calls),
        torch.full((1, 1, 1, 1), stream, device=seed.device).expand(shape_of_calls),
    )
    return _multiplier(counters, columns, dropout_p, seed, dtype)


def row_dropout_multiplier(
    columns: int,
    dropout_p: float,
    seed: Tensor | None,
    coordinates: Tensor | None,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """`dropout_multiplier` of hidden states: [R, columns], one head, rows anywhere.

    Args:
        coordinates: int32 [R, 2], the sequence and the row in it of each row.
        others: as in `dropout_multiplier`.
    """
    assert seed is not None and coordinates is not None, "dropout needs both"
    groups = torch.arange(-(-columns // 8), device=seed.device)
    sequence, row = coordinates.long()[:, :, None].unbind(1)  # [R, 1] each
    shape = (coordinates.shape[0], groups.numel())
    counters = (
        groups.expand(shape),
        row.expand(shape),
        sequence.expand(shape),
        torch.full((1, 1), stream, device=seed.device).expand(shape),
    )
    return _multiplier(counters, columns, dropout_p, seed, dtype)


def _multiplier(
    counters: tuple[Tensor, Tensor, Tensor, Tensor],  # [..., groups]
    columns: int,
    dropout_p: float,
    seed: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    words = torch.stack(philox_4x32(counters, seed), dim=-1)  # [..., groups, 4]
    decisions = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # [..., groups, 4, 2]
    keep = decisions.flatten(-3)[..., :columns] >= dropout_threshold(dropout_p)
    return keep.to(dtype) * (1.0 / (1.0 - dropout_p))
