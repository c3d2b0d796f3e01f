"""Which backend serves each device of this machine."""

import torch

from ptv2_fast.ops.registration import CPP_IMPORT_ERROR, HAS_TRITON, KERNEL_DTYPES
from ptv2_fast.ops.triton_calls import triton_serves


def _describe_cpu() -> str:
    if CPP_IMPORT_ERROR is None:
        return f"cpp ({torch.ops.ptv2.cpu_capability()})"
    return f"split, with dropout reference (no C++ extension: {CPP_IMPORT_ERROR})"


def _describe_gpu(device: torch.device) -> str:
    if not HAS_TRITON:
        return "split, with dropout reference (triton is not installed)"
    if not triton_serves(device):
        return "split, with dropout reference (triton needs compute capability 8.0)"
    return "triton"


def backends() -> dict[str, str]:
    """The backend that `prefix_attention` uses on each device, as {"cpu": "cpp (avx2)", ...}."""
    served = {"cpu": _describe_cpu()}
    for kind in KERNEL_DTYPES:
        module = getattr(torch, kind)
        if kind != "cpu" and module.is_available():
            for index in range(module.device_count()):
                device = torch.device(kind, index)
                name = module.get_device_name(index)
                served[f"{device} ({name})"] = _describe_gpu(device)
    return served
