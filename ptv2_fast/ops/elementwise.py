"""The elementwise operators of a frozen block: activations, dropout + add + norm, rotary positions.

What they share: rows are tokens, everything is computed in fp32 and rounded once, nothing is kept
that a counter, two statistics or the input can give again, and no gradient goes to a weight.
`ptv2::bias_activation` and its kin are dispatched as the attention operators are (see
registration.py); this file holds their schemas and fakes. Its attributes of the operators' names
are their definitions in plain torch.

Names of dtypes: X is that of the products of matrices, R that of the residual stream; they differ
under autocast only (X bfloat16 or float16, R float32). Weights of length C are float32 always.
"""

import functools
from collections.abc import Callable

import torch

from ptv2_fast.ops.activations import (
    bias_activation,
    bias_activation_backward,
    gated_activation,
    gated_activation_backward,
)
from ptv2_fast.ops.norms import (
    dropout_add,
    dropout_add_norm,
    dropout_add_norm_backward,
    dropout_backward,
    norm_from_stats,
)
from ptv2_fast.ops.registration import HAS_TRITON, library
from ptv2_fast.ops.rotary import rotate_
from ptv2_fast.ops.triton_calls import with_fallback

_DROPOUT = "Tensor? seed, Tensor? coordinates, float dropout_p, int stream"
_GATED = "Tensor input, Tensor? bias, str activation, bool activated_first"
SCHEMAS = {
    "bias_activation": "(Tensor input, Tensor? bias, str activation) -> Tensor",
    "bias_activation_backward": (
        "(Tensor grad_out, Tensor input, Tensor? bias, str activation) -> Tensor"
    ),
    "gated_activation": f"({_GATED}) -> Tensor",
    "gated_activation_backward": f"(Tensor grad_out, {_GATED}) -> Tensor",
    "dropout_add_norm": (
        "(Tensor input, Tensor? bias, Tensor residual, Tensor weight, Tensor? beta, float epsilon, "
        f"bool subtract_mean, {_DROPOUT}) -> (Tensor out, Tensor total, Tensor statistics)"
    ),
    "dropout_add_norm_backward": (
        "(Tensor? grad_out, Tensor? grad_other, Tensor? grad_total, Tensor total, "
        f"Tensor statistics, Tensor weight, bool subtract_mean, {_DROPOUT}, "
        "ScalarType input_dtype) -> (Tensor grad_residual, Tensor grad_input)"
    ),
    "norm_from_stats": "(Tensor total, Tensor statistics, Tensor weight, Tensor? beta) -> Tensor",
    "dropout_add": f"(Tensor input, Tensor? bias, Tensor residual, {_DROPOUT}) -> Tensor",
    "dropout_backward": f"(Tensor grad_total, {_DROPOUT}, ScalarType input_dtype) -> Tensor",
    "rotate_": (
        "(Tensor(a!) packed, Tensor cosine, Tensor sine, int heads, int head_dim, "
        "bool interleaved, bool inverse) -> ()"
    ),
}


def _fake_activation(input, bias, activation):
    return torch.empty_like(input)


def _fake_activation_backward(grad_out, input, bias, activation):
    return torch.empty_like(input)


def _fake_gated(input, bias, activation, activated_first):
    return input.new_empty(input.shape[0], input.shape[1] // 2)


def _fake_gated_backward(grad_out, input, bias, activation, activated_first):
    return torch.empty_like(input)


def _fake_norm(input, bias, residual, *rest):
    statistics = residual.new_empty(
        (residual.shape[0], 2), dtype=torch.promote_types(residual.dtype, torch.float32)
    )
    return torch.empty_like(residual), torch.empty_like(residual), statistics


def _fake_norm_backward(grad_out, grad_other, grad_total, total, *rest):
    return torch.empty_like(total), _fake_dropout_backward(total, *rest[-5:])


def _fake_norm_from_stats(total, *rest):
    return torch.empty_like(total)


def _fake_add(input, bias, residual, *rest):
    return torch.empty_like(residual)


def _fake_dropout_backward(grad_total, seed, coordinates, dropout_p, stream, input_dtype):
    is_same = dropout_p == 0.0 and input_dtype == grad_total.dtype
    return grad_total.new_empty(0 if is_same else grad_total.shape, dtype=input_dtype)


def _fake_rotate(packed, *rest):
    return None


def _triton(name: str) -> Callable:
    """The launcher of that name; Triton is imported at its first call."""

    @functools.cache
    def launcher() -> Callable:
        from ptv2_kernels import elementwise

        return getattr(elementwise, "launch_" + name)

    return lambda *arguments: launcher()(*arguments)


_IMPLEMENTATIONS: dict[str, tuple[Callable, Callable]] = {
    "bias_activation": (bias_activation, _fake_activation),
    "bias_activation_backward": (bias_activation_backward, _fake_activation_backward),
    "gated_activation": (gated_activation, _fake_gated),
    "gated_activation_backward": (gated_activation_backward, _fake_gated_backward),
    "dropout_add_norm": (dropout_add_norm, _fake_norm),
    "dropout_add_norm_backward": (dropout_add_norm_backward, _fake_norm_backward),
    "norm_from_stats": (norm_from_stats, _fake_norm_from_stats),
    "dropout_add": (dropout_add, _fake_add),
    "dropout_backward": (dropout_backward, _fake_dropout_backward),
    "rotate_": (rotate_, _fake_rotate),
}
for _name, (_definition, _fake) in _IMPLEMENTATIONS.items():
    library.define(_name + SCHEMAS[_name], tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake("ptv2::" + _name, _fake, lib=library)
    library.impl(_name, _definition, "CompositeExplicitAutograd")
    if HAS_TRITON:
        for _key in ("CUDA", "XPU"):
            library.impl(_name, with_fallback(_name, _triton(_name), _definition), _key)
