"""Where a program is: the sequence and the head that it works on, and how far they reach."""

from typing import NamedTuple

import triton
import triton.language as tl


class ProgramPlace(NamedTuple):
    """One head of one sequence; a tile of its scores begins at (first_row, first_column).

    A number each. Made by keyword: Triton's cache does not see the order of the fields.
    """

    sequence: int  # in the batch
    start: int  # what strides[0] steps over: the sequence; packed, its first token
    row_count: int  # queries of the sequence
    column_count: int  # its tokens
    head: int  # of the queries
    kv_head: int  # whose keys and values that head reads
    heads: int
    kv_heads: int
    queries: int  # of the longest sequence, likewise tokens
    tokens: int
    context: int  # the context length; any number without context lengths
    seed: int  # of the dropout; any number without dropout


@triton.jit
def locate_tile(length, BLOCK: tl.constexpr):
    """(first row, sequence) of this program: tiles of one sequence are neighbours in the grid."""
    tiles = tl.cdiv(length, BLOCK)
    return tl.program_id(0) % tiles * BLOCK, tl.program_id(0) // tiles


@triton.jit
def locate(extras, sequence, head, kv_head, heads, group, queries, tokens, seed):
    """The place of a head of a sequence."""
    start, row_count, column_count = locate_sequence(extras, sequence, queries, tokens)
    return ProgramPlace(
        sequence=sequence,
        start=start,
        row_count=row_count,
        column_count=column_count,
        head=head,
        kv_head=kv_head,
        heads=heads,
        kv_heads=heads // group,
        queries=queries,
        tokens=tokens,
        context=load_context(extras, sequence),
        seed=seed,
    )


@triton.jit
def with_head(place, head):
    """The place of another query head that reads the same key/value head."""
    return ProgramPlace(
        sequence=place.sequence,
        start=place.start,
        row_count=place.row_count,
        column_count=place.column_count,
        head=head,
        kv_head=place.kv_head,
        heads=place.heads,
        kv_heads=place.kv_heads,
        queries=place.queries,
        tokens=place.tokens,
        context=place.context,
        seed=place.seed,
    )


@triton.jit
def locate_sequence(extras, sequence, queries, tokens):
    """(start, queries, tokens) of one sequence."""
    if extras.cu_seqlens_ptr is None:
        start = sequence
    else:
        start = tl.load(extras.cu_seqlens_ptr + sequence)
        queries = tl.load(extras.cu_seqlens_ptr + sequence + 1) - start
        tokens = queries
    return start, queries, tokens


@triton.jit
def load_context(extras, sequence):
    if extras.context_lengths_ptr is None:
        return 0
    else:
        return tl.load(extras.context_lengths_ptr + sequence)


@triton.jit
def load_seed(extras):
    if extras.seed_ptr is None:
        return 0
    else:
        return tl.load(extras.seed_ptr)


@triton.jit
def locate_prefix(extras, sequence, prefix_length):
    """(row of the bank, length) of the prefix that a sequence reads."""
    if extras.prefix_index_ptr is None:
        bank_row = 0
    else:
        bank_row = tl.load(extras.prefix_index_ptr + sequence)
    return bank_row, length_of_prefix(extras, bank_row, prefix_length)


@triton.jit
def length_of_prefix(extras, bank_row, prefix_length):
    if extras.prefix_lengths_ptr is not None:
        prefix_length = tl.load(extras.prefix_lengths_ptr + bank_row)
    return prefix_length


@triton.jit
def prefix_end(length, BLOCK_PREFIX: tl.constexpr, ONE_PREFIX_TILE: tl.constexpr):
    """Where the loop over prefix tiles ends; the compiler unrolls a loop over constants."""
    if ONE_PREFIX_TILE:
        return BLOCK_PREFIX
    else:
        return length


@triton.jit
def row_pointers(ptr, extras, place, first_row, ROWS: tl.constexpr):
    """Where lse or delta of some rows lie: [B, H, T], packed [N, H]."""
    start = tl.cast(place.start, tl.int64)
    if extras.cu_seqlens_ptr is None:
        first = (start * place.heads + place.head) * place.queries + first_row
        return ptr + first + tl.arange(0, ROWS)
    else:
        first = (start + first_row) * place.heads + place.head
        return ptr + first + tl.arange(0, ROWS) * place.heads
