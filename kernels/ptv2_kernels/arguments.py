"""What the kernels take: strided tensors and extras as named tuples, sizes as plain numbers.

Numbers that change from batch to batch are plain arguments, which `do_not_specialize` can name; a
tuple is specialised for alignment and for strides of 1. What is None is compiled out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
LARGEST_BLOCK = 256
# Sizes that change from batch to batch must not recompile a kernel.
RUNTIME_SIZES = ["queries", "tokens", "prefix_length"]


class Strided(NamedTuple):
    """A tensor [B, H, T, D], or a bank of prefixes [R, H_kv, P, D].

    One code path for both layouts: a kernel steps from sequence to sequence by strides[0] times
    the start of the sequence, which is its number when padded and its first token when packed.
    """

    ptr: Tensor
    strides: tuple[int, ...]  # start, head, row, column


class Extras(NamedTuple):
    """Everything beside tensors and sizes; None = without it."""

    cu_seqlens_ptr: Tensor | None  # int32 [B + 1]: the packed layout
    key_mask_ptr: Tensor | None  # bool [B, S], contiguous
    context_lengths_ptr: Tensor | None  # int32 [B]
    window: int | None
    prefix_index_ptr: Tensor | None  # int32 [B]: the prefixes are a bank
    prefix_lengths_ptr: Tensor | None  # int32 [R]
    bias_ptr: Tensor | None  # [1|B, H, T, S]
    bias_strides: tuple[int, ...]  # sequence, head, row; column 1
    any_scale: int | None  # 1: scores are scaled before they are compared
    seed_ptr: Tensor | None  # int64 [1]
    threshold: int | None  # a 16-bit decision below it drops
    multiplier: float  # of what is kept
    prefix_threshold: int | None
    prefix_multiplier: float
    position_key: Strided | None  # [1, H, slots, D]
    position_query: Strided | None
    slots_ptr: Tensor | None  # int32 [2 M - 1], the distance 0 in the middle
    slot_count: int | None  # 2 M - 1: odd, hence of one kind to the compiler
    gate_ptr: Tensor | None  # [R, H], contiguous: on the weights of prefix columns

    def of_tokens(self) -> "Extras":
        """Without what only the prefix has, likewise."""
        return self._replace(gate_ptr=None)

    def of_prefix(self) -> "Extras":
        """Without what only tokens have, so that a kernel without tokens is not compiled anew."""
        return self._replace(
            key_mask_ptr=None, context_lengths_ptr=None, window=None,
            bias_ptr=None, bias_strides=(0, 0, 0),
            position_key=None, position_query=None, slots_ptr=None, slot_count=None,
        )  # fmt: skip


class Call(NamedTuple):
    """One call of the operator, as its kernels see it."""

    batch: int
    longest: int  # rows of the longest sequence, T
    longest_key: int  # S
    extras: Extras
    scale: float
    sizes: dict[str, int]


def strided(tensor: Tensor) -> Strided:
    strides = tensor.stride()
    if abs(strides[-2]) >= 2**31 // LARGEST_BLOCK and tensor.numel():
        tensor = tensor.contiguous()  # offsets inside a tile are counted in int32
        strides = tensor.stride()
    if len(strides) == 3:  # packed [N, H, D]
        row, head, column = strides
        strides = (row, head, row, column)
    return Strided(tensor, strides)


def describe_call(
    query: Tensor,  # [B, H, T, D]; packed: [N, H, D]
    key: Tensor,  # [B, H_kv, S, D]; packed: [N, H_kv, D]
    prefix_key: Tensor,  # [R, H_kv, P, D]
    key_mask: Tensor | None,  # bool [B, S]
    seed: Tensor | None,  # int64 [1]
    scale: float,
    dropout_p: float,
    prefix_dropout_p: float,
    context_lengths: Tensor | None = None,  # int32 [B]
    window: int = -1,  # negative = none
    prefix_index: Tensor | None = None,  # int32 [B]
    prefix_lengths: Tensor | None = None,  # int32 [R]
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int = 0,
    bias: Tensor | None = None,  # [1|B, H, T, S]
    position_key: Tensor | None = None,  # [H, slots, D]
    position_query: Tensor | None = None,
    position_slots: Tensor | None = None,  # int32 [2 M - 1]
    prefix_gate: Tensor | None = None,  # [R, H]
) -> Call:
    """The options of the raw operators, from key_mask on, in the form the kernels take."""
    heads, kv_heads = query.shape[1], key.shape[1]
    bias_strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias_strides = (0 if bias.shape[0] == 1 else bias.stride(0), *bias.stride()[1:3])
    extras = Extras(
        cu_seqlens,
        None if key_mask is None else key_mask.contiguous(),
        context_lengths,
        None if window < 0 else window,
        prefix_index,
        None if prefix_index is None else prefix_lengths,
        bias,
        bias_strides,
        # A bias is added to scaled scores, and a negative scale turns their order around.
        None if bias is None and scale > 0 else 1,
        seed if dropout_p > 0 or prefix_dropout_p > 0 else None,
        round(65536 * dropout_p) if dropout_p > 0 else None,
        1.0 / (1.0 - dropout_p),
        round(65536 * prefix_dropout_p) if prefix_dropout_p > 0 else None,
        1.0 / (1.0 - prefix_dropout_p),
        None if position_key is None else strided(position_key[None]),
        None if position_query is None else strided(position_query[None]),
        None if position_slots is None else position_slots.contiguous(),
        None if position_slots is None else len(position_slots),
        None if prefix_gate is None else prefix_gate.contiguous(),
    )
    if cu_seqlens is None:
        batch, longest, longest_key = query.shape[0], query.shape[2], key.shape[2]
    else:
        batch, longest, longest_key = cu_seqlens.shape[0] - 1, max_seqlen, max_seqlen
    sizes = {
        "heads": heads,
        "group": heads // max(1, kv_heads),
        "queries": longest,
        "tokens": longest_key,
        "prefix_length": prefix_key.shape[2],
    }
    return Call(batch, longest, longest_key, extras, scale, sizes)


def empty_token_major(like: Tensor, heads: int) -> Tensor:
    """An empty [N, heads, D], or [B, heads, T, D] whose [B, T, heads, D] view is contiguous."""
    if like.dim() == 3:
        return like.new_empty(like.shape[0], heads, like.shape[2])
    batch, _, tokens, head_dim = like.shape
    # One call: a transposed new_empty costs the processor twice the time.
    row = max(1, heads) * head_dim
    return like.new_empty_strided(
        (batch, heads, tokens, head_dim), (max(1, tokens) * row, head_dim, row, 1)
    )


def empty_statistics(query: Tensor) -> Tensor:
    """An empty float32 [B, H, T], or [N, H] in the packed layout: lse, delta."""
    return torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)


def tile_grid(call: Call, rows: int, block: int, heads: int) -> tuple[int, int, int]:
    """A program per (tile of the rows of a sequence, sequence) and head."""
    return -(-rows // block) * call.batch, heads, 1
