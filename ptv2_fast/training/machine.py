"""What a run ran on."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch


def processor_name() -> str:
    """The processor's name, as Linux or Python gives it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads of torch, system, and the accelerator if `device` is one."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
