"""How the operator lays out what it allocates; every backend and every fake allocates alike.

Tokens come as [B, H, T, D], or packed as [N, H, D] (the sequences one behind the other).
"""

import torch
from torch import Tensor


def empty_token_major(like: Tensor) -> Tensor:
    """An empty [N, H, D], or [B, H, T, D] whose [B, T, H, D] view is contiguous, as HF's is."""
    return _empty_tokens(like, like.shape[1])


def _empty_tokens(like: Tensor, heads: int) -> Tensor:
    if like.dim() == 3:
        return like.new_empty(like.shape[0], heads, like.shape[2])
    batch, _, tokens, head_dim = like.shape
    return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def empty_lse(query: Tensor) -> Tensor:
    """An empty [B, H, T], or [N, H] in the packed layout."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape[:-1], dtype=dtype)


def empty_gradients(
    query: Tensor,
    key: Tensor,
    prefix_key: Tensor,
    needs_query: bool,
    needs_key_value: bool,
    needs_prefix: bool,
    joint: bool,
    prefix_gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The six uninitialised gradients; one that is not needed is an empty(0), as without a gate.

    `joint`: the first holds those of query, key and value, along the heads; the next two are
    empty(0).
    """

    def token_gradient(like: Tensor, needed: bool) -> Tensor:
        return empty_token_major(like) if needed and not joint else like.new_empty(0)

    def prefix_gradient() -> Tensor:
        return prefix_key.new_empty(prefix_key.shape if needs_prefix else 0)

    gate_dtype = torch.promote_types(query.dtype, torch.float32)
    gate_shape = prefix_gate.shape if needs_prefix and prefix_gate is not None else 0
    together = query.shape[1] + 2 * key.shape[1]
    return (
        _empty_tokens(query, together) if joint else token_gradient(query, needs_query),
        token_gradient(key, needs_key_value),
        token_gradient(key, needs_key_value),
        prefix_gradient(),
        prefix_gradient(),
        query.new_empty(gate_shape, dtype=gate_dtype),
    )


def split_joint(joint: Tensor, key_value_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The views of a joint gradient that belong to query, key and value."""
    heads = joint.shape[1] - 2 * key_value_heads
    query, key, value = joint.split((heads, key_value_heads, key_value_heads), dim=1)
    return query, key, value


def widened(tensor: Tensor) -> Tensor:
    """In fp32, or as it is in float64: the dtype that results are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
