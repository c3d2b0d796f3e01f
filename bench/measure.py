"""Interleaved timing, the machine header and the CSV writer of the benchmarks."""

import csv
import functools
import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
Key = TypeVar("Key")


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p20: float
    p80: float


@functools.cache
def _beyond_l2(device: torch.device) -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device=device)


def _time_once(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call; on a GPU by events, with an L2 cache that holds nothing of it."""
    if device.type == "cuda":
        _beyond_l2(device).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def time_interleaved(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float = 2.0,
    least_rounds: int = 5,
) -> dict[str, Timing]:
    """Times the functions in turn, after one warm-up round.

    Interleaving makes the ratios hold when the speed of a shared machine drifts. Every round has an
    order of its own, since a function finds the caches as the one before left them.
    """
    for function in functions.values():
        function()
    rounds = least_rounds
    if seconds > 0:
        once = sum(_time_once(function, device) for function in functions.values())
        rounds = max(least_rounds, min(200, int(seconds * 1e3 / once)))
    samples = sample_interleaved(functions, device, rounds)
    return {name: _summary(times) for name, times in samples.items()}


def sample_interleaved(
    functions: dict[Key, Callable[[], object]], device: torch.device, rounds: int
) -> dict[Key, list[float]]:
    """Milliseconds of every call of functions that are warm, as `time_interleaved` makes them."""
    samples: dict[Key, list[float]] = {name: [] for name in functions}
    order = list(functions)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(_time_once(functions[name], device))
    return samples


def _summary(times: list[float]) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0])
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[1], deciles[7])


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    family = f"family {fields['cpu family']} model {fields['model']}" if "model" in fields else ""
    return f"{fields.get('model name', platform.machine())} {family}".strip()


def _printed_by(*command: str) -> str:
    """The first line that a command prints; "unknown" where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return (
        (done.stdout.strip().splitlines() or ["unknown"])[0] if done.returncode == 0 else "unknown"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def machine_columns(device: torch.device) -> dict[str, str]:
    """What a figure depends on: device, threads, versions, commit, date."""
    from ptv2_fast import backends

    if device.type == "cuda":
        driver = _printed_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        name = f"{torch.cuda.get_device_name(device)}, driver {driver}"
    else:
        name = f"{_processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    served = next(text for key, text in backends().items() if key.startswith(device.type))
    return {
        "machine": name,
        "backend": served,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": _printed_by("git", "describe", "--always", "--dirty"),
        "date": date.today().isoformat(),
    }


def merge_csv(path: Path, rows: list[dict[str, object]], key: tuple[str, ...]) -> None:
    """Write rows to a file that may exist, in place of its rows with the same values of `key`."""
    kept: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    new = {tuple(str(row[name]) for name in key) for row in rows}
    write_csv(path, [row for row in kept if tuple(row.get(name) for name in key) not in new] + rows)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    columns = max((list(row) for row in rows), key=len)
    columns += [name for row in rows for name in row if name not in columns]
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(columns)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
