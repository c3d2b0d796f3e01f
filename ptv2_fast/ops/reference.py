"""The definition of prefix attention in plain torch: the oracle of every backend.

    scores = scale * query @ [prefix_key ; key]^T          (hidden token columns: -inf)
    out    = dropout(softmax(scores)) @ [prefix_value ; value]

Row i sees token column j when key_mask shows it, j < context_length or j <= i, and
|i - j| <= window; each of the three may be absent. It always sees the prefix.
Query head h reads key/value head h // (H / H_kv).

It runs in any floating dtype (float64 included), on any device, and is differentiable.
"""

import functools

import torch
from torch import Tensor

from ptv2_fast.ops.dropout import (
    PREFIX_KEY_STREAM,
    PREFIX_STREAM,
    PREFIX_VALUE_STREAM,
    TOKEN_STREAM,
    dropout_multiplier,
)


def reference_attention(
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, S, D]
    value: Tensor,  # [B, H_kv, S, D]
    prefix_key: Tensor,  # [H_kv, P, D]
    prefix_value: Tensor,  # [H_kv, P, D]
    key_mask: Tensor | None,  # bool [B, S], True = attend
    seed: Tensor | None,  # int64 [1]
    scale: float,
    dropout_p: float,
    prefix_dropout_p: float,
    context_lengths: Tensor | None = None,  # int32 [B]
    window: int = -1,  # negative = none
) -> tuple[Tensor, Tensor]:
    """Attention of every query over [prefix ; tokens], by definition.

    Returns:
        out [B, H, T, D] and lse [B, H, T], the natural logarithm of the softmax denominator, both
        float64 for float64 inputs, else float32. A row without a visible column has out 0 and lse
        -inf.
    """
    query = _upcast(query)
    group = _group(query, key)
    keys = _columns(prefix_key, key, prefix_dropout_p, seed, PREFIX_KEY_STREAM, group)
    values = _columns(prefix_value, value, prefix_dropout_p, seed, PREFIX_VALUE_STREAM, group)
    visible = visible_tokens(query, key, key_mask, context_lengths, window)
    scores = _scores(query, keys, visible, scale)

    # A row without a visible column: a finite pivot before the softmax keeps values and gradients
    # free of NaN; repairing NaN afterwards would leave it in the gradients.
    any_visible = (scores > float("-inf")).any(dim=-1, keepdim=True)
    safe_scores = torch.where(any_visible, scores, torch.zeros_like(scores))
    lse = torch.logsumexp(safe_scores, dim=-1) if scores.shape[-1] else scores.sum(dim=-1)
    probabilities = torch.where(any_visible, torch.softmax(safe_scores, dim=-1), 0.0)
    lse = lse.masked_fill(~any_visible[..., 0], float("-inf"))
    multiplier = _probability_multiplier(scores, prefix_key.shape[1], dropout_p, seed)
    return (probabilities * multiplier) @ values, lse


def reference_gradients(
    grad_out: Tensor,  # [B, H, T, D]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,  # [B, H, T, D]
    lse: Tensor,  # [B, H, T]
    key_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    prefix_dropout_p: float,
    context_lengths: Tensor | None = None,
    window: int = -1,
    grad_lse: Tensor | None = None,  # [B, H, T]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients by the formulas every backend implements, probabilities from lse."""
    query, grad_out = _upcast(query), _upcast(grad_out)
    group = _group(query, key)
    keys = _columns(prefix_key, key, prefix_dropout_p, seed, PREFIX_KEY_STREAM, group)
    values = _columns(prefix_value, value, prefix_dropout_p, seed, PREFIX_VALUE_STREAM, group)
    visible = visible_tokens(query, key, key_mask, context_lengths, window)
    scores = _scores(query, keys, visible, scale)
    pivot = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    probabilities = torch.exp(scores - pivot)
    multiplier = _probability_multiplier(scores, prefix_key.shape[1], dropout_p, seed)

    delta = (_upcast(out) * grad_out).sum(dim=-1, keepdim=True)
    if grad_lse is not None:  # d lse / d scores = probabilities
        delta = delta - grad_lse[..., None]
    grad_probabilities = multiplier * (grad_out @ values.transpose(-1, -2))
    grad_scores = scale * probabilities * (grad_probabilities - delta)
    grad_query = grad_scores @ keys
    # Summed over the query heads that share a key/value head, [B, H_kv, P + S, D].
    grad_keys = (grad_scores.transpose(-1, -2) @ query).unflatten(1, (-1, group)).sum(dim=2)
    grad_values = (probabilities * multiplier).transpose(-1, -2) @ grad_out
    grad_values = grad_values.unflatten(1, (-1, group)).sum(dim=2)

    def prefix_gradient(gradient: Tensor, stream: int) -> Tensor:
        per_sequence = gradient[:, :, : prefix_key.shape[1]]
        multiplier = _multiplier(per_sequence, prefix_dropout_p, seed, stream)
        return (per_sequence * multiplier).sum(dim=0)

    return (
        grad_query,
        grad_keys[:, :, prefix_key.shape[1] :],
        grad_values[:, :, prefix_key.shape[1] :],
        prefix_gradient(grad_keys, PREFIX_KEY_STREAM),
        prefix_gradient(grad_values, PREFIX_VALUE_STREAM),
    )


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _multiplier(like: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor | float:
    if p == 0:
        return 1.0
    assert seed is not None
    return dropout_multiplier(like.shape, p, seed, stream, like.dtype)


def _group(query: Tensor, key: Tensor) -> int:
    """How many query heads share a key/value head."""
    return query.shape[1] // key.shape[1] if key.shape[1] else 1


def _columns(
    prefix: Tensor,
    tokens: Tensor,
    prefix_dropout_p: float,
    seed: Tensor | None,
    stream: int,
    group: int,
) -> Tensor:
    """Keys or values of all columns for every query head, [B, H, P + S, D]."""
    expanded = _upcast(prefix).expand(tokens.shape[0], *prefix.shape)
    expanded = expanded * _multiplier(expanded, prefix_dropout_p, seed, stream)
    return torch.cat((expanded, _upcast(tokens)), dim=2).repeat_interleave(group, dim=1)


def visible_tokens(
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H, S, D]
    key_mask: Tensor | None,
    context_lengths: Tensor | None,
    window: int,
) -> Tensor | None:
    """Which token columns each row sees, bool, broadcasts to [B, H, T, S]; None = all."""
    rows = torch.arange(query.shape[2], device=query.device)[:, None]
    columns = torch.arange(key.shape[2], device=query.device)
    conditions = []
    if key_mask is not None:
        conditions.append(key_mask[:, None, None, :])
    if context_lengths is not None:
        conditions.append((columns < context_lengths[:, None, None, None]) | (columns <= rows))
    if window >= 0:
        conditions.append((rows - columns).abs() <= window)
    return functools.reduce(torch.logical_and, conditions) if conditions else None


def _scores(query: Tensor, keys: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    scores = scale * (query @ keys.transpose(-1, -2))  # [B, H, T, P + S]
    if visible is None:
        return scores
    prefix_length = keys.shape[2] - visible.shape[-1]
    visible = torch.nn.functional.pad(visible, (prefix_length, 0), value=True)
    return scores.masked_fill(~visible, float("-inf"))


def _probability_multiplier(
    scores: Tensor, prefix_length: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Dropout factors of the probabilities; prefix and token columns are numbered separately."""
    multiplier = torch.ones_like(scores)
    multiplier[..., :prefix_length] *= _multiplier(
        scores[..., :prefix_length], dropout_p, seed, PREFIX_STREAM
    )
    multiplier[..., prefix_length:] *= _multiplier(
        scores[..., prefix_length:], dropout_p, seed, TOKEN_STREAM
    )
    return multiplier
