"""Runs the units of a stage in processes of their own and keeps their rows in one CSV file.

The file is written after every row, to a temporary name that is renamed. A unit is complete once
its process has ended well; a second call measures what is not, and drops the rows of units that
were cut off.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from bench.gpu.stages import STAGES, Row, StageOptions
from bench.measure import write_csv

ROOT = Path(__file__).parent.parent.parent
UNIT_SECONDS = 300  # the most for one unit
OK, FAILED = "ok", "failed"


class Results:
    """The CSV file of one stage. Every row has `unit`, `status`, `reason` and `complete`."""

    def __init__(self, path: Path, machine: dict[str, str]) -> None:
        self.path, self.machine = path, machine
        self._lock = threading.Lock()
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if row["complete"] == "yes"]

    def is_complete(self, unit: str) -> bool:
        statuses = [row["status"] for row in self.rows if row["unit"] == unit]
        return bool(statuses) and FAILED not in statuses

    def has_failed(self, unit: str) -> bool:
        return any(row["unit"] == unit and row["status"] == FAILED for row in self.rows)

    def add(self, unit: str, row: Row) -> None:
        first = {"unit": unit, "status": OK, "reason": "", "complete": ""}
        with self._lock:
            self.rows.append({**first, **row, **self.machine})
            write_csv(self.path, self.rows)

    def finish(self, unit: str) -> None:
        with self._lock:
            for row in self.rows:
                if row["unit"] == unit:
                    row["complete"] = "yes"
            write_csv(self.path, self.rows)

    def drop(self, unit: str) -> None:
        with self._lock:
            self.rows = [row for row in self.rows if row["unit"] != unit]


@dataclass
class StageRun:
    """One call of one stage.

    Args:
        stage: its name.
        device: "cuda", or "cpu" for a rehearsal.
        options: for its units.
        results: its file.
        console: where progress is told.
        deadline: of time.monotonic(), when no further unit is begun.
    """

    stage: str
    device: torch.device
    options: StageOptions
    results: Results
    console: Console
    deadline: float

    def run(self, units: list[str]) -> int:
        """Runs the units that are not complete, those that failed before last.

        Returns:
            How many failed.
        """
        waiting = [name for name in units if not self.results.is_complete(name)]
        waiting.sort(key=self.results.has_failed)
        if len(waiting) < len(units):
            self.console.print(f"{self.stage}: {len(units) - len(waiting)} units are there already")
        processes = 1
        if STAGES[self.stage].in_parallel:
            processes = max(1, min(8, (os.cpu_count() or 1) // 2))
        with ThreadPoolExecutor(processes) as pool:
            outcomes = list(pool.map(self._run_unit, waiting))
        left = outcomes.count(None)
        if left:
            self.console.print(f"{self.stage}: time is over, {left} units left for another call")
        return outcomes.count(False)

    def _run_unit(self, name: str) -> bool | None:
        """Whether a unit ended well; None when there was no time for it."""
        begun = time.monotonic()
        if begun >= self.deadline:
            return None
        self.results.drop(name)
        failures, error = 0, None
        try:
            for row in self._rows_of(name):
                failures += row.get("status") == FAILED
                self.results.add(name, row)
                self.console.print(one_line(name, row))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= self.deadline:
                self.results.drop(name)
                return None
            error = f"took more than {UNIT_SECONDS} s"
        except subprocess.CalledProcessError as ended:
            error = ended.stderr
        if error is not None:
            failures += 1
            row = {"status": FAILED, "reason": error}
            self.results.add(name, row)
            self.console.print(one_line(name, row))
        self.results.finish(name)
        self.console.print(f"{self.stage} {name}: {time.monotonic() - begun:.0f} s")
        return failures == 0

    def _rows_of(self, name: str) -> Iterator[Row]:
        """The rows of a unit as its process writes them.

        Raises:
            subprocess.TimeoutExpired: when it takes too long.
            subprocess.CalledProcessError: when it fails; stderr is the last line of its output.
        """
        until = min(self.deadline + 15, time.monotonic() + UNIT_SECONDS)
        environment = dict(os.environ)
        if self.device.type == "cuda":
            environment.pop("TRITON_INTERPRET", None)
        inherited = filter(None, [os.environ.get("PYTHONPATH")])
        path = [str(ROOT), str(ROOT / "kernels"), *inherited]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        environment.setdefault("HF_HUB_OFFLINE", "1")
        reader, writer = os.pipe()
        command = [
            sys.executable, "-m", "bench.gpu.unit", self.stage, self.device.type, str(writer),
            json.dumps(asdict(self.options)), name,
        ]  # fmt: skip
        with tempfile.TemporaryFile("w+", errors="replace") as log, os.fdopen(reader) as rows:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, pass_fds=(writer,), stdout=log, stderr=log
            )
            os.close(writer)
            timer = threading.Timer(until - time.monotonic(), process.kill)
            timer.start()
            try:
                yield from map(json.loads, rows)
                code = process.wait()
            finally:
                timer.cancel()
                process.kill()
                process.wait()
            if code != 0 and time.monotonic() >= until:
                raise subprocess.TimeoutExpired(command, UNIT_SECONDS)
            if code != 0:
                log.seek(0)
                lines = log.read().strip().splitlines() or [f"it ended with {code}"]
                raise subprocess.CalledProcessError(code, command, stderr=lines[-1][:500])


def one_line(unit: str, row: Row) -> str:
    values = ", ".join(f"{name} {value}" for name, value in row.items() if value != "")
    return f"{unit}: {values}"[:250]
