"""RMSNorms of the heads of queries and keys, and their gradient."""

from typing import Any

import torch
from torch import Tensor

from ptv2_fast.frozen.modules import Norm
from ptv2_fast.ops.layout import widened


def normalise_heads(heads: Tensor, norm: Norm, ops: Any) -> Tensor:
    """[R, heads, head_dim], each head in its norm; `ops` are the elementwise operators."""
    rows = heads.reshape(-1, heads.shape[-1]).contiguous()
    return ops.norm_from_stats(rows, _stats(rows, norm), norm.weight, norm.beta).view(heads.shape)


def normalise_heads_gradient(grad_out: Tensor, heads: Tensor, norm: Norm, ops: Any) -> Tensor:
    """The gradient of `heads`, contiguous; `grad_out` is that of the normalised ones."""
    rows = heads.reshape(-1, heads.shape[-1]).contiguous()
    grad_rows = grad_out.reshape(rows.shape).contiguous()
    gradient, _ = ops.dropout_add_norm_backward(
        grad_rows, None, None, rows, stats_of_heads(heads, norm), norm.weight, False, None, None,
        0.0, 0, rows.dtype,
    )  # fmt: skip
    return gradient.view(heads.shape)


def stats_of_heads(heads: Tensor, norm: Norm) -> Tensor:
    """Of [R, heads, head_dim], as `norm_from_stats` wants them, [R * heads, 2]."""
    return _stats(heads.reshape(-1, heads.shape[-1]).contiguous(), norm)


def _stats(rows: Tensor, norm: Norm) -> Tensor:
    """[rows, 2], mean (0 in an RMSNorm) and 1 / deviation."""
    mean_square = widened(rows).square().mean(dim=1)
    scale = torch.rsqrt(mean_square + norm.epsilon)
    return torch.stack((torch.zeros_like(scale), scale), dim=1)
