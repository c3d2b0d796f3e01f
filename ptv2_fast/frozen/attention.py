"""The attention of a frozen block on packed rows: its projections, rotation, and the operator."""

from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ptv2_fast.frozen.call import BlockCall, BlockTensors
from ptv2_fast.frozen.head_norms import (
    normalise_heads,
    normalise_heads_gradient,
    stats_of_heads,
)
from ptv2_fast.frozen.layout import append_zeros
from ptv2_fast.frozen.modules import Norm
from ptv2_fast.frozen.vectors import VectorGradients
from ptv2_fast.frozen.weights import CalledLinears
from ptv2_fast.ops.options import AttentionOptions


class Attention(NamedTuple):
    """What the backward pass of the attention reads."""

    query: Tensor  # [N, heads, head_dim] or, for first tokens only, [B, heads, head_dim]
    key_value: Tensor | None  # [N, 2, key_value_heads, head_dim]
    out: Tensor  # as query
    lse: Tensor  # [N or B, heads]


class BlockAttention:
    """The attention of one call."""

    def __init__(
        self,
        call: BlockCall,
        tensors: BlockTensors,
        prefix_key: Tensor,  # [R, key_value_heads, P, head_dim]
        prefix_value: Tensor,
        prefix_gate: Tensor | None,  # [R, heads]
        ops: Any,
        suffix: str,
    ) -> None:
        self.call, self.tensors, self.weights = call, tensors, call.weights
        self.spec, modules = call.weights.spec, call.weights.modules
        self.heads, self.key_value_heads = modules.heads, modules.key_value_heads
        self.head_dim = modules.head_dim
        self.prefix, self.gate = (prefix_key, prefix_value), prefix_gate
        self.ops: ModuleType = ops
        self._forward = getattr(torch.ops.ptv2, "prefix_attention_forward" + suffix)
        self._backward = getattr(torch.ops.ptv2, "prefix_attention_backward" + suffix)
        self.rows = tensors.cu_seqlens[:-1].long() if call.first_token_only else None

    def project(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """query [N or B, heads, head_dim] and key_value [N, 2, key_value_heads, head_dim]."""
        products, weights = input.to(self.weights.dtype), self.weights
        queries = self.heads * self.head_dim
        if self.rows is None or weights.query is None or weights.key_value is None:
            joined = weights.query_key_value.biased(products)
            if isinstance(weights.query_key_value, CalledLinears) and self.spec.rotary:
                joined = joined.clone()  # what a layer of someone else gave is not ours to write to
            if not weights.head_norms:  # else `_operands` does, which keeps these for the norms
                self._rotate(joined, self.heads + self.key_value_heads)
            if self.spec.by_head:
                parts = joined.unflatten(1, (self.heads, 3, self.head_dim)).transpose(1, 2)
                return parts[:, 0], parts[:, 1:]
            query, key_value = joined[:, :queries], joined[:, queries:]
            if self.rows is not None:
                query = query[self.rows]
        else:
            key_value = weights.key_value.biased(products)
            query = weights.query.biased(products[self.rows])
            if not weights.head_norms:
                self._rotate(key_value, self.key_value_heads)
                self._rotate(query, self.heads, self.rows)
        return (
            query.unflatten(1, (self.heads, self.head_dim)),
            key_value.unflatten(1, (2, self.key_value_heads, self.head_dim)),
        )

    def attend(self, query: Tensor, key_value: Tensor) -> Attention:
        """Attention over the prefix and the tokens of each sequence."""
        operands, options = self._operands(query, key_value)
        out, lse = self._forward(*operands, *options)
        if self.rows is not None:
            out, lse = out.squeeze(2), lse.squeeze(2)
        else:
            out[self.call.tokens :] = 0
        return Attention(query, key_value, out, lse)

    def gradient(
        self,
        grad_out: Tensor,
        attention: Attention,
        input: Tensor | None,
        needs_input: bool,
        needs_prefix: bool,
        vectors: VectorGradients,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """The gradient of the input through query, key and value; those of the prefix and its gate.

        Those of what trains of the projections and of the heads' norms go to `vectors`, for which
        `input` is what was projected.
        """
        operands, options = self._operands(attention.query, attention.key_value)
        out, lse = attention.out, attention.lse
        if self.rows is not None:
            grad_out, out, lse = grad_out.unsqueeze(2), out.unsqueeze(2), lse.unsqueeze(2)
        needs_projections = needs_input or vectors.want_projections
        joint = needs_projections and self.rows is None
        gradients = self._backward(
            grad_out, *operands, out, lse, None, needs_projections, needs_projections,
            needs_prefix, joint, *options,
        )  # fmt: skip
        grad_input = None
        if joint:
            grad_joined = gradients[0].flatten(1)
            grad_joined[self.call.tokens :] = 0
            keys = self.heads * self.head_dim
            values = keys + self.key_value_heads * self.head_dim
            self._turn_back(grad_joined[:, :keys], grad_joined[:, keys:values], attention, vectors)
            vectors.add_bias("query_key_value", grad_joined)
            if self.spec.by_head:
                parts = grad_joined.unflatten(1, (3, self.heads, self.head_dim))
                grad_joined = parts.transpose(1, 2).flatten(1)
            narrow = self._add_update(input, grad_joined, vectors)
            if needs_input:
                layer = self.weights.query_key_value
                grad_input = layer.input_gradient(grad_joined, narrow_gradient=narrow)
        elif needs_projections:
            grad_query, grad_key_value = self._first_token_gradients(
                gradients[0], gradients[1], gradients[2], attention, vectors
            )
            if vectors.want_input_matrix:
                self._add_update(input, self._joined(grad_query, grad_key_value), vectors)
            if needs_input:
                grad_input = self._first_token_input_gradient(grad_query, grad_key_value)
        return grad_input, *gradients[3:]

    def _add_update(
        self, input: Tensor | None, gradient: Tensor, vectors: VectorGradients
    ) -> Tensor | None:
        if input is None:
            return None
        update, input = self.weights.query_key_value.update, input.to(self.weights.dtype)
        return vectors.add_update("query_key_value", update, input, gradient)

    def _joined(self, grad_query: Tensor, grad_key_value: Tensor) -> Tensor:
        """[N, all outputs], from that of the first tokens' queries and of all keys and values."""
        grad_joined = grad_query.new_zeros(len(grad_key_value), grad_query.shape[1])
        grad_joined.index_copy_(0, cast(Tensor, self.rows), grad_query)
        return torch.cat((grad_joined, grad_key_value), dim=1)

    def _first_token_gradients(
        self,
        grad_query: Tensor,
        grad_key: Tensor,
        grad_value: Tensor,
        attention: Attention,
        vectors: VectorGradients,
    ) -> tuple[Tensor, Tensor]:
        """Of the projected query, [B, C], and of key and value side by side, [N, C]."""
        parts = [self._packed(part).flatten(1) for part in (grad_key, grad_value)]
        grad_query = grad_query.reshape(len(cast(Tensor, self.rows)), -1)
        self._turn_back(grad_query, parts[0], attention, vectors)
        grad_key_value = torch.cat(parts, dim=1)
        vectors.add_bias("query_key_value", grad_query, grad_key_value)
        return grad_query, grad_key_value

    def _first_token_input_gradient(self, grad_query: Tensor, grad_key_value: Tensor) -> Tensor:
        rows, weights = cast(Tensor, self.rows), self.weights
        if weights.query is None or weights.key_value is None:
            grad_joined = self._joined(grad_query, grad_key_value)
            return weights.query_key_value.input_gradient(grad_joined)
        grad_input = weights.key_value.input_gradient(grad_key_value)
        return grad_input.index_add_(0, rows, weights.query.input_gradient(grad_query))

    def _turn_back(
        self,
        grad_query: Tensor,
        grad_key: Tensor,
        attention: Attention,
        vectors: VectorGradients,
    ) -> None:
        """Turn gradients of attended queries and keys into those of projected ones, in place.

        Args:
            grad_query, grad_key: [N or B, heads * head_dim].
            attention: with the projected ones.
            vectors: get the gradients of the heads' norms.
        """
        self._rotate(grad_query, self.heads, self.rows, inverse=True)
        self._rotate(grad_key, self.key_value_heads, inverse=True)
        if not self.weights.head_norms:
            return
        projected = (attention.query, cast(Tensor, attention.key_value)[:, 0])
        for name, gradient, heads, norm in zip(
            ("query_norm", "key_norm"), (grad_query, grad_key), projected, self.weights.head_norms,
            strict=True,
        ):  # fmt: skip
            each = gradient.unflatten(1, (-1, self.head_dim))
            if name in vectors.wanted:
                vectors.add_head_norm(name, each, heads, stats_of_heads(heads, norm))
            each.copy_(normalise_heads_gradient(each, heads, norm, self.ops))

    def _normalised(self, heads: Tensor, norm: Norm, rows: Tensor | None = None) -> Tensor:
        """Queries or keys in the norm of their heads, and rotated."""
        normal = normalise_heads(heads, norm, self.ops)
        self._rotate(normal.flatten(1), heads.shape[1], rows)
        return normal

    def _rotate(
        self, packed: Tensor, heads: int, rows: Tensor | None = None, inverse: bool = False
    ) -> None:
        """Rotate the first heads of [R, C] in place, by the positions of all rows or of `rows`."""
        if self.spec.rotary is None:
            return
        angles = (cast(Tensor, self.tensors.cosine), cast(Tensor, self.tensors.sine))
        cosine, sine = angles if rows is None else (angle[rows] for angle in angles)
        interleaved = self.spec.rotary == "interleaved"
        self.ops.rotate_(packed, cosine, sine, heads, self.head_dim, interleaved, inverse)

    def _operands(
        self, query: Tensor, key_value: Tensor | None
    ) -> tuple[tuple[Tensor, ...], AttentionOptions]:
        """The tensors and the options of the attention's raw operators."""
        spec, call, starts = self.spec, self.call, self.tensors.cu_seqlens
        scale = self.head_dim**-0.5 if spec.scale is None else spec.scale
        dropout = (scale, call.dropout.attention, call.dropout.prefix)
        key, value = (None, None) if key_value is None else key_value.unbind(1)
        if self.weights.head_norms:
            query_norm, key_norm = self.weights.head_norms
            query = self._normalised(query, query_norm, self.rows)
            key = None if key is None else self._normalised(key, key_norm)
        context = self.tensors.context_lengths
        bank: dict[str, Any] = {
            "prefix_index": self.tensors.prefix_index,
            "prefix_lengths": self.tensors.prefix_lengths,
        }
        if self.rows is None:
            options = AttentionOptions(
                None, self.tensors.seed, *dropout, cu_seqlens=starts, max_seqlen=call.max_seqlen,
                context_lengths=torch.zeros_like(starts[1:]) if spec.is_causal else context,
                window=-1 if spec.window is None else spec.window, bias=self.tensors.bias,
                position_key=self.tensors.position_key,
                position_query=self.tensors.position_query,
                position_slots=self.tensors.position_slots, prefix_gate=self.gate, **bank,
            )  # fmt: skip
            # Without keys the prefix alone has a gradient, and nothing is read from these.
            if key is None or value is None:
                key = value = query[:, : self.key_value_heads]
        else:
            # One query a sequence: the packed layout has as many queries as tokens, so the keys
            # and values are padded instead.
            columns = torch.arange(call.max_seqlen, device=starts.device)
            mask = columns < starts.diff()[:, None]
            if spec.window is not None:
                mask &= columns <= spec.window
            if context is not None:
                mask &= columns < context.clamp(min=1)[:, None]
            bias = None if self.tensors.bias is None else self.tensors.bias[:, :, :1]
            options = AttentionOptions(
                mask, self.tensors.seed, *dropout, bias=bias, prefix_gate=self.gate, **bank
            )
            query = query.unsqueeze(2)
            if key is None or value is None:
                part = query[:, : self.key_value_heads]
                key = value = part.expand(-1, -1, call.max_seqlen, -1)
            else:
                key, value = self._padded(key), self._padded(value)
        return (query, key, value, *self.prefix), options

    def _places(self) -> Tensor:
        """The place of each row in [B * max_seqlen]."""
        sequence, row = self.tensors.coordinates[: self.call.tokens].long().unbind(1)
        return sequence * self.call.max_seqlen + row

    def _padded(self, packed: Tensor) -> Tensor:
        """[N, heads, head_dim] -> [B, heads, max_seqlen, head_dim]."""
        batch = self.tensors.cu_seqlens.shape[0] - 1
        padded = packed.new_zeros(batch * self.call.max_seqlen, *packed.shape[1:])
        padded.index_copy_(0, self._places(), packed[: self.call.tokens])
        return padded.unflatten(0, (batch, self.call.max_seqlen)).transpose(1, 2)

    def _packed(self, padded: Tensor) -> Tensor:
        """The inverse of `_padded`."""
        rows = padded.transpose(1, 2).flatten(0, 1)[self._places()]
        return append_zeros(rows, len(self.tensors.coordinates))
