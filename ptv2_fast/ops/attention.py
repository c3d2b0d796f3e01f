"""The public operator: validation, autograd and the choice of a backend."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptv2_fast.ops.registration import BACKENDS, CPP_IMPORT_ERROR, HAS_TRITON, KERNEL_DTYPES
from ptv2_fast.ops.validation import expect, validate, validate_visibility


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, key_mask, seed, context_lengths, suffix, rates, window, lse_counts = arguments
        forward_op = getattr(torch.ops.ptv2, "prefix_attention_forward" + suffix)
        out, lse = forward_op(*tensors, key_mask, seed, *rates, context_lengths, window)
        ctx.save_for_backward(*tensors, out, lse, key_mask, seed, context_lengths)
        ctx.suffix, ctx.rates, ctx.window, ctx.lse_counts = suffix, rates, window, lse_counts
        if not lse_counts:
            ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        *saved, context_lengths = ctx.saved_tensors
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros_like(saved[5])
        needs_query, *needs_others = ctx.needs_input_grad[:5]
        needed = (needs_query, any(needs_others[:2]), any(needs_others[2:]))
        backward_op = getattr(torch.ops.ptv2, "prefix_attention_backward" + ctx.suffix)
        grad_lse = grad_lse if ctx.lse_counts else None  # compiled graphs send zeros
        gradients = backward_op(
            grad_out, *saved, *ctx.rates, *needed, context_lengths, ctx.window, grad_lse
        )
        wanted = (
            gradient if need else None
            for gradient, need in zip(gradients, ctx.needs_input_grad[:5], strict=True)
        )
        return *wanted, *[None] * 7


def _resolve_suffix(backend: str | None, query: Tensor) -> str:
    """The suffix of the raw operators that serve this call; "" lets the dispatcher choose."""
    device = query.device.type
    served = KERNEL_DTYPES.get(device, (torch.float32, torch.bfloat16, torch.float16))
    if backend is None:
        return "" if query.dtype in served else "_reference"
    expect(backend in BACKENDS, "backend", f"None or one of {BACKENDS}", repr(backend))
    if backend == "cpp":
        expect(
            CPP_IMPORT_ERROR is None,
            "backend",
            "a build with the C++ extension",
            f"'cpp' without it ({CPP_IMPORT_ERROR})",
        )
        expect(device == "cpu", "backend", "'cpp' with tensors on the CPU", device)
    if backend == "triton":
        expect(HAS_TRITON, "backend", "an installed triton", "'triton' without it")
    if backend in ("cpp", "triton"):
        dtypes = KERNEL_DTYPES["cpu" if backend == "cpp" else "cuda"]
        expect(
            query.dtype in dtypes,
            "query",
            f"a dtype that {backend} serves, one of {dtypes}",
            query.dtype,
        )
    return "_" + backend


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    key_mask: Tensor | None = None,
    context_lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    prefix_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query over [prefix ; tokens]; the prefix is read in place.

    `dropout(softmax(scale * query @ [prefix_key ; key]^T)) @ [prefix_value ; value]` (Liu et al.,
    "P-Tuning v2", ACL 2022, section 3.2), without expanding the prefix to the batch or
    concatenating it to the keys and values, forward and backward. Gradients are deterministic.

    Args:
        query: [B, H, T, D], float32, bfloat16 or (on GPUs) float16; D a multiple of 8 up to 256.
        key, value: [B, H_kv, S, D], dtype of query; H is a multiple of H_kv (grouped-query
            attention: query head h reads key/value head h // (H / H_kv)). T, S and P may be 0.
        prefix_key, prefix_value: [H_kv, P, D], shared by the batch; cast to query's dtype.
        key_mask: bool [B, S], True = attend (padding). Prefix columns are always visible.
        context_lengths: int32 [B]; row i sees token column j when j < context_lengths[b] or j <= i
            (GLM's prefix-LM; 0 = causal). None: bidirectional. Needs S = T.
        window: row i sees token columns with |i - j| <= window. Needs S = T.
        scale: factor on the scores, default D ** -0.5.
        dropout_p: dropout on probabilities, prefix columns included.
        prefix_dropout_p: element-wise dropout on prefix_key and prefix_value, a mask per sequence.
        seed: int64 tensor [1] that fixes the dropout masks; drawn from torch's generator when None.
        check: on a GPU too, check the values of context_lengths, which waits for the device; on a
            CPU they always are.
        backend: "reference", "cpp", "triton" or "split" forces one; None chooses by device. "split"
            serves no dropout, context_lengths or window.

    Returns:
        [B, H, T, D] in query's dtype, whose [B, T, H, D] view is contiguous. A row without a
        visible column gives 0.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    tensors = (query, key, value, prefix_key, prefix_value)
    rates = (scale, dropout_p, prefix_dropout_p)
    return _attend(
        tensors, rates, key_mask, context_lengths, window, seed, check, backend, lse_counts=False
    )[0]


def prefix_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    key_mask: Tensor | None = None,
    context_lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    prefix_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    check: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `prefix_attention`, with the log-sum-exp of the scores of each row; both differentiable.

    Two results over disjoint columns merge by lse. "split" gives no gradient of lse.

    Returns:
        out, and lse [B, H, T] in float32 (float64 for float64 inputs): natural logarithm, dropout
        not applied, -inf for a row without a visible column.
    """
    tensors = (query, key, value, prefix_key, prefix_value)
    rates = (scale, dropout_p, prefix_dropout_p)
    return _attend(
        tensors, rates, key_mask, context_lengths, window, seed, check, backend, lse_counts=True
    )


def _attend(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    rates: tuple[float | None, float, float],  # scale, dropout_p, prefix_dropout_p
    key_mask: Tensor | None,
    context_lengths: Tensor | None,
    window: int | None,
    seed: Tensor | None,
    check: bool,
    backend: str | None,
    lse_counts: bool,
) -> tuple[Tensor, Tensor]:
    """out and lse; the gradient of lse is passed on when `lse_counts`."""
    query, key, value, prefix_key, prefix_value = tensors
    scale, dropout_p, prefix_dropout_p = rates
    ps = {"dropout_p": dropout_p, "prefix_dropout_p": prefix_dropout_p}
    validate(query, key, value, prefix_key, prefix_value, key_mask, ps, seed)
    validate_visibility(query, key, context_lengths, window, check)
    suffix = _resolve_suffix(backend, query)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if seed is None and (dropout_p > 0 or prefix_dropout_p > 0):
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
    prefix_key, prefix_value = prefix_key.to(query.dtype), prefix_value.to(query.dtype)
    raw_rates = (scale, float(dropout_p), float(prefix_dropout_p))
    limit = -1 if window is None else window
    tensors = (query, key, value, prefix_key, prefix_value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _PrefixAttention.apply(
            *tensors, key_mask, seed, context_lengths, suffix, raw_rates, limit, lse_counts
        )
    forward_op = getattr(torch.ops.ptv2, "prefix_attention_forward" + suffix)
    return forward_op(*tensors, key_mask, seed, *raw_rates, context_lengths, limit)
