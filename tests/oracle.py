"""What a backend is held against: float64 reference, plain torch in the same dtype, magnitudes."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.ops import dropout
from ptv2_fast.ops.attention import attend, prefix_attention_with_lse
from ptv2_fast.ops.reference import reference_attention
from tests.closeness import rounding_unit
from tests.inputs import Inputs


class Results(NamedTuple):
    out: Tensor
    lse: Tensor  # 0 instead of -inf
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor
    grad_prefix_key: Tensor
    grad_prefix_value: Tensor
    grad_prefix_gate: Tensor  # empty without one


def _in_padded_layout(function):
    """Packed inputs are what they are when padded: computed so, and packed again."""

    @functools.wraps(function)
    def wrapper(inputs: Inputs, *rest) -> Results:
        if inputs.padded is None:
            return function(inputs, *rest)
        results = function(inputs.padded, *rest)
        return Results(*map(inputs.pack_rows, results[:-3]), *results[-3:])

    return wrapper


def _with_gradients(function, inputs: Inputs, dtype: torch.dtype) -> Results:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs.tensors]
    wide = torch.promote_types(dtype, torch.float32)
    if inputs.prefix_gate is not None:
        leaves.append(inputs.prefix_gate.detach().to(wide).requires_grad_())
    out, lse = function(*leaves)
    outputs, gradients = [out], [inputs.grad_out.to(out.dtype)]
    if inputs.grad_lse is not None:
        outputs, gradients = [out, lse], [*gradients, inputs.grad_lse.to(lse.dtype)]
    gradients = torch.autograd.grad(outputs, leaves, gradients, materialize_grads=True)
    if inputs.prefix_gate is None:
        gradients = (*gradients, out.new_empty(0, dtype=wide))
    # As every backend returns it.
    lse = lse.detach().masked_fill(lse.isinf(), 0.0).to(wide)
    return Results(out.detach(), lse, *gradients)


def _column_multipliers(inputs: Inputs, p: float, dtype: torch.dtype) -> Tensor | float:
    """Dropout factors of the probabilities, [B, H, T, P + S]."""
    if p == 0:
        return 1.0
    batch, heads, queries, _ = inputs.query.shape
    return torch.cat(
        [
            dropout.dropout_multiplier((batch, heads, queries, n), p, inputs.seed, stream, dtype)
            for n, stream in (
                (inputs.prefix_key.shape[-2], dropout.PREFIX_STREAM),
                (inputs.key.shape[2], dropout.TOKEN_STREAM),
            )
        ],
        dim=-1,
    )


def _expanded_prefix(inputs: Inputs, prefix: Tensor, stream: int, p: float) -> Tensor:
    """The prefix of each sequence, [B, H_kv, P, D]."""
    batch = inputs.query.shape[0]
    if inputs.prefix_index is None:
        expanded = prefix.expand(batch, *prefix.shape)
    else:
        picked = [prefix[row] for row in inputs.prefix_index.tolist()]
        expanded = torch.stack(picked) if picked else prefix[:0]
    if p == 0:
        return expanded
    return expanded * dropout.dropout_multiplier(
        tuple(expanded.shape), p, inputs.seed, stream, prefix.dtype
    )


def _all_columns(inputs: Inputs, tensors, prefix_p: float) -> tuple[Tensor, Tensor]:
    """Keys and values of every query head, prefix expanded and concatenated, [B, H, P + S, D]."""
    _, key, value, prefix_key, prefix_value = tensors
    prefix_key = _expanded_prefix(inputs, prefix_key, dropout.PREFIX_KEY_STREAM, prefix_p)
    prefix_value = _expanded_prefix(inputs, prefix_value, dropout.PREFIX_VALUE_STREAM, prefix_p)
    group = _group(inputs)
    keys, values = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
    return keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)


def _group(inputs: Inputs) -> int:
    """Query heads to a key/value head."""
    return inputs.query.shape[1] // inputs.key.shape[1]


def _scores(inputs: Inputs, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with hidden columns at the least finite value, and which columns are visible."""
    scores = query @ keys.transpose(-1, -2)
    prefix_length = inputs.prefix_key.shape[-2]
    if inputs.positions is not None:
        of_tokens = scores[..., prefix_length:] + _by_distance(
            inputs, query, keys[:, :, prefix_length:]
        )
        scores = torch.cat((scores[..., :prefix_length], of_tokens), -1)
    scores = scores * inputs.scale
    if inputs.bias is not None:
        bias = _finite_bias(inputs).to(scores.dtype)
        scores = torch.cat((scores[..., :prefix_length], scores[..., prefix_length:] + bias), -1)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if inputs.bias is not None:
        visible[..., prefix_length:] &= inputs.bias > float("-inf")
    if inputs.key_mask is not None:
        visible[..., prefix_length:] &= inputs.key_mask[:, None, None, :]
    if inputs.prefix_index is not None:
        lengths = inputs.prefix_lengths[inputs.prefix_index.long()]
        column = torch.arange(prefix_length, device=scores.device)
        visible[..., :prefix_length] &= (column < lengths[:, None])[:, None, None]
    row = torch.arange(scores.shape[2], device=scores.device)[:, None]
    column = torch.arange(scores.shape[3] - prefix_length, device=scores.device)
    if inputs.context_lengths is not None:
        end = inputs.context_lengths[:, None, None].maximum(row + 1)  # [B, T, 1]
        visible[..., prefix_length:] &= (column < end)[:, None]
    if inputs.window is not None:
        visible[..., prefix_length:] &= column >= row - inputs.window
        visible[..., prefix_length:] &= column <= row + inputs.window
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min), visible


def _slots(inputs: Inputs) -> Tensor:
    """[T, T]"""
    positions = torch.arange(inputs.key.shape[2], device=inputs.key.device)
    distances = positions[:, None] - positions
    return inputs.position_slots.long()[distances + len(inputs.position_slots) // 2]


def _by_distance(inputs: Inputs, query: Tensor, key: Tensor, absolute: bool = False) -> Tensor:
    """The position terms of the scores of tokens, unscaled."""
    slots, total = _slots(inputs), 0.0
    for table, rows, of_columns in (
        (inputs.position_key, query, False),
        (inputs.position_query, key, True),
    ):
        if table is not None:
            table = table.to(rows.dtype)
            products = rows @ (table.abs() if absolute else table).transpose(-1, -2)
            index = slots.T if of_columns else slots
            term = torch.take_along_dim(products, index[None, None], dim=-1)
            total = total + (term.transpose(-1, -2) if of_columns else term)
    return total


def _finite_bias(inputs: Inputs) -> Tensor:
    """0 for the columns that the bias hides."""
    return inputs.bias.masked_fill(inputs.bias.isinf(), 0.0)


def _gates(inputs: Inputs, gate: Tensor) -> Tensor:
    """By what the weight of each column is multiplied, [1|B, H, 1, P + S]."""
    if inputs.prefix_index is not None:
        gate = gate[inputs.prefix_index.long()]
    of_prefix = gate.reshape(-1, gate.shape[-1], 1, 1).expand(
        -1, -1, 1, inputs.prefix_key.shape[-2]
    )
    return F.pad(of_prefix, (0, inputs.key.shape[2]), value=1.0)


def _gated_weights(
    inputs: Inputs, query: Tensor, keys: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """exp(scores - pivot) times the gates, hidden columns 0, and the pivot [B, H, T, 1]."""
    scores, visible = _scores(inputs, query, keys)
    scores, gates = scores.to(gate.dtype), _gates(inputs, gate)
    counted = visible & (gates > 0)
    offset = (scores + gates.log()).masked_fill(~counted, torch.finfo(scores.dtype).min).detach()
    pivot = F.pad(offset, (0, 1), value=-1e4).amax(dim=-1, keepdim=True)
    any_counted = counted.any(dim=-1, keepdim=True)
    weights = torch.exp(scores.masked_fill(~(visible & any_counted), float("-inf")) - pivot)
    return weights * gates, pivot


def _lse(inputs: Inputs, query: Tensor, keys: Tensor, gate: Tensor | None = None) -> Tensor:
    """[B, H, T]; 0 for a row without a visible column."""
    if gate is not None:
        weights, pivot = _gated_weights(inputs, query, keys, gate)
        total = weights.sum(dim=-1)
        lse = pivot[..., 0] + total.masked_fill(total == 0, 1.0).log()
        return lse.masked_fill(total == 0, 0.0)
    scores, visible = _scores(inputs, query, keys)
    if not scores.shape[-1]:
        return scores.sum(dim=-1)
    return scores.logsumexp(dim=-1).masked_fill(~visible.any(dim=-1), 0.0)


def _probabilities(
    inputs: Inputs, query: Tensor, keys: Tensor, gate: Tensor | None = None
) -> Tensor:
    if gate is not None:
        weights, _ = _gated_weights(inputs, query, keys, gate)
        total = weights.sum(dim=-1, keepdim=True)
        return (weights / total.masked_fill(total == 0, 1.0)).to(query.dtype)
    scores, visible = _scores(inputs, query, keys)
    return scores.softmax(dim=-1) * visible


@_in_padded_layout
def concatenate_and_expand(inputs: Inputs, p: float, prefix_p: float) -> Results:
    """What PEFT and the original compute, in the dtype of the inputs (eager attention)."""

    def attention(*tensors: Tensor) -> Tensor:
        keys, values = _all_columns(inputs, tensors[:5], prefix_p)
        scored = (inputs, tensors[0], keys, *tensors[5:])
        probabilities = _probabilities(*scored)
        out = probabilities * _column_multipliers(inputs, p, probabilities.dtype) @ values
        return out, _lse(*scored)

    return _with_gradients(attention, inputs, inputs.query.dtype)


def concatenate_and_sdpa(inputs: Inputs) -> Results:
    """Torch's own fused attention over concatenated columns: the yardstick of what is built on it.

    On CPU its exponential is good to 20 bits only, and so are results that are merged by its lse.
    """
    batch, prefix_length = inputs.query.shape[0], inputs.prefix_key.shape[-2]
    visible = None
    if inputs.key_mask is not None:
        ones = inputs.key_mask.new_ones(batch, prefix_length)
        visible = torch.cat((ones, inputs.key_mask), dim=1)[:, None, None]
    if inputs.prefix_gate is not None:
        offset = _gates(inputs, inputs.prefix_gate).log()
        visible = offset if visible is None else offset.masked_fill(~visible, float("-inf"))
        visible = visible.to(inputs.query.dtype)

    def attention(*tensors: Tensor) -> Tensor:
        keys, values = _all_columns(inputs, tensors[:5], 0.0)
        out = F.scaled_dot_product_attention(tensors[0], keys, values, visible)
        return out, _lse(inputs, tensors[0], keys, *tensors[5:])

    results = _with_gradients(attention, inputs, inputs.query.dtype)
    # Its mask has no gradient.
    of_gate = concatenate_and_expand(inputs, 0.0, 0.0).grad_prefix_gate
    return results._replace(grad_prefix_gate=of_gate)


@_in_padded_layout
def oracle(inputs: Inputs, p: float, prefix_p: float) -> Results:
    """The reference in float64 on the same quantised inputs."""

    def attention(*tensors: Tensor) -> Tensor:
        of_prefix, options = tensors[3:], inputs.raw_options(p, prefix_p)
        if inputs.prefix_index is None:
            of_prefix = [each[None] for each in of_prefix]
        prefix_key, prefix_value, *gate = of_prefix
        if gate:
            options = options._replace(prefix_gate=gate[0])
        return reference_attention(*tensors[:3], prefix_key, prefix_value, options)

    return _with_gradients(attention, inputs, torch.float64)


@_in_padded_layout
def magnitudes(inputs: Inputs, p: float, prefix_p: float) -> Results:
    """The oracle's expressions on absolute values, with plus signs: the size of their rounding.

    A backward pass recomputes probabilities as exp(scores - lse) from an fp32 lse, whose rounding
    grows with |lse|; plain torch divides by the sum instead and has no such term.
    """
    tensors = [tensor.double() for tensor in inputs.tensors]
    keys, values = _all_columns(inputs, tensors, prefix_p)
    gate = None if inputs.prefix_gate is None else inputs.prefix_gate.double()
    probabilities = _probabilities(inputs, tensors[0], keys, gate)
    multipliers = _column_multipliers(inputs, p, torch.float64)
    signed_lse = _lse(inputs, tensors[0], keys, gate)
    ungated = _ungated(inputs, tensors[0], keys, signed_lse, probabilities)
    # In rounding units of fp32, expressed in those of the inputs' dtype.
    lse_rounding = signed_lse.abs()[..., None] * torch.finfo(torch.float32).eps
    lse_rounding = lse_rounding / rounding_unit(inputs.query)
    query, keys, values, grad_out = (
        x.abs() for x in (tensors[0], keys, values, inputs.grad_out.double())
    )
    scale = inputs.scale
    out = (probabilities * multipliers) @ values
    scores = scale * (query @ keys.transpose(-1, -2))
    of_tokens = slice(inputs.prefix_key.shape[-2], None)
    if inputs.positions is not None:
        by_distance = _by_distance(inputs, query, keys[:, :, of_tokens], absolute=True)
        scores[..., of_tokens] += scale * by_distance
    if inputs.bias is not None:
        scores[..., of_tokens] += _finite_bias(inputs).double().abs()
    if gate is not None:
        scores += _gates(inputs, gate).log().abs().nan_to_num(posinf=0.0)
    lse = (probabilities * scores).sum(dim=-1) + signed_lse.abs()
    probabilities = probabilities * (1 + lse_rounding)
    delta = (out * grad_out).sum(dim=-1, keepdim=True)
    if inputs.grad_lse is not None:
        delta = delta + inputs.grad_lse.double().abs()[..., None]
    grad_probabilities = multipliers * (grad_out @ values.transpose(-1, -2))
    grad_scores = probabilities * (grad_probabilities + delta)
    # In fp32; but delta comes of out as it was stored, and lse_rounding is in units of the dtype.
    unit = rounding_unit(inputs.query) / torch.finfo(torch.float32).eps
    grad_gate = ungated * (1 + unit * lse_rounding) * (grad_probabilities + unit * delta)
    grad_gate = grad_gate[..., : of_tokens.start].sum(dim=(2, 3))
    grad_query = scale * grad_scores @ keys
    grad_keys = scale * grad_scores.transpose(-1, -2) @ query
    if inputs.position_slots is not None:
        # One column at a time: the sum over distances, with plus signs.
        grad_tokens, slots = scale * grad_scores[..., of_tokens], _slots(inputs)
        for row in range(slots.shape[0]):
            if inputs.position_key is not None:
                table = inputs.position_key.double().abs()[:, slots[row]]  # [H, T, D]
                grad_query[:, :, row] += (grad_tokens[:, :, row, None] @ table)[:, :, 0]
            if inputs.position_query is not None:
                table = inputs.position_query.double().abs()[:, slots[:, row]]
                by_row = grad_tokens[..., row][:, :, None] @ table
                grad_keys[:, :, of_tokens.start + row] += by_row[:, :, 0]
    grad_values = (probabilities * multipliers).transpose(-1, -2) @ grad_out
    grad_keys, grad_values = (
        gradient.unflatten(1, (-1, _group(inputs))).sum(dim=2)
        for gradient in (grad_keys, grad_values)
    )
    prefix_length = inputs.prefix_key.shape[-2]

    def prefix_gradient(gradient: Tensor, prefix: Tensor, stream: int) -> Tensor:
        per_sequence = gradient[:, :, :prefix_length]
        ones = torch.ones_like(prefix, dtype=torch.float64)
        per_sequence = per_sequence * _expanded_prefix(inputs, ones, stream, prefix_p)
        return total_by_row(per_sequence, prefix)

    def total_by_row(per_sequence: Tensor, prefix: Tensor) -> Tensor:
        if inputs.prefix_index is None:
            return per_sequence.sum(dim=0)
        total = torch.zeros_like(prefix, dtype=torch.float64)
        for sequence, row in enumerate(inputs.prefix_index.tolist()):
            total[row] += per_sequence[sequence]
        return total

    return Results(
        out,
        lse,
        grad_query,
        grad_keys[:, :, prefix_length:],
        grad_values[:, :, prefix_length:],
        prefix_gradient(grad_keys, inputs.prefix_key, dropout.PREFIX_KEY_STREAM),
        prefix_gradient(grad_values, inputs.prefix_value, dropout.PREFIX_VALUE_STREAM),
        grad_gate.new_empty(0) if gate is None else total_by_row(grad_gate, gate),
    )


def _ungated(
    inputs: Inputs, query: Tensor, keys: Tensor, lse: Tensor, probabilities: Tensor
) -> Tensor:
    """exp(scores - lse), 0 for hidden columns and in rows without a probability."""
    counts = (probabilities > 0).any(dim=-1, keepdim=True)
    scores, visible = _scores(inputs, query, keys)
    return torch.exp(scores.masked_fill(~(visible & counts), float("-inf")) - lse[..., None])


def run_backend(inputs: Inputs, backend: str, p: float, prefix_p: float) -> Results:
    """Forward and the gradients through the public operator."""
    attention = functools.partial(attention_of, inputs, backend, p, prefix_p)
    return _with_gradients(attention, inputs, inputs.query.dtype)


def attention_of(
    inputs: Inputs, backend: str | None, p: float, prefix_p: float, *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """The public operator on these tensors, with the options of `inputs`; a sixth is the gate."""
    options = {**inputs.options, "dropout_p": p, "prefix_dropout_p": prefix_p}
    tensors, gate = tensors[:5], tensors[5:]
    if gate:
        options["prefix_gate"] = gate[0]
    if inputs.positions is None:
        return prefix_attention_with_lse(*tensors, **options, backend=backend)
    return attend(
        tensors, True, False, backend, scale=inputs.scale, **options, positions=inputs.positions
    )
