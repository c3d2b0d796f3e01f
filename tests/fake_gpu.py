"""A GPU that compiles but never runs: the real host code of a launch on tensors of the CPU.

Every launch specialises and compiles its kernel for the target as on a device, and is recorded
instead of executed. Only for processes without TRITON_INTERPRET.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver


@dataclass(frozen=True)
class Gpu:
    """What decides how many blocks fit on one multiprocessor; shared memory in bytes."""

    shared_limit: int  # one block
    shared_total: int
    warps: int
    blocks: int


# CUDA C++ programming guide, technical specifications per compute capability; CDNA 3 ISA guide.
GPUS = {
    "sm_80": Gpu(166912, 167936, 64, 32),
    "sm_86": Gpu(101376, 102400, 48, 16),
    "sm_89": Gpu(101376, 102400, 48, 24),
    "sm_90": Gpu(232448, 233472, 64, 32),
    "sm_100": Gpu(232448, 233472, 64, 32),
    "sm_120": Gpu(101376, 102400, 48, 24),
    "gfx942": Gpu(65536, 65536, 32, 32),
}


def target_of(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, object]
    compiled: CompiledKernel


class _Utilities:
    def __init__(self, shared_limit: int) -> None:
        self.shared_limit = shared_limit
        self.loads = 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_limit, "multiprocessor_count": 108, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spills, most threads of a block."""
        self.loads += 1
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class FakeGpu(DriverBase):
    """Stands in for Triton's driver; `launches` fills up.

    Triton caches kernels and limits by device index, so that every fake GPU has one of its own.
    """

    _indices = itertools.count()

    def __init__(self, target_name: str, shared_limit: int | None) -> None:
        self.target = target_of(target_name)
        self.utils = _Utilities(shared_limit or GPUS[target_name].shared_limit)
        self.index = next(self._indices)
        self.launches: list[Launch] = []

    def launcher_cls(self, source, metadata):
        def record(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            kernels = source.fn.device_caches[self.index][0].values()
            compiled = next(kernel for kernel in kernels if kernel.src is source)
            named = dict(zip(source.fn.arg_names, arguments, strict=True))
            name = source.fn.__name__.removeprefix("_").removesuffix("_kernel")
            self.launches.append(Launch(name, (x, y, z), named, compiled))

        return record

    @property
    def compilations(self) -> int:
        """Kernels that this GPU has compiled and loaded."""
        return self.utils.loads

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def map_python_to_cpp_type(self, type_name: str) -> str:
        return type_name

    def get_benchmarker(self):
        raise NotImplementedError("a fake GPU times nothing")


@contextmanager
def fake_gpu(target_name: str, shared_limit: int | None = None) -> Iterator[FakeGpu]:
    """Launches inside go to a fake `target_name`; `shared_limit` bytes per block if it is given."""
    gpu, hip = FakeGpu(target_name, shared_limit), torch.version.hip
    driver.set_active(gpu)
    if gpu.target.backend == "hip":
        torch.version.hip = "fake"  # the launchers choose their configuration by it
    try:
        yield gpu
    finally:
        torch.version.hip = hip
        driver.set_active(None)  # Triton looks for a real one at the next launch
