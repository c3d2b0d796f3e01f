"""Argument checks of the public operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

_MAX_HEAD_DIM = 256


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


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_mask: Tensor | None,
    probabilities: dict[str, float],
    seed: Tensor | None,
) -> None:
    """Checks shapes, dtypes, devices and strides; reads no value, so it never synchronises."""
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "prefix_key": prefix_key,
        "prefix_value": prefix_value,
    }
    for name, tensor in tensors.items():
        rank = 3 if name.startswith("prefix") else 4
        layout = "[H_kv, P, D]" if rank == 3 else "[B, H, T, D]"
        expect(tensor.dim() == rank, name, f"{rank} dimensions {layout}", list(tensor.shape))
        expect(tensor.device == query.device, name, f"query's device {query.device}", tensor.device)
        expect(tensor.is_floating_point(), name, "a floating dtype", tensor.dtype)
        if rank == 4:
            expect(tensor.dtype == query.dtype, name, f"query's dtype {query.dtype}", tensor.dtype)
    batch, heads, _, head_dim = query.shape
    expect(
        head_dim % 8 == 0 and 8 <= head_dim <= _MAX_HEAD_DIM,
        "query",
        f"head_dim a multiple of 8 up to {_MAX_HEAD_DIM}",
        head_dim,
    )
    _, kv_heads, tokens, _ = key.shape
    prefix_length = prefix_key.shape[1]
    divides = heads == kv_heads or (kv_heads > 0 and heads % kv_heads == 0)
    expect(divides, "key", f"a number of heads that divides query's {heads}", kv_heads)
    _expect_shape("key", key, "[B, H_kv, S, D]", (batch, kv_heads, tokens, head_dim))
    _expect_shape("value", value, "[B, H_kv, S, D]", (batch, kv_heads, tokens, head_dim))
    for name in ("prefix_key", "prefix_value"):
        _expect_shape(name, tensors[name], "[H_kv, P, D]", (kv_heads, prefix_length, head_dim))
    for name, tensor in tensors.items():
        expect(
            tensor.stride(-1) == 1 or tensor.numel() == 0, name, "last stride 1", tensor.stride()
        )
    if key_mask is not None:
        expect(
            key_mask.dtype == torch.bool,
            "key_mask",
            "dtype torch.bool, True = attend",
            key_mask.dtype,
        )
        _expect_shape("key_mask", key_mask, "[B, S]", (batch, tokens))
        expect(
            key_mask.device == query.device,
            "key_mask",
            f"query's device {query.device}",
            key_mask.device,
        )
    for name, p in probabilities.items():
        expect(0.0 <= p < 1.0, name, "a probability in [0, 1)", p)
    if seed is not None:
        expect(
            seed.dtype == torch.int64 and tuple(seed.shape) == (1,),
            "seed",
            "an int64 tensor [1]",
            f"{seed.dtype} {list(seed.shape)}",
        )
        expect(seed.device == query.device, "seed", f"query's device {query.device}", seed.device)


def validate_visibility(
    query: Tensor, key: Tensor, context_lengths: Tensor | None, window: int | None, check: bool
) -> None:
    """Checks context_lengths and window; reads values on a CPU, elsewhere only with `check`."""
    queries, tokens = query.shape[2], key.shape[2]
    if window is not None:
        expect(type(window) is int and window >= 0, "window", "None or an integer >= 0", window)
        expect(queries == tokens, "window", "None unless S = T", f"S = {tokens} and T = {queries}")
    if context_lengths is None:
        return
    expect(
        context_lengths.dtype == torch.int32 and tuple(context_lengths.shape) == query.shape[:1],
        "context_lengths",
        f"an int32 tensor [B] = [{query.shape[0]}]",
        f"{context_lengths.dtype} {list(context_lengths.shape)}",
    )
    expect(
        context_lengths.device == query.device,
        "context_lengths",
        f"query's device {query.device}",
        context_lengths.device,
    )
    expect(
        queries == tokens, "context_lengths", "None unless S = T", f"S = {tokens} and T = {queries}"
    )
    if (check or context_lengths.device.type == "cpu") and not torch.compiler.is_compiling():
        outside = [n for n in context_lengths.tolist() if not 0 <= n <= tokens]
        expect(not outside, "context_lengths", f"values in 0..{tokens}", outside)
