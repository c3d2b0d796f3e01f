"""The public operator: validation, autograd and the choice of a backend."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptv2_fast.ops.registration import BACKENDS, CPP_IMPORT_ERROR, HAS_TRITON, KERNEL_DTYPES
from ptv2_fast.ops.validation import expect, validate


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, key_mask, seed, suffix, options):
        forward_op = getattr(torch.ops.ptv2, "prefix_attention_forward" + suffix)
        out, lse = forward_op(query, key, value, prefix_key, prefix_value, key_mask, seed, *options)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, out, lse, key_mask, seed)
        ctx.suffix, ctx.options = suffix, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        needs_query, *needs_others = ctx.needs_input_grad[:5]
        needed = (needs_query, any(needs_others[:2]), any(needs_others[2:]))
        backward_op = getattr(torch.ops.ptv2, "prefix_attention_backward" + ctx.suffix)
        gradients = backward_op(grad_out, *ctx.saved_tensors, *ctx.options, *needed)
        return (
            *(
                gradient if need else None
                for gradient, need in zip(gradients, ctx.needs_input_grad[:5], strict=True)
            ),
            None,
            None,
            None,
            None,
        )


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
    scale: float | None = None,
    dropout_p: float = 0.0,
    prefix_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query over [prefix ; tokens]; the prefix is read in place.

    `dropout(softmax(scale * query @ [prefix_key ; key]^T)) @ [prefix_value ; value]` (Liu et al.,
    "P-Tuning v2", ACL 2022, section 3.2), without expanding the prefix to the batch or
    concatenating it to the keys and values, forward and backward. Gradients are deterministic.

    Args:
        query: [B, H, T, D], float32, bfloat16 or (on GPUs) float16; D a multiple of 8 up to 256.
        key, value: [B, H, S, D], dtype of query. T, S and P may be 0.
        prefix_key, prefix_value: [H, P, D], shared by the batch; cast to query's dtype.
        key_mask: bool [B, S], True = attend (padding). Prefix columns are always visible.
        scale: factor on the scores, default D ** -0.5.
        dropout_p: dropout on probabilities, prefix columns included.
        prefix_dropout_p: element-wise dropout on prefix_key and prefix_value, a mask per sequence.
        seed: int64 tensor [1] that fixes the dropout masks; drawn from torch's generator when None.
        backend: "reference", "cpp", "triton" or "split" forces one; None chooses by device.

    Returns:
        [B, H, T, D] in query's dtype, whose [B, T, H, D] view is contiguous. A row without a
        visible column gives 0.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    ps = {"dropout_p": dropout_p, "prefix_dropout_p": prefix_dropout_p}
    validate(query, key, value, prefix_key, prefix_value, key_mask, ps, seed)
    suffix = _resolve_suffix(backend, query)
    if backend == "split":
        for name, p in ps.items():
            expect(p == 0.0, name, "0.0 with backend='split', which serves no dropout", p)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if seed is None and (dropout_p > 0 or prefix_dropout_p > 0):
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
    prefix_key, prefix_value = prefix_key.to(query.dtype), prefix_value.to(query.dtype)
    options = (scale, float(dropout_p), float(prefix_dropout_p))
    tensors = (query, key, value, prefix_key, prefix_value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _PrefixAttention.apply(*tensors, key_mask, seed, suffix, options)
    forward_op = getattr(torch.ops.ptv2, "prefix_attention_forward" + suffix)
    return forward_op(*tensors, key_mask, seed, *options)[0]
