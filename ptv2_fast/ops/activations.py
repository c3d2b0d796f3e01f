"""Activations of a feed-forward network, plain and gated, and their gradients, in plain torch.

These definitions are what the kernels of `ptv2::bias_activation` and its kin are held to; see
elementwise.py for the names of dtypes. All compute in fp32 (float64 for float64) and round once.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ptv2_fast.ops.layout import widened

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "quick_gelu")

# Three of them are x * sigmoid(v(x)): v and its derivative.
_TANH_SCALE = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715
_GATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor | float]]] = {
    "gelu_tanh": (
        lambda x: _TANH_SCALE * (x + _CUBIC * x * x * x),
        lambda x: _TANH_SCALE * (1.0 + 3.0 * _CUBIC * x * x),
    ),
    "silu": (lambda x: x, lambda x: 1.0),
    "quick_gelu": (lambda x: 1.702 * x, lambda x: 1.702),
}


def bias_activation(input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(input + bias).

    Args:
        input: X [R, C], contiguous.
        bias: fp32 [C].
        activation: "gelu", that of the error function; "gelu_tanh", its approximation by tanh;
            "silu"; "relu"; "quick_gelu", x * sigmoid(1.702 x).

    Returns:
        X [R, C].

    Raises:
        ValueError: of another activation.
    """
    return _activate(_biased(input, bias), activation).to(input.dtype)


def bias_activation_backward(
    grad_out: Tensor, input: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The gradient of `bias_activation`'s input: grad_out * act'(input + bias), X [R, C]."""
    slope = _slope(_biased(input, bias), activation)
    return (widened(grad_out) * slope).to(input.dtype)


def gated_activation(
    input: Tensor, bias: Tensor | None, activation: str, activated_first: bool
) -> Tensor:
    """act(a) * b of the two halves a, b of input + bias, or a * act(b).

    Args:
        input: X [R, 2C], contiguous.
        bias: fp32 [2C].
        activation: as in `bias_activation`.
        activated_first: the first half is the activated one.

    Returns:
        X [R, C].
    """
    activated, gate = _halves(_biased(input, bias), activated_first)
    return (_activate(activated, activation) * gate).to(input.dtype)


def gated_activation_backward(
    grad_out: Tensor, input: Tensor, bias: Tensor | None, activation: str, activated_first: bool
) -> Tensor:
    """The gradient of `gated_activation`'s input, X [R, 2C], of grad_out X [R, C]."""
    activated, gate = _halves(_biased(input, bias), activated_first)
    grad = widened(grad_out)
    grad_activated = grad * gate * _slope(activated, activation)
    grad_gate = grad * _activate(activated, activation)
    halves = (grad_activated, grad_gate) if activated_first else (grad_gate, grad_activated)
    return torch.cat(halves, dim=1).to(input.dtype)


def _biased(input: Tensor, bias: Tensor | None) -> Tensor:
    return widened(input) if bias is None else widened(input) + bias


def _halves(biased: Tensor, activated_first: bool) -> tuple[Tensor, Tensor]:
    """The activated half and the other one."""
    first, second = biased.chunk(2, dim=1)
    return (first, second) if activated_first else (second, first)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.nn.functional.gelu(x)
    if activation == "relu":
        return x.relu()
    return x * torch.sigmoid(_gate_of(activation)[0](x))


def _slope(x: Tensor, activation: str) -> Tensor:
    """The derivative of the activation; that of ReLU is 0 at 0."""
    if activation == "gelu":
        below = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
        density = torch.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
        return below + x * density
    if activation == "relu":
        return (x > 0).to(x.dtype)
    gate, derivative = _gate_of(activation)
    opened, closed = torch.sigmoid(gate(x)), torch.sigmoid(-gate(x))
    return opened + x * opened * closed * derivative(x)


def _gate_of(activation: str) -> tuple[Callable, Callable]:
    if activation not in _GATES:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}")
    return _GATES[activation]
