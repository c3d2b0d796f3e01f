"""Dropout + add + norm, its gradient and its parts, in plain torch.

These definitions are what the kernels of `ptv2::dropout_add_norm` and its kin are held to; see
elementwise.py for the names of dtypes. All compute in fp32 (float64 for float64) and round once,
and no gradient goes to a weight.

What all take that know dropout:
    seed: int64 [1]; with `coordinates` int32 [R, 2], the (sequence, row in it) of each row, it
        fixes the dropout mask. Both may be None when dropout_p is 0.
    dropout_p: in [0, 1).
    stream: of ops/dropout.py.
"""

import torch
from torch import Tensor

from ptv2_fast.ops.dropout import row_dropout_multiplier
from ptv2_fast.ops.layout import widened


def dropout_add_norm(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    beta: Tensor | None,
    epsilon: float,
    subtract_mean: bool,
    seed: Tensor | None,
    coordinates: Tensor | None,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm(residual + dropout(input + bias)) by LayerNorm, or by RMSNorm, which takes no mean.

    The statistics are those of the *rounded* total, so that `norm_from_stats` repeats `out` to the
    bit.

    Args:
        input: X [R, C], contiguous.
        bias: fp32 [C].
        residual: R [R, C], contiguous.
        weight, beta: fp32 [C], the affine part of the norm; without beta nothing is added.
        epsilon: added to the variance, or to the mean of the squares.
        subtract_mean: LayerNorm, and not RMSNorm.

    Returns:
        out R [R, C]; total R [R, C], the sum that was normalised; statistics fp32 [R, 2]: the mean
        (0 for RMSNorm) and 1 / sqrt(variance or mean of squares + epsilon) of each row of total.
    """
    dropout = (seed, coordinates, dropout_p, stream)
    total = dropout_add(input, bias, residual, *dropout)
    wide = widened(total)
    if subtract_mean:
        variance, mean = torch.var_mean(wide, dim=1, correction=0)
    else:
        variance = wide.square().mean(1)
        mean = torch.zeros_like(variance)
    statistics = torch.stack((mean, torch.rsqrt(variance + epsilon)), dim=1)
    return norm_from_stats(total, statistics, weight, beta), total, statistics


def dropout_add_norm_backward(
    grad_out: Tensor | None,
    grad_other: Tensor | None,
    grad_total: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    weight: Tensor,
    subtract_mean: bool,
    seed: Tensor | None,
    coordinates: Tensor | None,
    dropout_p: float,
    stream: int,
    input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of `dropout_add_norm`'s residual and input.

    Args:
        grad_out: R [R, C], a gradient of `out`.
        grad_other: X [R, C], another one that is added to it first; one of the two is given.
        grad_total: R [R, C], a gradient of `total` that does not pass the norm; it is added to the
            one that does.
        input_dtype: X.
        others: as in the forward.

    Returns:
        grad_residual R [R, C]; grad_input X [R, C], empty(0) where it would be grad_residual again:
        without dropout and with X = R.

    Raises:
        ValueError: without a gradient of `out`.
    """
    given = [widened(grad) for grad in (grad_out, grad_other) if grad is not None]
    if not given:
        raise ValueError("grad_out, grad_other: expected at least one of the two, got None twice")
    rstd = statistics[:, 1:]
    normal = (widened(total) - statistics[:, :1]) * rstd
    scaled = sum(given[1:], given[0]) * weight
    inner = scaled - normal * (scaled * normal).mean(1, keepdim=True)
    if subtract_mean:
        inner = inner - scaled.mean(1, keepdim=True)
    grad = rstd * inner
    if grad_total is not None:
        grad = grad + widened(grad_total)
    grad_residual = grad.to(total.dtype)
    if _is_same(total, dropout_p, input_dtype):
        return grad_residual, total.new_empty(0)
    return grad_residual, _dropped(grad, seed, coordinates, dropout_p, stream).to(input_dtype)


def norm_from_stats(
    total: Tensor, statistics: Tensor, weight: Tensor, beta: Tensor | None
) -> Tensor:
    """The `out` of `dropout_add_norm`, to the bit, from its total and statistics."""
    scaled = (widened(total) - statistics[:, :1]) * statistics[:, 1:] * weight
    return (scaled if beta is None else scaled + beta).to(total.dtype)


def dropout_add(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    seed: Tensor | None,
    coordinates: Tensor | None,
    dropout_p: float,
    stream: int,
) -> Tensor:
    """The `total` of `dropout_add_norm` where no norm follows: residual + dropout(input + bias)."""
    added = widened(input) if bias is None else widened(input) + bias
    added = _dropped(added, seed, coordinates, dropout_p, stream)
    return (widened(residual) + added).to(residual.dtype)


def dropout_backward(
    grad_total: Tensor,
    seed: Tensor | None,
    coordinates: Tensor | None,
    dropout_p: float,
    stream: int,
    input_dtype: torch.dtype,
) -> Tensor:
    """The gradient of `dropout_add`'s input, X [R, C]; that of its residual is grad_total R [R, C].

    Returns:
        empty(0) where it would be grad_total again: without dropout and with X = R.
    """
    if _is_same(grad_total, dropout_p, input_dtype):
        return grad_total.new_empty(0)
    return _dropped(widened(grad_total), seed, coordinates, dropout_p, stream).to(input_dtype)


def _is_same(grad_residual: Tensor, dropout_p: float, input_dtype: torch.dtype) -> bool:
    return dropout_p == 0.0 and input_dtype == grad_residual.dtype


def _dropped(
    values: Tensor,
    seed: Tensor | None,
    coordinates: Tensor | None,
    dropout_p: float,
    stream: int,
) -> Tensor:
    if dropout_p == 0.0:
        return values
    return values * row_dropout_multiplier(
        values.shape[1], dropout_p, seed, coordinates, stream, values.dtype
    )
