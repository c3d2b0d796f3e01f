"""Products with a frozen matrix."""

import platform

import torch
from torch import Tensor, nn


def _is_intel() -> bool:
    """Whether the processor is one of Intel."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read(1000)
    except OSError:
        text = platform.processor()
    return "GenuineIntel" in text


def _dtypes_of_onednn() -> tuple[torch.dtype, ...]:
    """What goes straight to oneDNN on a CPU."""
    has_onednn = torch.backends.mkldnn.is_available()
    if not (has_onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return ()
    mkl_is_fast = torch.backends.mkl.is_available() and _is_intel()
    return (torch.bfloat16,) if mkl_is_fast else (torch.float32, torch.bfloat16)


_OF_ONEDNN = _dtypes_of_onednn()
_SMALL = 4096  # numbers of a result


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight^T + bias, [R, in] -> [R, out], without a graph.

    On a CPU straight to oneDNN: torch adds the bias of bf16 in a pass of its own, and sends fp32 to
    MKL. That is slower than oneDNN on processors of AMD, with the few columns of a low-rank update
    up to 4 times, and faster on those of Intel, where fp32 stays with it. A result of few numbers
    is sooner by torch, whose calls cost less.
    """
    is_small = input.shape[0] * weight.shape[0] < _SMALL
    if weight.device.type == "cpu" and weight.dtype in _OF_ONEDNN and not is_small:
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return nn.functional.linear(input, weight, bias)
