"""What bench/gpu/elementwise.py measures: operators, the same in torch, arguments and bytes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.activation_checks import check_activation
from tests.elementwise_cases import DTYPES, EPSILON, Case, exact_statistics
from tests.norm_checks import check_norm_backward, check_norm_forward
from tests.rotary_checks import check_rotations

INNER_COLUMNS = {"cuda": (3072, 4096), "cpu": (96,)}
HIDDEN_COLUMNS = {"cuda": (768, 1024), "cpu": (64,)}
HEAD_DIM = 64  # of what is rotated
aten = torch.ops.aten


def _gelu(biased: Tensor) -> Tensor:
    return F.gelu(biased)


def _gelu_backward(grad_out: Tensor, biased: Tensor) -> Tensor:
    return aten.gelu_backward(grad_out, biased)


def _gated(joint: Tensor) -> Tensor:
    first, second = joint.chunk(2, dim=1)
    return F.silu(first) * second


def _gated_backward(grad_out: Tensor, joint: Tensor) -> Tensor:
    first, second = joint.chunk(2, dim=1)
    grad_first = aten.silu_backward(grad_out * second, first)
    return torch.cat((grad_first, grad_out * F.silu(first)), dim=1)


def _norm(
    dropout_p: float, input: Tensor, residual: Tensor, weight: Tensor, beta: Tensor
) -> Tensor:
    total = residual + F.dropout(input, dropout_p)
    return F.layer_norm(total, total.shape[1:], weight, beta, EPSILON)


def _norm_backward(
    dropout_p: float, grad_out: Tensor, grad_other: Tensor, grad_total: Tensor, total: Tensor,
    mean: Tensor, deviation: Tensor, weight: Tensor, beta: Tensor, mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_residual, _, _ = aten.native_layer_norm_backward(
        grad_out + grad_other, total, total.shape[1:], mean, deviation, weight, beta,
        [True, False, False],
    )  # fmt: skip
    grad_residual = grad_residual + grad_total
    grad_input = grad_residual.to(grad_other.dtype)
    if dropout_p > 0.0:
        grad_input = aten.native_dropout_backward(grad_input, mask, 1 / (1 - dropout_p))
    return grad_residual, grad_input


def _rms_norm(
    dropout_p: float, input: Tensor, residual: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(input, dropout_p)
    return F.rms_norm(total, total.shape[1:], weight, EPSILON), total


def _norm_again(total: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(total, total.shape[1:], weight, beta, EPSILON)


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """heads: [R, heads, head_dim]; cosine, sine: [R, 1, head_dim]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine


def _gelu_arguments(case: Case) -> tuple[tuple, tuple]:
    return (case.input, case.bias, "gelu"), (case.input,)


def _gelu_backward_arguments(case: Case) -> tuple[tuple, tuple]:
    return (case.grad_other, case.input, case.bias, "gelu"), (case.grad_other, case.input)


def _gated_arguments(case: Case) -> tuple[tuple, tuple]:
    joint, bias = case.doubled
    return (joint, bias, "silu", True), (joint,)


def _gated_backward_arguments(case: Case) -> tuple[tuple, tuple]:
    joint, bias = case.doubled
    return (case.grad_other, joint, bias, "silu", True), (case.grad_other, joint)


def _affine(case: Case) -> tuple[Tensor, Tensor]:
    """In the residual stream's dtype, as an encoder holds them."""
    return case.weight.to(case.residual.dtype), case.beta.to(case.residual.dtype)


def _norm_arguments(case: Case) -> tuple[tuple, tuple]:
    return case.forward, (case.input, case.residual, *_affine(case))


def _rms_norm_arguments(case: Case) -> tuple[tuple, tuple]:
    case = replace(case, subtract_mean=False, beta=None)
    return case.forward, (case.input, case.residual, case.weight.to(case.residual.dtype))


def _norm_backward_arguments(case: Case) -> tuple[tuple, tuple]:
    weight, beta = _affine(case)
    _, mean, deviation = aten.native_layer_norm(
        case.total, case.total.shape[1:], weight, beta, EPSILON
    )
    mask = torch.rand(case.input.shape, device=case.input.device) >= case.dropout_p
    saved = case.total, mean, deviation, weight, beta, mask
    return case.backward, (case.grad_out, case.grad_other, case.grad_total, *saved)


def _again_arguments(case: Case) -> tuple[tuple, tuple]:
    return case.again, (case.total, *_affine(case))


def _rotation_arguments(case: Case) -> tuple[tuple, tuple]:
    """The heads are rotated again and again; that changes no speed."""
    rows, columns = case.input.shape
    angle = torch.rand(rows, HEAD_DIM // 2, device=case.input.device)
    cosine, sine = angle.cos(), angle.sin()
    packed = case.input.clone()
    ours = packed, cosine, sine, columns // HEAD_DIM, HEAD_DIM, False, False
    wide = (part.repeat(1, 2)[:, None].to(packed.dtype) for part in (cosine, sine))
    return ours, (packed.unflatten(1, (-1, HEAD_DIM)), *wide)


def _activation_bytes(tensors: int, vectors: int, case: Case) -> int:
    """`tensors` of the result's size without gate, `vectors` of its length."""
    rows, columns = case.input.shape
    return tensors * rows * columns * case.input.element_size() + 4 * columns * vectors


def _norm_bytes(inputs: int, residuals: int, vectors: int, case: Case) -> int:
    """`inputs`, `residuals`, `vectors`: tensors of input's and residual's dtype, of length C."""
    rows, columns = case.input.shape
    per_row = columns * (
        inputs * case.input.element_size() + residuals * case.residual.element_size()
    )
    return rows * (per_row + 8 + 8 * (case.dropout_p > 0.0)) + 4 * columns * vectors


def _norm_backward_bytes(case: Case) -> int:
    is_same = case.dropout_p == 0.0 and case.input.dtype == case.residual.dtype
    return _norm_bytes(1 if is_same else 2, 4, 1, case)


def _rotation_bytes(case: Case) -> int:
    rows, columns = case.input.shape
    return rows * (2 * columns * case.input.element_size() + 4 * HEAD_DIM)


def _check_gelu(backend: str, case: Case) -> float:
    return check_activation(backend, case, "gelu", None)


def _check_gated(backend: str, case: Case) -> float:
    return check_activation(backend, case, "silu", True)


def _check_rms_norm(backend: str, case: Case) -> float:
    statistics = exact_statistics(case.total, False).float()
    return check_norm_forward(backend, replace(case, subtract_mean=False, statistics=statistics))


def _check_rotation(backend: str, case: Case) -> float:
    return check_rotations(backend, case.input.dtype, case.input.device)


@dataclass(frozen=True)
class Operator:
    """What is measured of an operator.

    Args:
        operator: its name.
        plain: the same in torch, of whose arguments dropout_p comes first if `drops`.
        arguments: those of the operator and of `plain`.
        byte_count: that the kernel moves.
        check: raises AssertionError unless its results are right.
        columns: by device.
        drops: it knows dropout.
        mixes: it knows a residual stream.
    """

    operator: str
    plain: Callable
    arguments: Callable[[Case], tuple[tuple, tuple]]
    byte_count: Callable[[Case], int]
    check: Callable[[str, Case], float]
    columns: dict[str, tuple[int, ...]]
    drops: bool = False
    mixes: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that differ for it."""
        return tuple(DTYPES) if self.mixes else ("fp32", "bf16")


def _norm_operator(name: str, *fields, drops: bool = True) -> Operator:
    return Operator(name, *fields, HIDDEN_COLUMNS, drops=drops, mixes=True)


OPERATORS = {
    "bias_activation": Operator(
        "bias_activation", _gelu, _gelu_arguments, functools.partial(_activation_bytes, 2, 1),
        _check_gelu, INNER_COLUMNS,
    ),
    "bias_activation_backward": Operator(
        "bias_activation_backward", _gelu_backward, _gelu_backward_arguments,
        functools.partial(_activation_bytes, 3, 1), _check_gelu, INNER_COLUMNS,
    ),
    "gated_activation": Operator(
        "gated_activation", _gated, _gated_arguments, functools.partial(_activation_bytes, 3, 2),
        _check_gated, INNER_COLUMNS,
    ),
    "gated_activation_backward": Operator(
        "gated_activation_backward", _gated_backward, _gated_backward_arguments,
        functools.partial(_activation_bytes, 5, 2), _check_gated, INNER_COLUMNS,
    ),
    "dropout_add_norm": _norm_operator(
        "dropout_add_norm", _norm, _norm_arguments, functools.partial(_norm_bytes, 1, 3, 3),
        check_norm_forward,
    ),
    "dropout_add_norm rms": _norm_operator(
        "dropout_add_norm", _rms_norm, _rms_norm_arguments,
        functools.partial(_norm_bytes, 1, 3, 2), _check_rms_norm,
    ),
    "dropout_add_norm_backward": _norm_operator(
        "dropout_add_norm_backward", _norm_backward, _norm_backward_arguments,
        _norm_backward_bytes, check_norm_backward,
    ),
    "norm_from_stats": _norm_operator(
        "norm_from_stats", _norm_again, _again_arguments, functools.partial(_norm_bytes, 0, 2, 2),
        check_norm_forward, drops=False,
    ),
    "rotate_": Operator(
        "rotate_", _rotated, _rotation_arguments, _rotation_bytes, _check_rotation, HIDDEN_COLUMNS,
    ),
}  # fmt: skip
