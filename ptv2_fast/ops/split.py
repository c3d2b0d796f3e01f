"""The two-call split: prefix attention from the SDPA kernels that torch installs.

Attention over [prefix ; tokens] is the merge of two attentions by their log-sum-exps, and the flash
backward of each segment is exact when it is given the output and lse of the whole. A gate on the
prefix is an addend of its segment's lse. No dropout, no causal or windowed attention, no bank,
packed layout or bias, no gradient of lse.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ptv2_fast.ops.layout import empty_gradients, empty_lse, empty_token_major, split_joint
from ptv2_fast.ops.options import AttentionOptions
from ptv2_fast.ops.reference import MOST_EXPONENT

_aten = torch.ops.aten


class _Segment(NamedTuple):
    key: Tensor  # [B, H, S, D]
    value: Tensor  # [B, H, S, D]
    bias: Tensor | None  # additive, 0 or -inf, [B, H, T, S]


def _refuse(options: AttentionOptions, grad_lse: Tensor | None = None) -> None:
    for name in ("dropout_p", "prefix_dropout_p"):
        if getattr(options, name) > 0:
            given = getattr(options, name)
            raise ValueError(f"{name}: expected 0.0 with backend='split', got {given}")
    for name in ("context_lengths", "prefix_index", "cu_seqlens", "bias", "position_slots"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: expected None with backend='split', got a tensor")
    if options.window >= 0:
        raise ValueError(f"window: expected None with backend='split', got {options.window}")
    if grad_lse is not None:
        raise ValueError("lse: expected no gradient with backend='split', got one")


def split_serves(query: Tensor, options: AttentionOptions, grad_lse: Tensor | None = None) -> bool:
    """Whether the split can take this call."""
    try:
        _refuse(options, grad_lse)
    except ValueError:
        return False
    return query.dtype != torch.float64


def _segments(query, key, value, prefix_key, prefix_value, key_mask) -> list[_Segment | None]:
    """The prefix segment and the token segment; None for one without columns."""
    batch, heads, queries, head_dim = query.shape
    key, value = (_for_every_head(tensor, heads, 1) for tensor in (key, value))
    prefix_key, prefix_value = (
        _for_every_head(tensor, heads, 1) for tensor in (prefix_key, prefix_value)
    )
    prefix = tokens = None
    if prefix_key.shape[2]:
        shape = (batch, heads, prefix_key.shape[2], head_dim)
        prefix = _Segment(prefix_key.expand(shape), prefix_value.expand(shape), None)
    if key.shape[2]:
        bias = None
        if key_mask is not None:
            # Memory-efficient attention wants bias rows to start at multiples of 16 elements.
            padded = -(-key.shape[2] // 16) * 16
            bias = query.new_zeros(batch, padded)[:, : key.shape[2]]
            bias = bias.masked_fill_(~key_mask, float("-inf"))[:, None, None, :]
            bias = bias.expand(batch, heads, queries, key.shape[2])
            # Added to a score of NaN the bias would hide nothing.
            key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
        tokens = _Segment(key, value, bias)
    return [prefix, tokens]


def _for_every_head(tensor: Tensor, heads: int, dim: int) -> Tensor:
    """Key/value heads repeated for the query heads that share them."""
    kv_heads = tensor.shape[dim]
    return tensor if kv_heads == heads else tensor.repeat_interleave(heads // kv_heads, dim)


def _sum_over_group(gradient: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[..., H, S, D] -> [..., H_kv, S, D]."""
    heads = gradient.shape[-3]
    if heads == kv_heads:
        return gradient
    return gradient.unflatten(-3, (kv_heads, heads // kv_heads)).sum(dim=-3, dtype=dtype)


def _segment_forward(query: Tensor, segment: _Segment, scale: float) -> tuple[Tensor, Tensor]:
    key, value, bias = segment
    if query.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
        # torch gives out 0 and lse 0 to a row without a score above -inf: to one without a visible
        # column, and to one whose scores are NaN.
        doubtful = lse == 0
        if doubtful.any():
            scores = query @ key.transpose(2, 3)
            if bias is not None:
                scores = scores.masked_fill(bias == float("-inf"), 0.0)
            is_nan = doubtful & scores.isnan().any(dim=-1)
            lse = lse.masked_fill(is_nan, float("nan"))
            out = out.masked_fill(is_nan[..., None], float("nan"))
    else:
        out, lse, _, _ = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, scale=scale
        )
        lse = lse[..., : query.shape[2]]
    if bias is not None:
        visible = (bias > float("-inf")).any(dim=-1)
        lse = lse.masked_fill(~visible, float("-inf"))
        out = out.masked_fill(~visible[..., None], 0.0)
    return out, lse.to(torch.promote_types(query.dtype, torch.float32))


def _segment_backward(
    grad_out: Tensor, query: Tensor, segment: _Segment, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    key, value, bias = segment
    if query.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    # The kernel reads lse in rows that are padded to a multiple of 32.
    padding = -lse.shape[-1] % 32
    lse = torch.nn.functional.pad(lse, (0, padding), value=float("inf"))
    no_random_state = torch.zeros((), dtype=torch.int64, device=query.device)
    return _aten._scaled_dot_product_efficient_attention_backward(
        grad_out, query, key, value, bias, out, lse, no_random_state, no_random_state,
        0.0, [True, True, True, False], scale=scale,
    )[:3]  # fmt: skip


def _gate_gradient(
    grad_out: Tensor, query: Tensor, prefix: _Segment, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """[H]: how the weight of the prefix's own output moves the whole one, summed over all rows."""
    prefix_out, prefix_lse = _segment_forward(query, prefix, scale)
    weight = torch.exp((prefix_lse - lse).clamp(max=MOST_EXPONENT))
    weight = weight.masked_fill(lse == float("-inf"), 0.0)
    moved = (prefix_out.to(lse.dtype) - out.to(lse.dtype)) * grad_out.to(lse.dtype)
    return (weight * moved.sum(dim=-1)).sum(dim=(0, 2))


def split_forward(
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, S, D]
    value: Tensor,
    prefix_key: Tensor,  # [1, H_kv, P, D]
    prefix_value: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D] and lse [B, H, T] by one SDPA call per segment and a merge."""
    _refuse(options)
    out = empty_token_major(query)
    lse = empty_lse(query).fill_(float("-inf"))
    if query.numel() == 0:
        return out, lse
    merged = torch.zeros_like(query, dtype=lse.dtype)
    segments = _segments(query, key, value, prefix_key, prefix_value, options.key_mask)
    for segment, gate in zip(segments, (options.prefix_gate, None), strict=True):
        if segment is None:
            continue
        segment_out, segment_lse = _segment_forward(query, segment, options.scale)
        if gate is not None:
            segment_lse = segment_lse + gate.log()[..., None]
        total = torch.logaddexp(lse, segment_lse)
        pivot = total.masked_fill(total == float("-inf"), 0.0)
        merged = (
            merged * torch.exp(lse - pivot)[..., None]
            + segment_out * torch.exp(segment_lse - pivot)[..., None]
        )
        lse = total
    return out.copy_(merged), lse


def split_backward(
    grad_out: Tensor,  # [B, H, T, D]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,  # [B, H, T]
    grad_lse: Tensor | None,
    options: AttentionOptions,
    needs_query: bool,
    needs_key_value: bool,
    needs_prefix: bool,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, segment by segment; the batch is summed in fp32 for the prefix."""
    _refuse(options, grad_lse)
    scale = options.scale
    gradients = empty_gradients(
        query, key, prefix_key, needs_query, needs_key_value, needs_prefix, joint,
        options.prefix_gate,
    )  # fmt: skip
    for gradient in gradients:
        gradient.zero_()
    grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, grad_gate = gradients
    if joint:
        grad_query, grad_key, grad_value = split_joint(grad_query, key.shape[1])
    prefix, tokens = _segments(query, key, value, prefix_key, prefix_value, options.key_mask)
    gate, gated_lse = options.prefix_gate, lse
    if gate is not None and prefix is not None:
        if needs_prefix and query.numel():
            grad_gate.copy_(_gate_gradient(grad_out, query, prefix, out, lse, scale))
        # exp(score - gated_lse) is gate * exp(score - lse).
        gated_lse = (lse - gate.log()[..., None]).masked_fill(lse == float("-inf"), float("inf"))
    # With lse 0 a row without a visible column has probabilities exp(-inf - 0) = 0.
    gated_lse = gated_lse.masked_fill(gated_lse == float("-inf"), 0.0)
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    grad_out = grad_out.contiguous()
    query_parts = []
    if query.numel() and prefix is not None and (needs_query or needs_prefix):
        part, per_sequence_key, per_sequence_value = _segment_backward(
            grad_out, query, prefix, out, gated_lse, scale
        )
        query_parts.append(part)
        if needs_prefix:
            for total, per_sequence in (
                (grad_prefix_key, per_sequence_key),
                (grad_prefix_value, per_sequence_value),
            ):
                summed = per_sequence.sum(dim=0, dtype=lse.dtype)
                total[0].copy_(_sum_over_group(summed, key.shape[1], lse.dtype))
    if query.numel() and tokens is not None and (needs_query or needs_key_value):
        part, token_key, token_value = _segment_backward(grad_out, query, tokens, out, lse, scale)
        query_parts.append(part)
        if needs_key_value:
            grad_key.copy_(_sum_over_group(token_key, key.shape[1], lse.dtype))
            grad_value.copy_(_sum_over_group(token_value, key.shape[1], lse.dtype))
    if needs_query and query_parts:
        grad_query.copy_(torch.stack(query_parts).sum(dim=0, dtype=lse.dtype))
    return gradients
