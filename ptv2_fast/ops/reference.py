"""The definition of prefix attention in plain torch: the oracle of every backend.

    scores = scale * query @ [prefix_key ; key]^T + [0 ; bias]   (hidden token columns: -inf)
    out    = dropout(softmax(scores)) @ [prefix_value ; value]

Token column j is visible to row i when key_mask[j], j < context_length or j <= i, and
|i - j| <= window; each of the three may be absent. Always visible is the prefix of its sequence:
row prefix_index[b] of a bank, of which the first prefix_lengths columns are inside.
Query head h reads key/value head h // (H / H_kv). Packed sequences are what they are when padded.

Disentangled attention (He et al., "DeBERTa", ICLR 2021, section 3.1) adds to the score of row i and
token column j, before the scale, with s = position_slots[i - j]

    query[i] . position_key[s] + key[j] . position_query[s]

A prefix_gate multiplies the weights of prefix columns, exp(score), before they are divided by their
sum: softmax(scores + log(gate)), written so that a gate of 0 has a gradient too.

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
from ptv2_fast.ops.options import AttentionOptions
from ptv2_fast.ops.packing import PackedRows

# The largest exponent of a weight without its gate, which has no bound where the gate is 0.
MOST_EXPONENT = 80.0


def reference_attention(
    query: Tensor,  # [B, H, T, D]; packed: [N, H, D]
    key: Tensor,  # [B, H_kv, S, D]; packed: [N, H_kv, D]
    value: Tensor,
    prefix_key: Tensor,  # [R, H_kv, P, D]
    prefix_value: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over [prefix ; tokens], by definition.

    Returns:
        out [B, H, T, D] and lse [B, H, T], the natural logarithm of the softmax denominator, both
        float64 for float64 inputs, else float32; packed [N, H, D] and [N, H]. A row without a
        visible column has out 0 and lse -inf, one with a visible score of NaN or inf has NaN in
        both.
    """
    if options.cu_seqlens is not None:
        rows = PackedRows(options.cu_seqlens, options.max_seqlen, query.shape[0])
        out, lse = reference_attention(
            rows.pad(query),
            rows.pad(key),
            rows.pad(value),
            prefix_key,
            prefix_value,
            rows.padded_options(options),
        )
        return rows.unpad(out), rows.unpad(lse)
    query = _upcast(query)
    keys = _columns(query, key, prefix_key, options, PREFIX_KEY_STREAM)
    values = _columns(query, value, prefix_value, options, PREFIX_VALUE_STREAM)
    scores = _scores(query, keys, key.shape[2], options)
    if options.prefix_gate is not None:
        probabilities, lse = _gated_softmax(scores, _column_gates(scores, key.shape[2], options))
        multiplier = _probability_multiplier(scores, key.shape[2], options)
        return (probabilities * multiplier) @ values, lse

    # A row without a visible column: a finite pivot before the softmax keeps values and gradients
    # free of NaN; repairing NaN afterwards would leave it in the gradients.
    any_visible = (scores != float("-inf")).any(dim=-1, keepdim=True)
    safe_scores = torch.where(any_visible, scores, torch.zeros_like(scores))
    lse = torch.logsumexp(safe_scores, dim=-1) if scores.shape[-1] else scores.sum(dim=-1)
    lse = torch.where(lse == float("inf"), float("nan"), lse)  # as softmax of an infinite score
    probabilities = torch.where(any_visible, torch.softmax(safe_scores, dim=-1), 0.0)
    lse = lse.masked_fill(~any_visible[..., 0], float("-inf"))
    multiplier = _probability_multiplier(scores, key.shape[2], options)
    return (probabilities * multiplier) @ values, lse


def reference_gradients(
    grad_out: Tensor,  # [B, H, T, D]; packed: [N, H, D]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,  # [B, H, T]; packed: [N, H]
    grad_lse: Tensor | None,  # as lse
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients by the formulas every backend implements, probabilities from lse.

    Of the five tensors, and of the gate, empty(0) without one.
    """
    if options.cu_seqlens is not None:
        rows = PackedRows(options.cu_seqlens, options.max_seqlen, query.shape[0])
        of_query, of_key, of_value, of_prefix_key, of_prefix_value, of_gate = reference_gradients(
            rows.pad(grad_out),
            rows.pad(query),
            rows.pad(key),
            rows.pad(value),
            prefix_key,
            prefix_value,
            rows.pad(out),
            rows.pad(lse),
            None if grad_lse is None else rows.pad(grad_lse),
            rows.padded_options(options),
        )
        of_tokens = (rows.unpad(of_query), rows.unpad(of_key), rows.unpad(of_value))
        return *of_tokens, of_prefix_key, of_prefix_value, of_gate
    query, grad_out = _upcast(query), _upcast(grad_out)
    keys = _columns(query, key, prefix_key, options, PREFIX_KEY_STREAM)
    values = _columns(query, value, prefix_value, options, PREFIX_VALUE_STREAM)
    scores = _scores(query, keys, key.shape[2], options)
    pivot = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    exponents, gates = scores - pivot, None
    if options.prefix_gate is not None:
        exponents = torch.where(lse[..., None] == float("-inf"), lse[..., None], exponents)
        exponents = exponents.clamp(max=MOST_EXPONENT)
        gates = _column_gates(scores, key.shape[2], options)
    probabilities = torch.exp(exponents)
    multiplier = _probability_multiplier(scores, key.shape[2], options)

    delta = (_upcast(out) * grad_out).sum(dim=-1, keepdim=True)
    if grad_lse is not None:  # d lse / d scores = probabilities
        delta = delta - grad_lse[..., None]
    grad_probabilities = multiplier * (grad_out @ values.transpose(-1, -2))
    prefix_length, grad_gate = prefix_key.shape[2], query.new_empty(0)
    if gates is not None:
        of_weights = probabilities * (grad_probabilities - delta)
        per_head = of_weights[..., :prefix_length].sum(dim=(2, 3))  # [B, H]
        grad_gate = _sum_of_rows(per_head, prefix_key.shape[0], options.prefix_index)
        probabilities = probabilities * gates
    grad_scores = options.scale * probabilities * (grad_probabilities - delta)
    grad_query = grad_scores @ keys
    # Summed over the query heads that share a key/value head, [B, H_kv, P + S, D].
    group = _group(query, key)
    grad_keys = (grad_scores.transpose(-1, -2) @ query).unflatten(1, (-1, group)).sum(dim=2)
    grad_values = (probabilities * multiplier).transpose(-1, -2) @ grad_out
    grad_values = grad_values.unflatten(1, (-1, group)).sum(dim=2)
    grad_key = grad_keys[:, :, prefix_length:]
    if options.position_slots is not None:
        grad_tokens, slots = grad_scores[..., prefix_length:], _slots(key.shape[2], options)
        if options.position_key is not None:
            grad_query = grad_query + _through_table(grad_tokens, slots, options.position_key)
        if options.position_query is not None:
            by_key = grad_tokens.transpose(-1, -2)
            grad_key = grad_key + _through_table(by_key, slots.T, options.position_query)

    def prefix_gradient(gradient: Tensor, stream: int) -> Tensor:
        per_sequence = gradient[:, :, :prefix_length]
        multiplier = _multiplier(per_sequence, options.prefix_dropout_p, options.seed, stream)
        return _sum_of_rows(per_sequence * multiplier, prefix_key.shape[0], options.prefix_index)

    return (
        grad_query,
        grad_key,
        grad_values[:, :, prefix_length:],
        prefix_gradient(grad_keys, PREFIX_KEY_STREAM),
        prefix_gradient(grad_values, PREFIX_VALUE_STREAM),
        grad_gate,
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
    query: Tensor, tokens: Tensor, prefix: Tensor, options: AttentionOptions, stream: int
) -> Tensor:
    """Keys or values of all columns for every query head, [B, H, P + S, D]."""
    prefix = _upcast(prefix)
    if options.prefix_index is None:
        expanded = prefix[0].expand(tokens.shape[0], *prefix.shape[1:])
    else:
        expanded = prefix[options.prefix_index.long()]
    inside = _inside_prefix(prefix.shape[2], options)
    if inside is not None:
        expanded = expanded.masked_fill(~inside[:, None, :, None], 0.0)
    expanded = expanded * _multiplier(expanded, options.prefix_dropout_p, options.seed, stream)
    columns = torch.cat((expanded, _upcast(tokens)), dim=2)
    return columns.repeat_interleave(_group(query, tokens), dim=1)


def _inside_prefix(prefix_length: int, options: AttentionOptions) -> Tensor | None:
    """Which prefix columns each sequence has, bool [B, P]; None = all."""
    if options.prefix_lengths is None or options.prefix_index is None:
        return None
    lengths = options.prefix_lengths[options.prefix_index.long()]
    return torch.arange(prefix_length, device=lengths.device) < lengths[:, None]


def _sum_of_rows(per_sequence: Tensor, bank_rows: int, prefix_index: Tensor | None) -> Tensor:
    """[B, ...] -> [R, ...]: the sum over the sequences of each row of the bank."""
    if prefix_index is None:
        return per_sequence.sum(dim=0, keepdim=True)
    rows = torch.arange(bank_rows, device=per_sequence.device)[:, None]
    reads = (rows == prefix_index).to(per_sequence.dtype)  # [R, B]; a product, not atomics
    return (reads @ per_sequence.flatten(1)).unflatten(1, per_sequence.shape[1:])


def visible_tokens(
    queries: int, tokens: int, options: AttentionOptions, device: torch.device
) -> Tensor | None:
    """Which token columns are visible to each row, bool, broadcasts to [B, H, T, S]; None = all."""
    rows = torch.arange(queries, device=device)[:, None]
    columns = torch.arange(tokens, device=device)
    conditions = []
    if options.key_mask is not None:
        conditions.append(options.key_mask[:, None, None, :])
    if options.context_lengths is not None:
        context = options.context_lengths[:, None, None, None]
        conditions.append((columns < context) | (columns <= rows))
    if options.window >= 0:
        conditions.append((rows - columns).abs() <= options.window)
    return functools.reduce(torch.logical_and, conditions) if conditions else None


def _scores(query: Tensor, keys: Tensor, tokens: int, options: AttentionOptions) -> Tensor:
    scores = query @ keys.transpose(-1, -2)  # [B, H, T, P + S]
    prefix_length = scores.shape[-1] - tokens
    if options.position_slots is not None:
        of_tokens = _position_scores(query, keys[:, :, prefix_length:], options)
        scores = scores + torch.nn.functional.pad(of_tokens, (prefix_length, 0))
    scores = options.scale * scores
    if options.bias is not None:
        scores = scores + torch.nn.functional.pad(options.bias.to(scores.dtype), (prefix_length, 0))
    visible = visible_tokens(query.shape[2], tokens, options, query.device)
    inside = _inside_prefix(prefix_length, options)
    if visible is not None:
        visible = torch.nn.functional.pad(visible, (prefix_length, 0), value=True)
        scores = scores.masked_fill(~visible, float("-inf"))
    if inside is not None:
        inside = torch.nn.functional.pad(inside, (0, tokens), value=True)
        scores = scores.masked_fill(~inside[:, None, None], float("-inf"))
    return scores


def _column_gates(scores: Tensor, tokens: int, options: AttentionOptions) -> Tensor:
    """By what the weight of each column is multiplied, [1|B, H, 1, P + S]."""
    assert options.prefix_gate is not None
    gates = options.prefix_gate.to(scores.dtype)
    if options.prefix_index is not None:
        gates = gates[options.prefix_index.long()]
    gates = gates[:, :, None, None].expand(-1, -1, 1, scores.shape[-1] - tokens)
    return torch.nn.functional.pad(gates, (0, tokens), value=1.0)


def _gated_softmax(scores: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and lse of scores [B, H, T, P + S] whose weights are multiplied by gates."""
    counted = (scores != float("-inf")) & (gates > 0)
    any_counted = counted.any(dim=-1, keepdim=True)
    offset = scores.detach() + gates.detach().log()
    offset = offset.masked_fill(~counted, float("-inf"))
    # One column of 0 stands for rows without any.
    pivot = torch.cat((offset, torch.where(any_counted, float("-inf"), 0.0)), dim=-1)
    pivot = pivot.amax(dim=-1, keepdim=True)
    weights = torch.exp((scores - pivot).clamp(max=MOST_EXPONENT)) * gates
    weights = torch.where(any_counted, weights, 0.0)
    total = torch.where(any_counted, weights.sum(dim=-1, keepdim=True), 1.0)
    lse = (pivot + total.log())[..., 0].masked_fill(~any_counted[..., 0], float("-inf"))
    return weights / total, lse


def _slots(tokens: int, options: AttentionOptions) -> Tensor:
    """The slot of row i and column j, int64 [T, T]."""
    assert options.position_slots is not None
    positions = torch.arange(tokens, device=options.position_slots.device)
    distances = positions[:, None] - positions
    return options.position_slots.long()[distances + (len(options.position_slots) - 1) // 2]


def _position_scores(query: Tensor, key: Tensor, options: AttentionOptions) -> Tensor:
    """What the distance of two tokens adds to their unscaled scores, [B, H, T, T]."""
    shape = (*query.shape[:-1], key.shape[2])
    slots, scores = _slots(key.shape[2], options), query.new_zeros(shape)
    if options.position_key is not None:
        of_queries = query @ options.position_key.to(query.dtype).transpose(-1, -2)
        scores = scores + of_queries.gather(-1, slots.expand(shape))
    if options.position_query is not None:
        of_keys = key @ options.position_query.to(query.dtype).transpose(-1, -2)
        scores = scores + of_keys.gather(-1, slots.T.expand(shape)).transpose(-1, -2)
    return scores


def _through_table(grad_scores: Tensor, slots: Tensor, table: Tensor) -> Tensor:
    """What reaches the rows of scaled gradients [B, H, T, T] through a table, [B, H, T, D]."""
    sums = grad_scores.new_zeros(*grad_scores.shape[:-1], table.shape[1])
    sums = sums.scatter_add(-1, slots.expand(grad_scores.shape), grad_scores)
    return sums @ table.to(sums.dtype)


def _probability_multiplier(scores: Tensor, tokens: int, options: AttentionOptions) -> Tensor:
    """Dropout factors of the probabilities; prefix and token columns are numbered separately."""
    prefix_length = scores.shape[-1] - tokens
    multiplier = torch.ones_like(scores)
    multiplier[..., :prefix_length] *= _multiplier(
        scores[..., :prefix_length], options.dropout_p, options.seed, PREFIX_STREAM
    )
    multiplier[..., prefix_length:] *= _multiplier(
        scores[..., prefix_length:], options.dropout_p, options.seed, TOKEN_STREAM
    )
    return multiplier
