"""The finished runs in folders: for the report, model cards and tables of experiments."""

import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ptv2_fast.files import without_word
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.tasks.comparison import ERROR, FIGURES
from ptv2_fast.training import run_folder
from ptv2_fast.training.multitask.config import MultiTaskConfig
from ptv2_fast.training.options import RunConfig, defaults, options_of_run
from ptv2_fast.training.sweeps.plan import SWEEP, VARIED

# The paper's columns first; then the other baselines.
COLUMNS = {
    "FT": "fine-tuning",
    "PT": "prompt tuning (Lester et al. 2021)",
    "PT-2": "P-Tuning v2",
    "MPT-2": "P-Tuning v2 from a multi-task prefix",
    "Multi-task": "P-Tuning v2 of several tasks with one prefix",
    "LP": "linear probe",
    "P-tuning": "P-tuning v1 (Liu et al. 2021)",
    "LoRA": "LoRA (Hu et al. 2022)",
}
_COLUMN_OF = {
    "fine-tuning": "FT", "prompt-tuning": "PT", "p-tuning-v2": "PT-2", "linear-probe": "LP",
    "p-tuning-v1": "P-tuning", "lora": "LoRA",
}  # fmt: skip
COUNTS = {"max_train_examples": "training", "max_eval_examples": "validation"}
# What makes two runs' data different; own data is named by the first.
_DATA = (
    "dataset", "train_file", "data_dir", "dataset_config", "validation_file", "test_file",
    "train_split", "validation_split", "test_split", *COUNTS,
)  # fmt: skip


class LeftOut(NamedTuple):
    """A folder, or a part of a run, that cannot be shown."""

    folder: Path
    reason: str


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
        options: all options, flat; of a run of several tasks with their tables under `tasks`.
        report: report.json.
        curve: the lines of metrics.jsonl that hold scores of the validation set.
        mistakes: of mistakes.json, by split; empty where the version of the run kept none.
        ablation: of a run in one, its kind and the options that vary there, with this run's values;
            of depth also `layers`, how many have a prefix, and their `order`; else None.
    """

    folder: Path
    options: dict[str, Any]
    report: dict[str, Any]
    curve: list[dict[str, Any]]
    mistakes: dict[str, dict[str, Any]]
    ablation: tuple[str, dict[str, Any]] | None

    @property
    def seed(self) -> int:
        return self.options["seed"]

    @property
    def column(self) -> str:
        """Of the report's tables."""
        method = self.report["method"]
        if method == "p-tuning-v2" and self.report.get("tasks"):
            return "Multi-task"
        if method == "p-tuning-v2" and (self.report.get("started_from") or {}).get("trained_with"):
            return "MPT-2"
        return _COLUMN_OF.get(method, method)

    @cached_property
    def results(self) -> list["Result"]:
        """One for each task that the run was scored on, by the metric that selects."""
        parts = self.report.get("tasks") or {"": self.report}
        options = {table["name"]: table for table in self.options.get("tasks", ())}
        options = options or {"": self.options}
        results = []
        for name, part in parts.items():
            prefix = f"{name}/" if name else ""
            scores = {
                split.removeprefix(prefix): values
                for split, values in self.report["metrics"].items()
                if split.startswith(prefix)
            }
            metric = part.get("metric") or make_task(DataOptions(task=part["task"])).metric
            data = options.get(name, {})
            results.append(Result(self, name, part["task"], metric, scores, data))
        return [result for result in results if result.splits]

    def changed_options(self) -> dict[str, Any]:
        """The options that are not the defaults."""
        known = defaults()
        return {name: v for name, v in self.options.items() if v != known.get(name, math.nan)}

    def data_notes(self) -> Iterator[tuple[str, str, Any]]:
        """Split, what was odd in the data or done to them, and more of it."""
        examples = self.report.get("examples") or {}
        for split, count in (self.report.get("truncated_examples") or {}).items():
            if count:
                yield split, "cut to fit the model", f"{count} of {examples.get(split)} examples"
        for split, total in (self.report.get("drawn_from") or {}).items():
            yield split, "drawn by the seed", f"{examples.get(split)} of {total} examples"
        for split, notes in (self.report.get("remarks") or {}).items():
            yield from ((split, note, value) for note, value in notes.items())

    def command(self) -> str:
        """What repeats the run."""
        given = {"method": self.options["method"]} | self.changed_options()
        several = "tasks" in given
        words = ["ptv2-fast", "multitask" if several else "train"]
        words += ["--output", f"{self.folder}-again"]
        more = ["--config", str(self.folder / run_folder.CONFIG)] if several else flags(given)
        return shlex.join([*words, *more])


@dataclass(frozen=True, eq=False)
class Result:
    """What a run reached on one task.

    Attributes:
        name: of the task in a run of several, else "".
        metric: the one that selects, which tables show.
        scores: split -> metric -> value.
        data: options that name the data, among others.
    """

    run: Run
    name: str
    task: str
    metric: str
    scores: dict[str, dict[str, float]]
    data: dict[str, Any]

    @property
    def model(self) -> str:
        return self.run.report["model"]

    @property
    def splits(self) -> list[str]:
        """The splits that tables show: those of the test set, else those of the validation set."""
        scored = [name for name, values in self.scores.items() if self.metric in values]
        kinds = [[n for n in scored if n.startswith(kind)] for kind in ("test", "validation")]
        return next(filter(None, kinds), scored)

    def score(self, split: str) -> float:
        """By the metric that selects; NaN where there is none."""
        return self.scores.get(split, {}).get(self.metric, math.nan)

    @property
    def validation(self) -> float:
        """The score by which settings are chosen."""
        return self.score(next((n for n in self.scores if n.startswith("validation")), ""))

    def mistakes(self, split: str) -> dict[str, Any] | None:
        """What `tasks.comparison.mistakes` found; None where nothing was kept."""
        return self._of(split, self.run.mistakes)

    def _of(self, split: str, table: dict[str, Any] | None) -> Any:
        """The part of a table of the run that is of a split."""
        return (table or {}).get(f"{self.name}/{split}" if self.name else split)

    def chance(self, split: str) -> float | None:
        """The score that is no better than a constant answer's; None where none is known.

        That is two standard errors above it, as if the score were a part of the examples.
        """
        value: Any = (self._of(split, self.run.report.get("baselines")) or {}).get(self.metric)
        count: Any = self._of(split, self.run.report.get("examples"))
        if not (run_folder.is_number(value) and run_folder.is_number(count)) or not count:
            return None
        return value + 2 * math.sqrt(max(0.0, value * (1 - value)) / count)


def flags(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line, but for those that are None."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[LeftOut]]:
    """The finished runs in folders and in the folders inside them, and what is no such run.

    Raises:
        ValueError: for a path that is no folder, and when there is no finished run at all.
    """
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    seen: set[str] = set()
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"runs: expected a folder, got {str(folder)!r}")
        candidates = {os.path.realpath(path): path for path in _run_folders(folder)}
        if not candidates:
            left_out.append(LeftOut(folder, "no run in it"))
        for path in [path for place, path in candidates.items() if place not in seen]:
            try:
                runs.append(_read_run(path, left_out))
            except ValueError as error:
                left_out.append(LeftOut(path, str(error)))
        seen |= candidates.keys()
    if not runs:
        reasons = "; ".join(f"{item.folder}: {item.reason}" for item in left_out)
        raise ValueError(f"runs: expected at least one finished run, got none ({reasons})")
    return runs, left_out


def data_titles(runs: Iterable[Run]) -> dict[Result, str]:
    """Names of data sets that tell those of some runs apart, and say no more.

    Two results are on the same data when task, files and numbers of examples are the same; the
    folder of a published data set counts only where its task has several.
    """
    described = {result: _describe_data(result.data) for run in runs for result in run.results}
    titles = {}
    for result, own in described.items():
        title, words, named = result.task, [], ""
        if result.task in BENCHMARKS:
            title = BENCHMARKS[result.task].title
        elif own:
            named = next(iter(own))
            title, words = own[named], [result.task]
        for name in own:
            values = {other.get(name) for r, other in described.items() if r.task == result.task}
            values -= {None} if name == "data_dir" else set()
            if name in COUNTS or (len(values) > 1 and name != named):
                words.append(own[name])
        titles[result] = f"{title} ({', '.join(words)})" if words else title
    return titles


def _describe_data(data: dict[str, Any]) -> dict[str, str]:
    """The options that name data, in words."""
    known = defaults()
    words = {}
    for name in _DATA:
        value = data.get(name)
        if value in (None, known[name]):
            continue
        words[name] = str(value)
        if name in COUNTS:
            words[name] = f"{value} {COUNTS[name]} examples"
        elif name == "data_dir":
            words[name] = Path(value).name
        elif name.endswith("_file"):
            words[name] = "/".join(Path(value).parts[-2:])
    return words


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """The ends of paths, of as few parts as tell them apart; "model" says too little."""
    parts = {path: path.replace("\\", "/").strip("/").split("/") for path in paths}
    for count in range(1, max(map(len, parts.values())) + 1):
        names = {path: "/".join(words[-count:]) for path, words in parts.items()}
        if len({*names.values()}) == len(names) and "model" not in names.values():
            return names
    return {path: path for path in parts}


def _run_folders(top: Path) -> Iterator[Path]:
    marks = {run_folder.CONFIG, run_folder.REPORT, run_folder.METRICS}
    for path, inner, files in os.walk(top):
        if marks & set(files) and SWEEP not in files:
            inner.clear()  # adapter, model and checkpoints are no runs
            yield Path(path)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def _read_run(folder: Path, left_out: list[LeftOut]) -> Run:
    config = run_folder.read_json(folder / run_folder.CONFIG)
    if not (folder / run_folder.REPORT).is_file():
        raise ValueError("unfinished: there is no report.json")
    report, options = run_folder.read_report(folder), _options(config)
    parts: dict[str, Any] = {}
    for name, (what, read, nothing) in _PARTS.items():
        try:
            parts[name] = read(folder)
        except ValueError as error:
            parts[name] = nothing
            left_out.append(LeftOut(folder, f"only its {what}: {error}"))
    run = Run(folder, options, report, **parts)
    if not run.results:
        raise ValueError("not scored: neither a validation nor a test set was given")
    return run


def _options(config: dict[str, Any]) -> dict[str, Any]:
    values = options_of_run(without_word(config))
    if "tasks" not in values:
        return RunConfig.from_dict(values).flat()
    tables = MultiTaskConfig.from_dict(values).to_dict()
    return {**tables.pop("model"), **tables.pop("training"), **tables}


def _read_curve(folder: Path) -> list[dict[str, Any]]:
    path = folder / run_folder.METRICS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    lines = [line for line in lines if isinstance(line, dict)]
    return [line for line in lines if any(name.startswith("eval_") for name in line)]


def _read_mistakes(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / run_folder.MISTAKES
    content = run_folder.read_json(path) if path.is_file() else {}
    for split, mistakes in content.items():
        try:
            good = type(mistakes["wrong"]) is int
            for counts in mistakes["confusion"].values():
                good = good and all(type(count) is int for count in counts.values())
            for label in mistakes["classes"].values():
                good = good and all(run_folder.is_number(label[name]) for name in FIGURES)
            for error in mistakes["errors"]:
                good = good and all(isinstance(error[name], str) for name in ERROR)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name}: not readable of {split!r} ({error!r})") from error
        if not good:
            raise ValueError(f"{path.name}: expected text and numbers of {split!r}")
    return content


def _read_ablation(folder: Path) -> tuple[str, dict[str, Any]] | None:
    path = folder.parent / SWEEP
    if not path.is_file():
        return None
    content = run_folder.read_json(path)
    kind, runs = content.get("kind"), content.get("runs")
    runs = runs if isinstance(runs, dict) else {}
    changes = runs.get(folder.name)
    if not isinstance(kind, str) or not isinstance(changes, dict):
        raise ValueError(f"{path}: expected its kind, and {folder.name!r} under 'runs'")
    if kind not in VARIED:
        return None
    values = {name: changes.get(name) for name in VARIED[kind]}
    if any(type(values[name]) is not types for name, types in VARIED[kind].items()):
        raise ValueError(f"{path}: expected {[*values]} of {folder.name!r}, got {changes!r:.100}")
    if kind == "depth":
        try:
            depths = {name: [*map(int, run["depth"].split("-"))] for name, run in runs.items()}
            first, last = depths[folder.name]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected depths such as 1-4, got {runs!r:.100}") from error
        is_all = first == 1 and last == max(map(max, depths.values()))
        values["order"] = "all" if is_all else "ascending" if first == 1 else "descending"
        values["layers"] = last - first + 1
    return kind, values


# By attribute of a run: what it is, how it is read, and what stands for it where it cannot be.
_PARTS: dict[str, tuple[str, Callable[[Path], Any], Any]] = {
    "curve": ("learning curve", _read_curve, []),
    "mistakes": ("mistakes", _read_mistakes, {}),
    "ablation": ("place in a sweep", _read_ablation, None),
}
