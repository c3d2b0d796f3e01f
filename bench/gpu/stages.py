"""The stages by name, and what each needs of a machine.

A stage is a module of this package with

    units(device) -> list[str]      what it measures, the most important first
    run(name, device, options) -> rows of one unit, as they are measured

Every unit runs in a process of its own (unit.py): a kernel that hangs or corrupts the device costs
its own unit and no other. On a CPU the device is a rehearsal: the same code on tiny shapes, with
interpreted kernels.
"""

import gc
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

Row = dict[str, object]
LEFT_OUT = "left out"  # the status of a way or method that cannot run on this machine


@dataclass(frozen=True)
class StageOptions:
    """Of one call of bench.gpu, for the units of its stages.

    Args:
        without: names of ways or methods to leave out.
        seconds: measuring time per row; rounds: at least so many.
        output: folder of the results.
    """

    without: tuple[str, ...] = ()
    seconds: float = 0.5
    rounds: int = 5
    output: str = "."


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        purpose: for --help.
        packages: without which it cannot run at all.
        gigabytes: of GPU memory that it needs.
        in_parallel: its units measure no time, so that several may run at once.
    """

    purpose: str
    packages: tuple[str, ...] = ()
    gigabytes: int = 8
    in_parallel: bool = False


STAGES = {
    "check": Stage(
        "every kernel against the float64 oracle; determinism; a whole model", in_parallel=True
    ),
    "attention": Stage(
        "the operator against concatenation, Flex and variable-length attention", gigabytes=16
    ),
    "elementwise": Stage("activations, norms and rotations against torch, eager and compiled"),
    "step": Stage(
        "training steps against fine-tuning, LoRA and PEFT's prefix", ("transformers",), 16
    ),
    "memory": Stage("peak of a step; largest batch in 8, 16 and 24 GB", ("transformers",), 26),
    "tune": Stage("launch configurations of the attention kernels", gigabytes=16),
}


def module_of(stage: str) -> ModuleType:
    return importlib.import_module(f"bench.gpu.{stage}")


def why_not(stage: str, is_rehearsal: bool) -> str | None:
    """Why this machine cannot run a stage, in one line; None when it can."""
    needs = STAGES[stage]
    missing = [name for name in needs.packages if importlib.util.find_spec(name) is None]
    if missing:
        return f"it needs {' and '.join(missing)}, not installed here"
    if is_rehearsal:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device here; --dry-run rehearses it on the CPU"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        actual = f"{capability[0]}.{capability[1]} ({torch.cuda.get_device_name()})"
        return f"expected compute capability 8.0 or later, got {actual}"
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < needs.gigabytes:
        return f"expected {needs.gigabytes} GB of free GPU memory, got {free:.1f}"
    return None


def units_of(stage: str, device: torch.device, chosen: list[str] | None) -> list[str]:
    """The units of a stage, or those of them that are asked for.

    Raises:
        ValueError: for a name that is none of its units.
    """
    known = module_of(stage).units(device)
    unknown = [name for name in chosen or () if name not in known]
    if unknown:
        raise ValueError(f"--only: expected units of {stage}, some of {known}, got {unknown}")
    return [name for name in known if chosen is None or name in chosen]


def run_unit(stage: str, name: str, device: torch.device, options: StageOptions) -> Iterator[Row]:
    return module_of(stage).run(name, device, options)


def reason_of(error: Exception) -> str:
    """An error as the reason of a row, in one line."""
    return " ".join([f"{type(error).__name__}:", *str(error).split()])[:500]


def release() -> None:
    """Gives the memory of what is not used any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
