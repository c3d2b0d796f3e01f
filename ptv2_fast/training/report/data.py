"""The runs in folders, for the report: what is finished, and what cannot be shown and why."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ptv2_fast.files import without_word
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.training import run_folder
from ptv2_fast.training.options import SECTIONS
from ptv2_fast.training.sweeps.plan import SWEEP

# The paper's columns first; then the other baselines.
COLUMNS = {
    "FT": "fine-tuning",
    "PT": "prompt tuning (Lester et al. 2021)",
    "PT-2": "P-Tuning v2",
    "MPT-2": "P-Tuning v2 continued from a multi-task prefix",
    "Multi-task": "P-Tuning v2, one prefix shared by several tasks",
    "LP": "linear probe",
    "P-tuning": "P-tuning (Liu et al. 2021)",
    "LoRA": "LoRA (Hu et al. 2022)",
}
_COLUMN_OF = {
    "fine-tuning": "FT", "prompt-tuning": "PT", "p-tuning-v2": "PT-2", "linear-probe": "LP",
    "p-tuning-v1": "P-tuning", "lora": "LoRA",
}  # fmt: skip
# What figures and tables read of a sweep's axes, by kind.
_AXES: dict[str, dict[str, type]] = {
    "depth": {"depth": str, "order": str, "layers": int},
    "length": {"num_virtual_tokens": int, "prefix_projection": bool},
    "reparam": {"prefix_projection": bool},
    "head": {"head": str},
}


@dataclass(frozen=True)
class LeftOut:
    """A folder, or a part of a run, that the report does not show."""

    folder: Path
    reason: str


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
        options: all options, flat.
        report: report.json.
        curve: the lines of metrics.jsonl that hold scores of the validation set.
        sweep: what its sweep compares ("depth", "length", ...), None for a run of its own.
        axes: this run's values of what the sweep varies.
        column: of the table.
    """

    folder: Path
    options: dict[str, Any]
    report: dict[str, Any]
    curve: tuple[dict[str, Any], ...]
    sweep: str | None
    axes: dict[str, Any]
    column: str

    @property
    def seed(self) -> Any:
        return self.options.get("seed")

    @cached_property
    def results(self) -> tuple["Result", ...]:
        """One for each task that the run was scored on."""
        report = self.report
        parts = report.get("tasks")
        if not parts:
            task = report["task"]
            metric = report.get("metric") or _metric(task)
            return (Result(self, task, metric, report["metrics"], self.options, "eval", ""),)
        options = {part.get("name"): part for part in self.options.get("tasks", ())}
        results = []
        for name, part in parts.items():
            scores = {
                key.removeprefix(f"{name}/"): value
                for key, value in report["metrics"].items()
                if key.startswith(f"{name}/")
            }
            own = Result(
                self, part["task"], part["metric"], scores, options.get(name, {}), f"eval_{name}",
                f"{name}/",
            )  # fmt: skip
            results.append(own)
        return tuple(results)


@dataclass(frozen=True, eq=False)
class Result:
    """What a run reached on one task.

    Attributes:
        metric: the one that selects, which tables show.
        scores: split -> metric -> value.
        data: options that name the data, among others.
        prefix: of the metrics in the curve.
        part: what stands before the splits in report.json.
    """

    run: Run
    task: str
    metric: str
    scores: dict[str, dict[str, float]]
    data: dict[str, Any]
    prefix: str
    part: str

    @property
    def model(self) -> str:
        return str(self.run.report["model"])

    def chance(self, split: str) -> float | None:
        """The score that is no better than a constant answer's; None where none is known.

        That is two standard errors above it, as if the score were a part of the examples.
        """
        constant = (self.run.report.get("baselines") or {}).get(self.part + split, {})
        count = (self.run.report.get("examples") or {}).get(self.part + split)
        value = constant.get(self.metric)
        if not (run_folder.is_number(value) and run_folder.is_number(count)) or not count:
            return None
        return value + 2 * math.sqrt(max(0.0, value * (1 - value)) / count)

    @property
    def splits(self) -> list[str]:
        """The splits that tables show: those of the test set, else those of the validation set."""
        for kind in ("test", "validation"):
            names = [name for name in self.scores if name.startswith(kind)]
            if names:
                return names
        return list(self.scores)


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[LeftOut]]:
    """The finished runs in folders and in the folders inside them, and what is no such run.

    Raises:
        ValueError: for a path that is no folder, and when there is no finished run at all.
    """
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    seen: set[str] = set()
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"runs: expected a folder, got {str(folder)!r}")
        before = len(seen)
        for candidate in _run_folders(folder):
            if os.path.realpath(candidate) in seen:
                continue
            seen.add(os.path.realpath(candidate))
            try:
                runs.append(_read_run(candidate, left_out))
            except ValueError as error:
                left_out.append(LeftOut(candidate, str(error)))
        if len(seen) == before and not any(
            os.path.realpath(f) in seen for f in _run_folders(folder)
        ):
            left_out.append(LeftOut(folder, "no run in it"))
    if not runs:
        reasons = "; ".join(f"{item.folder}: {item.reason}" for item in left_out)
        raise ValueError(f"runs: expected at least one finished run, got none ({reasons})")
    return runs, left_out


def _run_folders(top: Path) -> Iterator[Path]:
    marks = {run_folder.CONFIG, run_folder.REPORT, run_folder.METRICS}
    for path, inner, files in os.walk(top):
        if marks & set(files) and SWEEP not in files:
            inner.clear()  # adapter, model and checkpoints are no runs
            yield Path(path)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def _read_run(folder: Path, left_out: list[LeftOut]) -> Run:
    config = without_word(run_folder.read_json(folder / run_folder.CONFIG))
    if not (folder / run_folder.REPORT).is_file():
        raise ValueError("unfinished: there is no report.json")
    report = run_folder.read_report(folder)
    if not report["metrics"]:
        raise ValueError("not scored: neither a validation nor a test set was given")
    options: dict[str, Any] = {}
    for name, value in config.items():
        if name in SECTIONS and isinstance(value, dict):
            options |= value
        elif name != "found":
            options[name] = value
    if "tasks" in options:
        options.setdefault("mixed_batches", False)  # a version before the option did not mix
    _check_options(options)
    curve: tuple[dict[str, Any], ...] = ()
    sweep: str | None = None
    axes: dict[str, Any] = {}
    try:
        curve = _read_curve(folder / run_folder.METRICS)
    except ValueError as error:
        left_out.append(LeftOut(folder, f"only its learning curve: {error}"))
    try:
        sweep, axes = _read_sweep(folder)
    except ValueError as error:
        left_out.append(LeftOut(folder, f"only its place in a sweep: {error}"))
    column = _column(report)
    return Run(folder, options, report, curve, sweep, axes, column)


def _check_options(options: dict[str, Any]) -> None:
    tasks = options.get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(table, dict) for table in tasks):
        raise ValueError(f"config.json: expected a list of tables in 'tasks', got {tasks!r:.100}")
    for name, value in options.items():
        plain = value is None or isinstance(value, str) or run_folder.is_number(value)
        if name != "tasks" and not plain and not isinstance(value, list):
            raise ValueError(f"config.json: expected an option in {name!r}, got {value!r:.100}")
    seed = options.get("seed")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"config.json: expected an integer in 'seed', got {seed!r:.100}")


def _read_curve(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    return tuple(
        line
        for line in lines
        if isinstance(line, dict) and any(name.startswith("eval_") for name in line)
    )


def _read_sweep(folder: Path) -> tuple[str | None, dict[str, Any]]:
    path = folder.parent / SWEEP
    if not path.is_file():
        return None, {}
    content = run_folder.read_json(path)
    runs = content.get("runs")
    axes = runs.get(folder.name) if isinstance(runs, dict) else None
    if not isinstance(axes, dict):
        raise ValueError(f"{path}: expected the run {folder.name!r} under 'runs'")
    kind, needed = content.get("kind"), {}
    if isinstance(kind, str):
        needed = _AXES.get(kind, {})
    wrong = {name for name, types in needed.items() if type(axes.get(name)) is not types}
    if not isinstance(kind, str) or wrong:
        raise ValueError(f"{path}: expected kind and {list(needed)} of {folder.name!r}, got {axes}")
    return kind, axes


def _column(report: dict[str, Any]) -> str:
    method = str(report["method"])
    if method == "p-tuning-v2":
        if report.get("tasks"):
            return "Multi-task"
        if (report.get("started_from") or {}).get("trained_with"):
            return "MPT-2"
    return _COLUMN_OF.get(method, method)


def _metric(task: str) -> str:
    if task in BENCHMARKS:
        return BENCHMARKS[task].metrics[0]
    return make_task(DataOptions(task=task)).metric


def option_defaults() -> dict[str, Any]:
    """Every option's value where none is given."""
    return {
        name: field.default
        for part in SECTIONS.values()
        for name, field in part.__dataclass_fields__.items()  # type: ignore[attr-defined]
    }
