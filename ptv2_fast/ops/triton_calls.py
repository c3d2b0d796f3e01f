"""Calls of the Triton kernels on a GPU, and of what serves where they do not compile."""

import functools
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What Triton raises as a plain RuntimeError before anything runs on the device.
_BUILD_MESSAGES = (
    "Failed to find C compiler",
    "Failed to load newly compiled",
    "PassManager::run failed",
    "error encountered during parsing",
)
_failed: set[tuple[str, torch.dtype, int]] = set()  # (operator, dtype, width of the rows)


@functools.cache
def triton_serves(device: torch.device) -> bool:
    """Triton compiles tensor-core code for compute capability 8.0 and later only."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def with_fallback(name: str, launch: Callable, fallback: Callable) -> Callable:
    """An implementation of an operator for GPUs: by Triton, or by `fallback`.

    A kernel that does not compile with the installed Triton, or has no compiler for its launcher,
    is replaced for its dtype and width as long as the process lives, and a warning says so once.
    What fails on the device is raised.

    Args:
        name: of the operator.
        launch: takes the operator's arguments, of which the first is a tensor, or None and another
            one is.
        fallback: takes the same.
    """

    def serve(*arguments: Any) -> Any:
        tensor = arguments[0]
        if tensor is None:  # an optional gradient
            tensor = next(each for each in arguments if isinstance(each, Tensor))
        if not triton_serves(tensor.device):
            return fallback(*arguments)
        if _failed and _key(name, tensor) in _failed:
            return fallback(*arguments)
        try:
            return launch(*arguments)
        except Exception as error:
            if not _is_build_failure(error):
                raise
            key = _key(name, tensor)
            _failed.add(key)
            warnings.warn(_message(key, error), RuntimeWarning, stacklevel=2)
            return fallback(*arguments)

    return serve


def _key(name: str, tensor: Tensor) -> tuple[str, torch.dtype, int]:
    return name, tensor.dtype, tensor.shape[-1]


def _is_build_failure(error: Exception) -> bool:
    from triton.errors import TritonError

    if isinstance(error, (TritonError, subprocess.CalledProcessError)):
        return True
    return type(error) is RuntimeError and str(error).startswith(_BUILD_MESSAGES)


def _message(key: tuple[str, torch.dtype, int], error: BaseException) -> str:
    import triton

    name, dtype, width = key
    while error.__cause__ is not None:  # a device function's error, under those of its callers
        error = error.__cause__
    reason = " ".join([type(error).__name__ + ":", *str(error).split()])[:300]
    return (
        f"ptv2_fast: the Triton kernels of {name} ({dtype}, {width} columns) do not compile with "
        f"triton {triton.__version__}; torch computes the same instead, slower ({reason})"
    )
