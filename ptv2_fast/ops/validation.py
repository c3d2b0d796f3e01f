"""Argument checks of the public operator; every backend gets checked arguments only.

`validate_tensors` and `validate_options` read no value of a tensor, so that they never wait for a
device; `validate_values` does.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_HEAD_DIM = 256


class Sizes(NamedTuple):
    batch: int
    heads: int
    queries: int  # T; packed: max_seqlen, likewise tokens
    tokens: int  # S
    packed_tokens: int | None  # N; None in the padded layout
    prefix: int  # P
    bank_rows: int | None  # R; None for a prefix that the batch shares
    device: torch.device
    dtype: torch.dtype

    @property
    def packed(self) -> bool:
        return self.packed_tokens is not None


def expect(condition: bool, argument: str, expected: str, actual: object) -> None:
    """Raises a ValueError that names the argument, what was expected and what was given."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {actual}")


def _expect_shape(argument: str, tensor: Tensor, names: str, shape: Sequence[int]) -> None:
    expect(
        tuple(tensor.shape) == tuple(shape),
        argument,
        f"{names} = {list(shape)}",
        list(tensor.shape),
    )


def _expect_vector(
    argument: str, tensor: Tensor, names: str, length: int, dtype: torch.dtype, device: torch.device
) -> None:
    """An optional 1-D tensor of the call."""
    expect(
        tensor.dtype == dtype and tensor.dim() == 1 and tensor.shape[0] == length,
        argument,
        f"{dtype} {names} = [{length}]",
        f"{tensor.dtype} {list(tensor.shape)}",
    )
    expect(tensor.device == device, argument, f"query's device {device}", tensor.device)


def validate_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Sizes:
    """Checks ranks, shapes, dtypes, devices and strides of the five tensors, and the layout."""
    packed = cu_seqlens is not None
    rank = 3 if packed else 4
    layout = "[N, H, D] (packed, since cu_seqlens is given)" if packed else "[B, H, T, D]"
    tokens = {"query": query, "key": key, "value": value}
    prefixes = {"prefix_key": prefix_key, "prefix_value": prefix_value}
    for name, tensor in tokens.items():
        expect(tensor.dim() == rank, name, f"{rank} dimensions {layout}", list(tensor.shape))
    expect(
        prefix_key.dim() in (3, 4),
        "prefix_key",
        "3 dimensions [H_kv, P, D] or 4 [R, H_kv, P, D]",
        list(prefix_key.shape),
    )
    for name, tensor in (tokens | prefixes).items():
        expect(tensor.device == query.device, name, f"query's device {query.device}", tensor.device)
        expect(tensor.is_floating_point(), name, "a floating dtype", tensor.dtype)
        if name in tokens:
            expect(tensor.dtype == query.dtype, name, f"query's dtype {query.dtype}", tensor.dtype)
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[-1]
    expect(
        head_dim % 8 == 0 and 8 <= head_dim <= _MAX_HEAD_DIM,
        "query",
        f"head_dim a multiple of 8 up to {_MAX_HEAD_DIM}",
        head_dim,
    )
    divides = heads == kv_heads or (kv_heads > 0 and heads % kv_heads == 0)
    expect(divides, "key", f"a number of heads that divides query's {heads}", kv_heads)
    names = "[N, H_kv, D]" if packed else "[B, H_kv, S, D]"
    for name in ("key", "value"):
        shape = [query.shape[0], kv_heads, *key.shape[2:-1], head_dim]
        _expect_shape(name, tokens[name], names, shape)
    names = "[H_kv, P, D]" if prefix_key.dim() == 3 else "[R, H_kv, P, D]"
    for name, tensor in prefixes.items():
        shape = [*prefix_key.shape[:-3], kv_heads, prefix_key.shape[-2], head_dim]
        _expect_shape(name, tensor, names, shape)
    for name, tensor in (tokens | prefixes).items():
        expect(
            tensor.stride(-1) == 1 or tensor.numel() == 0, name, "last stride 1", tensor.stride()
        )
    if cu_seqlens is not None:
        batch, queries = _validate_packed(query, cu_seqlens, max_seqlen)
        columns = queries
    else:
        expect(max_seqlen is None, "max_seqlen", "None without cu_seqlens", max_seqlen)
        batch, queries, columns = query.shape[0], query.shape[2], key.shape[2]
    return Sizes(
        batch,
        heads,
        queries,
        columns,
        query.shape[0] if packed else None,
        prefix_key.shape[-2],
        prefix_key.shape[0] if prefix_key.dim() == 4 else None,
        query.device,
        query.dtype,
    )


def _validate_packed(query: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> tuple[int, int]:
    """Batch and T of a packed call."""
    expect(
        cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1,
        "cu_seqlens",
        "int32 [B + 1]",
        f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}",
    )
    expect(
        cu_seqlens.device == query.device,
        "cu_seqlens",
        f"query's device {query.device}",
        cu_seqlens.device,
    )
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise ValueError(f"max_seqlen: expected an integer with cu_seqlens, got {max_seqlen!r}")
    expect(max_seqlen >= 0, "max_seqlen", "an integer >= 0", max_seqlen)
    return cu_seqlens.shape[0] - 1, max_seqlen


def validate_options(
    sizes: Sizes,
    key_mask: Tensor | None,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    context_lengths: Tensor | None,
    window: int | None,
    bias: Tensor | None,
    probabilities: dict[str, float],
    seed: Tensor | None,
) -> None:
    """Checks shapes, dtypes and devices of everything beside the five tensors."""
    device = sizes.device
    if key_mask is not None:
        expect(not sizes.packed, "key_mask", "None with cu_seqlens", f"{list(key_mask.shape)}")
        expect(
            key_mask.dtype == torch.bool, "key_mask", "torch.bool, True = attend", key_mask.dtype
        )
        _expect_shape("key_mask", key_mask, "[B, S]", (sizes.batch, sizes.tokens))
        expect(key_mask.device == device, "key_mask", f"query's device {device}", key_mask.device)
    if sizes.bank_rows is None:
        for name, given in (("prefix_index", prefix_index), ("prefix_lengths", prefix_lengths)):
            expect(given is None, name, "None unless prefix_key is a bank [R, H_kv, P, D]", given)
    else:
        if prefix_index is None:
            raise ValueError("prefix_index: expected int32 [B], as prefix_key is a bank, got None")
        _expect_vector("prefix_index", prefix_index, "[B]", sizes.batch, torch.int32, device)
        if prefix_lengths is not None:
            _expect_vector(
                "prefix_lengths", prefix_lengths, "[R]", sizes.bank_rows, torch.int32, device
            )
    square = f"S = {sizes.tokens} and T = {sizes.queries}"
    if window is not None:
        expect(type(window) is int and window >= 0, "window", "None or an integer >= 0", window)
        expect(sizes.queries == sizes.tokens, "window", "None unless S = T", square)
    if context_lengths is not None:
        _expect_vector("context_lengths", context_lengths, "[B]", sizes.batch, torch.int32, device)
        expect(sizes.queries == sizes.tokens, "context_lengths", "None unless S = T", square)
    if bias is not None:
        _validate_bias(sizes, bias)
    for name, p in probabilities.items():
        expect(0.0 <= p < 1.0, name, "a probability in [0, 1)", p)
    if seed is not None:
        _expect_vector("seed", seed, "[1]", 1, torch.int64, device)


def _validate_bias(sizes: Sizes, bias: Tensor) -> None:
    dtypes = (sizes.dtype, torch.float32)
    expect(bias.dtype in dtypes, "bias", f"query's dtype {sizes.dtype} or float32", bias.dtype)
    expect(bias.dim() == 4, "bias", "4 dimensions [1 or B, H, T, S]", list(bias.shape))
    batch = 1 if bias.shape[0] == 1 else sizes.batch
    shape = (batch, sizes.heads, sizes.queries, sizes.tokens)
    _expect_shape("bias", bias, "[1 or B, H, T, S]", shape)
    expect(bias.device == sizes.device, "bias", f"query's device {sizes.device}", bias.device)
    expect(bias.stride(-1) == 1 or bias.numel() == 0, "bias", "last stride 1", bias.stride())
    expect(not bias.requires_grad, "bias", "no requires_grad, it gets no gradient", True)


def values_are_known(tensor: Tensor) -> bool:
    """False while a graph is traced, and for fake tensors."""
    return not torch.compiler.is_compiling() and type(tensor).__name__ != "FakeTensor"


def validate_values(
    sizes: Sizes,
    cu_seqlens: Tensor | None,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    context_lengths: Tensor | None,
) -> None:
    """Checks what the integer tensors hold; on a GPU this waits for the device."""
    if cu_seqlens is not None:
        starts = cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        expect(
            starts[0] == 0 and starts[-1] == sizes.packed_tokens and min(lengths, default=0) >= 0,
            "cu_seqlens",
            f"values that rise from 0 to N = {sizes.packed_tokens}",
            starts,
        )
        longest = max(lengths, default=0)
        expect(
            longest <= sizes.queries,
            "max_seqlen",
            f"at least the longest sequence {longest}",
            sizes.queries,
        )
    for name, tensor, least, most in (
        ("prefix_index", prefix_index, 0, (sizes.bank_rows or 0) - 1),
        ("prefix_lengths", prefix_lengths, 0, sizes.prefix),
        ("context_lengths", context_lengths, 0, sizes.tokens),
    ):
        if tensor is not None:
            outside = [number for number in tensor.tolist() if not least <= number <= most]
            expect(not outside, name, f"values in {least}..{most}", outside)
