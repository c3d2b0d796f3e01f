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


def _in_padded_layout(function):
    """Packed inputs are what they are when padded: computed so, and packed again."""

    @functools.wraps(function)
    def wrapper(inputs: Inputs, *rest) -> Results:
        if inputs.padded is None:
            return function(inputs, *rest)
        *of_tokens, grad_prefix_key, grad_prefix_value = function(inputs.padded, *rest)
        packed = (inputs.pack_rows(result) for result in of_tokens)
        return Results(*packed, grad_prefix_key, grad_prefix_value)

    return wrapper


def _with_gradients(function, inputs: Inputs, dtype: torch.dtype) -> Results:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs.tensors]
    out, lse = function(*leaves)
    outputs, gradients = [out], [inputs.grad_out.to(out.dtype)]
    if inputs.grad_lse is not None:
        outputs, gradients = [out, lse], [*gradients, inputs.grad_lse.to(lse.dtype)]
    gradients = torch.autograd.grad(outputs, leaves, gradients, materialize_grads=True)
    lse = lse.detach().masked_fill(lse.isinf(), 0.0)
    lse = lse.to(torch.promote_types(lse.dtype, torch.float32))  # as every backend returns it
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
        seen = inputs.context_lengths[:, None, None].maximum(row + 1)  # [B, T, 1]
        visible[..., prefix_length:] &= (column < seen)[:, None]
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


def _lse(inputs: Inputs, query: Tensor, keys: Tensor) -> Tensor:
    """[B, H, T]; 0 for a row without a visible column."""
    scores, visible = _scores(inputs, query, keys)
    if not scores.shape[-1]:
        return scores.sum(dim=-1)
    return scores.logsumexp(dim=-1).masked_fill(~visible.any(dim=-1), 0.0)


def _probabilities(inputs: Inputs, query: Tensor, keys: Tensor) -> Tensor:
    scores, visible = _scores(inputs, query, keys)
    return scores.softmax(dim=-1) * visible


@_in_padded_layout
def concatenate_and_expand(inputs: Inputs, p: float, prefix_p: float) -> Results:
    """What PEFT and the original compute, in the dtype of the inputs (eager attention)."""

    def attention(*tensors: Tensor) -> Tensor:
        keys, values = _all_columns(inputs, tensors, prefix_p)
        probabilities = _probabilities(inputs, tensors[0], keys)
        out = probabilities * _column_multipliers(inputs, p, probabilities.dtype) @ values
        return out, _lse(inputs, tensors[0], keys)

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

    def attention(*tensors: Tensor) -> Tensor:
        keys, values = _all_columns(inputs, tensors, 0.0)
        out = F.scaled_dot_product_attention(tensors[0], keys, values, visible)
        return out, _lse(inputs, tensors[0], keys)

    return _with_gradients(attention, inputs, inputs.query.dtype)


@_in_padded_layout
def oracle(inputs: Inputs, p: float, prefix_p: float) -> Results:
    """The reference in float64 on the same quantised inputs."""

    def attention(*tensors: Tensor) -> Tensor:
        *tokens, prefix_key, prefix_value = tensors
        if inputs.prefix_index is None:
            prefix_key, prefix_value = prefix_key[None], prefix_value[None]
        return reference_attention(
            *tokens, prefix_key, prefix_value, inputs.raw_options(p, prefix_p)
        )

    return _with_gradients(attention, inputs, torch.float64)


@_in_padded_layout
def magnitudes(inputs: Inputs, p: float, prefix_p: float) -> Results:
    """The oracle's expressions on absolute values, with plus signs: the size of their rounding.

    A backward pass recomputes probabilities as exp(scores - lse) from an fp32 lse, whose rounding
    grows with |lse|; plain torch divides by the sum instead and has no such term.
    """
    tensors = [tensor.double() for tensor in inputs.tensors]
    keys, values = _all_columns(inputs, tensors, prefix_p)
    probabilities = _probabilities(inputs, tensors[0], keys)
    multipliers = _column_multipliers(inputs, p, torch.float64)
    signed_lse = _lse(inputs, tensors[0], keys)
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
    lse = (probabilities * scores).sum(dim=-1) + signed_lse.abs()
    probabilities = probabilities * (1 + lse_rounding)
    delta = (out * grad_out).sum(dim=-1, keepdim=True)
    if inputs.grad_lse is not None:
        delta = delta + inputs.grad_lse.double().abs()[..., None]
    grad_scores = probabilities * (multipliers * (grad_out @ values.transpose(-1, -2)) + delta)
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
    )


def run_backend(inputs: Inputs, backend: str, p: float, prefix_p: float) -> Results:
    """Forward and the five gradients through the public operator."""
    attention = functools.partial(attention_of, inputs, backend, p, prefix_p)
    return _with_gradients(attention, inputs, inputs.query.dtype)


def attention_of(
    inputs: Inputs, backend: str | None, p: float, prefix_p: float, *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """The public operator on these tensors, with the options of `inputs`."""
    options = {**inputs.options, "dropout_p": p, "prefix_dropout_p": prefix_p}
    if inputs.positions is None:
        return prefix_attention_with_lse(*tensors, **options, backend=backend)
    return attend(
        tensors, True, False, backend, scale=inputs.scale, **options, positions=inputs.positions
    )
