"""One post-LN encoder block as one autograd function, with frozen weights.

Forward, of X = [N, hidden] (rows are the attended tokens of all sequences):

    Q, K, V = X Wqkv + b                      one product
    O       = prefix_attention(Q, K, V)       reads the packed rows by their strides
    Y       = LayerNorm(X + dropout(O Wo + b))                 total_1 = what is normalised
    Z       = LayerNorm(Y + dropout(gelu(Y W1 + b) W2 + b))    total_2, likewise

Backward gives the gradients of X and of the prefix, and none of a weight. A frozen linear layer
needs nothing kept for that, LayerNorm its total and two statistics, GELU its input U = Y W1,
attention q, k, v, out and lse, dropout a seed. What of it is kept, and what is computed again from
what is kept below, says the policy (memory.py). All policies give the same bits, since the same
products of the same shapes are computed again from the same bits.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptv2_fast.frozen.arithmetic import Attention, BlockArithmetic, BlockCall, BlockTensors


def run_block(
    hidden: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    call: BlockCall,
    tensors: BlockTensors,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block forward, differentiable with respect to `hidden` and the prefix.

    Args:
        hidden: [N, hidden] in the dtype of the residual stream.
        prefix_key, prefix_value: [heads, P, head_dim]; P may be 0. Cast to the products' dtype.
        call, tensors: see there.

    Returns:
        The output [N, hidden], or [B, hidden] with `first_rows_only`; what its last LayerNorm
        normalised, and the statistics of that: for the block above.
    """
    dtype = call.weights.dtype
    call = call._replace(weights=call.weights.bind())
    prefix_key, prefix_value = prefix_key.to(dtype)[None], prefix_value.to(dtype)[None]
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden, prefix_key, prefix_value)
    ):
        return _FrozenBlock.apply(hidden, prefix_key, prefix_value, call, *tensors)
    with _without_autocast(hidden):
        block = BlockArithmetic(call, tensors, prefix_key, prefix_value, hidden.dtype)
        return block.forward(hidden)[:3]


def _without_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


class _FrozenBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, prefix_key, prefix_value, call, *tensors):
        tensors = BlockTensors(*tensors)
        needs_hidden = ctx.needs_input_grad[0]
        with _without_autocast(hidden):
            block = BlockArithmetic(call, tensors, prefix_key, prefix_value, hidden.dtype)
            out, total_2, statistics_2, attention, total_1, statistics_1, expanded = block.forward(
                hidden, keep_expanded=call.policy == "none"
            )
        query, key_value = attention.query, attention.key_value
        keeps_query = call.policy in ("none", "ffn")
        if not needs_hidden:
            # The prefix alone has a gradient, and that reads no key and no value; the copy frees
            # them. It costs no more than the input that query would be computed from.
            keeps_query, query, key_value = call.policy != "block", query.contiguous(), None
        if not keeps_query:
            query = key_value = None
        reads_input = not keeps_query
        has_below = call.below is not None
        if call.policy == "block":
            attention_out = lse = total_1 = statistics_1 = None
        else:
            attention_out, lse = attention.out, attention.lse
        ctx.save_for_backward(
            prefix_key, prefix_value, tensors.cu_seqlens, tensors.coordinates, tensors.seed,
            tensors.below_total if reads_input and has_below else None,
            tensors.below_statistics if reads_input and has_below else None,
            hidden if reads_input and not has_below else None,
            query, key_value, attention_out, lse,
            total_1, statistics_1, total_2, statistics_2, *expanded,
        )  # fmt: skip
        ctx.call, ctx.residual_dtype = call, hidden.dtype
        ctx.mark_non_differentiable(total_2, statistics_2)
        ctx.set_materialize_grads(False)
        return out, total_2, statistics_2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, *_):
        (
            prefix_key, prefix_value, cu_seqlens, coordinates, seed, below_total,
            below_statistics, hidden, query, key_value, attention_out, lse, total_1, statistics_1,
            total_2, statistics_2, *expanded,
        ) = ctx.saved_tensors  # fmt: skip
        nothing = (None,) * 9
        if grad_out is None:
            return nothing
        needs_hidden, *needs_prefix = ctx.needs_input_grad[:3]
        tensors = BlockTensors(cu_seqlens, coordinates, seed, below_total, below_statistics)
        with _without_autocast(grad_out):
            block = BlockArithmetic(ctx.call, tensors, prefix_key, prefix_value, ctx.residual_dtype)
            if query is None:
                if hidden is None:
                    hidden = block.normalise(below_total, below_statistics, ctx.call.below)
                query, key_value = block.project(hidden)
            if attention_out is None:
                attention = block.attend(query, key_value)
                _, total_1, statistics_1 = block.add_attention(hidden, attention.out)
            else:
                attention = Attention(query, key_value, attention_out, lse)
            del hidden, query, key_value
            grad_residual, grad_other = block.feed_forward_gradient(
                grad_out.contiguous(), total_2, statistics_2, total_1, statistics_1, expanded
            )
            grad_sum, grad_attention = block.attention_output_gradient(
                grad_residual, grad_other, total_1, statistics_1
            )
            del grad_residual, grad_other
            grad_hidden, grad_prefix_key, grad_prefix_value = block.attention_gradient(
                grad_attention, attention, needs_hidden, any(needs_prefix)
            )
            if grad_hidden is not None:
                if block.rows is None:
                    grad_hidden = grad_sum.add_(grad_hidden)
                else:
                    grad_hidden = grad_hidden.to(grad_sum.dtype).index_add_(0, block.rows, grad_sum)
        wanted = (
            gradient if need else None
            for gradient, need in zip(
                (grad_hidden, grad_prefix_key, grad_prefix_value),
                ctx.needs_input_grad,
                strict=False,
            )
        )
        return *wanted, *nothing[3:]
