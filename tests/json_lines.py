"""Runs a module in a process of its own: one process cannot interpret and compile Triton."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def json_lines(module: str, *options: str, interpret: bool = False) -> Iterator[dict]:
    """What `python -m module options` prints, one object per line, as it comes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", module, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield from map(json.loads, process.stdout)
    if process.returncode != 0:
        raise RuntimeError(f"{module} ended with {process.returncode}; its stderr says why")
