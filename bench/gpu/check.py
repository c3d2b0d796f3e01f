"""The groups of tests/gpu_cases.py, a row a check: the oracle, equal bits, whole models."""

import time
import traceback
from collections.abc import Iterator

import torch

from bench.gpu.stages import Row, StageOptions
from tests.devices import Unavailable
from tests.gpu_cases import GROUPS, Check


def units(device: torch.device) -> list[str]:
    """Groups of checks; in a rehearsal, whose checks are short, families of groups."""
    if device.type == "cuda":
        return list(GROUPS)
    return list(dict.fromkeys(family_of(group) for group in GROUPS))


def family_of(group: str) -> str:
    return group.partition("-")[0]


def checks_of(unit: str, device: torch.device) -> dict[str, Check]:
    if device.type == "cuda":
        return {f"{unit}: {name}": check for name, check in GROUPS[unit].items()}
    return {
        f"{group}: {name}": check
        for group, checks in GROUPS.items()
        if family_of(group) == unit
        for name, check in checks.items()
        if check.rehearsed
    }


def run(name: str, device: torch.device, options: StageOptions) -> Iterator[Row]:
    """A row a check. One that fails leaves the others alone, unless the device is lost with it."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    checks = checks_of(name, device)
    for number, (check_name, check) in enumerate(checks.items(), start=1):
        torch.manual_seed(0)
        yield {"check": check_name, **outcome(check, device)}
        lost = loss_of(device)
        if lost is not None:
            reason = f"the device is lost, {len(checks) - number} checks not made: {lost}"
            yield {"check": check_name, "status": "failed", "reason": reason}
            return


def outcome(check: Check, device: torch.device) -> Row:
    """Seconds (compilation included), and the largest error over its budget where there is one."""
    started, row = time.perf_counter(), {}
    try:
        ratio = check.run(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row["error_ratio"] = "" if ratio is None else f"{ratio:.3f}"
    except Unavailable as reason:
        row |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        row |= {"status": "failed", "reason": reason_of(error)}
        traceback.print_exc()
    return {"seconds": f"{time.perf_counter() - started:.2f}", **row}


def reason_of(error: Exception) -> str:
    """The first line of its message, or the line of code of an assertion without one."""
    lines = str(error).strip().splitlines()
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {lines[0][:400] if lines else where.line}"


def loss_of(device: torch.device) -> str | None:
    """What a further call of the device says when it no longer answers."""
    if device.type == "cpu":
        return None
    try:
        torch.zeros(1, device=device).item()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
