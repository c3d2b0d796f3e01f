"""Calls of the Triton launchers that stand for what is shipped, by the names in LAYOUTS.

The tensors hold zeros, since these calls are compiled, counted and recorded, never compared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptv2_fast.ops.options import AttentionOptions
from ptv2_kernels import elementwise
from ptv2_kernels.backward import launch_backward
from ptv2_kernels.forward import launch_forward

LAYOUTS = ("padded", "short_prefix", "rows", "packed", "biased", "positions", "gated")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    heads: int = 3
    tokens: int = 200
    prefix: int = 100
    head_dim: int = 64
    rows_of_bank: int = 1
    group: int = 1  # query heads per key/value head
    queries: int | None = None  # None = tokens


@dataclass(frozen=True)
class Call:
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    options: AttentionOptions

    def forward(self) -> tuple[Tensor, Tensor]:
        return launch_forward(*self.tensors, *self.options)

    def backward(
        self,
        out: Tensor,
        lse: Tensor,
        *,
        needs_query: bool = True,
        needs_key_value: bool = True,
        needs_prefix: bool = True,
        joint: bool = False,
        grad_lse: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        needs = (needs_query, needs_key_value, needs_prefix, joint)
        grad_out = torch.zeros_like(out)
        return launch_backward(grad_out, *self.tensors, out, lse, grad_lse, *needs, *self.options)

    def both(self, **needs: bool) -> None:
        out, lse = self.forward()
        grad_lse = torch.zeros_like(lse) if self.options.window >= 0 else None
        self.backward(out, lse, grad_lse=grad_lse, **needs)


def _prefixes(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (sizes.rows_of_bank, sizes.heads // sizes.group, sizes.prefix, sizes.head_dim)
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


def _options(sizes: Sizes, dropout_p: float, prefix_dropout_p: float, **others) -> AttentionOptions:
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p or prefix_dropout_p else None
    scale = sizes.head_dim**-0.5
    options = AttentionOptions(
        others.pop("key_mask", None), seed, scale, dropout_p, prefix_dropout_p
    )
    return options._replace(**others)


def padded_call(
    sizes: Sizes = Sizes(),
    dtype: torch.dtype = torch.bfloat16,
    dropout_p: float = 0.0,
    prefix_dropout_p: float = 0.0,
    masked: bool = True,
    **others: object,
) -> Call:
    """[B, H, T, D] whose [B, T, H, D] view is contiguous; nothing else than padding is masked."""

    def zeros(length: int, heads: int) -> Tensor:
        shape = (sizes.batch, length, heads, sizes.head_dim)
        return torch.zeros(shape, dtype=dtype).transpose(1, 2)

    query = zeros(sizes.tokens if sizes.queries is None else sizes.queries, sizes.heads)
    key, value = (zeros(sizes.tokens, sizes.heads // sizes.group) for _ in range(2))
    if masked:
        others["key_mask"] = torch.ones(sizes.batch, sizes.tokens, dtype=torch.bool)
    tensors = (query, key, value, *_prefixes(sizes, dtype))
    return Call(tensors, _options(sizes, dropout_p, prefix_dropout_p, **others))


def packed_call(
    lengths: list[int],
    sizes: Sizes = Sizes(),
    dtype: torch.dtype = torch.bfloat16,
    dropout_p: float = 0.0,
    prefix_dropout_p: float = 0.0,
    **others: object,
) -> Call:
    """[N, H, D] of sequences of these lengths, each with a row of a bank; sizes.batch is unused."""

    def zeros(heads: int) -> Tensor:
        return torch.zeros(sum(lengths), heads, sizes.head_dim, dtype=dtype)

    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    others |= {"cu_seqlens": starts, "max_seqlen": max(lengths)}
    if sizes.rows_of_bank > 1:
        others["prefix_index"] = torch.arange(len(lengths)).remainder(sizes.rows_of_bank).int()
        others["prefix_lengths"] = torch.full((sizes.rows_of_bank,), sizes.prefix).int()
    query = zeros(sizes.heads)
    key, value = (zeros(sizes.heads // sizes.group) for _ in range(2))
    tensors = (query, key, value, *_prefixes(sizes, dtype))
    return Call(tensors, _options(sizes, dropout_p, prefix_dropout_p, **others))


def biased_call(sizes: Sizes, dtype: torch.dtype = torch.bfloat16, *dropout: float) -> Call:
    """Padded, with a bias [1, H, T, S] that the batch shares."""
    bias = torch.zeros(1, sizes.heads, sizes.tokens, sizes.tokens, dtype=dtype)
    return padded_call(sizes, dtype, *dropout, bias=bias)


def position_call(sizes: Sizes, dtype: torch.dtype = torch.bfloat16, *dropout: float) -> Call:
    """Padded, with the tables and the slots of DeBERTa."""
    tables = torch.zeros(2, sizes.heads, 512, sizes.head_dim, dtype=dtype)
    slots = torch.zeros(2 * sizes.tokens - 1, dtype=torch.int32)
    positions = {"position_key": tables[0], "position_query": tables[1], "position_slots": slots}
    return padded_call(sizes, dtype, *dropout, **positions)


def layout_call(
    layout: str, dtype: torch.dtype, head_dim: int, dropout_p: float, prefix_dropout_p: float
) -> Call:
    """`layout` is one of LAYOUTS; rows: grouped heads, context lengths, window, gradient of lse."""
    dropout = (dropout_p, prefix_dropout_p)
    if layout == "padded":
        return padded_call(Sizes(head_dim=head_dim), dtype, *dropout)
    if layout == "short_prefix":
        return padded_call(Sizes(prefix=20, head_dim=head_dim), dtype, *dropout)
    if layout == "rows":
        sizes = Sizes(heads=6, group=2, head_dim=head_dim)
        context = torch.zeros(sizes.batch, dtype=torch.int32)
        return padded_call(sizes, dtype, *dropout, context_lengths=context, window=50)
    if layout == "biased":
        return biased_call(Sizes(head_dim=head_dim), dtype, *dropout)
    if layout == "gated":
        sizes = Sizes(prefix=20, head_dim=head_dim)
        return padded_call(sizes, dtype, *dropout, prefix_gate=torch.zeros(1, sizes.heads))
    if layout == "positions":
        return position_call(Sizes(head_dim=head_dim), dtype, *dropout)
    return packed_call([200, 7, 129], Sizes(rows_of_bank=2, head_dim=head_dim), dtype, *dropout)


@dataclass(frozen=True)
class BlockStyle:
    """What the elementwise operators of a block differ in."""

    activation: str
    subtract_mean: bool  # LayerNorm with beta, else RMSNorm without
    interleaved: bool
    activated_first: bool = True


STYLES = {
    "bert": BlockStyle("gelu", True, False),
    "llama": BlockStyle("silu", False, False),
    "glm": BlockStyle("gelu_tanh", True, True, activated_first=False),
    "t5": BlockStyle("relu", False, True),
    "clip": BlockStyle("quick_gelu", True, False, activated_first=False),
}


def run_elementwise(
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rows: int,
    columns: int,
    dropout_p: float,
    style: BlockStyle = STYLES["bert"],
    head_dim: int = 64,
    rotary_dim: int = 64,
) -> None:
    """Each of the elementwise operators once, with all optional tensors but an RMSNorm's beta.

    Rotated are query and key of packed rows of 3 * columns.
    """
    input = torch.zeros(rows, columns, dtype=input_dtype)
    both, packed = input.repeat(1, 2), input.repeat(1, 3)
    residual = torch.zeros(rows, columns, dtype=residual_dtype)
    bias, weight = torch.zeros(columns), torch.zeros(columns)
    beta = torch.zeros(columns) if style.subtract_mean else None
    seed, coordinates = torch.zeros(1, dtype=torch.int64), torch.zeros(rows, 2, dtype=torch.int32)
    dropout = (seed, coordinates, dropout_p, 5)
    elementwise.launch_bias_activation(input, bias, style.activation)
    grad_out = torch.zeros_like(input)
    elementwise.launch_bias_activation_backward(grad_out, input, bias, style.activation)
    gated = (both, bias.repeat(2), style.activation, style.activated_first)
    elementwise.launch_gated_activation(*gated)
    elementwise.launch_gated_activation_backward(grad_out, *gated)
    norm = (weight, beta, 1e-12, style.subtract_mean)
    out, total, statistics = elementwise.launch_dropout_add_norm(
        input, bias, residual, *norm, *dropout
    )
    elementwise.launch_norm_from_stats(total, statistics, weight, beta)
    gradients = (torch.zeros_like(out), grad_out, torch.zeros_like(total))
    elementwise.launch_dropout_add_norm_backward(
        *gradients, total, statistics, weight, style.subtract_mean, *dropout, input_dtype
    )
    elementwise.launch_dropout_add(input, bias, residual, *dropout)
    elementwise.launch_dropout_backward(gradients[2], *dropout, input_dtype)
    angles = torch.zeros(2, rows, rotary_dim // 2)
    heads = 2 * columns // head_dim
    elementwise.launch_rotate_(packed, *angles, heads, head_dim, style.interleaved, False)
