"""Launchers of the elementwise steps of a frozen block: gelu.py and layer_norm.py.

They take the arguments of the operators of `ptv2_fast.ops.elementwise`, which define the results.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ptv2_kernels import gelu
from ptv2_kernels.configs import COMPILER_OPTIONS, row_options
from ptv2_kernels.layer_norm import (
    _dropout_add_layer_norm_backward_kernel,
    _dropout_add_layer_norm_kernel,
    _layer_norm_again_kernel,
)


class HiddenDropout(NamedTuple):
    """Dropout of hidden states, as a kernel takes it; None = without it."""

    seed_ptr: Tensor | None  # int64 [1]
    coordinates_ptr: Tensor | None  # int32 [R, 2]: sequence, row in it
    threshold: int | None  # a 16-bit decision below it drops
    multiplier: float  # of what is kept
    stream: int


def _dropout(
    seed: Tensor | None, coordinates: Tensor | None, dropout_p: float, stream: int
) -> HiddenDropout:
    if dropout_p == 0.0:
        return HiddenDropout(None, None, None, 1.0, 0)
    assert seed is not None and coordinates is not None
    multiplier = 1.0 / (1.0 - dropout_p)
    threshold = round(65536 * dropout_p)
    return HiddenDropout(seed, coordinates.contiguous(), threshold, multiplier, stream)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _launch_gelu(kernel, rows_and_columns: torch.Size, *tensors: Tensor | None) -> None:
    rows, columns = rows_and_columns
    if rows * columns == 0:
        return
    tiles = triton.cdiv(rows, gelu.BLOCK_ROWS) * triton.cdiv(columns, gelu.BLOCK_COLUMNS)
    kernel[(tiles,)](
        *tensors,
        rows,
        COLUMNS=columns,
        BLOCK_ROWS=gelu.BLOCK_ROWS,
        BLOCK_COLUMNS=gelu.BLOCK_COLUMNS,
        num_warps=4,
        **COMPILER_OPTIONS,
    )


def _launch_rows(kernel, rows_and_columns: torch.Size, *arguments) -> None:
    rows, columns = rows_and_columns
    if rows * columns == 0:
        return
    kernel[lambda meta: (triton.cdiv(rows, meta["BLOCK_ROWS"]),)](
        *arguments, rows, COLUMNS=columns, **row_options(columns)
    )


def launch_bias_gelu(input: Tensor, bias: Tensor | None) -> Tensor:
    input = input.contiguous()
    out = torch.empty_like(input)
    _launch_gelu(gelu._bias_gelu_kernel, input.shape, input, _contiguous(bias), out)
    return out


def launch_bias_gelu_backward(grad_out: Tensor, input: Tensor, bias: Tensor | None) -> Tensor:
    input = input.contiguous()
    grad_input = torch.empty_like(input)
    tensors = (grad_out.contiguous(), input, _contiguous(bias), grad_input)
    _launch_gelu(gelu._bias_gelu_backward_kernel, input.shape, *tensors)
    return grad_input


def launch_dropout_add_layer_norm(
    input: Tensor,  # [R, C]
    bias: Tensor | None,  # float32 [C]
    residual: Tensor,  # [R, C]
    weight: Tensor,  # float32 [C]
    beta: Tensor,
    epsilon: float,
    seed: Tensor | None,  # int64 [1]
    coordinates: Tensor | None,  # int32 [R, 2]
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out and total [R, C], statistics float32 [R, 2]."""
    residual = residual.contiguous()
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    statistics = residual.new_empty((residual.shape[0], 2), dtype=torch.float32)
    _launch_rows(
        _dropout_add_layer_norm_kernel,
        residual.shape,
        input.contiguous(),
        _contiguous(bias),
        residual,
        weight.contiguous(),
        beta.contiguous(),
        out,
        total,
        statistics,
        _dropout(seed, coordinates, dropout_p, stream),
        epsilon,
    )
    return out, total, statistics


def launch_dropout_add_layer_norm_backward(
    grad_out: Tensor,  # [R, C]
    grad_other: Tensor | None,  # [R, C], of input_dtype
    total: Tensor,  # [R, C]
    statistics: Tensor,  # float32 [R, 2]
    weight: Tensor,  # float32 [C]
    seed: Tensor | None,  # int64 [1]
    coordinates: Tensor | None,  # int32 [R, 2]
    dropout_p: float,
    stream: int,
    input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """grad_residual and grad_input [R, C]; empty(0) where grad_input would be the same again."""
    total = total.contiguous()
    grad_residual = torch.empty_like(total)
    is_same = dropout_p == 0.0 and input_dtype == total.dtype
    grad_input = total.new_empty(0 if is_same else total.shape, dtype=input_dtype)
    _launch_rows(
        _dropout_add_layer_norm_backward_kernel,
        total.shape,
        grad_out.contiguous(),
        _contiguous(grad_other),
        total,
        statistics.contiguous(),
        weight.contiguous(),
        grad_residual,
        None if is_same else grad_input,
        _dropout(seed, coordinates, dropout_p, stream),
    )
    return grad_residual, grad_input


def launch_layer_norm_again(
    total: Tensor, statistics: Tensor, weight: Tensor, beta: Tensor
) -> Tensor:
    total = total.contiguous()
    out = torch.empty_like(total)
    _launch_rows(
        _layer_norm_again_kernel,
        total.shape,
        total,
        statistics.contiguous(),
        weight.contiguous(),
        beta.contiguous(),
        out,
    )
    return out
