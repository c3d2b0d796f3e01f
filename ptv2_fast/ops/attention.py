"""The public operator: validation, autograd and the choice of a backend."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptv2_fast.ops.options import AttentionOptions
from ptv2_fast.ops.registration import (
    BACKENDS,
    CPP_IMPORT_ERROR,
    HAS_TRITON,
    KERNEL_DTYPES,
    POSITION_BACKENDS,
)
from ptv2_fast.ops.validation import (
    argument_error,
    described,
    validate_options,
    validate_positions,
    validate_tensors,
    validate_values,
    values_are_known,
)

_MAX_WINDOW = 2**30  # tokens


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        tensors, options, (suffix, lse_counts) = arguments[:5], arguments[5:-2], arguments[-2:]
        out, lse = _RAW_OPERATORS["forward", suffix](*_with_bank(*tensors), *options)
        # None saves as None, and the others are put back between: no tensor rides on ctx itself.
        saved, plain = [], []
        for option in options:
            is_tensor = isinstance(option, Tensor)
            saved.append(option if is_tensor else None)
            plain.append(None if is_tensor else option)
        ctx.save_for_backward(*tensors, out, lse, *saved)
        ctx.plain_options, ctx.suffix, ctx.lse_counts = plain, suffix, lse_counts
        if not lse_counts:
            ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        saved = ctx.saved_tensors  # once: checkpointing recomputes on the first look only
        tensors, (out, lse), saved_options = saved[:5], saved[5:7], saved[7:]
        options = [
            plain if tensor is None else tensor
            for plain, tensor in zip(ctx.plain_options, saved_options, strict=True)
        ]
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros_like(out)
        # The gate is the last option.
        needs = (*ctx.needs_input_grad[:5], ctx.needs_input_grad[4 + len(options)])
        needed = (needs[0], needs[1] or needs[2], any(needs[3:]))
        grad_lse = grad_lse if ctx.lse_counts else None  # compiled graphs send zeros
        backward = _RAW_OPERATORS["backward", ctx.suffix]
        gradients = backward(
            grad_out, *_with_bank(*tensors), out, lse, grad_lse, *needed, False, *options
        )
        wanted = [grad if need else None for grad, need in zip(gradients, needs, strict=True)]
        of_gate = wanted.pop()
        if tensors[3].dim() == 3:
            wanted[3:] = [None if grad is None else grad.squeeze(0) for grad in wanted[3:]]
        return *wanted, *[None] * (len(options) - 1), of_gate, None, None


class Positions(NamedTuple):
    """What disentangled attention takes beside; `disentangled_prefix_attention` explains it."""

    key: Tensor | None  # [H, slots, D]
    query: Tensor | None
    slots: Tensor  # int32 [2 M - 1]


_RAW_OPERATORS = {
    (way, suffix): getattr(torch.ops.ptv2, f"prefix_attention_{way}{suffix}").default
    for way in ("forward", "backward")
    for suffix in ("", *("_" + backend for backend in BACKENDS))
}


def _with_bank(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of the raw operators, to whom a shared prefix is a bank of one row."""
    if prefix_key.dim() == 3:
        prefix_key, prefix_value = prefix_key.unsqueeze(0), prefix_value.unsqueeze(0)
    return query, key, value, prefix_key, prefix_value


def _gate_of_bank(gate: Tensor | None, prefix_key: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gate of the raw operators, [R, H] in the dtype of lse."""
    if gate is None:
        return None
    gate = gate.to(torch.promote_types(dtype, torch.float32))
    return gate.unsqueeze(0) if prefix_key.dim() == 3 else gate


def _resolve_suffix(backend: str | None, query: Tensor, has_positions: bool) -> str:
    """The suffix of the raw operators that serve this call; "" lets the dispatcher choose."""
    device = query.device.type
    if backend is None:
        served = KERNEL_DTYPES.get(device)
        return "" if served is None or query.dtype in served else "_reference"
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise argument_error("backend", f"None or one of {BACKENDS}", described(backend))
    if has_positions and backend not in POSITION_BACKENDS:
        raise argument_error("backend", f"None or one of {POSITION_BACKENDS}", described(backend))
    if backend == "cpp":
        if CPP_IMPORT_ERROR is not None:
            actual = f"'cpp' without it ({CPP_IMPORT_ERROR})"
            raise argument_error("backend", "a build with the C++ extension", actual)
        if device != "cpu":
            raise argument_error("backend", "'cpp' with tensors on the CPU", device)
    if backend == "triton" and not HAS_TRITON:
        raise argument_error("backend", "an installed triton", "'triton' without it")
    if backend in ("cpp", "triton"):
        dtypes = KERNEL_DTYPES["cpu" if backend == "cpp" else "cuda"]
        if query.dtype not in dtypes:
            expected = f"a dtype that {backend} serves, one of {dtypes}"
            raise argument_error("query", expected, query.dtype)
    return "_" + backend


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    context_lengths: Tensor | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    prefix_dropout_p: float = 0.0,
    prefix_gate: Tensor | None = None,
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
            Packed: [N, H, D].
        key, value: [B, H_kv, S, D], dtype of query; H is a multiple of H_kv (grouped-query
            attention: query head h reads key/value head h // (H / H_kv)). T, S and P may be 0.
            Packed: [N, H_kv, D].
        prefix_key, prefix_value: [H_kv, P, D], shared by the batch, or a bank [R, H_kv, P, D] of
            which each sequence reads one row; cast to query's dtype.
        key_mask: bool [B, S], True = attend (padding). Prefix columns are always visible. Not in
            the packed layout, which has no padding.
        cu_seqlens: int32 [B + 1]: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] of the
            packed layout; the last entry is N. The result is that of the padded call to the bit.
        max_seqlen: with cu_seqlens, a length that no sequence exceeds.
        prefix_index: int32 [B], the row of the bank that each sequence reads.
        prefix_lengths: int32 [R]: only the first columns of a row of the bank exist. What lies
            behind them is not read, and its gradient is 0.
        context_lengths: int32 [B]; token column j is visible to row i when j < context_lengths[b]
            or j <= i (GLM's prefix-LM; 0 = causal). None: bidirectional. Needs S = T.
        window: token columns with |i - j| <= window are visible to row i. Needs S = T.
        bias: [1 or B, H, T, S], query's dtype or float32, added to the scores of token columns
            (T5, MPNet); it has no gradient. Packed: T and S are max_seqlen.
        scale: factor on the scores, a finite number, default D ** -0.5.
        dropout_p: dropout on probabilities, prefix columns included.
        prefix_dropout_p: element-wise dropout on prefix_key and prefix_value, a mask per sequence.
        prefix_gate: [H], with a bank [R, H], numbers >= 0 that the weights of all prefix columns of
            a query head are multiplied by before they are divided by their sum: the logit offset
            log(prefix_gate) on their scores. It has a gradient. A head whose gate is 0 gives what
            it gives without a prefix ("cpp" to the bit, "triton" too where tiles are the same), and
            its gate trains: the gradient is that of the gate and not of its logarithm, which would
            be 0 there. Computed in float32.
        seed: int64 tensor [1] that fixes the dropout masks; drawn from torch's generator when None.
        check: on a GPU too, check the values of cu_seqlens, prefix_index, prefix_lengths and
            context_lengths, which waits for the device; on a CPU they always are.
        backend: "reference", "cpp", "triton" or "split" forces one; None chooses by device. "split"
            serves no dropout, bank, packed layout, context_lengths, window or bias.

    Returns:
        [B, H, T, D] in query's dtype, whose [B, T, H, D] view is contiguous; packed [N, H, D]. A
        row without a visible column gives 0, one with a visible score of NaN or inf gives NaN.
        Masked tokens count nothing as long as what they hold is finite: 0 times NaN is NaN.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    return attend(
        (query, key, value, prefix_key, prefix_value), False, check, backend,
        key_mask, cu_seqlens, max_seqlen, prefix_index, prefix_lengths, context_lengths, window,
        bias, scale, dropout_p, prefix_dropout_p, prefix_gate, seed,
    )[0]  # fmt: skip


def prefix_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    context_lengths: Tensor | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    prefix_dropout_p: float = 0.0,
    prefix_gate: Tensor | None = None,
    seed: Tensor | None = None,
    check: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `prefix_attention`, with the log-sum-exp of the scores of each row; both differentiable.

    Two results over disjoint columns merge by lse. "split" gives no gradient of lse.

    Returns:
        out, and lse [B, H, T] (packed [N, H]) in float32 (float64 for float64 inputs): natural
        logarithm, dropout not applied, -inf for a row without a visible column.
    """
    return attend(
        (query, key, value, prefix_key, prefix_value), True, check, backend,
        key_mask, cu_seqlens, max_seqlen, prefix_index, prefix_lengths, context_lengths, window,
        bias, scale, dropout_p, prefix_dropout_p, prefix_gate, seed,
    )  # fmt: skip


def attend(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    lse_counts: bool,  # the gradient of lse is passed on
    check: bool,
    backend: str | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    context_lengths: Tensor | None,
    window: int | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
    prefix_dropout_p: float,
    prefix_gate: Tensor | None,
    seed: Tensor | None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    """What all public functions do: checks, the choice of a backend, autograd; out and lse."""
    query, key, value, prefix_key, prefix_value = tensors
    sizes = validate_tensors(query, key, value, prefix_key, prefix_value, cu_seqlens, max_seqlen)
    validate_options(
        sizes, key_mask, prefix_index, prefix_lengths, context_lengths, window, bias,
        scale, dropout_p, prefix_dropout_p, prefix_gate, seed,
    )  # fmt: skip
    of_key, of_query, slots = (None, None, None) if positions is None else positions
    slot_count = 0 if positions is None else validate_positions(sizes, key, *positions)
    if not isinstance(check, bool):
        raise argument_error("check", "a bool", described(check))
    if window is not None:  # a wider one hides nothing, and kernels add it to positions
        window = min(window, _MAX_WINDOW)
    if (check or query.device.type == "cpu") and values_are_known(query):
        validate_values(
            sizes, cu_seqlens, prefix_index, prefix_lengths, context_lengths, prefix_gate,
            slots, slot_count,
        )  # fmt: skip
    # A generous bound would cost memory and time. To a bias or context lengths it means something.
    is_bound_only = bias is None and context_lengths is None
    if max_seqlen is not None and is_bound_only and values_are_known(query):
        max_seqlen = min(max_seqlen, query.shape[0])
    suffix = _resolve_suffix(backend, query, positions is not None)
    if seed is None and (dropout_p > 0 or prefix_dropout_p > 0):
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
    options = AttentionOptions(
        key_mask,
        seed,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        float(dropout_p),
        float(prefix_dropout_p),
        context_lengths,
        -1 if window is None else window,
        prefix_index,
        prefix_lengths,
        cu_seqlens,
        0 if max_seqlen is None else max_seqlen,
        bias,
        of_key,
        of_query,
        slots,
        _gate_of_bank(prefix_gate, prefix_key, query.dtype),
    )
    prefix_key, prefix_value = prefix_key.to(query.dtype), prefix_value.to(query.dtype)
    tensors = (query, key, value, prefix_key, prefix_value)
    trained = tensors if prefix_gate is None else (*tensors, prefix_gate)
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in trained]):
        return _PrefixAttention.apply(*tensors, *options, suffix, lse_counts)
    return _RAW_OPERATORS["forward", suffix](*_with_bank(*tensors), *options)
