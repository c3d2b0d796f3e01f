"""Launchers of the elementwise operators of a frozen block.

They take the arguments of the operators of `ptv2_fast.ops.elementwise`, which define the results;
a shape that does not fit is a ValueError.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptv2_kernels.activations import (
    ACTIVATIONS,
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    _bias_activation_backward_kernel,
    _bias_activation_kernel,
)
from ptv2_kernels.configs import COMPILER_OPTIONS, architecture, row_options
from ptv2_kernels.gated_activation import (
    _gated_activation_backward_kernel,
    _gated_activation_kernel,
)
from ptv2_kernels.launching import Launcher
from ptv2_kernels.norms import (
    _dropout_add_norm_backward_kernel,
    _dropout_add_norm_kernel,
    _norm_from_stats_kernel,
)
from ptv2_kernels.residual import _dropout_add_kernel, _dropout_backward_kernel
from ptv2_kernels.rotary import launch_rotate_

__all__ = [
    "launch_bias_activation",
    "launch_bias_activation_backward",
    "launch_dropout_add",
    "launch_dropout_add_norm",
    "launch_dropout_add_norm_backward",
    "launch_dropout_backward",
    "launch_gated_activation",
    "launch_gated_activation_backward",
    "launch_norm_from_stats",
    "launch_rotate_",
]


_bias_activation = Launcher(_bias_activation_kernel)
_bias_activation_backward = Launcher(_bias_activation_backward_kernel)
_gated_activation = Launcher(_gated_activation_kernel)
_gated_activation_backward = Launcher(_gated_activation_backward_kernel)
_dropout_add_norm = Launcher(_dropout_add_norm_kernel)
_dropout_add_norm_backward = Launcher(_dropout_add_norm_backward_kernel)
_norm_from_stats = Launcher(_norm_from_stats_kernel)
_dropout_add = Launcher(_dropout_add_kernel)
_dropout_backward = Launcher(_dropout_backward_kernel)


class HiddenDropout(NamedTuple):
    """Dropout of hidden states, as a kernel takes it; None = without it."""

    seed_ptr: Tensor | None  # int64 [1]
    coordinates_ptr: Tensor | None  # int32 [R, 2]: sequence, row in it
    threshold: int | None  # a 16-bit decision below it drops
    multiplier: float  # of what is kept
    stream: int


def _dropout(
    rows: int, seed: Tensor | None, coordinates: Tensor | None, dropout_p: float, stream: int
) -> HiddenDropout:
    if dropout_p == 0.0:
        return HiddenDropout(None, None, None, 1.0, 0)
    if seed is None or coordinates is None or coordinates.dtype != torch.int32:
        raise ValueError("seed, coordinates: expected int64 [1] and int32 [R, 2] with dropout")
    coordinates = _fitting("coordinates", coordinates, rows, 2)
    threshold = round(65536 * dropout_p)
    return HiddenDropout(seed, coordinates, threshold, 1.0 / (1.0 - dropout_p), stream)


def _fitting(name: str, tensor: Tensor | None, *shape: int) -> Tensor | None:
    """The tensor, dense; what the kernels take for granted would be read beyond its end."""
    if tensor is None:
        return None
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    return _dense(tensor)


def _dense(tensor: Tensor) -> Tensor:
    """Contiguous from a multiple of 16 bytes on.

    What is known of addresses decides which thread holds what of a row, and so the order of sums.
    """
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _launch_columns(
    launch: Launcher,
    rows_and_columns: tuple[int, ...],
    *tensors: Tensor | None,
    **constants: str | bool,
) -> None:
    """`rows_and_columns`: of the result of an activation."""
    rows, columns = rows_and_columns
    options = _column_options(columns, **constants)
    if rows * columns == 0:
        return
    tiles = -(-rows // BLOCK_ROWS) * -(-columns // BLOCK_COLUMNS)
    launch((tiles, 1, 1), options, *tensors, rows)


@functools.cache
def _column_options(columns: int, **constants: str | bool) -> dict[str, object]:
    if constants["ACTIVATION"] not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {constants['ACTIVATION']!r}"
        )
    blocks = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    return {"COLUMNS": columns, **constants, **blocks, "num_warps": 4, **COMPILER_OPTIONS}


def _launch_rows(
    launch: Launcher, rows_and_columns: tuple[int, ...], *arguments, **constants: bool
) -> None:
    rows, columns = rows_and_columns
    if rows * columns == 0:
        return
    options = _row_options(columns, architecture(), **constants)
    launch((-(-rows // options["BLOCK_ROWS"]), 1, 1), options, *arguments, rows)


@functools.cache
def _row_options(columns: int, architecture: str | int, **constants: bool) -> dict[str, Any]:
    return {"COLUMNS": columns, **constants, **row_options(columns, architecture)}


def launch_bias_activation(input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    input = _dense(input)
    out = torch.empty_like(input)
    bias = _fitting("bias", bias, input.shape[1])
    _launch_columns(_bias_activation, input.shape, input, bias, out, ACTIVATION=activation)
    return out


def launch_bias_activation_backward(
    grad_out: Tensor, input: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    input = _dense(input)
    grad_input = torch.empty_like(input)
    _launch_columns(
        _bias_activation_backward, input.shape,
        _fitting("grad_out", grad_out, *input.shape), input,
        _fitting("bias", bias, input.shape[1]), grad_input, ACTIVATION=activation,
    )  # fmt: skip
    return grad_input


def launch_gated_activation(
    input: Tensor, bias: Tensor | None, activation: str, activated_first: bool
) -> Tensor:
    input = _dense(input)  # [R, 2 C]
    out = input.new_empty(_half_of(input))
    _launch_columns(
        _gated_activation, out.shape, input, _fitting("bias", bias, input.shape[1]), out,
        ACTIVATION=activation, ACTIVATED_FIRST=activated_first,
    )  # fmt: skip
    return out


def launch_gated_activation_backward(
    grad_out: Tensor, input: Tensor, bias: Tensor | None, activation: str, activated_first: bool
) -> Tensor:
    input = _dense(input)  # [R, 2 C]
    grad_input = torch.empty_like(input)
    half = _half_of(input)
    _launch_columns(
        _gated_activation_backward, half, _fitting("grad_out", grad_out, *half), input,
        _fitting("bias", bias, input.shape[1]), grad_input,
        ACTIVATION=activation, ACTIVATED_FIRST=activated_first,
    )  # fmt: skip
    return grad_input


def _half_of(input: Tensor) -> tuple[int, int]:
    rows, columns = input.shape
    if columns % 2:
        raise ValueError(f"input: expected an even number of columns, got {columns}")
    return rows, columns // 2


def launch_dropout_add_norm(
    input: Tensor,  # [R, C]
    bias: Tensor | None,  # float32 [C]
    residual: Tensor,  # [R, C]
    weight: Tensor,  # float32 [C]
    beta: Tensor | None,
    epsilon: float,
    subtract_mean: bool,
    seed: Tensor | None,  # int64 [1]
    coordinates: Tensor | None,  # int32 [R, 2]
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out and total [R, C], statistics float32 [R, 2]."""
    residual = _dense(residual)
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    rows, columns = residual.shape
    statistics = torch.empty((rows, 2), dtype=torch.float32, device=residual.device)
    _launch_rows(
        _dropout_add_norm,
        residual.shape,
        _fitting("input", input, rows, columns),
        _fitting("bias", bias, columns),
        residual,
        _fitting("weight", weight, columns),
        _fitting("beta", beta, columns),
        out,
        total,
        statistics,
        _dropout(rows, seed, coordinates, dropout_p, stream),
        epsilon,
        SUBTRACT_MEAN=subtract_mean,
    )
    return out, total, statistics


def launch_dropout_add_norm_backward(
    grad_out: Tensor | None,  # [R, C]
    grad_other: Tensor | None,  # [R, C], of input_dtype
    grad_total: Tensor | None,  # [R, C]
    total: Tensor,  # [R, C]
    statistics: Tensor,  # float32 [R, 2]
    weight: Tensor,  # float32 [C]
    subtract_mean: bool,
    seed: Tensor | None,  # int64 [1]
    coordinates: Tensor | None,  # int32 [R, 2]
    dropout_p: float,
    stream: int,
    input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """grad_residual and grad_input [R, C]; empty(0) where grad_input would be the same again."""
    if grad_out is None and grad_other is None:
        raise ValueError("grad_out, grad_other: expected at least one tensor, got None twice")
    total = _dense(total)
    rows, columns = total.shape
    grad_residual = torch.empty_like(total)
    grad_input = _empty_grad_input(total, dropout_p, input_dtype)
    _launch_rows(
        _dropout_add_norm_backward,
        total.shape,
        _fitting("grad_out", grad_out, rows, columns),
        _fitting("grad_other", grad_other, rows, columns),
        _fitting("grad_total", grad_total, rows, columns),
        total,
        _fitting("statistics", statistics, rows, 2),
        _fitting("weight", weight, columns),
        grad_residual,
        grad_input if grad_input.shape == total.shape else None,
        _dropout(rows, seed, coordinates, dropout_p, stream),
        SUBTRACT_MEAN=subtract_mean,
    )
    return grad_residual, grad_input


def _empty_grad_input(total: Tensor, dropout_p: float, input_dtype: torch.dtype) -> Tensor:
    """Like total in input_dtype; empty(0) where it would hold grad_residual again."""
    is_same = dropout_p == 0.0 and input_dtype == total.dtype
    return total.new_empty(0 if is_same else total.shape, dtype=input_dtype)


def launch_norm_from_stats(
    total: Tensor, statistics: Tensor, weight: Tensor, beta: Tensor | None
) -> Tensor:
    total = _dense(total)
    rows, columns = total.shape
    out = torch.empty_like(total)
    _launch_rows(
        _norm_from_stats,
        total.shape,
        total,
        _fitting("statistics", statistics, rows, 2),
        _fitting("weight", weight, columns),
        _fitting("beta", beta, columns),
        out,
    )
    return out


def launch_dropout_add(
    input: Tensor,  # [R, C]
    bias: Tensor | None,  # float32 [C]
    residual: Tensor,  # [R, C]
    seed: Tensor | None,  # int64 [1]
    coordinates: Tensor | None,  # int32 [R, 2]
    dropout_p: float,
    stream: int,
) -> Tensor:
    residual = _dense(residual)
    total = torch.empty_like(residual)
    _launch_rows(
        _dropout_add,
        residual.shape,
        _fitting("input", input, *residual.shape),
        _fitting("bias", bias, residual.shape[1]),
        residual,
        total,
        _dropout(residual.shape[0], seed, coordinates, dropout_p, stream),
    )
    return total


def launch_dropout_backward(
    grad_total: Tensor,  # [R, C]
    seed: Tensor | None,  # int64 [1]
    coordinates: Tensor | None,  # int32 [R, 2]
    dropout_p: float,
    stream: int,
    input_dtype: torch.dtype,
) -> Tensor:
    """The gradient of input [R, C]; empty(0) where it would be grad_total again."""
    grad_input = _empty_grad_input(grad_total, dropout_p, input_dtype)
    dropout = _dropout(grad_total.shape[0], seed, coordinates, dropout_p, stream)
    if grad_input.shape == grad_total.shape:
        tensors = (_dense(grad_total), grad_input)
        _launch_rows(_dropout_backward, grad_total.shape, *tensors, dropout)
    return grad_input
