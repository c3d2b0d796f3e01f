"""The rules that every backend of the activations is held to."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.ops import elementwise
from ptv2_fast.ops.activations import ACTIVATIONS
from tests.closeness import assert_close_to_oracle
from tests.devices import CPU
from tests.elementwise_cases import Case, operator

PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def plain_activation(
    activation: str, grad_out: Tensor, input: Tensor, bias: Tensor | None, first: bool | None
) -> tuple[Tensor, Tensor]:
    """What eager torch computes in the dtype of the input, and the gradient by autograd.

    `first`: None is the plain activation, else the gated one's activated_first.
    """
    biased = input if bias is None else input + bias.to(input.dtype)
    biased = biased.detach().requires_grad_()
    if first is None:
        out = PLAIN[activation](biased)
    else:
        a, b = biased.chunk(2, dim=1)
        out = PLAIN[activation](a) * b if first else a * PLAIN[activation](b)
    (grad,) = torch.autograd.grad(out, biased, grad_out)
    return out.detach(), grad


def check_activations(
    backend: str, case: Case, activations: tuple[str, ...] = ACTIVATIONS
) -> float:
    """Plain and gated against float64; the largest error over its budget, as of every check."""
    return max(
        check_activation(backend, case, activation, first)
        for activation in activations
        for first in (None, True, False)
    )


def check_activation(backend: str, case: Case, activation: str, first: bool | None) -> float:
    if first is None:
        input, bias, name, order = case.input, case.bias, "bias_activation", ()
    else:
        (input, bias), name, order = case.doubled, "gated_activation", (first,)
    grad_out = case.total.to(input.dtype)
    exact_bias = None if bias is None else bias.double()
    size = input.double().abs() + (0 if bias is None else bias.double().abs())
    if first is None:
        out_size, grad_size = size, grad_out.double().abs()
    else:
        a, b = size.chunk(2, dim=1)
        halves = (b, a)  # the slope and the growth of an activation are those of its input at most
        out_size, grad_size = a * b, torch.cat(halves, 1) * grad_out.double().abs().repeat(1, 2)
    plain = plain_activation(activation, grad_out, input, bias, first)
    forward = assert_close_to_oracle(
        operator(backend, name)(input, bias, activation, *order),
        getattr(elementwise, name)(input.double(), exact_bias, activation, *order),
        plain[0],
        out_size,
        f"{name} {activation}",
    )
    arguments = (input.double(), exact_bias, activation, *order)
    backward = assert_close_to_oracle(
        operator(backend, name + "_backward")(grad_out, input, bias, activation, *order),
        getattr(elementwise, name + "_backward")(grad_out.double(), *arguments),
        plain[1],
        grad_size,
        f"{name}_backward {activation}",
    )
    return max(forward, backward)


def exact_pair(activation: str, input: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and its slope in float64, also where 1 + erf cancels."""
    input = input.double()
    out = elementwise.bias_activation(input, None, activation)
    if activation == "gelu":
        out = torch.where(input < 0, 0.5 * input * torch.special.erfc(-input * 0.5**0.5), out)
    ones = torch.ones_like(input)
    return out, elementwise.bias_activation_backward(ones, input, None, activation)


def check_tails(
    backend: str, activation: str, dtype: torch.dtype, device: torch.device = CPU
) -> float:
    """The rule of closeness.py within each unit of [-12, 12]: small values are held to small
    errors. The gradient of a gated activation holds the activation and its slope, too.

    Plain torch is that of the CPU on every device: CUDA's GELU computes the left tail by another
    formula, exact to the last bit where the CPU's has cancelled, in values below 1e-6.
    """
    units = list(range(-12, 12))
    input = torch.stack([torch.linspace(unit, unit + 1, 2001) for unit in units]).to(dtype)
    ones = torch.ones_like(input)
    exact = exact_pair(activation, input)
    plain = plain_activation(activation, ones, input, None, None)
    moved, unity = input.to(device), ones.to(device)
    joint = torch.cat((moved, unity), dim=1)
    both = operator(backend, "gated_activation_backward")(unity, joint, None, activation, True)
    slope, value = both.chunk(2, dim=1)
    arguments = (moved, None, activation)
    found = {
        "forward": (operator(backend, "bias_activation")(*arguments), 0),
        "backward": (operator(backend, "bias_activation_backward")(unity, *arguments), 1),
        "gated slope": (slope, 1),
        "gated value": (value, 0),
    }
    return max(
        assert_close_to_oracle(*results, results[1].abs(), f"{activation} {name} at {unit}")
        for name, (actual, which) in found.items()
        for unit, *results in zip(units, actual.cpu(), exact[which], plain[which], strict=True)
    )
