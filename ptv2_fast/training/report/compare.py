"""Runs brought together for the report: seeds as one setting, methods on the same data compared."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.training.options import NEUTRAL_OPTIONS
from ptv2_fast.training.report.data import COLUMNS, Result, Run, option_defaults
from ptv2_fast.training.statistic import Statistic

# What two runs may differ in and still be one setting: the seed, and what leaves no mark.
_NO_SETTING = NEUTRAL_OPTIONS | {"seed", "logging_steps", "save_steps"}
# What makes two runs' data different.
_DATA = (
    "data_dir", "train_file", "validation_file", "test_file", "dataset", "dataset_config",
    "train_split", "validation_split", "test_split", "max_train_examples", "max_eval_examples",
)  # fmt: skip
_COUNTS = {"max_train_examples": "training", "max_eval_examples": "validation"}


# Those options of a run, in words.
Data = frozenset[tuple[str, str]]
# What names a user's own data, the shortest first.
_SOURCES: tuple[Callable[[dict[str, str]], str], ...] = (
    lambda data: data.get("dataset", ""),
    lambda data: data.get("train_file", "").rpartition("/")[0],
    lambda data: data.get("train_file", ""),
)


@dataclass(frozen=True, eq=False)
class Setting:
    """Results that differ only in the seed."""

    results: tuple[Result, ...]

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def column(self) -> str:
        return self.first.run.column

    @property
    def options(self) -> dict[str, Any]:
        return self.first.run.options

    def score(self, split: str | None, metric: str | None = None) -> Statistic | None:
        """Of a split (None = the first that tables show), in 0..1."""
        split = split or self.first.splits[0]
        metric = metric or self.first.metric
        found = (result.scores.get(split, {}).get(metric) for result in self.results)
        return Statistic.of([value for value in found if value is not None])

    def cost(self, name: str) -> Statistic | None:
        """Of a figure of report.json such as train_seconds."""
        found = (result.run.report.get(name) for result in self.results)
        return Statistic.of([value for value in found if value is not None])

    @property
    def rank(self) -> tuple[int, float]:
        """Larger for the setting to show of several: more seeds, then validation score."""
        names = [name for name in self.first.scores if name.startswith("validation")]
        score = self.score(names[0] if names else None)
        mean = score.mean if score and math.isfinite(score.mean) else -math.inf
        return len(self.results), mean


def settings_of(runs: Iterable[Run]) -> list[Setting]:
    """The runs' results, those that differ only in the seed together."""
    groups: dict[str, list[Result]] = {}
    for run in runs:
        for result in run.results:
            options = {k: v for k, v in run.options.items() if k not in _NO_SETTING}
            key = (result.task, run.column, result.model, options)
            groups.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(result)
    return [Setting(tuple(_one_a_seed(results))) for results in groups.values()]


def _one_a_seed(results: list[Result]) -> list[Result]:
    """A run that was repeated with the same seed says nothing more about the spread."""
    by_seed: dict[Any, Result] = {}
    for result in results:
        by_seed.setdefault(result.run.seed, result)
    return list(by_seed.values())


@dataclass(frozen=True, eq=False)
class Comparison:
    """The methods on one data set with one model.

    Attributes:
        title, model: for the reader.
        settings: column -> the setting shown of it, in the order of COLUMNS.
        alternatives: column -> how many settings were run.
    """

    title: str
    model: str
    settings: dict[str, Setting]
    alternatives: dict[str, int]

    @property
    def any(self) -> Setting:
        return next(iter(self.settings.values()))

    @property
    def task(self) -> str:
        return self.any.first.task

    @property
    def metric(self) -> str:
        return self.any.first.metric

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(s for one in self.settings.values() for s in one.first.splits))

    def scores(self, split: str, metric: str | None = None) -> dict[str, Statistic]:
        """Column -> score, where there is one."""
        found = {name: one.score(split, metric) for name, one in self.settings.items()}
        return {name: score for name, score in found.items() if score is not None}

    def is_chance(self, name: str, split: str) -> bool:
        """Whether a method's score is no better than that of a constant answer."""
        score = self.settings[name].score(split) if name in self.settings else None
        known = [r.chance(split) for one in self.settings.values() for r in one.results]
        return score is not None and any(c is not None and score.mean <= c for c in known)

    def ratio(self, split: str, name: str = "PT-2") -> float | None:
        """A method's score as a part of fine-tuning's.

        None where one of the two is missing, or no better than a constant answer: such a part says
        nothing.
        """
        scores = self.scores(split)
        if name not in scores or "FT" not in scores or not scores["FT"].mean:
            return None
        if self.is_chance(name, split) or self.is_chance("FT", split):
            return None
        value = scores[name].mean / scores["FT"].mean
        return value if math.isfinite(value) else None


def compare(settings: Iterable[Setting], names: "Names") -> list[Comparison]:
    """One comparison for each data set and model, in the order in which they were found."""
    groups: dict[tuple[str, str], dict[str, list[Setting]]] = {}
    for setting in settings:
        key = (names.title(setting.first), names.model(setting.first))
        groups.setdefault(key, {}).setdefault(setting.column, []).append(setting)
    comparisons = []
    for (title, model), columns in groups.items():
        order = [*(c for c in COLUMNS if c in columns), *(c for c in columns if c not in COLUMNS)]
        shown = {name: max(columns[name], key=lambda one: one.rank) for name in order}
        counts = {name: len(columns[name]) for name in order}
        comparisons.append(Comparison(title, model, shown, counts))
    return comparisons


class Names:
    """Names of data sets and models that tell those of a report apart, and say no more.

    Two runs are on the same data when task, files and numbers of examples are the same;
    the folder of a published data set counts only where its task has several.

    Args:
        runs: all runs of the report.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        results = [result for run in runs for result in run.results]
        self._data = {result: _data_key(result) for result in results}
        same: dict[str, set[Data]] = {}
        for task, data in self._data.values():
            same.setdefault(task, set()).add(_without_count(data))
        self._titles = {key: _title(*key, same[key[0]]) for key in self._data.values()}
        self._models = model_labels(result.model for result in results)
        self.top = os.path.commonpath([run.folder.parent.absolute() for run in runs])

    def run(self, run: Run) -> str:
        """Of a run: its folder below the one that holds them all, `top`."""
        return str(run.folder.absolute().relative_to(self.top))

    def title(self, result: Result) -> str:
        """Of the data set."""
        return self._titles[self._data[result]]

    def model(self, result: Result) -> str:
        """Of the model."""
        return self._models[result.model]

    def titles(self, run: Run) -> str:
        """Of all data sets of a run."""
        return ", ".join(self.title(result) for result in run.results)


def _data_key(result: Result) -> tuple[str, Data]:
    defaults = option_defaults()
    given = set()
    for name in _DATA:
        value = result.data.get(name)
        if value is not None and value != defaults.get(name):
            given.add((name, _data_words(name, value)))
    return result.task, frozenset(given)


def _title(task: str, data: Data, same_task: set[Data]) -> str:
    """The name of a data set: of all that have the task, without the numbers of examples."""
    whole = _without_count(data)
    words = [text for _, text in sorted(data - whole)]
    if task in BENCHMARKS:
        folders = {pair for other in same_task for pair in other if pair[0] == "data_dir"}
        parts = whole - frozenset.intersection(*same_task)
        parts -= folders if len(folders) == 1 else set()
        words = [*(text for _, text in sorted(parts)), *words]
        title = BENCHMARKS[task].title
    else:
        title = _source(whole, same_task)
        words = [task, *words] if title else [*(text for _, text in sorted(whole)), *words]
        title = title or task
    return f"{title} ({', '.join(words)})" if words else title


def _source(data: Data, same_task: set[Data]) -> str:
    """The data set, folder or file that examples come from, if it is no other's; else nothing."""
    for source in _SOURCES:
        own = source(dict(data))
        if own and [source(dict(other)) for other in same_task].count(own) == 1:
            return own
    return ""


def _without_count(data: Data) -> Data:
    return frozenset(pair for pair in data if pair[0] not in _COUNTS)


def _data_words(name: str, value: Any) -> str:
    if name in _COUNTS:
        return f"{value} {_COUNTS[name]} examples"
    path = Path(str(value))
    if name == "data_dir":
        return path.name
    if name.endswith("_file") and path.parent.name:
        return f"{path.parent.name}/{path.name}"
    return path.name if name.endswith("_file") else str(value)


def model_labels(models: Iterable[str]) -> dict[str, str]:
    """Short names: the last part of a path, or more where that says little or is not unique."""
    models = list(dict.fromkeys(models))
    labels = {}
    for model in models:
        parts = [part for part in model.replace("\\", "/").split("/") if part] or [model]
        labels[model] = "/".join(parts[-2:]) if parts[-1] == "model" else parts[-1]
    repeated = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    return {model: model if label in repeated else label for model, label in labels.items()}
