"""What bench/gpu/elementwise.py measures: operators, the same in torch, arguments and bytes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.activation_checks import check_activation
from tests.byte_formulas import Rows, elementwise_bytes
from tests.elementwise_cases import DTYPES, EPSILON, Case, exact_statistics
from tests.norm_checks import check_norm_backward, check_norm_forward
from tests.rotary_checks import check_rotations

INNER_COLUMNS = {"cuda": (3072, 4096), "cpu": (96,)}
HIDDEN_COLUMNS = {"cuda": (768, 1024), "cpu": (64,)}
HEAD_DIM = 64  # of what is rotated
aten = torch.ops.aten
ACTIVATIONS = {"gelu": (F.gelu, aten.gelu_backward), "silu": (F.silu, aten.silu_backward)}


def _gated(activation: str, joint: Tensor) -> Tensor:
    first, second = joint.chunk(2, dim=1)
    return ACTIVATIONS[activation][0](first) * second


def _gated_backward(activation: str, grad_out: Tensor, joint: Tensor) -> Tensor:
    activate, gradient = ACTIVATIONS[activation]
    first, second = joint.chunk(2, dim=1)
    return torch.cat((gradient(grad_out * second, first), grad_out * activate(first)), dim=1)


def _norm(
    dropout_p: float, input: Tensor, residual: Tensor, weight: Tensor, beta: Tensor
) -> Tensor:
    total = residual + F.dropout(input, dropout_p)
    return F.layer_norm(total, total.shape[1:], weight, beta, EPSILON)


def _norm_backward(
    dropout_p: float, grad_out: Tensor, grad_other: Tensor, total: Tensor, mean: Tensor,
    deviation: Tensor, weight: Tensor, beta: Tensor, mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_residual, _, _ = aten.native_layer_norm_backward(
        grad_out + grad_other, total, total.shape[1:], mean, deviation, weight, beta,
        [True, False, False],
    )  # fmt: skip
    return grad_residual, _dropped(dropout_p, grad_residual.to(grad_other.dtype), mask)


def _dropped(dropout_p: float, grad: Tensor, mask: Tensor) -> Tensor:
    return (
        grad if dropout_p == 0.0 else aten.native_dropout_backward(grad, mask, 1 / (1 - dropout_p))
    )


def _rms_norm(
    dropout_p: float, input: Tensor, residual: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(input, dropout_p)
    return F.rms_norm(total, total.shape[1:], weight, EPSILON), total


def _rms_norm_backward(
    dropout_p: float, grad_other: Tensor, grad_total: Tensor, total: Tensor, deviation: Tensor,
    weight: Tensor, mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In float32 step by step, as the gradient of transformers' RMSNorm is computed."""
    normal, scaled = total.float() * deviation, grad_other.float() * weight
    grad = deviation * (scaled - normal * (scaled * normal).mean(1, keepdim=True))
    grad_residual = grad_total + grad.to(total.dtype)
    return grad_residual, _dropped(dropout_p, grad_residual.to(grad_other.dtype), mask)


def _dropout_add(dropout_p: float, input: Tensor, residual: Tensor) -> Tensor:
    return residual + F.dropout(input, dropout_p)


def _norm_from_stats(total: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(total, total.shape[1:], weight, beta, EPSILON)


def _rotated(interleaved: bool, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """heads: [R, heads, head_dim]; cosine, sine: [R, 1, head_dim]."""
    if interleaved:
        turned = torch.stack((-heads[..., 1::2], heads[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return heads * cosine + turned * sine


def _activation_arguments(activation: str, case: Case) -> tuple[tuple, tuple]:
    return (case.input, case.bias, activation), (case.input,)


def _activation_backward_arguments(activation: str, case: Case) -> tuple[tuple, tuple]:
    ours, plain = _activation_arguments(activation, case)
    return (case.grad_other, *ours), (case.grad_other, *plain)


def _gated_arguments(activation: str, case: Case) -> tuple[tuple, tuple]:
    joint, bias = case.doubled
    return (joint, bias, activation, True), (joint,)


def _gated_backward_arguments(activation: str, case: Case) -> tuple[tuple, tuple]:
    ours, plain = _gated_arguments(activation, case)
    return (case.grad_other, *ours), (case.grad_other, *plain)


def _post_norm(case: Case) -> Case:
    """BERT's: LayerNorm, whose result has two gradients."""
    return replace(case, grad_total=None)


def _pre_norm(case: Case) -> Case:
    """Llama's: RMSNorm, whose result has one gradient and whose sum another one."""
    statistics = exact_statistics(case.total, False).float()
    return replace(case, subtract_mean=False, beta=None, grad_out=None, statistics=statistics)


def _affine(case: Case) -> tuple[Tensor, Tensor]:
    """In the residual stream's dtype, as an encoder holds them."""
    return case.weight.to(case.residual.dtype), case.beta.to(case.residual.dtype)


def _norm_arguments(case: Case) -> tuple[tuple, tuple]:
    return case.forward, (case.input, case.residual, *_affine(case))


def _rms_norm_arguments(case: Case) -> tuple[tuple, tuple]:
    weight = case.weight.to(case.residual.dtype)
    return _pre_norm(case).forward, (case.input, case.residual, weight)


def _mask(case: Case) -> Tensor:
    return torch.rand(case.input.shape, device=case.input.device) >= case.dropout_p


def _norm_backward_arguments(case: Case) -> tuple[tuple, tuple]:
    weight, beta = _affine(case)
    _, mean, deviation = aten.native_layer_norm(
        case.total, case.total.shape[1:], weight, beta, EPSILON
    )
    saved = case.total, mean, deviation, weight, beta, _mask(case)
    return _post_norm(case).backward, (case.grad_out, case.grad_other, *saved)


def _rms_norm_backward_arguments(case: Case) -> tuple[tuple, tuple]:
    case = _pre_norm(case)
    saved = case.total, case.statistics[:, 1:], case.weight, _mask(case)
    return case.backward, (case.grad_other, case.grad_total, *saved)


def _addition_arguments(case: Case) -> tuple[tuple, tuple]:
    return case.addition, (case.input, case.residual)


def _norm_from_stats_arguments(case: Case) -> tuple[tuple, tuple]:
    return case.again, (case.total, *_affine(case))


def _rotation_arguments(interleaved: bool, case: Case) -> tuple[tuple, tuple]:
    """Query and key of packed rows, which are rotated again and again: that changes no speed."""
    rows, columns = case.input.shape
    angle = torch.rand(rows, HEAD_DIM // 2, device=case.input.device)
    angles, packed = (angle.cos(), angle.sin()), case.input.repeat(1, 3)
    heads = 2 * columns // HEAD_DIM
    ours = packed, *angles, heads, HEAD_DIM, interleaved, False
    if interleaved:
        wide = [each.repeat_interleave(2, dim=1) for each in angles]
    else:
        wide = [each.repeat(1, 2) for each in angles]
    rotated = packed[:, : 2 * columns].unflatten(1, (heads, HEAD_DIM))
    return ours, (rotated, *(each[:, None].to(packed.dtype) for each in wide))


@dataclass(frozen=True)
class Operator:
    """What is measured of an operator.

    Args:
        operator: its name.
        plain: the same in torch, of whose arguments dropout_p comes first if `drops`.
        arguments: those of the operator and of `plain`.
        check: raises AssertionError unless its results are right.
        columns: by device.
        vectors: of C float32 numbers, which the kernel reads.
        drops: it knows dropout.
        mixes: it knows a residual stream.
        gradients: of dropout_add_norm_backward, as in byte_formulas.Rows.
    """

    operator: str
    plain: Callable
    arguments: Callable[[Case], tuple[tuple, tuple]]
    check: Callable[[str, Case], float]
    columns: dict[str, tuple[int, ...]]
    vectors: int
    drops: bool = False
    mixes: bool = False
    gradients: tuple[bool, bool, bool] = (True, True, True)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that differ for it."""
        return tuple(DTYPES) if self.mixes else ("fp32", "bf16")

    def byte_count(self, case: Case) -> int:
        """How many bytes the kernel moves."""
        rows, columns = case.input.shape
        problem = Rows(
            columns, case.input.element_size(), case.residual.element_size(),
            case.dropout_p > 0.0, 2 * columns, HEAD_DIM, self.gradients,
        )  # fmt: skip
        row = elementwise_bytes(problem)[self.operator.removesuffix("_")]
        return rows * row + 4 * columns * self.vectors


def _activations(activation: str) -> dict[str, Operator]:
    """Plain and gated ones, and their gradients."""
    forward, backward = ACTIVATIONS[activation]

    def operator(name: str, plain: Callable, arguments: Callable, first: bool | None) -> Operator:
        def check(backend: str, case: Case) -> float:
            return check_activation(backend, case, activation, first)

        vectors = 1 if first is None else 2
        bound = functools.partial(arguments, activation)
        return Operator(name, plain, bound, check, INNER_COLUMNS, vectors)

    gated, gated_backward = (functools.partial(f, activation) for f in (_gated, _gated_backward))
    calls = (
        ("bias_activation", forward, _activation_arguments, None),
        ("bias_activation_backward", backward, _activation_backward_arguments, None),
        ("gated_activation", gated, _gated_arguments, True),
        ("gated_activation_backward", gated_backward, _gated_backward_arguments, True),
    )
    return {f"{call[0]} {activation}": operator(*call) for call in calls}


def _norm_operator(
    name: str, plain: Callable, arguments: Callable, check: Callable, vectors: int, **fields
) -> Operator:
    fields = {"drops": True, "mixes": True, **fields}
    return Operator(name, plain, arguments, check, HIDDEN_COLUMNS, vectors, **fields)


def _rotation(interleaved: bool) -> Operator:
    plain, arguments = (functools.partial(f, interleaved) for f in (_rotated, _rotation_arguments))

    def check(backend: str, case: Case) -> float:
        return check_rotations(backend, case.input.dtype, case.input.device)

    return Operator("rotate_", plain, arguments, check, HIDDEN_COLUMNS, 0)


OPERATORS = {
    **_activations("gelu"),
    **{name: each for name, each in _activations("silu").items() if name.startswith("gated")},
    "dropout_add_norm": _norm_operator(
        "dropout_add_norm", _norm, _norm_arguments, check_norm_forward, 3
    ),
    "dropout_add_norm rms": _norm_operator(
        "dropout_add_norm", _rms_norm, _rms_norm_arguments,
        lambda backend, case: check_norm_forward(backend, _pre_norm(case)), 2,
    ),
    "dropout_add_norm_backward": _norm_operator(
        "dropout_add_norm_backward", _norm_backward, _norm_backward_arguments,
        lambda backend, case: check_norm_backward(backend, _post_norm(case)), 1,
        gradients=(True, True, False),
    ),
    "dropout_add_norm_backward rms": _norm_operator(
        "dropout_add_norm_backward", _rms_norm_backward, _rms_norm_backward_arguments,
        lambda backend, case: check_norm_backward(backend, _pre_norm(case)), 1,
        gradients=(False, True, True),
    ),
    "norm_from_stats": _norm_operator(
        "norm_from_stats", _norm_from_stats, _norm_from_stats_arguments, check_norm_forward, 2,
        drops=False,
    ),
    "dropout_add": _norm_operator(
        "dropout_add", _dropout_add, _addition_arguments, check_norm_forward, 1
    ),
    "rotate_": _rotation(interleaved=False),
    "rotate_ interleaved": _rotation(interleaved=True),
}  # fmt: skip
