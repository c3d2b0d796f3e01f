"""The arithmetic of a frozen block: the parts of its forward pass and of its backward pass.

block.py puts them together and says which results are kept.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ptv2_fast.frozen.layout import append_zeros
from ptv2_fast.frozen.weights import AnyLinear, BlockWeights, Norm
from ptv2_fast.ops import elementwise
from ptv2_fast.ops.dropout import ATTENTION_OUTPUT_STREAM, FEED_FORWARD_STREAM
from ptv2_fast.ops.options import Options
from ptv2_fast.ops.registration import KERNEL_DTYPES


class Dropout(NamedTuple):
    """The probabilities of a block's dropouts; 0 outside training."""

    attention: float = 0.0
    attention_output: float = 0.0
    output: float = 0.0
    prefix: float = 0.0


class BlockCall(NamedTuple):
    """What one call of a block is, beside its tensors."""

    weights: BlockWeights
    dropout: Dropout
    policy: str
    chunk: int  # tokens that go through the feed-forward network at a time
    tokens: int  # N, rows that belong to a token; those behind them are not read
    max_seqlen: int
    first_rows_only: bool  # compute the output for the first token of each sequence only
    below: Norm | None  # the last LayerNorm of the block below, whose total comes along


class BlockTensors(NamedTuple):
    """The tensors of one call that have no gradient."""

    cu_seqlens: Tensor  # int32 [B + 1]
    coordinates: Tensor  # int32 [N, 2]
    seed: Tensor | None  # int64 [1]
    below_total: Tensor | None  # [N, hidden], what the block below normalised, and its statistics
    below_statistics: Tensor | None


class Attention(NamedTuple):
    """What the backward pass of the attention reads."""

    query: Tensor  # [N, heads, head_dim] or, for first rows only, [B, heads, head_dim]
    key_value: Tensor | None  # [N, 2, heads, head_dim]
    out: Tensor  # as query
    lse: Tensor  # [N or B, heads]


class BlockArithmetic:
    """The arithmetic of one call: the parts of the forward pass and of the backward pass."""

    def __init__(
        self,
        call: BlockCall,
        tensors: BlockTensors,
        prefix_key: Tensor,  # [1, heads, P, head_dim], the products' dtype
        prefix_value: Tensor,
        residual_dtype: torch.dtype,
    ) -> None:
        self.call, self.tensors, self.weights = call, tensors, call.weights
        self.prefix_key, self.prefix_value = prefix_key, prefix_value
        self.heads, self.head_dim = prefix_key.shape[1], prefix_key.shape[3]
        served = KERNEL_DTYPES.get(prefix_key.device.type, ())
        has_kernels = self.weights.dtype in served and residual_dtype in served
        self.steps = torch.ops.ptv2 if has_kernels else elementwise
        suffix = "" if has_kernels or not served else "_reference"
        self._attention_forward = getattr(torch.ops.ptv2, "prefix_attention_forward" + suffix)
        self._attention_backward = getattr(torch.ops.ptv2, "prefix_attention_backward" + suffix)
        self.rows = tensors.cu_seqlens[:-1].long() if call.first_rows_only else None
        self.coordinates = tensors.coordinates
        if self.rows is not None:
            self.coordinates = self.coordinates[self.rows]

    # The parts of the forward pass, in their order.

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """query [N or B, heads, head_dim] and key_value [N, 2, heads, head_dim]."""
        products = hidden.to(self.weights.dtype)
        shape = (-1, self.heads, self.head_dim)
        if self.rows is None:
            joined = self.weights.qkv.biased(products).view(-1, 3, self.heads, self.head_dim)
            return joined[:, 0], joined[:, 1:]
        key_value = self.weights.key_value.biased(products).unflatten(1, (2, *shape[1:]))
        return self.weights.query.biased(products[self.rows]).view(shape), key_value

    def attend(self, query: Tensor, key_value: Tensor) -> Attention:
        """Attention over the prefix and the tokens of each sequence."""
        operands, options = self._operands(query, key_value)
        out, lse = self._attention_forward(*operands, *options)
        if self.rows is not None:
            out, lse = out.squeeze(2), lse.squeeze(2)
        else:
            out[self.call.tokens :] = 0
        return Attention(query, key_value, out, lse)

    def add_attention(self, hidden: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Y, total_1 and its statistics."""
        layer, residual = self.weights.attention_output, hidden
        if self.rows is not None:
            residual = hidden[self.rows]
        projected = layer.unbiased(out.flatten(1))
        return self._add(projected, layer, residual, self.weights.attention_norm,
                         self.call.dropout.attention_output, ATTENTION_OUTPUT_STREAM)  # fmt: skip

    def expand(self, normal: Tensor, slot: int) -> Tensor:
        """U of chunk number `slot` of Y, without its bias."""
        return self.weights.intermediate.unbiased(normal.to(self.weights.dtype), slot)

    def add_feed_forward(
        self, normal: Tensor, keep_expanded: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Z, total_2, its statistics and the chunks of U when they are kept."""
        layer, kept, results = self.weights.output, [], []
        for slot, chunk in enumerate(normal.split(self.call.chunk)):
            expanded = self.expand(chunk, slot)
            activated = self.steps.bias_activation(expanded, self.weights.intermediate.bias, "gelu")
            results.append(layer.unbiased(activated, slot))
            if keep_expanded:
                kept.append(expanded)
        result = self._add(_join(results), layer, normal, self.weights.output_norm,
                           self.call.dropout.output, FEED_FORWARD_STREAM)  # fmt: skip
        return *result, kept

    def forward(
        self, hidden: Tensor, keep_expanded: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Attention, Tensor, Tensor, list[Tensor]]:
        """Z, total_2, its statistics; attention, total_1, its statistics, the chunks of U."""
        attention = self.attend(*self.project(hidden))
        normal, total_1, statistics_1 = self.add_attention(hidden, attention.out)
        out, total_2, statistics_2, expanded = self.add_feed_forward(normal, keep_expanded)
        return out, total_2, statistics_2, attention, total_1, statistics_1, expanded

    # The parts of the backward pass, in their order.

    def feed_forward_gradient(
        self,
        grad_out: Tensor,
        total_2: Tensor,
        statistics_2: Tensor,
        total_1: Tensor,
        statistics_1: Tensor,
        kept: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The two gradients of Y, that through the sum and that through U."""
        grad_residual, grad_output = self._add_gradient(
            grad_out, None, total_2, statistics_2, self.weights.output_norm,
            self.call.dropout.output, FEED_FORWARD_STREAM,
        )  # fmt: skip
        bias, results = self.weights.intermediate.bias, []
        for slot, grad in enumerate(grad_output.split(self.call.chunk)):
            if kept:
                expanded = kept[slot]
            else:
                rows = slice(slot * self.call.chunk, (slot + 1) * self.call.chunk)
                normal = self.normalise(
                    total_1[rows], statistics_1[rows], self.weights.attention_norm
                )
                expanded = self.expand(normal, slot)
            grad_activated = self.weights.output.input_gradient(grad, slot)
            grad_expanded = self.steps.bias_activation_backward(
                grad_activated, expanded, bias, "gelu"
            )
            results.append(self.weights.intermediate.input_gradient(grad_expanded, slot))
        return grad_residual, _join(results)

    def attention_output_gradient(
        self, grad_residual: Tensor, grad_other: Tensor, total_1: Tensor, statistics_1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient of X through the sum, and that of O."""
        grad_hidden, grad_projected = self._add_gradient(
            grad_residual, grad_other, total_1, statistics_1, self.weights.attention_norm,
            self.call.dropout.attention_output, ATTENTION_OUTPUT_STREAM,
        )  # fmt: skip
        grad_out = self.weights.attention_output.input_gradient(grad_projected)
        return grad_hidden, grad_out.unflatten(1, (self.heads, self.head_dim))

    def attention_gradient(
        self, grad_out: Tensor, attention: Attention, needs_hidden: bool, needs_prefix: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The gradient of X through Q, K and V, and those of the prefix."""
        operands, options = self._operands(attention.query, attention.key_value)
        out, lse = attention.out, attention.lse
        if self.rows is not None:
            grad_out, out, lse = grad_out.unsqueeze(2), out.unsqueeze(2), lse.unsqueeze(2)
        joint = needs_hidden and self.rows is None
        gradients = self._attention_backward(
            grad_out, *operands, out, lse, None, needs_hidden, needs_hidden, needs_prefix, joint,
            *options,
        )  # fmt: skip
        if not needs_hidden:
            grad_hidden = None
        elif joint:
            gradients[0][self.call.tokens :] = 0
            grad_hidden = self.weights.qkv.input_gradient(gradients[0].flatten(1))
        else:
            grad_key_value = torch.stack([self._packed(part) for part in gradients[1:3]], dim=1)
            grad_hidden = self.weights.key_value.input_gradient(grad_key_value.flatten(1))
            grad_query = self.weights.query.input_gradient(gradients[0].reshape(len(out), -1))
            grad_hidden.index_add_(0, cast(Tensor, self.rows), grad_query)
        return grad_hidden, gradients[3], gradients[4]

    def normalise(self, total: Tensor, statistics: Tensor, norm: Norm) -> Tensor:
        """The output of a LayerNorm again."""
        return self.steps.norm_from_stats(total, statistics, norm.weight, norm.beta)

    def _add(
        self, input: Tensor, layer: AnyLinear, residual: Tensor, norm: Norm, p: float,
        stream: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return self.steps.dropout_add_norm(
            input, layer.bias, residual, norm.weight, norm.beta, norm.epsilon, True,
            self.tensors.seed, self.coordinates, p, stream,
        )  # fmt: skip

    def _add_gradient(
        self, grad_out: Tensor, grad_other: Tensor | None, total: Tensor, statistics: Tensor,
        norm: Norm, p: float, stream: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        grad_residual, grad_input = self.steps.dropout_add_norm_backward(
            grad_out, grad_other, None, total, statistics, norm.weight, True,
            self.tensors.seed, self.coordinates, p, stream, self.weights.dtype,
        )  # fmt: skip
        is_same = p == 0.0 and self.weights.dtype == total.dtype
        return grad_residual, grad_residual if is_same else grad_input

    def _operands(
        self, query: Tensor, key_value: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Options]:
        """The tensors and the options of the attention's raw operators."""
        options = Options(
            None, self.tensors.seed, self.head_dim**-0.5, self.call.dropout.attention,
            self.call.dropout.prefix, cu_seqlens=self.tensors.cu_seqlens,
            max_seqlen=self.call.max_seqlen,
        )  # fmt: skip
        if self.rows is None:
            # Without keys the prefix alone has a gradient, and nothing is read from these.
            key, value = (query, query) if key_value is None else key_value.unbind(1)
        else:
            # One query a sequence: the packed layout has as many queries as tokens, so the keys
            # and values are padded instead.
            lengths = self.tensors.cu_seqlens.diff()[:, None]
            columns = torch.arange(self.call.max_seqlen, device=lengths.device)
            options = options._replace(key_mask=columns < lengths, cu_seqlens=None, max_seqlen=0)
            query = query.unsqueeze(2)
            if key_value is None:
                key = value = query.expand(-1, -1, self.call.max_seqlen, -1)
            else:
                key, value = (self._padded(part) for part in key_value.unbind(1))
        return (query, key, value, self.prefix_key, self.prefix_value), options

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


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
