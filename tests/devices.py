"""Where the tests of a backend run, and how torch is set while they do.

On a machine with a GPU the Triton kernels run compiled on it, elsewhere interpreted on the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

CPU = torch.device("cpu")
KERNEL_DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU

interpreted = pytest.mark.skipif(
    KERNEL_DEVICE.type == "cuda", reason="with a GPU the kernels are compiled, not interpreted"
)


def device_of(backend: str) -> torch.device:
    """Where the inputs of a backend lie."""
    return KERNEL_DEVICE if backend == "triton" else CPU


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """torch.empty and its relatives return NaN, so that an unwritten output cannot go unseen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """`precision`: of float32 products, as in torch.set_float32_matmul_precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Unavailable(Exception):
    """A check cannot be made here; the message says why."""


def needs_memory(device: torch.device, gigabytes: int) -> None:
    """Raises Unavailable when a GPU has less free memory."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] / 1e9
    if free < gigabytes:
        raise Unavailable(f"expected {gigabytes} GB of free GPU memory, got {free:.1f}")
