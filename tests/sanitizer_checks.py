"""compute-sanitizer over every kernel: `python -m tests.sanitizer_checks` launches them once.

It runs without torch's memory cache, inside which an access beyond a tensor would go unseen.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tests.attention_checks import raw_pair
from tests.devices import KERNEL_DEVICE, Unavailable
from tests.elementwise_cases import make_case, run_all
from tests.inputs import Shape, make_inputs
from tests.rotary_checks import FLAGS, RotaryShape, make_rotary

ROOT = Path(__file__).parent.parent
SECONDS = 240
CALLS = [
    (Shape(2, 2, 70, 45, 21, 64), torch.bfloat16, {"mask": "random"}),
    (Shape(2, 2, 37, 37, 70, 80), torch.float16, {"packed": True, "bias": "shared"}),
    (Shape(3, 4, 37, 37, 9, 32, group=2), torch.float32, {"bank": 2, "rows": "both", "lse": True}),
]


def launch_everything(device: torch.device) -> None:
    forward, backward = raw_pair("triton")
    for shape, dtype, made in CALLS:
        if device.type == "cpu":
            shape = dataclasses.replace(shape, batch=1, queries=7, tokens=7, prefix=5)
        inputs = make_inputs(shape, dtype, device=device, **made)
        for p in (0.0, 0.2):
            options = inputs.raw_options(p, p)
            results = forward(*inputs.raw_tensors, *options)
            arguments = (inputs.grad_out, *inputs.raw_tensors, *results, inputs.grad_lse)
            backward(*arguments, True, True, True, False, *options)
    for columns in (312, 1024) if device.type == "cuda" else (40,):
        run_all("triton", make_case((5, columns), "mixed", device=device))
        run_all("triton", make_case((5, columns), "bf16", False, 0.0, device, subtract_mean=False))
    rotary = make_rotary(RotaryShape(50, 12, 20, 7, behind=13), torch.bfloat16, device)
    for flags in FLAGS:
        rotary.rotate("triton", *flags)


def check_with_sanitizer(tool: str, device: torch.device) -> None:
    """No error of compute-sanitizer's `tool` in any launch."""
    if device.type == "cpu":
        raise Unavailable("compute-sanitizer watches GPUs")
    if shutil.which("compute-sanitizer") is None:
        raise Unavailable("compute-sanitizer is not installed here")
    command = [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
        sys.executable, "-m", "tests.sanitizer_checks",
    ]  # fmt: skip
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=SECONDS, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    found = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=====")]
    told = " | ".join(found[1:7]) or done.stdout[-500:]
    assert done.returncode == 0, f"{tool} ended with {done.returncode}: {told}\n{done.stdout}"


CHECKS = {
    "launches": launch_everything,
    "memcheck": lambda device: check_with_sanitizer("memcheck", device),
    "racecheck": lambda device: check_with_sanitizer("racecheck", device),
}


if __name__ == "__main__":
    launch_everything(KERNEL_DEVICE)
    torch.cuda.synchronize()
