"""One encoder block as one autograd function, with frozen weights.

Forward, of the residual stream R and the attention's input X, [N, hidden] (rows are the attended
tokens of all sequences; in a post-norm block X is R):

    Q, K, V = X Wqkv + b, Q and K rotated     one product
    O       = prefix_attention(Q, K, V)       reads the packed rows by their strides
    S1      = R + dropout(O Wo + b)           attention_sum
    Y       = norm(S1)
    S2      = R2 + dropout(activation(Y Wup + b) Wdown + b)     output_sum

R2 is Y in a post-norm block, which hands up norm(S2), and S1 in a pre-norm block, which hands up S2
and that in the norm which the block above starts with.

Backward gives the gradients of R, X, the prefix and what else trains (biases, norms and low-rank
updates of matrices, see vectors.py), and none of a whole matrix. A frozen linear layer needs
nothing kept for that, an update the layer's input, a norm its sum and two statistics, an activation
its input Y Wup, attention q, k, v, out and lse, dropout a seed. What of it is kept, and what is
computed again from what is kept below, says the policy (spec.py). All policies give the same bits,
since the same products of the same shapes are computed again from the same bits.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptv2_fast.frozen.arithmetic import BlockArithmetic, BranchEnd
from ptv2_fast.frozen.attention import Attention
from ptv2_fast.frozen.call import BlockCall, BlockTensors
from ptv2_fast.frozen.modules import Norm
from ptv2_fast.frozen.spec import Surroundings, kept_names
from ptv2_fast.frozen.vectors import NO_VECTORS, BlockVectors, VectorGradients

_KEPT = (
    "residual", "input", "query", "key_value", "attention_out", "lse", "attention_sum",
    "attention_stats", "output_sum", "output_stats",
)  # fmt: skip
_TENSORS = len(BlockTensors._fields)


class BlockResult(NamedTuple):
    """What a block hands up.

    Args:
        residual: [N, hidden], or [B, hidden] with `first_token_only`.
        input: of the attention above: the residual in its norm; None where that is computed there.
        sum, stats: [N, hidden] and fp32 [N, 2]: what the last norm got, for the block above to
            compute its input from once more; None without a norm.
        norm: that norm.
    """

    residual: Tensor
    input: Tensor | None
    sum: Tensor | None
    stats: Tensor | None
    norm: Norm | None


def run_block(
    residual: Tensor,
    input: Tensor | None,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_gate: Tensor | None,
    call: BlockCall,
    tensors: BlockTensors,
    vectors: BlockVectors = NO_VECTORS,
) -> BlockResult:
    """One block forward, differentiable by `residual`, `input`, the prefix and the vectors.

    Args:
        residual: [N, hidden] in the dtype of the residual stream.
        input: of the attention, likewise; None = the residual.
        prefix_key, prefix_value: [key_value_heads, P, head_dim]; P may be 0. Cast to the products'
            dtype. With `tensors.prefix_index` a bank, [R, key_value_heads, P, head_dim].
        prefix_gate: [heads] or [R, heads], as `prefix_attention` takes it, or None.
        call, tensors: see there.
        vectors: that train; their values are those of the call's weights and norms.
    """
    dtype = call.weights.dtype
    call = call._replace(weights=call.weights.for_forward())
    prefix_key, prefix_value = prefix_key.to(dtype), prefix_value.to(dtype)
    if prefix_gate is not None:
        prefix_gate = prefix_gate.to(torch.promote_types(dtype, torch.float32))
    if tensors.prefix_index is None:  # a bank of one row
        prefix_key, prefix_value = prefix_key[None], prefix_value[None]
        prefix_gate = None if prefix_gate is None else prefix_gate[None]
    arguments = (residual, input, prefix_key, prefix_value, prefix_gate)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*arguments, *vectors)
    ):
        results = _FrozenBlock.apply(*arguments, call, *tensors, *vectors)
    else:
        with _without_autocast(residual):
            block = BlockArithmetic(call, tensors, *arguments[2:], residual.dtype)
            end = block.forward(residual, residual if input is None else input).output_end
        results = (end.out, end.sum, end.stats)
    out, sum, stats = results
    if call.weights.spec.pre_norm:
        return BlockResult(sum, out, sum if stats is not None else None, stats, call.output_norm)
    return BlockResult(out, None, sum, stats, call.output_norm)


def _without_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


class _FrozenBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, input, prefix_key, prefix_value, prefix_gate, call, *rest):
        tensors, vectors = BlockTensors(*rest[:_TENSORS]), BlockVectors(*rest[_TENSORS:])
        gradients = _vector_gradients(ctx.needs_input_grad, call)
        around = Surroundings(
            needs_input_gradient=any(ctx.needs_input_grad[:2]),
            trains_projections=gradients.want_projections,
            trains_input_matrix=gradients.want_input_matrix,
            has_previous=tensors.previous_sum is not None,
            has_separate_input=input is not None,
            has_next_norm=call.output_norm is not None,
        )
        names = kept_names(call.policy, around)
        with _without_autocast(residual):
            prefix = (prefix_key, prefix_value, prefix_gate)
            block = BlockArithmetic(call, tensors, *prefix, residual.dtype)
            result = block.forward(
                residual, residual if input is None else input, "expanded" in names
            )
        attention, (_, attention_sum, attention_stats), end, expanded = result
        if "query" in names and "key_value" not in names:
            attention = attention._replace(query=attention.query.contiguous())  # frees the others
        values = dict(
            zip(
                _KEPT,
                (residual, input, *attention, attention_sum, attention_stats, end.sum, end.stats),
                strict=True,
            )
        )
        reads_previous = "query" not in names or gradients.want_input_matrix
        ctx.save_for_backward(
            *prefix, tensors.cu_seqlens, tensors.coordinates, tensors.seed,
            tensors.previous_sum if reads_previous else None,
            tensors.previous_stats if reads_previous else None,
            *tensors[5:],
            *(values[name] if name in names else None for name in _KEPT),
            *vectors,  # which the call has too: kept for autograd's check that none was changed
            *expanded,
        )  # fmt: skip
        ctx.call, ctx.residual_dtype, ctx.has_separate_input = (
            call, residual.dtype, input is not None,
        )  # fmt: skip
        without_gradient = [] if call.weights.spec.pre_norm else [end.sum]
        if end.stats is not None:
            without_gradient.append(end.stats)
        ctx.mark_non_differentiable(*without_gradient)
        ctx.set_materialize_grads(False)
        return end.out, end.sum, end.stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_sum, _):
        if grad_out is None and grad_sum is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        prefix, saved = saved[:3], saved[3:]
        tensors, saved = BlockTensors(*saved[:_TENSORS]), saved[_TENSORS:]
        kept = dict(zip(_KEPT, saved[: len(_KEPT)], strict=True))
        expanded = saved[len(_KEPT) + len(BlockVectors._fields) :]
        vectors = _vector_gradients(ctx.needs_input_grad, ctx.call)
        needs_residual, needs_input, *needs_prefix = ctx.needs_input_grad[:5]
        with _without_autocast(prefix[0]):
            block = BlockArithmetic(ctx.call, tensors, *prefix, ctx.residual_dtype)
            attention, attention_end, input = _recompute(block, kept, vectors.want_input_matrix)
            output_end = BranchEnd(None, kept["output_sum"], kept["output_stats"])
            del kept, saved
            grad_residual, grad_input = block.feed_forward_gradient(
                None if grad_sum is None else grad_sum.contiguous(),
                None if grad_out is None else grad_out.contiguous(),
                output_end, attention_end, expanded, vectors,
            )  # fmt: skip
            grad_residual, grad_heads = block.attention_output_gradient(
                grad_residual, grad_input, attention_end, attention.out, vectors
            )
            del grad_input
            grad_input, *of_prefix = block.attention.gradient(
                grad_heads, attention, input, needs_residual or needs_input, any(needs_prefix),
                vectors,
            )  # fmt: skip
            if grad_input is not None:
                grad_residual, grad_input = _of_all_rows(
                    grad_residual, grad_input, block.rows, ctx.has_separate_input
                )
        wanted = (
            gradient if need else None
            for gradient, need in zip(
                (grad_residual, grad_input, *of_prefix),
                ctx.needs_input_grad,
                strict=False,
            )
        )
        sums = (vectors.sums.get(name) for name in BlockVectors._fields)
        return *wanted, None, *(None,) * _TENSORS, *sums


def _vector_gradients(needs_gradient: tuple[bool, ...], call: BlockCall) -> VectorGradients:
    """For the vectors that train, the last arguments of the function."""
    needs = needs_gradient[-len(BlockVectors._fields) :]
    wanted = (name for name, need in zip(BlockVectors._fields, needs, strict=True) if need)
    return VectorGradients(frozenset(wanted), call.tokens, call.chunk)


def _recompute(
    block: BlockArithmetic, kept: dict[str, Tensor | None], needs_input: bool
) -> tuple[Attention, BranchEnd, Tensor | None]:
    """What the backward pass reads of the attention, and its input, kept or computed again."""
    tensors, call = block.tensors, block.call
    residual, input, query, key_value = (
        kept[name] for name in ("residual", "input", "query", "key_value")
    )
    if query is None or needs_input:
        if tensors.previous_sum is not None:
            stats, norm = cast(Tensor, tensors.previous_stats), cast(Norm, call.previous_norm)
            input = block.normalise(tensors.previous_sum, stats, norm)
            residual = tensors.previous_sum if block.spec.pre_norm else input
        elif input is None:
            input = residual
    if query is None:
        query, key_value = block.attention.project(cast(Tensor, input))
    if kept["attention_out"] is None:
        attention = block.attention.attend(query, cast(Tensor, key_value))
        return attention, block.add_attention(cast(Tensor, residual), attention.out), input
    attention = Attention(query, key_value, kept["attention_out"], cast(Tensor, kept["lse"]))
    end = BranchEnd(None, cast(Tensor, kept["attention_sum"]), kept["attention_stats"])
    return attention, end, input


def _of_all_rows(
    grad_residual: Tensor, grad_input: Tensor, rows: Tensor | None, is_separate: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of residual and input; their sum and None where these are one tensor.

    Args:
        grad_residual: [N, hidden], or [B, hidden] of the rows `rows`.
        grad_input: [N, hidden].
        rows: of the first tokens, or None.
        is_separate: residual and input are two tensors.
    """
    if rows is None:
        if is_separate:
            return grad_residual, grad_input.to(grad_residual.dtype)
        return grad_residual.add_(grad_input), None
    start = torch.zeros_like(grad_input) if is_separate else grad_input
    full = start.to(grad_residual.dtype).index_add_(0, rows, grad_residual)
    return full, grad_input.to(grad_residual.dtype) if is_separate else None
