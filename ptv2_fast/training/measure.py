"""What a training step keeps in memory for its backward pass, counted, and the process's peak."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def kept_bytes(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one step.

    Every storage that a saved tensor refers to is counted once and whole, since a saved view keeps
    all of it alive. Parameters and buffers are not counted: they exist anyway. The backward pass
    is not run and gradients do not change; dropout draws from torch's generator as in any step.

    Args:
        loss: runs the forward pass and returns the loss.
        model: whose parameters and buffers are left out.
    """
    # The storages themselves, so that none is freed and its address used again while we count.
    kept: dict[int, torch.UntypedStorage] = {}

    # Autograd gets nothing back: a saved output would hold its own node, and the graph never end.
    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(pack, _no_backward):
        result = loss()
    # Only now: frozen blocks may move their weights in their first forward.
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    total = sum(storage.nbytes() for storage in kept.values())
    del result  # alive until here, or its graph would be gone
    return total


def _no_backward(nothing: None) -> Tensor:
    raise RuntimeError("kept_bytes: expected no backward pass of what is only counted")


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory since the start or `reset_peak_memory`.

    Of the allocator on a GPU, of the whole process on a CPU.
    None where the system does not tell (elsewhere than on Linux, for a CPU).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_memory("VmHWM")


def reset_peak_memory() -> None:
    """Start the peaks of `peak_memory_bytes` anew, for another run in the same process.

    Where the system does not allow it, a CPU's peak stays that of the whole process.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def process_memory(field: str) -> int | None:
    """Bytes of this process by Linux's name: "VmRSS" = resident now, "VmHWM" = its peak.

    getrusage is no substitute: its peak outlives exec, so that a child starts with its parent's.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values[field].split()[0]) * 1024  # "123 kB"
