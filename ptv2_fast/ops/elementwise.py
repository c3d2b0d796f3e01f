"""The elementwise steps of a frozen encoder block: bias + GELU, and dropout + add + LayerNorm.

What they share: rows are tokens, everything is computed in fp32 and rounded once, nothing is kept
that a counter, two statistics or the input can give again, and no gradient goes to a weight.
`ptv2::bias_gelu` and its kin are dispatched as the attention operators are (see registration.py);
this file holds their schemas, fakes and definitions in plain torch.

Names of dtypes: X is that of the products of matrices, R that of the residual stream; they differ
under autocast only (X bfloat16 or float16, R float32). Weights of length C are float32 always.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ptv2_fast.ops.dropout import row_dropout_multiplier
from ptv2_fast.ops.registration import HAS_TRITON, library
from ptv2_fast.ops.triton_calls import with_fallback

_DROPOUT = "Tensor? seed, Tensor? coordinates, float dropout_p, int stream"
SCHEMAS = {
    "bias_gelu": "(Tensor input, Tensor? bias) -> Tensor",
    "bias_gelu_backward": "(Tensor grad_out, Tensor input, Tensor? bias) -> Tensor",
    "dropout_add_layer_norm": (
        f"(Tensor input, Tensor? bias, Tensor residual, Tensor weight, Tensor beta, float epsilon, "
        f"{_DROPOUT}) -> (Tensor out, Tensor total, Tensor statistics)"
    ),
    "dropout_add_layer_norm_backward": (
        "(Tensor grad_out, Tensor? grad_other, Tensor total, Tensor statistics, Tensor weight, "
        f"{_DROPOUT}, ScalarType input_dtype) -> (Tensor grad_residual, Tensor grad_input)"
    ),
    "layer_norm_again": "(Tensor total, Tensor statistics, Tensor weight, Tensor beta) -> Tensor",
}


def bias_gelu(input: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(input + bias), the GELU of the error function.

    Args:
        input: [R, C], contiguous.
        bias: fp32 [C].

    Returns:
        [R, C] in input's dtype.
    """
    biased = _wide(input) if bias is None else _wide(input) + bias
    return torch.nn.functional.gelu(biased).to(input.dtype)


def bias_gelu_backward(grad_out: Tensor, input: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of `bias_gelu`'s input: grad_out * gelu'(input + bias), [R, C]."""
    biased = _wide(input) if bias is None else _wide(input) + bias
    below = 0.5 * (1.0 + torch.erf(biased * math.sqrt(0.5)))
    density = torch.exp(-0.5 * biased * biased) * (1.0 / math.sqrt(2.0 * math.pi))
    return (_wide(grad_out) * (below + biased * density)).to(input.dtype)


def dropout_add_layer_norm(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    beta: Tensor,
    epsilon: float,
    seed: Tensor | None,
    coordinates: Tensor | None,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(residual + dropout(input + bias)), the end of both halves of a post-LN block.

    The statistics are those of the *rounded* total, so that `layer_norm_again` repeats `out` to
    the bit.

    Args:
        input: X [R, C], contiguous.
        bias: fp32 [C].
        residual: R [R, C], contiguous.
        weight, beta: fp32 [C], the affine part of the LayerNorm.
        epsilon: added to the variance.
        seed: int64 [1]; with `coordinates` int32 [R, 2], the (sequence, row in it) of each row,
            it fixes the dropout mask. Both may be None when dropout_p is 0.
        dropout_p: in [0, 1).
        stream: of ops/dropout.py.

    Returns:
        out R [R, C]; total R [R, C], the sum that was normalised; statistics fp32 [R, 2], the mean
        and 1 / sqrt(variance + epsilon) of each row of total.
    """
    added = _wide(input) if bias is None else _wide(input) + bias
    if dropout_p > 0.0:
        added = added * row_dropout_multiplier(
            input.shape[1], dropout_p, seed, coordinates, stream, added.dtype
        )
    total = (_wide(residual) + added).to(residual.dtype)
    variance, mean = torch.var_mean(_wide(total), dim=1, correction=0)
    statistics = torch.stack((mean, torch.rsqrt(variance + epsilon)), dim=1)
    return layer_norm_again(total, statistics, weight, beta), total, statistics


def dropout_add_layer_norm_backward(
    grad_out: Tensor,
    grad_other: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    coordinates: Tensor | None,
    dropout_p: float,
    stream: int,
    input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of `dropout_add_layer_norm`'s residual and input; none of its weights.

    Args:
        grad_out: R [R, C], a gradient of `out`.
        grad_other: X [R, C], another one that is added to it first.
        input_dtype: X.
        others: as in the forward.

    Returns:
        grad_residual R [R, C]; grad_input X [R, C], empty(0) where it would be grad_residual again:
        without dropout and with X = R.
    """
    grad_out = _wide(grad_out) if grad_other is None else _wide(grad_out) + _wide(grad_other)
    normal = (_wide(total) - statistics[:, :1]) * statistics[:, 1:]
    scaled = grad_out * weight
    grad = statistics[:, 1:] * (
        scaled - scaled.mean(1, keepdim=True) - normal * (scaled * normal).mean(1, keepdim=True)
    )
    grad_residual = grad.to(total.dtype)
    if dropout_p == 0.0 and input_dtype == total.dtype:
        return grad_residual, total.new_empty(0)
    if dropout_p > 0.0:
        grad = grad * row_dropout_multiplier(
            total.shape[1], dropout_p, seed, coordinates, stream, grad.dtype
        )
    return grad_residual, grad.to(input_dtype)


def layer_norm_again(total: Tensor, statistics: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
    """The `out` of `dropout_add_layer_norm`, to the bit, from its total and statistics."""
    normal = (_wide(total) - statistics[:, :1]) * statistics[:, 1:]
    return (normal * weight + beta).to(total.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _fake_gelu(input, bias):
    return torch.empty_like(input)


def _fake_gelu_backward(grad_out, input, bias):
    return torch.empty_like(input)


def _fake_layer_norm(input, bias, residual, *rest):
    statistics = residual.new_empty(
        (residual.shape[0], 2), dtype=torch.promote_types(residual.dtype, torch.float32)
    )
    return torch.empty_like(residual), torch.empty_like(residual), statistics


def _fake_layer_norm_backward(grad_out, grad_other, total, *rest):
    dropout_p, input_dtype = rest[-3], rest[-1]
    is_same = dropout_p == 0.0 and input_dtype == total.dtype
    grad_input = total.new_empty(0 if is_same else total.shape, dtype=input_dtype)
    return torch.empty_like(total), grad_input


def _fake_layer_norm_again(total, *rest):
    return torch.empty_like(total)


def _triton(name: str) -> Callable:
    def launch(*arguments):
        from ptv2_kernels import elementwise

        return getattr(elementwise, "launch_" + name)(*arguments)

    return launch


_IMPLEMENTATIONS: dict[str, tuple[Callable, Callable]] = {
    "bias_gelu": (bias_gelu, _fake_gelu),
    "bias_gelu_backward": (bias_gelu_backward, _fake_gelu_backward),
    "dropout_add_layer_norm": (dropout_add_layer_norm, _fake_layer_norm),
    "dropout_add_layer_norm_backward": (
        dropout_add_layer_norm_backward,
        _fake_layer_norm_backward,
    ),
    "layer_norm_again": (layer_norm_again, _fake_layer_norm_again),
}
for _name, (_definition, _fake) in _IMPLEMENTATIONS.items():
    library.define(_name + SCHEMAS[_name], tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake("ptv2::" + _name, _fake, lib=library)
    library.impl(_name, _definition, "CompositeExplicitAutograd")
    if HAS_TRITON:
        for _key in ("CUDA", "XPU"):
            library.impl(_name, with_fallback(_name, _triton(_name), _definition), _key)
