"""ptv2-fast env."""

import os
import platform
from importlib import metadata
from typing import Any

from ptv2_fast.cli.parser import add_command

_PACKAGES = (
    "ptv2-fast", "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers",
    "safetensors", "numpy",
)  # fmt: skip


def add(commands: Any) -> None:
    """Add the command."""
    add_command(commands, "env", _env, "print versions, devices and backends")


def _env(options: dict[str, Any]) -> None:
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<13} {version}", flush=True)

    import torch  # takes seconds

    from ptv2_fast.ops import backends
    from ptv2_fast.training.machine import processor_name

    threads = torch.get_num_threads()
    print(f"processor     {processor_name()}, {os.cpu_count()} cores, {threads} threads")
    print(f"cpu features  {torch.backends.cpu.get_cpu_capability()}")
    print(f"cuda          {torch.version.cuda or torch.version.hip or 'not in this torch'}")
    for device, backend in backends().items():
        print(f"backend       {device}: {backend}")
