"""The arithmetic of a frozen block: the parts of its forward pass and of its backward pass.

block.py puts them together and says which results are kept.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ptv2_fast.frozen.attention import Attention, BlockAttention
from ptv2_fast.frozen.call import BlockCall, BlockTensors
from ptv2_fast.frozen.modules import Norm
from ptv2_fast.frozen.vectors import VectorGradients
from ptv2_fast.frozen.weights import AnyLinear
from ptv2_fast.ops import elementwise
from ptv2_fast.ops.dropout import ACTIVATION_STREAM, ATTENTION_OUTPUT_STREAM, FEED_FORWARD_STREAM
from ptv2_fast.ops.registration import KERNEL_DTYPES


class BranchEnd(NamedTuple):
    """What the end of a branch gives: its sum, and what the next branch starts from."""

    out: Tensor | None  # the norm of the sum, [rows, hidden]; None where no norm follows
    sum: Tensor  # [rows, hidden]
    stats: Tensor | None  # fp32 [rows, 2], mean and 1 / deviation of the sum's rows


class BlockForward(NamedTuple):
    """The results of a forward pass."""

    attention: Attention
    attention_end: BranchEnd
    output_end: BranchEnd
    expanded: list[Tensor]  # chunks of the feed-forward network's first product, when kept


class BlockArithmetic:
    """The arithmetic of one call: the parts of the forward pass and of the backward pass."""

    def __init__(
        self,
        call: BlockCall,
        tensors: BlockTensors,
        prefix_key: Tensor,  # [1, key_value_heads, P, head_dim], the products' dtype
        prefix_value: Tensor,
        prefix_gate: Tensor | None,  # [1, heads], the dtype of lse
        residual_dtype: torch.dtype,
    ) -> None:
        self.call, self.tensors, self.weights = call, tensors, call.weights
        self.spec = call.weights.spec
        served = KERNEL_DTYPES.get(prefix_key.device.type, ())
        has_kernels = self.weights.dtype in served and residual_dtype in served
        self.ops = torch.ops.ptv2 if has_kernels else elementwise
        suffix = "" if has_kernels or not served else "_reference"
        prefix = (prefix_key, prefix_value, prefix_gate)
        self.attention = BlockAttention(call, tensors, *prefix, self.ops, suffix)
        self.rows = self.attention.rows
        self.coordinates = tensors.coordinates
        if self.rows is not None:
            self.coordinates = self.coordinates[self.rows]

    # The parts of the forward pass, in their order.

    def forward(self, residual: Tensor, input: Tensor, keep_expanded: bool = False) -> BlockForward:
        """One block.

        Args:
            residual: [N, hidden], what the attention's output is added to.
            input: [N, hidden], what the attention reads: the residual, or its norm.
            keep_expanded: return the chunks of the first product.
        """
        attention = self.attention.attend(*self.attention.project(input))
        attention_end = self.add_attention(residual, attention.out)
        normal = cast(Tensor, attention_end.out)
        results, expanded = self.feed_forward(normal, keep_expanded)
        residual = attention_end.sum if self.spec.pre_norm else normal
        output_end = self._end_branch(
            results, self.weights.down, residual, self.call.output_norm,
            self.call.dropout.output, FEED_FORWARD_STREAM,
        )  # fmt: skip
        return BlockForward(attention, attention_end, output_end, expanded)

    def add_attention(self, residual: Tensor, out: Tensor) -> BranchEnd:
        """The end of the attention's branch."""
        if self.rows is not None:
            residual = residual[self.rows]
        layer = self.weights.attention_output
        return self._end_branch(
            layer.unbiased(out.flatten(1)), layer, residual, self.call.attention_norm,
            self.call.dropout.attention_output, ATTENTION_OUTPUT_STREAM,
        )  # fmt: skip

    def feed_forward(self, normal: Tensor, keep_expanded: bool) -> tuple[Tensor, list[Tensor]]:
        """The network's output without its bias, and the chunks of its first product when kept."""
        kept, results = [], []
        for index, chunk in enumerate(normal.split(self.call.chunk)):
            expanded = self._expand(chunk, index)
            activated = self._drop_activated(self._activate(expanded), index)
            results.append(self.weights.down.unbiased(activated, index))
            if keep_expanded:
                kept.append(expanded)
        return _join(results), kept

    def normalise(self, sum: Tensor, stats: Tensor, norm: Norm) -> Tensor:
        """The output of a norm from the sum that it got and the statistics of that."""
        return self.ops.norm_from_stats(sum, stats, norm.weight, norm.beta)

    # The parts of the backward pass, in their order.

    def feed_forward_gradient(
        self, grad_sum: Tensor | None, grad_out: Tensor | None, output_end: BranchEnd,
        attention_end: BranchEnd, kept: list[Tensor], vectors: VectorGradients,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The gradients of the branch's residual and input, from those of its sum and its norm.

        Those of biases and norms go to `vectors`.
        """
        vectors.add_norm("output_norm", (grad_out,), output_end.sum, output_end.stats)
        grad_residual, grad_output = self._branch_gradient(
            grad_sum, grad_out, None, output_end, self.call.output_norm,
            self.call.dropout.output, FEED_FORWARD_STREAM,
        )  # fmt: skip
        vectors.add_bias("down", grad_output)
        results = []
        for index, grad in enumerate(grad_output.split(self.call.chunk)):
            first_row = index * self.call.chunk
            normal = None
            if not kept or vectors.want_update("up"):
                normal = self._normal_again(attention_end, index)
            expanded = kept[index] if kept else self._expand(cast(Tensor, normal), index)
            down, up, narrow = self.weights.down, self.weights.up, None
            if vectors.want_update("down"):
                activated = self._drop_activated(self._activate(expanded), index)
                narrow = vectors.add_update("down", down.update, activated, grad, first_row)
                del activated
            grad_activated = self._drop_activated(down.input_gradient(grad, index, narrow), index)
            grad_expanded = self._activation_gradient(grad_activated, expanded)
            vectors.add_bias("up", grad_expanded, first_row=first_row)
            narrow = None
            if normal is not None:
                narrow = vectors.add_update("up", up.update, normal, grad_expanded, first_row)
            results.append(up.input_gradient(grad_expanded, index, narrow))
        return grad_residual, _join(results)

    def attention_output_gradient(
        self, grad_residual: Tensor, grad_input: Tensor, attention_end: BranchEnd, out: Tensor,
        vectors: VectorGradients,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The gradient of the attention's residual, and that of its heads, whose result is `out`.

        Those of what trains of the output projection and of the norm go to `vectors`.
        """
        grad_sum, grad_out = (grad_residual, None) if self.spec.pre_norm else (None, grad_residual)
        vectors.add_norm(
            "attention_norm", (grad_out, grad_input), attention_end.sum, attention_end.stats
        )
        grad_residual, grad_projected = self._branch_gradient(
            grad_sum, grad_out, grad_input, attention_end, self.call.attention_norm,
            self.call.dropout.attention_output, ATTENTION_OUTPUT_STREAM,
        )  # fmt: skip
        layer = self.weights.attention_output
        vectors.add_bias("attention_output", grad_projected)
        heads = out.flatten(1)
        narrow = vectors.add_update("attention_output", layer.update, heads, grad_projected)
        grad_out = layer.input_gradient(grad_projected, narrow_gradient=narrow)
        return grad_residual, grad_out.unflatten(1, (-1, self.weights.modules.head_dim))

    def _end_branch(
        self, input: Tensor, layer: AnyLinear, residual: Tensor, norm: Norm | None, p: float,
        stream: int,
    ) -> BranchEnd:  # fmt: skip
        dropout = (self.tensors.seed, self.coordinates, p, stream)
        if norm is None:
            return BranchEnd(
                None, self.ops.dropout_add(input, layer.bias, residual, *dropout), None
            )
        out, *rest = self.ops.dropout_add_norm(
            input, layer.bias, residual, norm.weight, norm.beta, norm.epsilon,
            norm.subtract_mean, *dropout,
        )  # fmt: skip
        norm.scale_parts(out)
        return BranchEnd(out, *rest)

    def _branch_gradient(
        self, grad_sum: Tensor | None, grad_out: Tensor | None, grad_other: Tensor | None,
        end: BranchEnd, norm: Norm | None, p: float, stream: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The gradients of a branch's residual and output, which may be one tensor.

        `grad_sum` is that of the sum, `grad_out` (of the residual's dtype) and `grad_other` (of
        the products') are of its norm.
        """
        dropout = (self.tensors.seed, self.coordinates, p, stream, self.weights.dtype)
        if grad_out is None and grad_other is None:
            grad_residual = cast(Tensor, grad_sum)
            grad_input = self.ops.dropout_backward(grad_residual, *dropout)
        else:
            norm = cast(Norm, norm)
            grad_residual, grad_input = self.ops.dropout_add_norm_backward(
                grad_out, grad_other, grad_sum, end.sum, end.stats, norm.weight,
                norm.subtract_mean, *dropout,
            )  # fmt: skip
        is_same = p == 0.0 and self.weights.dtype == grad_residual.dtype
        return grad_residual, grad_residual if is_same else grad_input

    def _expand(self, normal: Tensor, chunk_index: int) -> Tensor:
        """The network's first product, without its bias."""
        return self.weights.up.unbiased(normal.to(self.weights.dtype), chunk_index)

    def _normal_again(self, end: BranchEnd, chunk_index: int) -> Tensor:
        """A chunk of the network's input, in the products' dtype."""
        rows = slice(chunk_index * self.call.chunk, (chunk_index + 1) * self.call.chunk)
        norm = cast(Norm, self.call.attention_norm)
        normal = self.normalise(end.sum[rows], cast(Tensor, end.stats)[rows], norm)
        return normal.to(self.weights.dtype)

    def _activate(self, expanded: Tensor) -> Tensor:
        bias, spec = self.weights.up.bias, self.spec
        if spec.gate is None:
            return self.ops.bias_activation(expanded, bias, spec.activation)
        return self.ops.gated_activation(expanded, bias, spec.activation, spec.gate == "first")

    def _activation_gradient(self, grad_activated: Tensor, expanded: Tensor) -> Tensor:
        bias, spec = self.weights.up.bias, self.spec
        if spec.gate is None:
            return self.ops.bias_activation_backward(
                grad_activated, expanded, bias, spec.activation
            )
        return self.ops.gated_activation_backward(
            grad_activated, expanded, bias, spec.activation, spec.gate == "first"
        )

    def _drop_activated(self, activated: Tensor, chunk_index: int) -> Tensor:
        """Dropout inside the network, of its activation or of the gradient of that."""
        p = self.call.dropout.activation
        if p == 0.0:
            return activated
        rows = slice(chunk_index * self.call.chunk, (chunk_index + 1) * self.call.chunk)
        return self.ops.dropout_backward(
            activated, self.tensors.seed, self.coordinates[rows], p, ACTIVATION_STREAM,
            activated.dtype,
        )  # fmt: skip


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
