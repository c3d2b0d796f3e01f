"""The tables of a report as text, ready for the template."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.training.report.compare import Comparison, Setting
from ptv2_fast.training.report.data import COLUMNS
from ptv2_fast.training.statistic import Statistic

# (task, model) -> the published figures; as ptv2_fast.recipes.published.published.
Published = Callable[[str, str], Sequence[Any]]

NONE = "–"  # noqa: RUF001
CHANCE = "chance"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        detail: smaller, after the text.
        reference: on a line of its own, as a published figure.
        best: set in bold.
        link: a place in the page, as "#run-1".
    """

    text: str
    detail: str = ""
    reference: str = ""
    best: bool = False
    link: str = ""


@dataclass(frozen=True)
class Row:
    """A row; those of the same group that follow each other stand under its name."""

    head: Cell
    cells: tuple[Cell, ...]
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table: `columns` maps each title to what it means, or to nothing."""

    caption: str
    corner: str
    columns: dict[str, str]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())
    numeric: bool = True

    def groups(self) -> list[tuple[str, list[Row]]]:
        """The rows, those of the same group together."""
        return [(name, list(rows)) for name, rows in itertools.groupby(self.rows, _group_of)]

    def meanings(self) -> list[tuple[str, str]]:
        """The columns whose title needs words, with those words."""
        pairs = self.columns.items()
        return [(title, text) for title, text in pairs if text and text != title]


def _group_of(row: Row) -> str:
    return row.group


def percent(score: float) -> str:
    """0.8812 -> 88.1, as tables print scores."""
    return f"{100 * score:.1f}" if math.isfinite(score) else "not a number"


def score_cell(score: Statistic | None, best: bool = False, reference: str = "") -> Cell:
    """Mean, standard deviation and number of seeds."""
    if score is None:
        return Cell(NONE, reference=reference)
    detail = f"±{100 * score.deviation:.1f}, n={score.count}" if score.deviation is not None else ""
    return Cell(percent(score.mean), detail, reference, best)


def best_columns(scores: dict[str, Statistic]) -> set[str]:
    """The columns whose score is printed as the highest one; none where there is no other."""
    means = {name: percent(s.mean) for name, s in scores.items() if math.isfinite(s.mean)}
    if len(means) < 2:
        return set()
    best = percent(max(scores[name].mean for name in means))
    return {name for name, text in means.items() if text == best}


def metric_name(metric: str) -> str:
    """exact_match -> exact match; f1 -> F1."""
    words = metric.replace("_", " ")
    return words.upper() if len(words) <= 3 and words[-1:].isdigit() else words


def paper_table(
    model: str, comparisons: Sequence[Comparison], published: Published | None = None
) -> Table:
    """The table in the paper's form for one model: a row for each data set and split."""
    names = [n for n in COLUMNS if n in ("FT", "PT", "PT-2", "MPT-2")]
    used = [name for one in comparisons for name in one.settings]
    names += [n for n in dict.fromkeys((*COLUMNS, *used)) if n in used and n not in names]
    sources: dict[str, bool] = {}
    rows = []
    for one in comparisons:
        for split in one.splits:
            scores = one.scores(split)
            best = best_columns(scores)
            printed = _printed(one, split, published, sources)
            cells = [score_cell(scores.get(n), n in best, printed.get(n, "")) for n in names]
            head = Cell(one.title, f"{split}, {metric_name(one.metric)}")
            rows.append(Row(head, (*cells, Cell(ratio(one, split)))))
    columns = {name: COLUMNS.get(name, name) for name in names}
    columns["PT-2 / FT"] = "P-Tuning v2 as a part of fine-tuning"
    caption = f"{model}: scores in per cent"
    notes = _source_notes(sources)
    if any(row.cells[-1].text == CHANCE for row in rows):
        notes = (*notes, f"{CHANCE}: one of the two is no better than a constant answer.")
    return Table(caption, "Data set", columns, tuple(rows), notes)


def _source_notes(sources: dict[str, bool]) -> tuple[str, ...]:
    if not sources:
        return ()
    note = f"Published figures: {', '.join(sorted(sources))} (P-Tuning v2, Liu et al. 2022)."
    mark = "† This published figure could not be compared with the printed table."
    return (note, mark) if any(sources.values()) else (note,)


def ratio(one: Comparison, split: str) -> str:
    """P-Tuning v2's score as a part of fine-tuning's, in words."""
    value = one.ratio(split)
    if value is not None:
        return f"{100 * value:.1f} %"
    chance = {"FT", "PT-2"} <= set(one.scores(split)) and (
        one.is_chance("FT", split) or one.is_chance("PT-2", split)
    )
    return CHANCE if chance else NONE


def _printed(
    one: Comparison, split: str, published: Published | None, sources: dict[str, bool]
) -> dict[str, str]:
    """Column -> the published figure; adds its source, and whether any of it is unverified."""
    data = one.any.first.data
    part_of_it = any(data.get(f"max_{part}_examples") is not None for part in ("train", "eval"))
    if published is None or one.task not in BENCHMARKS or part_of_it:
        return {}
    found: dict[str, str] = {}
    for figure in published(one.task, one.any.first.model):
        asked = (figure.metric, figure.split) == (one.metric, split)
        if not asked or figure.head != "linear" or figure.column in found:
            continue
        mark = "" if figure.verified else "†"
        found[figure.column] = f"published {figure.value:.1f}{mark}"
        sources[figure.source] = sources.get(figure.source, False) or not figure.verified
    return found


def metrics_table(comparisons: Iterable[Comparison]) -> Table:
    """Every metric on every split."""
    comparisons = list(comparisons)
    used = {name for one in comparisons for name in one.settings}
    names = [*(n for n in COLUMNS if n in used), *sorted(used - set(COLUMNS))]
    rows = []
    for one in comparisons:
        results = [result for s in one.settings.values() for result in s.results]
        pairs = dict.fromkeys(
            (split, metric)
            for result in results
            for split, values in result.scores.items()
            for metric in values
        )
        for split, metric in pairs:
            scores = one.scores(split, metric)
            cells = tuple(score_cell(scores.get(name)) for name in names)
            rows.append(Row(Cell(f"{split}, {metric_name(metric)}"), cells, _group(one)))
    columns = {name: COLUMNS.get(name, name) for name in names}
    return Table("Every metric on every split, times 100", "Split, metric", columns, tuple(rows))


def _group(one: Comparison) -> str:
    return f"{one.title}, {one.model}"


_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "trainable_parameters": ("Trained parameters", lambda value: f"{value:,.0f}"),
    "part": ("Part trained", lambda value: share(value)),
    "saved_bytes": ("Saved", lambda value: size(value)),
    "step_seconds": ("A step", lambda value: seconds(value)),
    "train_seconds": ("Training", lambda value: seconds(value)),
    "kept_bytes": ("Kept for backward", lambda value: size(value)),
    "peak_memory_bytes": ("Peak memory", lambda value: size(value)),
}
_COST_MEANINGS = {
    "part": "trained parameters among those of the model",
    "saved_bytes": "size of what is stored for the task",
    "step_seconds": "median seconds of a training step",
    "train_seconds": "seconds of all training steps, scoring and saving not counted",
    "kept_bytes": "bytes that autograd keeps from forward to backward pass in a step",
    "peak_memory_bytes": "of the accelerator, or of the process on a CPU",
}


def cost_table(comparisons: Iterable[Comparison]) -> Table:
    """Score and cost of each method, by data set and model."""
    rows = []
    for one in comparisons:
        split = one.splits[0]
        scores = one.scores(split)
        best = best_columns(scores)
        for name, setting in one.settings.items():
            score = scores.get(name)
            cells = [Cell(percent(score.mean) if score else NONE, best=name in best)]
            for cost, (_, form) in _COSTS.items():
                value = cost_of(setting, cost)
                cells.append(Cell(NONE if value is None else form(value)))
            group = f"{_group(one)}: {metric_name(one.metric)} on {split}"
            rows.append(Row(Cell(name), tuple(cells), group))
    columns = {"Score": ""} | {title: _COST_MEANINGS.get(n, "") for n, (title, _) in _COSTS.items()}
    return Table("Scores beside what they cost; means over seeds", "Method", columns, tuple(rows))


def cost_of(setting: Setting, name: str) -> float | None:
    """A mean of report.json; `part` is trained parameters among all."""
    if name == "part":
        trained, total = setting.cost("trainable_parameters"), setting.cost("total_parameters")
        return trained.mean / total.mean if trained and total and total.mean else None
    cost = setting.cost(name)
    return None if cost is None else cost.mean


def share(part: float) -> str:
    """A part in per cent, with two digits at least."""
    value = 100 * part
    return f"{value:.1f} %" if value >= 10 else f"{value:.2g} %"


def size(value: float) -> str:
    """Bytes as kB, MB or GB (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{1 if value < 100 * scale else 0}f} {unit}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """12 ms, 3.4 s, 12 min, 2.5 h."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def pair_table(
    kind: str, groups: dict[str, list[tuple[str, Statistic]]], caption: str, corner: str
) -> Table:
    """Two or more ways to do the same, one column each."""
    names = list(dict.fromkeys(name for pairs in groups.values() for name, _ in pairs))
    rows = []
    for title, pairs in groups.items():
        scores = dict(pairs)
        best = best_columns(scores)
        rows.append(Row(Cell(title), tuple(score_cell(scores.get(n), n in best) for n in names)))
    return Table(caption, corner, dict.fromkeys(names, ""), tuple(rows))
