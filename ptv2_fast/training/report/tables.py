"""A report's tables: frames of text and of `Markup`, whose index stands in front of the rows."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import pandas
from markupsafe import Markup

from ptv2_fast.training.finished_runs import COLUMNS, COUNTS, Result, Run
from ptv2_fast.training.report.compare import ABLATION, mark_best, percent
from ptv2_fast.training.report.figures import WORDS
from ptv2_fast.training.seeds import over_seeds

# (task, model) -> the published figures; as ptv2_fast.recipes.published.published.
Published = Callable[[str, str], Sequence[Any]]
NONE = "–"  # noqa: RUF001
_PAPER = ("FT", "PT", "PT-2", "MPT-2")  # its columns
# Units by the value from which on they are printed: (from, how much one is, name).
SHARES = ((0, 0.01, "%"),)
_TIMES = ((7200, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (0, 1e-3, "ms"))
_SIZES = ((1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e3, 1e3, "kB"), (0, 1, "B"))
_COSTS: dict[str, tuple[str, Any]] = {
    "Trained parameters": ("trainable_parameters", ()),
    "Part trained": ("part", SHARES),
    "Saved": ("saved_bytes", _SIZES),
    "A step": ("step_seconds", _TIMES),
    "Training": ("train_seconds", _TIMES),
    "Kept for backward": ("kept_bytes", _SIZES),
    "Peak memory": ("peak_memory_bytes", _SIZES),
}


def _cell(text: str, *details: str, best: bool = False) -> Markup:
    """Text, and smaller lines under it."""
    first = Markup("<b>{}</b>" if best else "{}").format(text)
    lines = [Markup("<small>{}</small>").format(line) for line in details if line]
    return Markup("<br>").join([first, *lines])


def score_cells(scores: pandas.DataFrame, more: Mapping[Any, str] | None = None) -> pandas.Series:
    """Mean, standard deviation and number of seeds, and more under them; the best in bold."""
    more = more or {}
    cells = {name: _cell(NONE, text) for name, text in more.items()}
    for row in scores.itertuples():
        spread = "" if pandas.isna(row.sd) else f"±{100 * row.sd:.1f}, n={row.n}"
        best = getattr(row, "best", False)
        cells[row.Index] = _cell(percent(row.mean), spread, more.get(row.Index, ""), best=best)
    return pandas.Series(cells, dtype=object).rename_axis(index=scores.index.names)


def score_table(scores: pandas.DataFrame) -> pandas.DataFrame:
    """The same by the last level of the index, in the order in which rows and columns come."""
    cells, columns = score_cells(scores), scores.index.unique("column")
    rows = scores.index.droplevel("column").unique()
    return cells.unstack("column").loc[rows, columns]


def scaled(value: float, units: Any) -> str:
    """A cost with three digits."""
    if pandas.isna(value):
        return NONE
    for start, size, unit in units:
        if value >= start:
            return f"{float(f'{value / size:.3g}'):g} {unit}"
    return f"{value:,.0f}"


def paper_table(
    main_scores: pandas.DataFrame, find: Published | None = None
) -> tuple[pandas.DataFrame, list[str]]:
    """The paper's table, a row for each model, data set and split; and notes."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    sources: dict[str, str] = {}
    for (model, title, split), scores in main_scores.groupby(
        ["model", "title", "split"], sort=False
    ):
        metric, result = scores["metric"].iloc[0], scores["result"].iloc[0]
        whole = all(result.data.get(name) is None for name in COUNTS)
        printed = {}
        for one in find(result.task, result.run.report["model"]) if find and whole else ():
            asked = (one.metric, one.split, one.head) == (metric, split, "linear")
            if asked and one.column not in printed:
                mark = "" if one.verified else "†"
                printed[one.column] = f"published {one.value:.1f}{mark}"
                sources[one.source] = sources.get(one.source, "") or mark
        row = rows[model, f"{title}: {scores['label'].iloc[0]}"] = dict.fromkeys(_PAPER)
        ratio, chance = (scores[name].reindex(["FT", "PT-2"]) for name in ("ratio", "chance"))
        words = "chance" if chance.notna().all() and chance.any() else NONE
        words = f"{percent(ratio['PT-2'])} %" if pandas.notna(ratio["PT-2"]) else words
        row |= {**score_cells(scores, printed), "PT-2 / FT": words}
    cells = pandas.DataFrame([*rows.values()], pandas.MultiIndex.from_tuples(rows), dtype=object)
    cells = cells[sorted(cells, key=lambda name: [*COLUMNS, name, "PT-2 / FT"].index(name))]
    notes = [f"Published: {', '.join(sorted(sources))} (Liu et al. 2022)."] if sources else []
    if any(sources.values()):
        notes.append("† could not be compared with the printed table.")
    return cells, notes


def cost_table(main_scores: pandas.DataFrame) -> pandas.DataFrame:
    """Score and cost of each method, by data set and model."""
    names = ["title", "model", "label", "column"]
    table = main_scores[main_scores["first_split"]].reset_index().set_index(names)
    cells = pandas.DataFrame({"Score": score_cells(table)})
    for title, (name, units) in _COSTS.items():
        cells[title] = [scaled(value, units) for value in table[name]]
    return cells


def ablation_table(ablations: pandas.DataFrame) -> pandas.DataFrame:
    """The comparisons of the reparameterisation of a prefix, and of heads."""
    rows = {}
    for (kind, _, title, label), own in ablations.groupby(ABLATION, sort=False):
        if axis := {"reparam": "prefix_projection", "head": "head"}.get(kind):
            own = mark_best(own.set_index(own[axis].map(WORDS)))
            rows[f"{title}: {label}"] = score_cells(own)
    return pandas.DataFrame(rows, dtype=object).T


def class_table(results: pandas.DataFrame) -> pandas.DataFrame:
    """F1 of each class, and how often it is right."""
    names = ["title", "model", "split", "class", "column"]
    rows = [
        (row.title, row.model, split, f"{name} ({values['support']:.0f})", row.column, values["f1"])
        for row in results.itertuples()
        for split in row.result.splits
        for name, values in (row.result.mistakes(split) or {}).get("classes", {}).items()
    ]
    return score_table(over_seeds(rows, names)) if rows else pandas.DataFrame()


def confusion_table(counts: Mapping[str, Mapping[str, int]]) -> pandas.DataFrame:
    """Right labels and, as columns, those given: of many those that are confused most."""
    table = pandas.DataFrame.from_dict(counts, orient="index")
    labels = table.index.union(table.columns, sort=False)
    table = table.reindex(index=labels, columns=labels).fillna(0).astype(int)
    confused = table.sum() + table.sum(axis=1) - 2 * numpy.diag(table)
    kept = labels[labels.isin(confused.nlargest(20).index)]
    return table.loc[kept, kept].map(lambda count: str(count or NONE))


def runs_table(runs: Sequence[Run], titles: Mapping[Result, str]) -> pandas.DataFrame:
    """Every run with its score and every option that is not the same in all of them."""
    options = [{name: text_of(value) for name, value in run.options.items()} for run in runs]
    cells = pandas.DataFrame(options, dtype=object)
    hidden = ("method", "task", "tasks", "seed")
    cells = cells[[n for n in cells if cells[n].nunique() > 1 and n not in hidden]]
    first = []
    for run in runs:
        pairs = [(one, split) for one in run.results for split in one.splits]
        scores = [f"{titles[one]} {split} {percent(one.score(split))}" for one, split in pairs]
        first.append((run.column, "; ".join(scores), run.seed))
    cells = pandas.DataFrame(first, columns=["Method", "Score", "Seed"]).join(cells)
    top = os.path.commonpath([run.folder.parent.absolute() for run in runs])
    names = [os.path.relpath(run.folder, top) for run in runs]
    link = Markup('<a href="#run-{}">{}</a>')
    links = [link.format(number, name) for number, name in enumerate(names, 1)]
    return cells.set_axis(pandas.Index(links, dtype=object))


def machines_table(runs: Sequence[Run]) -> pandas.DataFrame:
    """The machines and versions that runs used, and how many runs used them."""
    parts = [[run.report.get(name) or {} for name in ("machine", "versions")] for run in runs]
    rows = [{"processor": None, **machine, **versions} for machine, versions in parts]
    table = pandas.DataFrame(rows, dtype=object).map(text_of)
    return table.value_counts(sort=False).rename("runs").reset_index().set_index("runs")


def data_notes_table(runs: Sequence[Run], titles: Mapping[Result, str]) -> pandas.DataFrame:
    """What was odd in the data but accepted, and how many examples were cut; each said once."""
    rows = [
        (", ".join(titles[result] for result in run.results), split, f"{note}: {text_of(value)}")
        for run in runs
        for split, note, value in run.data_notes()
    ]
    table = pandas.DataFrame(rows, columns=["data set", "split", "remark"])
    return table.value_counts(sort=False).rename("runs").reset_index().set_index("data set")


def text_of(value: Any) -> str:
    """A value of a JSON file for a reader."""
    if value is None or value != value:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
