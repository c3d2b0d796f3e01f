"""Products with a frozen matrix."""

import torch
from torch import Tensor, nn

# What goes straight to oneDNN on a CPU, where this torch has it.
_OF_ONEDNN = (
    (torch.float32, torch.bfloat16)
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else ()
)
_SMALL = 4096  # numbers of a result


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight^T + bias, [R, in] -> [R, out], without a graph.

    On a CPU straight to oneDNN: torch sends fp32 to MKL, which is slower on processors of AMD (with
    the few columns of a low-rank update up to 4 times), and adds the bias of bf16 in a pass of its
    own. A result of few numbers is sooner there by torch, whose calls cost less.
    """
    is_small = input.shape[0] * weight.shape[0] < _SMALL
    if weight.device.type == "cpu" and weight.dtype in _OF_ONEDNN and not is_small:
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return nn.functional.linear(input, weight, bias)
