"""Argument checks of the public operator; every backend gets checked arguments only.

`validate_tensors` and `validate_options` read no value of a tensor, so that they never wait for a
device; `validate_values` does.
"""

import itertools
import numbers
import sys
from typing import Any, NamedTuple

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


def argument_error(argument: str, expected: str, actual: object) -> ValueError:
    """Names the argument, what was expected and what was given."""
    return ValueError(f"{argument}: expected {expected}, got {actual}")


def described(value: object) -> str:
    """A value that somebody gave, in a few words: of what may be long only its type."""
    if value is None or isinstance(value, (bool, float, str)):
        return f"{value!r:.50}"
    if isinstance(value, int) and abs(value) < 2**100:  # Python writes no number of 5,000 digits
        return repr(value)
    return type(value).__name__


def check_is_tensor(argument: str, given: object, expected: str = "a tensor") -> None:
    """Raises a ValueError for anything but a dense tensor."""
    if not isinstance(given, Tensor):
        raise argument_error(argument, expected, type(given).__name__)
    if given.is_nested or given.layout != torch.strided:
        actual = "a nested one" if given.is_nested else given.layout
        raise argument_error(argument, f"{expected} of layout torch.strided", actual)


# The checks stand as `if` and not behind a function: messages must cost nothing while all is well.


def _check_shape(argument: str, tensor: Tensor, names: str, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise argument_error(argument, f"{names} = {list(shape)}", list(tensor.shape))


def _check_device(argument: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise argument_error(argument, f"query's device {device}", tensor.device)


def _check_vector(
    argument: str, tensor: Tensor, names: str, length: int, dtype: torch.dtype, device: torch.device
) -> None:
    """An optional 1-D tensor of the call."""
    if tensor.dtype != dtype or tensor.dim() != 1 or tensor.shape[0] != length:
        actual = f"{tensor.dtype} {list(tensor.shape)}"
        raise argument_error(argument, f"{dtype} {names} = [{length}]", actual)
    _check_device(argument, tensor, device)


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
    for name, given in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("prefix_key", prefix_key),
        ("prefix_value", prefix_value),
        ("cu_seqlens", cu_seqlens),
    ):
        if given is not None or name != "cu_seqlens":
            check_is_tensor(name, given)
    device, dtype, rank = query.device, query.dtype, 4 if cu_seqlens is None else 3
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != rank:
            layout = "[B, H, T, D]" if rank == 4 else "[N, H, D] (packed, as cu_seqlens is given)"
            raise argument_error(name, f"{rank} dimensions {layout}", list(tensor.shape))
        if tensor.dtype != dtype or not tensor.is_floating_point():
            raise argument_error(name, f"a floating dtype, that of query {dtype}", tensor.dtype)
        _check_operand(name, tensor, device)
    if prefix_key.dim() not in (3, 4):
        expected = "3 dimensions [H_kv, P, D] or 4 [R, H_kv, P, D]"
        raise argument_error("prefix_key", expected, list(prefix_key.shape))
    for name, tensor in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        if not tensor.is_floating_point():
            raise argument_error(name, "a floating dtype", tensor.dtype)
        _check_operand(name, tensor, device)
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= _MAX_HEAD_DIM:
        expected = f"head_dim a multiple of 8 up to {_MAX_HEAD_DIM}"
        raise argument_error("query", expected, head_dim)
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise argument_error("key", f"a number of heads that divides query's {heads}", kv_heads)
    shape = (query.shape[0], kv_heads, *key.shape[2:-1], head_dim)
    names = "[B, H_kv, S, D]" if rank == 4 else "[N, H_kv, D]"
    _check_shape("key", key, names, shape)
    _check_shape("value", value, names, shape)
    shape = (*prefix_key.shape[:-3], kv_heads, prefix_key.shape[-2], head_dim)
    names = "[H_kv, P, D]" if prefix_key.dim() == 3 else "[R, H_kv, P, D]"
    _check_shape("prefix_key", prefix_key, names, shape)
    _check_shape("prefix_value", prefix_value, names, shape)
    if cu_seqlens is not None:
        batch, queries = _validate_packed(query, cu_seqlens, max_seqlen)
        columns = queries
    else:
        if max_seqlen is not None:
            raise argument_error("max_seqlen", "None without cu_seqlens", described(max_seqlen))
        batch, queries, columns = query.shape[0], query.shape[2], key.shape[2]
    return Sizes(
        batch,
        heads,
        queries,
        columns,
        None if cu_seqlens is None else query.shape[0],
        prefix_key.shape[-2],
        prefix_key.shape[0] if prefix_key.dim() == 4 else None,
        device,
        dtype,
    )


def _check_operand(name: str, tensor: Tensor, device: torch.device) -> None:
    _check_device(name, tensor, device)
    if tensor.dim() > 0 and tensor.stride(-1) != 1 and tensor.numel() > 0:
        raise argument_error(name, "last stride 1", tensor.stride())


def _validate_packed(query: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> tuple[int, int]:
    """Batch and T of a packed call."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        actual = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise argument_error("cu_seqlens", "torch.int32 [B + 1]", actual)
    _check_device("cu_seqlens", cu_seqlens, query.device)
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise argument_error("max_seqlen", "an integer with cu_seqlens", described(max_seqlen))
    if max_seqlen < 0 or max_seqlen >= 2**31:
        raise argument_error("max_seqlen", "an integer in 0..2**31-1", described(max_seqlen))
    return cu_seqlens.shape[0] - 1, max_seqlen


def validate_options(
    sizes: Sizes,
    key_mask: Tensor | None,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    context_lengths: Tensor | None,
    window: int | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
    prefix_dropout_p: float,
    prefix_gate: Tensor | None,
    seed: Tensor | None,
) -> None:
    """Checks types, shapes, dtypes and devices of everything beside the five tensors."""
    for name, given in (
        ("key_mask", key_mask),
        ("prefix_index", prefix_index),
        ("prefix_lengths", prefix_lengths),
        ("context_lengths", context_lengths),
        ("bias", bias),
        ("prefix_gate", prefix_gate),
        ("seed", seed),
    ):
        if given is not None:
            check_is_tensor(name, given, "None or a tensor")
    if scale is not None and not (_is_number(scale) and abs(scale) <= sys.float_info.max):
        raise argument_error("scale", "None or a finite number", described(scale))
    if key_mask is not None:
        if sizes.packed_tokens is not None:
            raise argument_error("key_mask", "None with cu_seqlens", list(key_mask.shape))
        if key_mask.dtype != torch.bool:
            raise argument_error("key_mask", "torch.bool, True = attend", key_mask.dtype)
        _check_shape("key_mask", key_mask, "[B, S]", (sizes.batch, sizes.tokens))
        _check_device("key_mask", key_mask, sizes.device)
    _validate_bank(sizes, prefix_index, prefix_lengths)
    if window is not None:
        if type(window) is not int or window < 0:
            raise argument_error("window", "None or an integer >= 0", described(window))
        _check_square("window", sizes)
    if context_lengths is not None:
        _check_vector(
            "context_lengths", context_lengths, "[B]", sizes.batch, torch.int32, sizes.device
        )
        _check_square("context_lengths", sizes)
    if bias is not None:
        _validate_bias(sizes, bias)
    for name, p in (("dropout_p", dropout_p), ("prefix_dropout_p", prefix_dropout_p)):
        if not (_is_number(p) and 0.0 <= p < 1.0):
            raise argument_error(name, "a probability in [0, 1)", described(p))
    if prefix_gate is not None:
        if not prefix_gate.is_floating_point():
            raise argument_error("prefix_gate", "a floating dtype", prefix_gate.dtype)
        shared = sizes.bank_rows is None
        shape = (sizes.heads,) if shared else (sizes.bank_rows or 0, sizes.heads)
        _check_shape("prefix_gate", prefix_gate, "[H]" if shared else "[R, H]", shape)
        _check_device("prefix_gate", prefix_gate, sizes.device)
    if seed is not None:
        _check_vector("seed", seed, "[1]", 1, torch.int64, sizes.device)


def _is_number(value: Any) -> bool:
    kinds = (numbers.Real, torch.SymInt, torch.SymFloat)
    return isinstance(value, kinds) and not isinstance(value, bool)


def _validate_bank(
    sizes: Sizes, prefix_index: Tensor | None, prefix_lengths: Tensor | None
) -> None:
    if sizes.bank_rows is None:
        for name, given in (("prefix_index", prefix_index), ("prefix_lengths", prefix_lengths)):
            if given is not None:
                raise argument_error(
                    name, "None unless prefix_key is [R, H_kv, P, D]", described(given)
                )
        return
    if prefix_index is None:
        raise argument_error("prefix_index", "torch.int32 [B], as prefix_key is a bank", None)
    _check_vector("prefix_index", prefix_index, "[B]", sizes.batch, torch.int32, sizes.device)
    if prefix_lengths is not None:
        _check_vector(
            "prefix_lengths", prefix_lengths, "[R]", sizes.bank_rows, torch.int32, sizes.device
        )


def _check_square(argument: str, sizes: Sizes) -> None:
    if sizes.queries != sizes.tokens:
        actual = f"S = {sizes.tokens} and T = {sizes.queries}"
        raise argument_error(argument, "None unless S = T", actual)


def _validate_bias(sizes: Sizes, bias: Tensor) -> None:
    if bias.dtype not in (sizes.dtype, torch.float32):
        raise argument_error("bias", f"query's dtype {sizes.dtype} or float32", bias.dtype)
    if bias.dim() != 4:
        raise argument_error("bias", "4 dimensions [1 or B, H, T, S]", list(bias.shape))
    batch = 1 if bias.shape[0] == 1 else sizes.batch
    shape = (batch, sizes.heads, sizes.queries, sizes.tokens)
    _check_shape("bias", bias, "[1 or B, H, T, S]", shape)
    _check_operand("bias", bias, sizes.device)
    if bias.requires_grad:
        raise argument_error("bias", "no requires_grad, as it gets no gradient", True)


def validate_positions(
    sizes: Sizes,
    key: Tensor,
    position_key: Tensor | None,
    position_query: Tensor | None,
    position_slots: Tensor,
) -> int:
    """Checks the tables of disentangled attention, of which one may be None; how many slots."""
    tables = (("position_key", position_key), ("position_query", position_query))
    if position_key is None and position_query is None:
        raise argument_error("position_key, position_query", "at least one tensor", "None twice")
    if key.shape[1] != sizes.heads:
        raise argument_error("key", f"query's {sizes.heads} heads", key.shape[1])
    slots = 0
    for name, table in tables:
        if table is None:
            continue
        check_is_tensor(name, table, "None or a tensor")
        if table.dtype != sizes.dtype:
            raise argument_error(name, f"query's dtype {sizes.dtype}", table.dtype)
        if table.dim() != 3 or table.shape[1] == 0:
            raise argument_error(name, "3 dimensions [H, slots >= 1, D]", list(table.shape))
        slots = slots or table.shape[1]
        _check_shape(name, table, "[H, slots, D]", (sizes.heads, slots, key.shape[-1]))
        _check_operand(name, table, sizes.device)
        if table.requires_grad:
            raise argument_error(name, "no requires_grad, as it gets no gradient", True)
    _check_square("position_slots", sizes)
    check_is_tensor("position_slots", position_slots)
    least = max(1, 2 * sizes.tokens - 1)
    length = position_slots.shape[0] if position_slots.dim() == 1 else 0
    if position_slots.dtype != torch.int32 or length % 2 == 0 or length < least:
        expected = f"torch.int32 [2 M - 1] of odd length, at least {least}"
        actual = f"{position_slots.dtype} {list(position_slots.shape)}"
        raise argument_error("position_slots", expected, actual)
    _check_operand("position_slots", position_slots, sizes.device)
    return slots


def values_are_known(tensor: Tensor) -> bool:
    """False while a graph is traced, and for fake tensors."""
    return not torch.compiler.is_compiling() and type(tensor).__name__ != "FakeTensor"


def validate_values(
    sizes: Sizes,
    cu_seqlens: Tensor | None,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    context_lengths: Tensor | None,
    prefix_gate: Tensor | None,
    position_slots: Tensor | None = None,
    slot_count: int = 0,
) -> None:
    """Checks what the integer tensors and the gate hold; on a GPU this waits for the device."""
    if cu_seqlens is not None:
        starts = cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        if starts[0] != 0 or starts[-1] != sizes.packed_tokens or min(lengths, default=0) < 0:
            expected = f"values that rise from 0 to N = {sizes.packed_tokens}"
            raise argument_error("cu_seqlens", expected, starts)
        longest = max(lengths, default=0)
        if longest > sizes.queries:
            expected = f"at least the longest sequence {longest}"
            raise argument_error("max_seqlen", expected, sizes.queries)
    for name, tensor, most in (
        ("prefix_index", prefix_index, (sizes.bank_rows or 0) - 1),
        ("prefix_lengths", prefix_lengths, sizes.prefix),
        ("context_lengths", context_lengths, sizes.tokens),
        ("position_slots", position_slots, slot_count - 1),
    ):
        if tensor is not None:
            outside = [number for number in tensor.tolist() if not 0 <= number <= most]
            if outside:
                raise argument_error(name, f"values in 0..{most}", outside)
    if prefix_gate is not None:
        outside = [x for x in prefix_gate.flatten().tolist() if not 0 <= x <= sys.float_info.max]
        if outside:
            raise argument_error("prefix_gate", "finite numbers >= 0", outside)
